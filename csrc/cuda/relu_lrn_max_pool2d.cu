// ReLU, local response normalisation across channels and max pooling in one kernel, forward and backward.
//
// A block of the forward pass owns a rectangle of pooled pixels and a few channels. The values that it pools (or, when
// pooling comes first, that it normalises) live in shared memory in float and never reach global memory; neighbouring
// blocks compute the border that they share twice. The backward pass has nothing but x and one byte per pooled element,
// and recomputes the rest: each thread gathers the gradients of its pixel and differentiates the normalisation there.
#include "lrn.h"
#include "pool.h"

namespace alexnet_cuda {
namespace {

GPU_DEVICE float relu_gradient(float v, float g) {
  return v <= 0 ? 0.f : g;
}

// ---- forward, normalisation before pooling -------------------------------------------------------------------------

struct Rectangles {
  int64_t first_image;
  int first_chunk;
  int rows, columns;                     // pooled rows and columns of a rectangle
  int tiles, tiles_per_row;              // rectangles of one image
  int group_channels, channels, chunks;  // channels per block, a multiple of kRun; blocks per group
};

template <class T, bool kChannelsLast, bool kAlexNet>
__global__ void __launch_bounds__(kThreads, kBlocks)
    lrn_pool_kernel(View<const T, kChannelsLast> x, View<T, kChannelsLast> y, uint8_t* code, Rectangles r, LrnArgs lrn,
                    PoolArgs pool, bool relu_first) {
  const gpu::shared<float> normalised = gpu::dynamic_shared<float>();
  const int64_t n = r.first_image + blockIdx.x / r.tiles;
  const uint32_t chunk = r.first_chunk + blockIdx.y;
  const int tile = blockIdx.x % r.tiles, group = chunk / r.chunks;
  const int low = group * r.group_channels, high = low + r.group_channels;
  const int begin = low + (chunk - group * r.chunks) * r.channels, end = min(high, begin + r.channels);
  const int oy0 = tile / r.tiles_per_row * r.rows, oy1 = min(oy0 + r.rows, pool.out_height);
  const int ox0 = tile % r.tiles_per_row * r.columns, ox1 = min(ox0 + r.columns, pool.out_width);

  // The part of the image under these windows.
  const int iy0 = max(0, oy0 * pool.stride - pool.padding), ix0 = max(0, ox0 * pool.stride - pool.padding);
  const int iy1 = min(pool.height, (oy1 - 1) * pool.stride - pool.padding + pool.kernel_size);
  const int width = min(pool.width, (ox1 - 1) * pool.stride - pool.padding + pool.kernel_size) - ix0;
  const int pixels = (iy1 - iy0) * width, runs = r.channels / kRun;
  const auto slot = [&](int pixel, int c) { return kChannelsLast ? pixel * r.channels + c : c * pixels + pixel; };

  for (int i = threadIdx.x; i < pixels * runs; i += kThreads) {
    const int local = kChannelsLast ? i / runs : i % pixels, run = (kChannelsLast ? i % runs : i / pixels) * kRun;
    const int pixel = (iy0 + local / width) * pool.width + ix0 + local % width, c = begin + run;
    if constexpr (kAlexNet) {
      float in[16], out[kRun];
      read_run<2, 14, kChannelsLast>(x, n, pixel, c, low, high, in);
#pragma unroll
      for (int j = 2; j < 14; ++j) in[j] = relu_first ? relu(in[j]) : in[j];
      normalise_run(in, lrn, out);
      if constexpr (kChannelsLast) {  // 16 bytes at a time: lanes are 32 bytes apart
        gpu::store4(normalised + slot(local, run), gpu::Quad<float>{out[0], out[1], out[2], out[3]});
        gpu::store4(normalised + slot(local, run + 4), gpu::Quad<float>{out[4], out[5], out[6], out[7]});
      } else {
#pragma unroll
        for (int j = 0; j < kRun; ++j) normalised[slot(local, run + j)] = out[j];
      }
    } else {
      const auto value = [&](int j) {
        const float v = gpu::to_float(x.at(n, pixel, j));
        return relu_first ? relu(v) : v;
      };
      for (int j = c; j < min(c + kRun, high); ++j)
        normalised[slot(local, j - begin)] =
            value(j) * inverse_power<false>(denominator(lrn, j, low, high, value), lrn.beta);
    }
  }
  __syncthreads();

  const int columns = ox1 - ox0, outputs = (oy1 - oy0) * columns, channels = end - begin;
  for (int i = threadIdx.x; i < outputs * channels; i += kThreads) {
    const int local = kChannelsLast ? i / channels : i % outputs, c = kChannelsLast ? i % channels : i / outputs;
    const int oy = oy0 + local / columns, ox = ox0 + local % columns;
    Maximum best;
    for_each_in_window(pool, oy, ox, [&](int position, int iy, int ix) {
      best.offer(normalised[slot((iy - iy0) * width + ix - ix0, c)], position);
    });
    const int64_t out = n * y.channels * y.plane + y.offset(oy * pool.out_width + ox, begin + c);
    y.data[out] = gpu::from_float<T>(relu_first ? best.value : relu(best.value));
    if (code) code[out] = static_cast<uint8_t>(best.code);
  }
}

// ---- forward, pooling before normalisation -------------------------------------------------------------------------

template <class T, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, kBlocks)
    pool_lrn_kernel(View<const T, kChannelsLast> x, View<T, kChannelsLast> y, uint8_t* code, Tile tile, LrnArgs lrn,
                    PoolArgs pool) {
  const gpu::shared<float> pooled = gpu::dynamic_shared<float>();
  const int begin = tile.begin(), end = tile.end(), low = tile.low(), high = low + tile.group_channels;
  tile.for_each<kChannelsLast>(tile.channels + lrn.front + lrn.back, [&](int row, int slot, int64_t n, int pixel) {
    const int c = begin - lrn.front + row;
    if (c < low || c >= high) {
      pooled[slot] = 0.f;
      return;
    }
    Maximum best;
    const T* image = x.image(n);
    for_each_in_window(pool, pixel / pool.out_width, pixel % pool.out_width, [&](int position, int iy, int ix) {
      best.offer(relu(gpu::to_float(image[x.offset(iy * pool.width + ix, c)])), position);
    });
    pooled[slot] = best.value;
    if (code && c >= begin && c < end)
      code[n * y.channels * y.plane + y.offset(pixel, c)] = static_cast<uint8_t>(best.code);
  });
  __syncthreads();
  tile.for_each<kChannelsLast>(end - begin, [&](int row, int slot, int64_t n, int pixel) {
    float sum = 0;
    for (int j = 0; j <= lrn.front + lrn.back; ++j) {
      const float v = pooled[slot + j * tile.pixels];
      sum = fmaf(v, v, sum);
    }
    const float v = pooled[slot + lrn.front * tile.pixels];
    y.at(n, pixel, begin + row) = gpu::from_float<T>(v * inverse_power<false>(fmaf(lrn.alpha, sum, lrn.k), lrn.beta));
  });
}

// ---- backward, normalisation before pooling ------------------------------------------------------------------------
// The plain backward kernels, but the gradient is gathered.

template <class T, bool kLast, bool kAlexNet>
struct LrnPoolBackward {
  static constexpr bool kChannelsLast = kLast, kQuads = kLast && kAlexNet;
  View<const T, kLast> x, grad;
  View<T, kLast> dx;
  const uint8_t* code;
  PoolArgs pool;
  bool relu_first;  // otherwise last: then a pooled value, and with it the x it came from, must be positive

