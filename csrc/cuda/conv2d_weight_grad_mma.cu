// The weight and bias gradient of AlexNet's first convolution on tensor cores: half, bfloat16 and TF32.
//
//   dw[filter, slab element] = sum over output pixels of  dy[pixel, filter]  x[pixel + shift, plane element]
//
// (slabs.h). A block keeps the sums of 64 or 96 filters and all slabs in registers: each of its 8 warps has all the
// filters and an eighth of the slabs. It goes through its share of the blocks of pixels of all images; of each, the
// cells of x and the gradient, as [pixel][filter], come into shared memory. Products sum over pixels, which is not the
// order of either: for 16-bit elements ldmatrix transposes both on the way to the tensor cores. It cannot for TF32, but
// filters and slab elements may be dealt to rows and columns of the products as it suits: a lane loads four filters of
// a pixel and has the elements of four rows, two elements of a slab and has those of two columns. The partial sums of
// the blocks are added up by a second kernel in a fixed order, which also puts slab elements back where they belong in
// a filter.
//
// The last slab element belongs to no filter element. It is taken as 1, so that its sums are the bias gradient.
#include "slabs.h"

namespace alexnet_cuda {
namespace {

// Slab elements in 16s: what two columns of products have.
template <int kChannels, int kWidth>
constexpr int kSixteens = (kPlan<kChannels, kWidth>.count * kWidth + 15) / 16;
template <int kChannels, int kWidth>
constexpr bool lacks_last_element() {
  const Slab& slab = kPlan<kChannels, kWidth>.slabs[kSixteens<kChannels, kWidth> * 16 / kWidth - 1];
  return !(slab.mask >> (kWidth - 1) & 1);
}
static_assert(lacks_last_element<1, 8>() && lacks_last_element<3, 8>() && lacks_last_element<4, 8>());
static_assert(lacks_last_element<1, 4>() && lacks_last_element<3, 4>() && lacks_last_element<4, 4>());
template <class T>
constexpr uint32_t kOne = sizeof(T) == 4                 ? 0x3f800000
                          : std::is_same_v<T, gpu::half> ? 0x3c003c00
                                                         : 0x3f803f80;
template <class T>
constexpr int kPixels = sizeof(T) == 4 ? kBlockPixels / 2 : kBlockPixels;  // of a block, as shared memory allows
// Words per pixel of the gradient. 16-bit: an odd number of 16 bytes, against bank conflicts. TF32: see `gradient_at`.
template <class T, int kTile>
constexpr int kRow = sizeof(T) == 4 ? kTile : kTile / 2 + 4;

// The word where 16 bytes of a pixel's filters begin. Lanes read the same 16 bytes of TF32 in four pixels at a time and
// their right neighbours: these are exchanged so that all are in different banks.
template <class T, int kTile>
GPU_DEVICE int gradient_at(int pixel, int run) {
  return pixel * kRow<T, kTile> + (sizeof(T) == 4 ? run ^ pixel % 4 * 2 : run) * 4;
}

// The gradient of a block's pixels, as [pixel][filter], with zeros where there is no such output or filter; and whether
// there is such an output, as a mask of an element's size. Some of it is still on its way at the end: wait for
// cp.async.
template <class T, int kTile, class Mask>
GPU_DEVICE void stage_gradient(gpu::shared<uint32_t> to, gpu::shared<Mask> masks, const Stored<T>* image,
                               const Geometry& g, int strip, int first, int first_filter) {
  constexpr int kWidth = kWidthOf<T>, kRuns = kTile / kWidth;
  for (int i = threadIdx.x; i < kPixels<T> * kRuns; i += kThreads) {
    // Lanes take neighbours in memory: runs of filters of a pixel, or pixels.
    const int pixel = g.channels_last ? i / kRuns : i % kPixels<T>;
    const int run = g.channels_last ? i % kRuns : i / kPixels<T>, filter = first_filter + run * kWidth;
    const int position = g.position(strip, first + pixel);
    const gpu::shared<uint32_t> row = to + gradient_at<T, kTile>(pixel, run);
    if (sizeof(T) == 2 && g.octets && g.channels_last) {
      const bool inside = position >= 0 && filter < g.filters;
      gpu::cp_async16(row, inside ? image + (position * g.filters + filter) : image, inside);
    } else {
      gpu::store4(row, gradient_words<T>(image, g, position, filter));
    }
    if (run == 0) masks[pixel] = static_cast<Mask>(position >= 0 ? ~0u : 0);
  }
}

// partial[slice][filter tile][filter][slab element]: the sums over the slice's share of `all` blocks of pixels.
template <class T, int kChannels, int kTile>
__global__ void __launch_bounds__(kThreads, 1)
    weight_grad_mma_kernel(const Stored<T>* __restrict__ x, const Stored<T>* __restrict__ grad,
                           float* __restrict__ partial, int64_t all, Geometry g, Operands operands) {
  constexpr bool kIsTF32 = sizeof(T) == 4;
  constexpr int kSteps = kSixteens<kChannels, kWidthOf<T>>, kWarp = (kSteps + 7) / 8;
  const gpu::shared<uint32_t> shared = gpu::dynamic_shared<uint32_t>();
  const gpu::shared<uint32_t> gradient = shared + kPlanesOf<T, kChannels> * kPlaneFor<kPixels<T>> / 2;
  const gpu::shared<uint32_t> masks = gradient + kPixels<T> * kRow<T, kTile>;
  const int lane = threadIdx.x % 32, quad = lane % 4, first_step = threadIdx.x / 32 * kWarp;
  const int64_t begin = all * blockIdx.x / gridDim.x, end = all * (blockIdx.x + 1) / gridDim.x;

  // Where this lane reads, in 16-bit words. 16-bit: its rows for ldmatrix are a cell of each slab pair, 8 filters of a
  // pixel. TF32: two elements of a cell in one of four slabs, four filters of a pixel.
  int cells[kWarp];
#pragma unroll
  for (int s = 0; s < kWarp; ++s) {
    const int step = min(first_step + s, kSteps - 1);
    cells[s] = kIsTF32 ? operands.slab[4 * step + lane / 8].offset + quad * 8 + lane / 4 % 2 * 4
                       : operands.slab[2 * step + lane / 16].offset + lane % 16 * 8;
  }
  const int row = kIsTF32 ? gradient_at<T, kTile>(quad, lane / 4) * 2
                          : gradient_at<T, kTile>(lane % 8 + lane / 16 * 8, lane / 8 % 2) * 2;

  // Has the last slab element: the last of 8 columns in this step of the last warp.
  constexpr int kLast = (kSteps - 1) % kWarp;
  const bool has_last = first_step + kLast == kSteps - 1 && lane / 4 == 7;

  float sums[kTile / 16][2 * kWarp][4] = {};
  for (int64_t b = begin; b < end; ++b) {
    const int64_t image = b / (g.blocks * g.strips);
    const int strip = static_cast<int>(b / g.blocks % g.strips), first = static_cast<int>(b % g.blocks) * kPixels<T>;
    __syncthreads();  // the previous block's pixels have been used
    stage_gradient<T, kTile>(gradient, gpu::shared_cast<std::conditional_t<kIsTF32, uint32_t, uint16_t>>(masks),
                             grad + image * g.filters * g.out_height * g.out_width, g, strip, first,
                             blockIdx.y * kTile);
    gpu::cp_async_commit();
    const Stored<T>* in = x + image * kChannels * g.height * g.width;
    if (g.channels_last)
      stage<kChannels, true, kPixels<T>>(shared, in, g, strip, first);
    else
      stage<kChannels, false, kPixels<T>>(shared, in, g, strip, first);
    gpu::cp_async_wait<0>();
    __syncthreads();
    const int pixels = min(kPixels<T>, g.out_height * g.pitch() - first);
    const gpu::shared<uint16_t> cell = gpu::shared_cast<uint16_t>(shared);
    const gpu::shared<uint16_t> filters = gpu::shared_cast<uint16_t>(gradient) + row;
    if constexpr (kIsTF32) {
#pragma unroll 1
      for (int pixel = 0; pixel < pixels; pixel += 8) {
        uint32_t right[2 * kWarp][2];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          // The gradient is 0 where there is no output, but 0 * NaN is not: x is cleared as well.
          const uint32_t keep = masks[pixel + 4 * k + quad];
#pragma unroll
          for (int s = 0; s < kWarp; ++s) {
            const auto two = gpu::load2(gpu::shared_cast<uint32_t>(cell + (cells[s] + (pixel + 4 * k) * 8)));
            right[2 * s][k] = two.v[0] & keep;
            right[2 * s + 1][k] = two.v[1] & keep;
          }
          if (has_last) right[2 * kLast + 1][k] = kOne<T>;
        }
#pragma unroll
        for (int m = 0; m < kTile / 16; m += 2) {
          const gpu::shared<uint32_t> at = gpu::shared_cast<uint32_t>(filters) + (pixel * kTile + m * 16);
          const auto low = gpu::load4(at), high = gpu::load4(at + 4 * kTile);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const uint32_t left[4] = {low.v[2 * i], low.v[2 * i + 1], high.v[2 * i], high.v[2 * i + 1]};
#pragma unroll
            for (int s = 0; s < 2 * kWarp; ++s) mma<T>(sums[m + i][s], left, right[s]);
          }
        }
      }
    } else {
#pragma unroll 1
      for (int pixel = 0; pixel < pixels; pixel += 16) {
        const uint32_t keep0 = masks[pixel / 2 + quad], keep1 = masks[pixel / 2 + quad + 4];  // as above
        uint32_t right[kWarp][4];
#pragma unroll
        for (int s = 0; s < kWarp; ++s) {
          gpu::ldmatrix_x4_trans(right[s], cell + (cells[s] + pixel * 8));
#pragma unroll
          for (int i = 0; i < 4; ++i) right[s][i] &= i % 2 ? keep1 : keep0;
        }
        if (has_last) right[kLast][2] = right[kLast][3] = kOne<T>;
#pragma unroll
        for (int m = 0; m < kTile / 16; ++m) {
          uint32_t left[4];
          gpu::ldmatrix_x4_trans(left, filters + (pixel * kRow<T, kTile> * 2 + m * 16));
#pragma unroll
          for (int s = 0; s < kWarp; ++s) {
            const uint32_t low[2] = {right[s][0], right[s][1]}, high[2] = {right[s][2], right[s][3]};
            mma<T>(sums[m][2 * s], left, low);
            mma<T>(sums[m][2 * s + 1], left, high);
          }
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
        for (int i = 0; i < 8; ++i) {
          const int half = i / 2 % 2, e = i % 2, column = i / 4;  // of four filters, of four elements; of products
          const int filter = kIsTF32 ? m / 2 * 32 + lane / 4 * 4 + m % 2 * 2 + half : m * 16 + half * 8 + lane / 4;
          const int element = kIsTF32 ? quad * 4 + e * 2 + column : column * 8 + quad * 2 + e;
          out[filter * (kSteps * 16) + (first_step + s) * 16 + element] = sums[m][2 * s + column][half * 2 + e];
        }
    }
}

// Adds the slices up, from the first to the last; a thread per slab element of a filter.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_partials_kernel(const float* partial, T* dweight, T* dbias, int filters, int elements, int slices,
                        int64_t slice_size, int taps_per_filter, Taps taps) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x, filter = i / elements;
  if (filter >= filters) return;
  const int element = static_cast<int>(i % elements), tap = taps.tap[element];
  if (tap < 0 && element != elements - 1) return;
  float sum = 0;
#pragma unroll 8
  for (int s = 0; s < slices; ++s) sum += partial[s * slice_size + i];
  T* to = tap < 0 ? dbias + filter : dweight + filter * taps_per_filter + tap;
  *to = gpu::from_float<T>(sum);
}

// Four channels have too many slabs for the registers of 96 filters.
int tile_of(const Conv& conv) {
  return conv.channels == 4 ? 64 : filter_tile(conv);
}
template <int kWidth>
int steps_of(const Conv& conv) {
  return dispatch_channels(conv, [](auto channels) { return kSixteens<decltype(channels)::value, kWidth>; });
}
int64_t slice_size(DType dtype, const Conv& conv) {
  const int steps = dtype == kTF32 ? steps_of<4>(conv) : steps_of<8>(conv);
  return int64_t{divide_up(conv.filters, tile_of(conv))} * tile_of(conv) * steps * 16;
}
// Of the batch and the layer alone, not of the device: no result may depend on that.
int slices_of(int64_t n, const Geometry& g) {
  return static_cast<int>(std::min(int64_t{128}, n * g.strips * g.blocks));
}

template <class T, int kChannels, int kTile>
gpu::error_t launch_tile(const Images& images, const void* grad, const void* x, void* dweight, void* dbias,
                         const Conv& conv, float* workspace, gpu::stream_t stream) {
  const Geometry geometry = geometry_of(images.channels_last, conv, grad, kPixels<T>);
  const int slices = slices_of(images.n, geometry), elements = kSixteens<kChannels, kWidthOf<T>> * 16;
  constexpr int kBytes = 2 * kPlanesOf<T, kChannels> * kPlaneFor<kPixels<T>> +
                         kPixels<T> * (4 * kRow<T, kTile> + static_cast<int>(sizeof(T)));
  static_assert(kBytes <= kSharedEverywhere);
  const gpu::error_t error =
      gpu::launch(weight_grad_mma_kernel<T, kChannels, kTile>, dim3(slices, divide_up(conv.filters, kTile)),
                  dim3(kThreads), kBytes, stream, static_cast<const Stored<T>*>(x), static_cast<const Stored<T>*>(grad),
                  workspace, images.n * geometry.strips * geometry.blocks, geometry,
                  operands<kChannels, kWidthOf<T>, kPixels<T>>(geometry.strip_width + 2));
  if (error != gpu::kSuccess) return error;
  return gpu::launch(sum_partials_kernel<T>, dim3(divide_up(conv.filters * elements, kThreads)), dim3(kThreads), 0,
                     stream, static_cast<const float*>(workspace), static_cast<T*>(dweight), static_cast<T*>(dbias),
                     static_cast<int>(conv.filters), elements, slices, slice_size(images.dtype, conv), kChannels * 121,
                     taps<kChannels, kWidthOf<T>>());
}

}  // namespace

