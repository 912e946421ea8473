// ReLU, local response normalisation (LRN) across channels and max pooling in one kernel, forward and backward, for any
// settings; relu_lrn_max_pool2d_alexnet.cu has faster kernels for AlexNets'.
//
// Memory: a thread block of the forward pass owns a rectangle of pooled pixels and some channels of one group. What it
// pools (or, if pooling comes first, what it normalises) lies in shared memory as floats and never reaches global
// memory; neighbouring thread blocks compute their common border twice.
//
// The backward pass is given x and one byte per pooled element, and recomputes the rest: each thread gathers the pooled
// gradient of its pixel and differentiates the normalisation there. Numerics: sums in float, in a fixed order.
#include "lrn.h"
#include "pool.h"

namespace alexnet_cuda {
namespace {

// ---- forward, normalisation before pooling -------------------------------------------------------------------------

// How a batch is cut into thread blocks: rectangles of pooled pixels times chunks of channels.
struct PoolTiles {
  int64_t first_image;
  int first_chunk;
  int rows, columns;                     // pooled rows and columns of a rectangle
  int per_image, per_row;                // rectangles
  int group_channels, channels, chunks;  // channels per thread block, a multiple of kRun; thread blocks per group
};

template <class T, bool kNhwc>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    lrn_pool_kernel(View<const T, kNhwc> x, View<T, kNhwc> y, uint8_t* code, PoolTiles tiles, LrnConstants lrn,
                    PoolGeometry pool, bool relu_first) {
  const gpu::shared<float> normalised = gpu::dynamic_shared<float>();
  // This thread block's image, group, channels [begin, end) and pooled rows and columns.
  const int64_t n = tiles.first_image + blockIdx.x / tiles.per_image;
  const uint32_t chunk = tiles.first_chunk + blockIdx.y;
  const int tile = blockIdx.x % tiles.per_image, group = chunk / tiles.chunks;
  const int low = group * tiles.group_channels, high = low + tiles.group_channels;
  const int begin = low + (chunk - group * tiles.chunks) * tiles.channels, end = min(high, begin + tiles.channels);
  const int oy0 = tile / tiles.per_row * tiles.rows, oy1 = min(oy0 + tiles.rows, pool.out_height);
  const int ox0 = tile % tiles.per_row * tiles.columns, ox1 = min(ox0 + tiles.columns, pool.out_width);

  // The part of the image under these windows: rows iy0 .. iy1 - 1, `width` columns from ix0 on.
  const int iy0 = max(0, oy0 * pool.stride - pool.padding), ix0 = max(0, ox0 * pool.stride - pool.padding);
  const int iy1 = min(pool.height, (oy1 - 1) * pool.stride - pool.padding + pool.kernel_size);
  const int width = min(pool.width, (ox1 - 1) * pool.stride - pool.padding + pool.kernel_size) - ix0;
  const int pixels = (iy1 - iy0) * width, runs = tiles.channels / kRun;
  // Index in shared memory: [pixel][channel] in NHWC, [channel][pixel] in NCHW.
  const auto slot = [&](int pixel, int c) { return kNhwc ? pixel * tiles.channels + c : c * pixels + pixel; };

  // Normalise: a run of x from global memory, through registers, to shared memory.
  for (int i = threadIdx.x; i < pixels * runs; i += kThreads) {
    const int local = kNhwc ? i / runs : i % pixels, run = (kNhwc ? i % runs : i / pixels) * kRun;
    const int pixel = (iy0 + local / width) * pool.width + ix0 + local % width, c = begin + run;
    const auto value = [&](int j) {
      const float v = gpu::to_float(x.at(n, pixel, j));
      return relu_first ? relu(v) : v;
    };
    for (int j = c; j < min(c + kRun, high); ++j)
      normalised[slot(local, j - begin)] =
          value(j) * inverse_power<false>(denominator(lrn, j, low, high, value), lrn.beta);
  }
  __syncthreads();

  // Pool: one output per thread at a time, from shared to global memory.
  const int columns = ox1 - ox0, outputs = (oy1 - oy0) * columns, channels = end - begin;
  for (int i = threadIdx.x; i < outputs * channels; i += kThreads) {
    const int local = kNhwc ? i / channels : i % outputs, c = kNhwc ? i % channels : i / outputs;
    const int oy = oy0 + local / columns, ox = ox0 + local % columns;
    Maximum best;
    for_each_in_window(pool, oy, ox, [&](int position, int iy, int ix) {
      best.update(normalised[slot((iy - iy0) * width + ix - ix0, c)], position);
    });
    const int64_t out = n * y.channels * y.pixels + y.offset(oy * pool.out_width + ox, begin + c);
    y.data[out] = gpu::from_float<T>(relu_first ? best.value : relu(best.value));
    if (code) code[out] = static_cast<uint8_t>(best.code);
  }
}

// ---- forward, pooling before normalisation -------------------------------------------------------------------------

template <class T, bool kNhwc>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    pool_lrn_kernel(ChannelTile tile, LrnConstants lrn, View<const T, kNhwc> x, View<T, kNhwc> y, uint8_t* code,
                    PoolGeometry pool) {
  const gpu::shared<float> pooled = gpu::dynamic_shared<float>();
  const int begin = tile.begin(), end = tile.end(), low = tile.low(), high = low + tile.group_channels;
  // Pool the tile's channels and those that their LRN windows reach: from global to shared memory; codes to memory.
  tile.for_each<kNhwc>(tile.channels + lrn.front + lrn.back, [&](int row, int slot, int64_t n, int pixel) {
    const int c = begin - lrn.front + row;
    if (c < low || c >= high) {
      pooled[slot] = 0.f;
      return;
    }
    Maximum best;
    const T* image = x.image(n);
    for_each_in_window(pool, pixel / pool.out_width, pixel % pool.out_width, [&](int position, int iy, int ix) {
      best.update(relu(gpu::to_float(image[x.offset(iy * pool.width + ix, c)])), position);
    });
    pooled[slot] = best.value;
    if (code && c >= begin && c < end)
      code[n * y.channels * y.pixels + y.offset(pixel, c)] = static_cast<uint8_t>(best.code);
  });
  __syncthreads();
  // Normalise: a window of pooled values from shared memory per element.
  tile.for_each<kNhwc>(end - begin, [&](int row, int slot, int64_t n, int pixel) {
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

// Policy of lrn.h's backward kernel. The gradient is gathered from the pooled one through the codes. ReLU is applied to
// x and dx or, if it comes last, to the gathered gradient (a pooled value is positive exactly if its x is).
template <class T, bool kNhwc>
struct LrnPoolBackward : LrnBackward<T, T, kNhwc> {
  using Base = LrnBackward<T, T, kNhwc>;
  const uint8_t* code;
  PoolGeometry pool;
  bool relu_first;

  GPU_DEVICE float x_at(int64_t n, int pixel, int c) const {
    const float v = Base::x_at(n, pixel, c);
    return relu_first ? relu(v) : v;
  }
  GPU_DEVICE float grad_at(int64_t n, int pixel, int c, float in) const {
    const float g = gather(this->grad, code, pool, n, pixel, c);
    return relu_first ? g : relu_gradient(in, g);
  }
  GPU_DEVICE float finish_dx(float in, float dx) const { return relu_first ? relu_gradient(in, dx) : dx; }
};

// ---- backward, pooling before normalisation ------------------------------------------------------------------------
// Two kernels: first the gradient of the pooled values into the workspace (floats, a quarter of x's elements), then
// that of pooling and ReLU.

// Policy of the first: pooled values are found in x through their codes.
template <class T, bool kNhwc>
struct PoolLrnBackward : LrnBackward<T, float, kNhwc> {
  const uint8_t* code;
  PoolGeometry pool;

  GPU_DEVICE float x_at(int64_t n, int pixel, int c) const {
    const auto& grad = this->grad;
    const int position = code[n * grad.channels * grad.pixels + grad.offset(pixel, c)];
    const int iy = pixel / pool.out_width * pool.stride - pool.padding + position / pool.kernel_size;
    const int ix = pixel % pool.out_width * pool.stride - pool.padding + position % pool.kernel_size;
    return relu(gpu::to_float(this->x.at(n, iy * pool.width + ix, c)));
  }
};

// The same for AlexNet's LRN: a thread computes runs of 8 channels with all windows in registers.
template <class T, bool kNhwc>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    pool_lrn5_backward_kernel(Runs runs, PoolLrnBackward<T, kNhwc> policy, LrnConstants lrn) {
  runs.for_each<kNhwc>([&](int64_t n, int pixel, int c, int low, int high) {
    float x[kRun + 8], g[kRun + 8], dx[kRun];
#pragma unroll
    for (int i = 0; i < kRun + 8; ++i) {
      const int channel = c - kHalo + i;
      x[i] = channel >= low && channel < high ? policy.x_at(n, pixel, channel) : 0.f;
    }
    read_run<2, 14>(policy.grad, n, pixel, c, low, high, g);
    differentiate_run(x, g + 2, lrn, dx);
    write_run(policy.dx, n, pixel, c, high, dx);
  });
}

template <class T, bool kNhwc>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    relu_pool_backward_kernel(Runs runs, View<const T, kNhwc> x, View<const float, kNhwc> grad, const uint8_t* code,
                              View<T, kNhwc> dx, PoolGeometry pool) {
  runs.for_each<kNhwc>([&](int64_t n, int pixel, int c, int low, int high) {
    // x and the gathered gradient of 8 channels into registers, masked and written.
    float in[16], g[16], out[kRun];
    read_run<kHalo, kHalo + kRun>(x, n, pixel, c, low, high, in);
    gather_run<kHalo, kHalo + kRun, false>(grad, code, pool, n, pixel, c, low, high, g);
#pragma unroll
    for (int i = 0; i < kRun; ++i) out[i] = relu_gradient(in[kHalo + i], g[kHalo + i]);
    write_run(dx, n, pixel, c, high, out);
  });
}

// ---- launchers -----------------------------------------------------------------------------------------------------

// launch(tiles, grid, bytes of shared memory) until all rectangles are done. Their pixels fit 48 KB of shared memory:
// wide rectangles in NCHW, whose rows are contiguous, squarer ones in NHWC, whose pixels are.
template <class Launch>
gpu::error_t launch_pool_tiles(const Images& images, int groups, const PoolGeometry& p, Launch launch) {
  const int group_channels = static_cast<int>(images.channels) / groups;
  const int channels = std::min(images.channels_last ? 32 : 16, divide_up(group_channels, kRun) * kRun);
  const auto pixels = [&](int rows, int columns) {
    return ((rows - 1) * p.stride + p.kernel_size) * ((columns - 1) * p.stride + p.kernel_size);
  };
  const int max_pixels = 48 * 1024 / static_cast<int>(sizeof(float)) / channels;
  int rows = 1, columns = std::min(p.out_width, images.channels_last ? 8 : 32);
  while (columns > 1 && pixels(rows, columns) > max_pixels) --columns;
  while (rows < p.out_height && pixels(rows + 1, columns) <= max_pixels) ++rows;
  rows = divide_up(p.out_height, divide_up(p.out_height, rows));  // of equal height
  const int per_row = divide_up(p.out_width, columns), per_image = per_row * divide_up(p.out_height, rows);
  const int chunks = divide_up(group_channels, channels);
  return for_each_batch(images.count, per_image, [&](int64_t first, int64_t count) {
    return for_each_part(groups * chunks, kMaxGridRows, [&](int first_chunk, int grid_rows) {
      const PoolTiles tiles = {first, first_chunk, rows, columns, per_image, per_row, group_channels, channels, chunks};
      return launch(tiles, dim3(count * per_image, grid_rows), pixels(rows, columns) * channels * sizeof(float));
    });
  });
}

}  // namespace

gpu::error_t launch_relu_lrn_max_pool2d(const TailArguments& args, gpu::stream_t stream) {
  if (has_alexnet_tail(args)) return launch_alexnet_tail(args, stream);
  const Images& images = args.images;
  const PoolGeometry pool(args.pool);
  return dispatch_images(images, [&](auto type, auto nhwc) {
    using T = typename decltype(type)::type;
    constexpr bool kNhwc = decltype(nhwc)::value;
    const auto x = view_of<const T, kNhwc>(args.x, images.channels, images.pixels());
    const auto y = view_of<T, kNhwc>(args.out, images.channels, args.pool.out_height * args.pool.out_width);
    if (args.order == kReluPoolLrn)
      return launch_tiles(pool_lrn_kernel<T, kNhwc>, images.count, y.channels, y.pixels, args.lrn, stream, x, y,
                          args.code, pool);
    return launch_pool_tiles(images, args.lrn.groups, pool, [&](const PoolTiles& tiles, dim3 grid, size_t bytes) {
      return gpu::launch(lrn_pool_kernel<T, kNhwc>, grid, kThreads, bytes, stream, x, y, args.code, tiles,
                         LrnConstants(args.lrn), pool, args.order == kReluLrnPool);
    });
  });
}

gpu::error_t launch_relu_lrn_max_pool2d_backward(const TailArguments& args, gpu::stream_t stream) {
  if (has_alexnet_tail(args)) return launch_alexnet_tail_backward(args, stream);
  const Images& images = args.images;
  const PoolGeometry pool(args.pool);
  const int64_t pooled = args.pool.out_height * args.pool.out_width;
  return dispatch_images(images, [&](auto type, auto nhwc) {
    using T = typename decltype(type)::type;
    constexpr bool kNhwc = decltype(nhwc)::value;
    const auto x = view_of<const T, kNhwc>(args.x, images.channels, images.pixels());
    const auto grad = view_of<const T, kNhwc>(args.grad, images.channels, pooled);
    const auto dx = view_of<T, kNhwc>(args.out, images.channels, images.pixels());
    const auto launch_lrn = [&](const auto& policy) {
      return launch_tiles(lrn_backward_tile_kernel<std::decay_t<decltype(policy)>>, images.count, policy.dx.channels,
                          policy.dx.pixels, args.lrn, stream, policy);
    };
    if (args.order != kReluPoolLrn)
      return launch_lrn(LrnPoolBackward<T, kNhwc>{{x, grad, dx}, args.code, pool, args.order == kReluLrnPool});
    const auto workspace = view_of<float, kNhwc>(args.workspace, images.channels, pooled);
    const PoolLrnBackward<T, kNhwc> policy = {{x, grad, workspace}, args.code, pool};
    const gpu::error_t error =
        is_lrn5(args.lrn) ? launch_runs(pool_lrn5_backward_kernel<T, kNhwc>, kNhwc, images.count, policy.dx.pixels,
                                        policy.dx.channels, args.lrn.groups, stream, policy, LrnConstants(args.lrn))
                          : launch_lrn(policy);
    if (error != gpu::kSuccess) return error;
    return launch_runs(relu_pool_backward_kernel<T, kNhwc>, kNhwc, images.count, x.pixels, x.channels, 1, stream, x,
                       view_of<const float, kNhwc>(args.workspace, images.channels, pooled), args.code, dx, pool);
  });
}

}  // namespace alexnet_cuda