  GPU_DEVICE float seen(float v) const { return relu_first ? relu(v) : v; }
  GPU_DEVICE void read_x(int64_t n, int pixel, int c, int low, int high, float (&v)[16]) const {
    read_run<0, 16, kQuads>(x, n, pixel, c, low, high, v);
#pragma unroll
    for (int i = 0; i < 16; ++i) v[i] = seen(v[i]);
  }
  GPU_DEVICE void read_grad(int64_t n, int pixel, int c, int low, int high, const float (&in)[16],
                            float (&v)[16]) const {
    gather_run<2, 14, kQuads>(grad, code, pool, n, pixel, c, low, high, v);
#pragma unroll
    for (int i = 2; i < 14; ++i) v[i] = relu_first ? v[i] : relu_gradient(in[i], v[i]);
  }
  GPU_DEVICE float x_at(int64_t n, int pixel, int c) const { return seen(gpu::to_float(x.at(n, pixel, c))); }
  GPU_DEVICE float grad_at(int64_t n, int pixel, int c, float in) const {
    const float g = gather(grad, code, pool, n, pixel, c);
    return relu_first ? g : relu_gradient(in, g);
  }
  GPU_DEVICE float finish(float in, float dx) const { return relu_first ? relu_gradient(in, dx) : dx; }
};

// ---- backward, pooling before normalisation ------------------------------------------------------------------------
// First the gradient of the pooled values, which are found in x through their codes, as floats in the workspace (a
// quarter of x's elements); then pooling's and ReLU's.

template <class T, bool kLast>
struct PoolLrnBackward {
  static constexpr bool kChannelsLast = kLast, kQuads = false;
  View<const T, kLast> x, grad;
  View<float, kLast> dx;  // of the pooled values
  const uint8_t* code;
  PoolArgs pool;

