// The weight gradient of AlexNet's first convolution for half and bfloat16 on tensor cores.
//
//   dw[filter, slab element] = sum over output pixels of  dy[pixel, filter]  x[pixel + shift, plane element]
//
// (slabs.h). A block keeps the sums of 64 or 96 filters and all slabs in registers: each of its 8 warps has all the
// filters and an eighth of the slabs. It goes through its share of the 256-pixel blocks of all images; of each, the
// cells of x and the gradient, as [pixel][filter], come into shared memory, and ldmatrix transposes both on the way to
// the tensor cores. The partial sums of the blocks are added up by a second kernel in a fixed order, which also puts
// slab elements back where they belong in a filter.
#include "slabs.h"

namespace alexnet_cuda {
namespace {

template <int kChannels>
constexpr int kWarpSteps = (kPlan<kChannels>.steps + 7) / 8;
template <int kTile>
constexpr int kRow = kTile + 8;  // 16-bit words per pixel of the gradient: an odd number of 16 bytes, no bank conflicts

// The gradient of a block's pixels, as [pixel][filter], with zeros where there is no such output or filter; and whether
// there is such an output, as a mask of 16 bits. Some of it is still on its way at the end: wait for cp.async.
template <int kTile>
GPU_DEVICE void stage_gradient(gpu::shared<uint32_t> to, gpu::shared<uint16_t> masks, const uint16_t* image,
                               const Geometry& g, int strip, int first, int first_filter) {
  const int plane = g.out_height * g.out_width;
  for (int i = threadIdx.x; i < kBlockPixels * kTile / 8; i += kThreads) {
    // Lanes take neighbours in memory: runs of 8 filters of a pixel, or pixels.
    const int pixel = g.channels_last ? i / (kTile / 8) : i % kBlockPixels;
    const int run = g.channels_last ? i % (kTile / 8) : i / kBlockPixels, filter = first_filter + run * 8;
    const int position = g.position(strip, first + pixel);
    const gpu::shared<uint32_t> row = to + (pixel * (kRow<kTile> / 2) + run * 4);
    if (g.octets && g.channels_last) {
      const bool inside = position >= 0 && filter < g.filters;
      gpu::cp_async16(row, inside ? image + (position * g.filters + filter) : image, inside);
    } else {
      gpu::Quad<uint32_t> words = {};
#pragma unroll
      for (int k = 0; k < 8; ++k)
        if (position >= 0 && filter + k < g.filters) {
          const int at = g.channels_last ? position * g.filters + filter + k : (filter + k) * plane + position;
          words.v[k / 2] |= uint32_t{image[at]} << 16 * (k % 2);
        }
      gpu::store4(row, words);
    }
    if (run == 0) masks[pixel] = static_cast<uint16_t>(position >= 0 ? 0xffff : 0);
  }
}

// partial[slice][filter tile][filter][slab element]: the sums over the slice's share of `all` blocks of pixels.
template <class T, int kChannels, int kTile>
__global__ void __launch_bounds__(kThreads, 1)
    weight_grad_mma_kernel(const uint16_t* __restrict__ x, const uint16_t* __restrict__ grad,
                           float* __restrict__ partial, int64_t all, Geometry g, Operands operands) {
  constexpr int kSteps = kPlan<kChannels>.steps, kWarp = kWarpSteps<kChannels>;
  const gpu::shared<uint32_t> shared = gpu::dynamic_shared<uint32_t>();
  const gpu::shared<uint32_t> gradient = shared + kChannels * kPlane, masks = gradient + kBlockPixels * kRow<kTile> / 2;
  const int lane = threadIdx.x % 32, quad = lane % 4, first_step = threadIdx.x / 32 * kWarp;
  const int64_t begin = all * blockIdx.x / gridDim.x, end = all * (blockIdx.x + 1) / gridDim.x;

  // Where this lane's rows for ldmatrix begin: a cell of each slab pair; 8 filters of a pixel.
  int cells[kWarp];
#pragma unroll
  for (int s = 0; s < kWarp; ++s)
    cells[s] = operands.slab[2 * min(first_step + s, kSteps - 1) + lane / 16].offset + lane % 16 * 8;
  const int row = (lane % 8 + lane / 16 * 8) * kRow<kTile> + lane / 8 % 2 * 8;

  float sums[kTile / 16][2 * kWarp][4] = {};
  for (int64_t b = begin; b < end; ++b) {
    const int64_t image = b / (g.blocks * g.strips);
    const int strip = static_cast<int>(b / g.blocks % g.strips), first = static_cast<int>(b % g.blocks) * kBlockPixels;
    __syncthreads();  // the previous block's pixels have been used
    stage_gradient<kTile>(gradient, gpu::shared_cast<uint16_t>(masks),
                          grad + image * g.filters * g.out_height * g.out_width, g, strip, first, blockIdx.y * kTile);
    gpu::cp_async_commit();
    const uint16_t* in = x + image * kChannels * g.height * g.width;
    if (g.channels_last)
      stage<kChannels, true>(shared, in, g, strip, first);
    else
      stage<kChannels, false>(shared, in, g, strip, first);
    gpu::cp_async_wait<0>();
    __syncthreads();
    const int pixels = min(kBlockPixels, g.out_height * g.pitch() - first);
#pragma unroll 1
    for (int pixel = 0; pixel < pixels; pixel += 16) {
      // The gradient is 0 where there is no output, but 0 * NaN is not: x is cleared as well.
      const uint32_t keep0 = masks[pixel / 2 + quad], keep1 = masks[pixel / 2 + quad + 4];
      uint32_t right[kWarp][4];
#pragma unroll
      for (int s = 0; s < kWarp; ++s) {
        gpu::ldmatrix_x4_trans(right[s], gpu::shared_cast<uint16_t>(shared) + (cells[s] + pixel * 8));
#pragma unroll
        for (int i = 0; i < 4; ++i) right[s][i] &= i % 2 ? keep1 : keep0;
      }
#pragma unroll
      for (int m = 0; m < kTile / 16; ++m) {
        uint32_t left[4];
        gpu::ldmatrix_x4_trans(left, gpu::shared_cast<uint16_t>(gradient) + (row + pixel * kRow<kTile> + m * 16));
#pragma unroll
        for (int s = 0; s < kWarp; ++s) {
          const uint32_t low[2] = {right[s][0], right[s][1]}, high[2] = {right[s][2], right[s][3]};
          gpu::mma_m16n8k16<T>(sums[m][2 * s], left, low);
          gpu::mma_m16n8k16<T>(sums[m][2 * s + 1], left, high);
        }
      }
    }
  }

  float* out = partial + (int64_t{blockIdx.x} * gridDim.y + blockIdx.y) * (kTile * kSteps * 16);
#pragma unroll
  for (int s = 0; s < kWarp; ++s)
    if (first_step + s < kSteps) {
#pragma unroll
      for (int m = 0; m < kTile / 16; ++m)
#pragma unroll
        for (int i = 0; i < 8; ++i)
          out[(m * 16 + i / 2 % 2 * 8 + lane / 4) * (kSteps * 16) + (first_step + s) * 16 + i / 4 * 8 + quad * 2 +
              i % 2] = sums[m][2 * s + i / 4][i % 4];
    }
}

// Adds the slices up, from the first to the last; a thread per slab element of a filter.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_partials_kernel(const float* partial, T* dweight, int filters, int elements, int slices, int64_t slice_size,
                        int taps_per_filter, Taps taps) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= int64_t{filters} * elements) return;
  const int tap = taps.tap[i % elements];
  if (tap < 0) return;
  float sum = 0;
