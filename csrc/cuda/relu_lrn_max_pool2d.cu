// ReLU, local response normalisation (LRN) across channels and max pooling, forward and backward: one kernel for any
// settings if pooling comes last (relu_lrn_max_pool2d_alexnet.cu has faster ones for AlexNets'), else those of
// max_pool2d and of local_response_norm.
//
// Memory: a thread block of the forward pass owns a rectangle of pooled pixels and some channels of one group. What it
// pools lies in shared memory as floats and never reaches global memory; neighbouring thread blocks compute their
// common border twice.
//
// The backward pass is given x and one byte per pooled element, and recomputes the rest: each thread gathers the pooled
// gradient of its pixel and differentiates the normalisation there. Numerics: sums in float, in a fixed order.
#include "lrn.h"
#include "pool.h"

namespace alexnet_cuda {
namespace {

// ---- forward -------------------------------------------------------------------------------------------------------

// How a batch is cut into thread blocks: rectangles of pooled pixels times chunks of channels.
struct PoolTiles {
  int64_t first_image;
  int first_chunk;
  int rows, columns;                     // pooled rows and columns of a rectangle
  int per_image, per_row;                // rectangles
  int group_channels, channels, chunks;  // channels per thread block, a multiple of kRun; thread blocks per group

  // Words of shared memory from one pixel to the next in NHWC: an odd number. A warp stores one channel of the 4 runs
  // of 8 pixels at a time, 8 words apart within a pixel; so they lie in 32 banks, without the word more in 4.
  __host__ __device__ static int pitch(int channels) { return channels + 1; }
};

// Shared memory holds as many pixels as fit 48 KB, what every launch may have, with 32 (NCHW: 16) channels: the fewer
// rectangles, the fewer pixels are normalised twice. With 3x3/2 pooling, neighbours share one row or column.
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
  const int pitch = PoolTiles::pitch(tiles.channels);
  const auto slot = [&](int pixel, int c) { return kNhwc ? pixel * pitch + c : c * pixels + pixel; };

  // Normalise: a run of x from global memory, through registers, to shared memory. The windows of LRN read x through
  // the cache, so that no channel beyond the thread block's own has to be staged. Lanes have the runs of a pixel, then
  // those of the next in NHWC, and neighbouring pixels of a run in NCHW: consecutive in memory.
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

  // Pool: one output per thread at a time, from shared to global memory. Lanes have neighbouring channels (NCHW:
  // columns), so that a warp reads consecutive words (NCHW: every stride-th) and writes consecutive elements.
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

// ---- backward ------------------------------------------------------------------------------------------------------

// Policy of lrn.h's backward kernel. The gradient is gathered from the pooled one through the codes. ReLU is applied to
// x and dx or, if it comes last, to the gathered gradient (a pooled value is positive exactly if its x is).
template <class T, bool kNhwc>
struct LrnPoolBackward : LrnBackward<T, kNhwc> {
  using Base = LrnBackward<T, kNhwc>;
  const uint8_t* code;
  PoolGeometry pool;
  bool relu_first;