  GPU_DEVICE float x_at(int64_t n, int pixel, int c) const {
    const int where = code[n * grad.channels * grad.plane + grad.offset(pixel, c)];
    const int iy = pixel / pool.out_width * pool.stride - pool.padding + where / pool.kernel_size;
    const int ix = pixel % pool.out_width * pool.stride - pool.padding + where % pool.kernel_size;
    return relu(gpu::to_float(x.at(n, iy * pool.width + ix, c)));
  }
  GPU_DEVICE float grad_at(int64_t n, int pixel, int c, float) const { return gpu::to_float(grad.at(n, pixel, c)); }
  GPU_DEVICE void read_x(int64_t n, int pixel, int c, int low, int high, float (&v)[16]) const {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int channel = c - kHalo + i;
      v[i] = channel >= low && channel < high ? x_at(n, pixel, channel) : 0.f;
    }
  }
  GPU_DEVICE void read_grad(int64_t n, int pixel, int c, int low, int high, const float (&)[16], float (&v)[16]) const {
    read_run<2, 14, false>(grad, n, pixel, c, low, high, v);
  }
  GPU_DEVICE float finish(float, float dx) const { return dx; }
};

template <class T, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, kBlocks)
    relu_pool_backward_kernel(View<const T, kChannelsLast> x, View<const float, kChannelsLast> grad,
                              const uint8_t* code, View<T, kChannelsLast> dx, Runs runs, PoolArgs pool) {
  runs.for_each<kChannelsLast>([&](int64_t n, int pixel, int c, int low, int high) {
    float in[16], g[16], out[kRun];
    read_run<kHalo, kHalo + kRun, false>(x, n, pixel, c, low, high, in);
    gather_run<kHalo, kHalo + kRun, false>(grad, code, pool, n, pixel, c, low, high, g);
#pragma unroll
    for (int i = 0; i < kRun; ++i) out[i] = relu_gradient(in[kHalo + i], g[kHalo + i]);
    write_run<false>(dx, n, pixel, c, high, out);
  });
}

// ---- launchers -----------------------------------------------------------------------------------------------------

// Rectangles whose pixels fit 48 KB of shared memory: wide ones in NCHW, whose rows are contiguous, squarer ones in
// NHWC, whose pixels are.
template <class Launch>
gpu::error_t launch_rectangles(const Images& images, int groups, const PoolArgs& p, Launch launch) {
  const int group_channels = static_cast<int>(images.c) / groups;
  const int channels = std::min(images.channels_last ? 32 : 16, divide_up(group_channels, kRun) * kRun);
  const auto pixels = [&](int rows, int columns) {
    return ((rows - 1) * p.stride + p.kernel_size) * ((columns - 1) * p.stride + p.kernel_size);
  };
  const int most = 48 * 1024 / static_cast<int>(sizeof(float)) / channels;
  int rows = 1, columns = std::min(p.out_width, images.channels_last ? 8 : 32);
  while (columns > 1 && pixels(rows, columns) > most) --columns;
  while (rows < p.out_height && pixels(rows + 1, columns) <= most) ++rows;
  rows = divide_up(p.out_height, divide_up(p.out_height, rows));  // of equal height
  const int per_row = divide_up(p.out_width, columns), tiles = per_row * divide_up(p.out_height, rows);
  const int chunks = divide_up(group_channels, channels);
  return for_each_batch(images.n, tiles, [&](int64_t first, int64_t count) {
    return for_each_part(groups * chunks, kMostRows, [&](int64_t first_chunk, int64_t grid_rows) {
      const Rectangles r = {
          first, static_cast<int>(first_chunk), rows, columns, tiles, per_row, group_channels, channels, chunks};
      return launch(r, dim3(static_cast<unsigned>(count * tiles), static_cast<unsigned>(grid_rows)),
                    pixels(rows, columns) * channels * sizeof(float));
    });
  });
}