#pragma unroll 8
  for (int s = 0; s < slices; ++s) sum += partial[s * slice_size + i];
  dweight[i / elements * taps_per_filter + tap] = gpu::from_float<T>(sum);
}

// Four channels have too many slabs for the registers of 96 filters.
int tile_of(const Conv& conv) {
  return conv.channels == 4 ? 64 : filter_tile(conv);
}
int64_t slice_size(const Conv& conv) {
  const int steps = conv.channels == 1 ? kPlan<1>.steps : conv.channels == 3 ? kPlan<3>.steps : kPlan<4>.steps;
  return int64_t{divide_up(conv.filters, tile_of(conv))} * tile_of(conv) * steps * 16;
}
// Of the batch and the layer alone, not of the device: no result may depend on that.
int slices_of(int64_t n, const Geometry& g) {
  return static_cast<int>(std::min(int64_t{128}, n * g.strips * g.blocks));
}

template <class T, int kChannels, int kTile>
gpu::error_t launch_tile(const Images& images, const void* grad, const void* x, void* dweight, const Conv& conv,
                         float* workspace, gpu::stream_t stream) {
  const Geometry geometry = geometry_of(images.channels_last, conv, grad);
  const int slices = slices_of(images.n, geometry), elements = kPlan<kChannels>.steps * 16;
  constexpr int kBytes = 4 * kChannels * kPlane + 2 * kBlockPixels * (kRow<kTile> + 1);
  const gpu::error_t error = gpu::launch(
      weight_grad_mma_kernel<T, kChannels, kTile>, dim3(slices, divide_up(conv.filters, kTile)), dim3(kThreads), kBytes,
      stream, static_cast<const uint16_t*>(x), static_cast<const uint16_t*>(grad), workspace,
      images.n * geometry.strips * geometry.blocks, geometry, operands<kChannels>(geometry.strip_width + 2));
  if (error != gpu::kSuccess) return error;
  return gpu::launch(sum_partials_kernel<T>, dim3(divide_up(conv.filters * elements, kThreads)), dim3(kThreads), 0,
                     stream, static_cast<const float*>(workspace), static_cast<T*>(dweight),
                     static_cast<int>(conv.filters), elements, slices, slice_size(conv), kChannels * 121,
                     taps<kChannels>());
}

}  // namespace

int64_t conv2d_weight_grad_workspace(DType dtype, int64_t n, const Conv& conv) {
  if (on_tensor_cores(dtype, conv)) return slices_of(n, geometry_of(false, conv, nullptr)) * slice_size(conv);
  return conv2d_weight_grad_slices(n) * conv.filters * conv.channels * conv.kernel_size * conv.kernel_size;
}

gpu::error_t launch_conv2d_weight_grad_mma(const Images& images, const void* grad, const void* x, void* dweight,
                                           const Conv& conv, float* workspace, gpu::stream_t stream) {
  const auto run = [&](auto type) {
    using T = typename decltype(type)::type;
    const bool wide = tile_of(conv) == 96;
    const auto launch = conv.channels == 1   ? (wide ? launch_tile<T, 1, 96> : launch_tile<T, 1, 64>)
                        : conv.channels == 3 ? (wide ? launch_tile<T, 3, 96> : launch_tile<T, 3, 64>)
                                             : launch_tile<T, 4, 64>;
    return launch(images, grad, x, dweight, conv, workspace, stream);
  };
  return images.dtype == kHalf ? run(Type<gpu::half>{}) : run(Type<gpu::bfloat16>{});
}

}  // namespace alexnet_cuda