int64_t conv2d_weight_grad_workspace(DType dtype, int64_t n, const Conv& conv) {
  if (on_tensor_cores(dtype)) {
    const int pixels = dtype == kTF32 ? kPixels<float> : kPixels<gpu::half>;
    return slices_of(n, geometry_of(false, conv, nullptr, pixels)) * slice_size(dtype, conv);
  }
  return conv2d_weight_grad_slices(n) * conv.filters * (conv.channels * conv.kernel_size * conv.kernel_size + 1);
}

gpu::error_t launch_conv2d_weight_grad_mma(const Images& images, const void* grad, const void* x, void* dweight,
                                           void* dbias, const Conv& conv, float* workspace, gpu::stream_t stream) {
  const auto run = [&](auto type) {
    using T = typename decltype(type)::type;
    return dispatch_channels(conv, [&](auto channels) {
      constexpr int kChannels = decltype(channels)::value;
      if constexpr (kChannels < 4)
        if (tile_of(conv) == 96)
          return launch_tile<T, kChannels, 96>(images, grad, x, dweight, dbias, conv, workspace, stream);
      return launch_tile<T, kChannels, 64>(images, grad, x, dweight, dbias, conv, workspace, stream);
    });
  };
  return dispatch(images.dtype, run);
}

}  // namespace alexnet_cuda