// As for the plain normalisation: NHWC needs channels, and addresses, that can be moved four at a time.
template <class T>
bool use_runs(const Images& images, const Lrn& lrn, const void* x, const void* dx, const void* grad, const void* code) {
  const int bytes = 4 * sizeof(T);
  return is_alexnet(lrn) &&
         (!images.channels_last || (images.c / lrn.groups % 4 == 0 && is_aligned(x, bytes) && is_aligned(dx, bytes) &&
                                    is_aligned(grad, bytes) && is_aligned(code, 4)));
}

}  // namespace

gpu::error_t launch_relu_lrn_max_pool2d(const Images& images, const void* x, void* y, uint8_t* code, Order order,
                                        const Lrn& lrn, const Pool& pool, gpu::stream_t stream) {
  const int channels = static_cast<int>(images.c), plane = static_cast<int>(images.h * images.w);
  const int out_plane = static_cast<int>(pool.out_height * pool.out_width);
  const PoolArgs args(pool);
  return dispatch(images.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return dispatch_flag(images.channels_last, [&](auto last) {
      constexpr bool kLast = decltype(last)::value;
      const View<const T, kLast> in = {static_cast<const T*>(x), channels, plane};
      const View<T, kLast> out = {static_cast<T*>(y), channels, out_plane};
      if (order == kReluPoolLrn)
        return launch_tiles(images.n, channels, out_plane, lrn,
                            [&](const Tile& tile, dim3 grid, size_t bytes, const LrnArgs& window) {
                              return gpu::launch(pool_lrn_kernel<T, kLast>, grid, dim3(kThreads), bytes, stream, in,
                                                 out, code, tile, window, args);
                            });
      return dispatch_flag(use_runs<T>(images, lrn, x, x, x, nullptr), [&](auto fast) {
        return launch_rectangles(images, lrn.groups, args, [&](const Rectangles& r, dim3 grid, size_t bytes) {
          return gpu::launch(lrn_pool_kernel<T, kLast, decltype(fast)::value>, grid, dim3(kThreads), bytes, stream, in,
                             out, code, r, LrnArgs(lrn), args, order == kReluLrnPool);
        });
      });
    });
  });
}

gpu::error_t launch_relu_lrn_max_pool2d_backward(const Images& images, const void* grad, const void* x,
                                                 const uint8_t* code, void* dx, Order order, const Lrn& lrn,
                                                 const Pool& pool, float* workspace, gpu::stream_t stream) {
  const int channels = static_cast<int>(images.c), plane = static_cast<int>(images.h * images.w);
  const int out_plane = static_cast<int>(pool.out_height * pool.out_width);
  const PoolArgs args(pool);
  return dispatch(images.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return dispatch_flag(images.channels_last, [&](auto last) {
      constexpr bool kLast = decltype(last)::value;
      const View<const T, kLast> in = {static_cast<const T*>(x), channels, plane};
      const View<const T, kLast> g = {static_cast<const T*>(grad), channels, out_plane};
      const View<T, kLast> out = {static_cast<T*>(dx), channels, plane};
      if (order == kReluPoolLrn) {
        const PoolLrnBackward<T, kLast> problem = {in, g, {workspace, channels, out_plane}, code, args};
        const gpu::error_t error = is_alexnet(lrn) ? launch_lrn_backward_runs(problem, images.n, lrn, stream)
                                                   : launch_lrn_backward_tiles(problem, images.n, lrn, stream);
        if (error != gpu::kSuccess) return error;
        const View<const float, kLast> pooled = {workspace, channels, out_plane};
        return launch_runs(kLast, images.n, plane, 1, channels, [&](const Runs& runs, dim3 grid) {
          return gpu::launch(relu_pool_backward_kernel<T, kLast>, grid, dim3(kThreads), 0, stream, in, pooled, code,
                             out, runs, args);
        });
      }
      return dispatch_flag(use_runs<T>(images, lrn, x, dx, grad, code), [&](auto fast) {
        constexpr bool kFast = decltype(fast)::value;
        const LrnPoolBackward<T, kLast, kFast> problem = {in, g, out, code, args, order == kReluLrnPool};
        if constexpr (kFast)
          return launch_lrn_backward_runs(problem, images.n, lrn, stream);
        else
          return launch_lrn_backward_tiles(problem, images.n, lrn, stream);
      });
    });
  });
}

}  // namespace alexnet_cuda