  GPU_DEVICE float x_at(int64_t n, int pixel, int c) const {
    const float v = Base::x_at(n, pixel, c);
    return relu_first ? relu(v) : v;
  }
  GPU_DEVICE float grad_at(int64_t n, int pixel, int c, float in) const {
    float g[1];
    gather(this->grad, code, pool, n, pixel, c, g);
    return relu_first ? g[0] : relu_gradient(in, g[0]);
  }
  GPU_DEVICE float finish_dx(float in, float dx) const { return relu_first ? relu_gradient(in, dx) : dx; }
};

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
  const int pixel_bytes = (images.channels_last ? PoolTiles::pitch(channels) : channels) * sizeof(float);
  const int max_pixels = 48 * 1024 / pixel_bytes;
  int rows = 1, columns = std::min(p.out_width, images.channels_last ? 8 : 32);
  while (columns > 1 && pixels(rows, columns) > max_pixels) --columns;
  while (rows < p.out_height && pixels(rows + 1, columns) <= max_pixels) ++rows;
  rows = divide_up(p.out_height, divide_up(p.out_height, rows));  // of equal height
  const int per_row = divide_up(p.out_width, columns), per_image = per_row * divide_up(p.out_height, rows);
  const int chunks = divide_up(group_channels, channels);
  return for_each_batch(images.count, per_image, [&](int64_t first, int64_t count) {
    return for_each_part(groups * chunks, kMaxGridRows, [&](int first_chunk, int grid_rows) {
      const PoolTiles tiles = {first, first_chunk, rows, columns, per_image, per_row, group_channels, channels, chunks};
      return launch(tiles, dim3(count * per_image, grid_rows), pixels(rows, columns) * pixel_bytes);
    });
  });
}

// ---- pooling before normalisation ----------------------------------------------------------------------------------
// The pooled values, a quarter of x in AlexNets, cross memory once more than in one kernel. In exchange both halves are
// bound by memory (docs/instruction_counts.md), and the pooled values are exact. ReLU is the pooling's: windows without
// a positive value have no gradient, so the gradient of LRN needs no mask.

// The pooled values, or their gradients, in the workspace.
int64_t pooled_floats(const TailArguments& args) {
  const Images& images = args.images;
  const int64_t values = images.count * images.channels * args.pool.out_height * args.pool.out_width;
  return (values * element_size(images.dtype) + 15) / 16 * 4;  // a multiple of 16 bytes
}

LrnArguments lrn_arguments(const TailArguments& args, const void* x, void* out) {
  LrnArguments lrn;
  lrn.images = args.images;
  lrn.images.height = args.pool.out_height;
  lrn.images.width = args.pool.out_width;
  lrn.x = x;
  lrn.grad = args.grad;
  lrn.out = out;
  lrn.lrn = args.lrn;
  return lrn;
}

gpu::error_t launch_pool_lrn(const TailArguments& args, gpu::stream_t stream) {
  PoolArguments pool = args;
  pool.out = args.workspace;
  const gpu::error_t error = launch_max_pool2d(pool, stream, true);
  if (error != gpu::kSuccess) return error;
  return launch_local_response_norm(lrn_arguments(args, args.workspace, args.out), stream);
}

gpu::error_t launch_pool_lrn_backward(const TailArguments& args, gpu::stream_t stream) {
  void* pooled_grad = args.workspace + pooled_floats(args);
  // Pool again: faster than to find the pooled values by their codes, and x is read but once either way.
  PoolArguments pool = args;
  pool.grad = nullptr;
  pool.code = nullptr;
  pool.out = args.workspace;
  gpu::error_t error = launch_max_pool2d(pool, stream, true);
  if (error != gpu::kSuccess) return error;
  error = launch_local_response_norm_backward(lrn_arguments(args, args.workspace, pooled_grad), stream);
  if (error != gpu::kSuccess) return error;
  PoolArguments pool_backward = args;
  pool_backward.grad = pooled_grad;
  return launch_max_pool2d_backward(pool_backward, stream);
}

}  // namespace

int64_t relu_lrn_max_pool2d_workspace(const TailArguments& args) {
  return args.order == kReluPoolLrn ? pooled_floats(args) * (args.grad ? 2 : 1) : 0;
}

gpu::error_t launch_relu_lrn_max_pool2d(const TailArguments& args, gpu::stream_t stream) {
  if (args.order == kReluPoolLrn) return launch_pool_lrn(args, stream);
  if (has_alexnet_tail(args)) return launch_alexnet_tail(args, stream);
  const Images& images = args.images;
  const PoolGeometry pool(args.pool);
  return dispatch_images(images, [&](auto type, auto nhwc) {
    using T = typename decltype(type)::type;
    constexpr bool kNhwc = decltype(nhwc)::value;
    const auto x = view_of<const T, kNhwc>(args.x, images.channels, images.pixels());
    const auto y = view_of<T, kNhwc>(args.out, images.channels, args.pool.out_height * args.pool.out_width);
    return launch_pool_tiles(images, args.lrn.groups, pool, [&](const PoolTiles& tiles, dim3 grid, size_t bytes) {
      return gpu::launch(lrn_pool_kernel<T, kNhwc>, grid, kThreads, bytes, stream, x, y, args.code, tiles,
                         LrnConstants(args.lrn), pool, args.order == kReluLrnPool);
    });
  });
}

gpu::error_t launch_relu_lrn_max_pool2d_backward(const TailArguments& args, gpu::stream_t stream) {
  if (args.order == kReluPoolLrn) return launch_pool_lrn_backward(args, stream);
  if (has_alexnet_tail(args)) return launch_alexnet_tail_backward(args, stream);
  const Images& images = args.images;
  const int64_t pooled = args.pool.out_height * args.pool.out_width;
  return dispatch_images(images, [&](auto type, auto nhwc) {
    using T = typename decltype(type)::type;
    constexpr bool kNhwc = decltype(nhwc)::value;
    using Policy = LrnPoolBackward<T, kNhwc>;
    const Policy policy = {{view_of<const T, kNhwc>(args.x, images.channels, images.pixels()),
                            view_of<const T, kNhwc>(args.grad, images.channels, pooled),
                            view_of<T, kNhwc>(args.out, images.channels, images.pixels())},
                           args.code,
                           PoolGeometry(args.pool),
                           args.order == kReluLrnPool};
    return launch_tiles(lrn_backward_tile_kernel<Policy>, images.count, policy.dx.channels, policy.dx.pixels, args.lrn,
                        stream, policy);
  });
}

}  // namespace alexnet_cuda
