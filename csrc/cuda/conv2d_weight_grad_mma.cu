// The weight and bias gradient of AlexNet's first convolution on tensor cores: float16, bfloat16 and TF32.
//
//   dw[filter, k] = sum over output pixels of  dy[pixel, filter]  x[pixel + shift of k, channel of k]
//
// where k counts the elements of all K slices (k_schedule.h). The last k meets no filter element; its x is taken as 1,
// so that its sums are the bias gradient. A thread block keeps the sums of 64 or 96 filters and all k in registers:
// each of its 8 warps has all the filters and an eighth of the K slices. It goes through its share of the pixels of all
// images (split-K); sum_partials adds the partial sums of the thread blocks in a fixed order.
//
// Memory: of a block of pixels, the s2d blocks of x (space_to_depth.h) and the gradient, as [pixel][filter], lie in
// shared memory.
//
// The trick: products sum over pixels, which neither operand has as its contiguous index. For 16-bit elements ldmatrix
// transposes both. It cannot for TF32, but filters and k may be assigned to rows and columns of the products freely: a
// lane loads four filters of a pixel, which are the elements of four rows, and two k, those of two columns.
//
// Numerics: products of T, float sums.
#include "space_to_depth.h"

namespace alexnet_cuda {
namespace {

// K in units of 16, which two products have as columns.
template <int kChannels, int kSize>
constexpr int kSixteens = (kSchedule<kChannels, kSize>.count * kSize + 15) / 16;
template <int kChannels, int kSize>
constexpr bool last_is_free() {
  const KSlice& slice = kSchedule<kChannels, kSize>.slices[kSixteens<kChannels, kSize> * 16 / kSize - 1];
  return !(slice.mask >> (kSize - 1) & 1);
}
static_assert(last_is_free<1, 8>() && last_is_free<3, 8>() && last_is_free<4, 8>());
static_assert(last_is_free<1, 4>() && last_is_free<3, 4>() && last_is_free<4, 4>());
template <class T>
constexpr uint32_t kOne = sizeof(T) == 4                 ? 0x3f800000
                          : std::is_same_v<T, gpu::half> ? 0x3c003c00
                                                         : 0x3f803f80;
template <class T>
constexpr int kPixels = sizeof(T) == 4 ? kBlockPixels / 2 : kBlockPixels;  // in shared memory at a time
// Words per pixel of the gradient. 16-bit: an odd multiple of 16 bytes, against bank conflicts. TF32: see gradient_at.
template <class T, int kTile>
constexpr int kRow = sizeof(T) == 4 ? kTile : kTile / 2 + 4;

// The word where 16 bytes (a run) of a pixel's filters begin. Lanes read the same two runs of TF32 in four pixels at a
// time: runs are permuted (xor) so that all are in different banks.
template <class T, int kTile>
GPU_DEVICE int gradient_at(int pixel, int run) {
  return pixel * kRow<T, kTile> + (sizeof(T) == 4 ? run ^ pixel % 4 * 2 : run) * 4;
}

// Moves the gradient of a block of pixels to shared memory, as [pixel][filter], zeros where there is no such output or
// filter; and a mask of an element's size per pixel, all ones if there is such an output. Wait for cp.async afterwards.
template <class T, int kTile, class Mask>
GPU_DEVICE void stage_gradient(gpu::shared<uint32_t> to, gpu::shared<Mask> masks, const Storage<T>* image,
                               const StripGeometry& g, int strip, int first, int first_filter) {
  constexpr int kSize = kGroupSize<T>, kRuns = kTile / kSize;
  for (int i = threadIdx.x; i < kPixels<T> * kRuns; i += kThreads) {
    // Consecutive threads take what is consecutive in memory: runs of filters of a pixel, or pixels.
    const int pixel = g.channels_last ? i / kRuns : i % kPixels<T>;
    const int run = g.channels_last ? i % kRuns : i / kPixels<T>, filter = first_filter + run * kSize;
    const int output = g.output_index(strip, first + pixel);
    const gpu::shared<uint32_t> row = to + gradient_at<T, kTile>(pixel, run);
    if (sizeof(T) == 2 && g.vectors && g.channels_last) {
      const bool inside = output >= 0 && filter < g.filters;
      gpu::cp_async16(row, inside ? image + (output * g.filters + filter) : image, inside);
    } else {
      gpu::store4(row, load_gradient<T>(image, g, output, filter));
    }
    if (run == 0) masks[pixel] = static_cast<Mask>(output >= 0 ? ~0u : 0);
  }
}

// partial[split][filter tile][filter][k]: the sums over the split's share of `total` blocks of pixels.
template <class T, int kChannels, int kTile>
__global__ void __launch_bounds__(kThreads, 1)
    weight_grad_mma_kernel(const Storage<T>* __restrict__ x, const Storage<T>* __restrict__ grad,
                           float* __restrict__ partial, int64_t total, StripGeometry g, SliceTable table) {
  constexpr bool kIsTF32 = sizeof(T) == 4;
  constexpr int kSteps = kSixteens<kChannels, kGroupSize<T>>, kWarpSteps = (kSteps + 7) / 8;
  const gpu::shared<uint32_t> shared = gpu::dynamic_shared<uint32_t>();
  const gpu::shared<uint32_t> gradient = shared + kGroups<T, kChannels> * kGroupStrideFor<kPixels<T>> / 2;
  const gpu::shared<uint32_t> masks = gradient + kPixels<T> * kRow<T, kTile>;
  const int lane = threadIdx.x % 32, quad_lane = lane % 4, first_step = threadIdx.x / 32 * kWarpSteps;
  const int64_t begin = total * blockIdx.x / gridDim.x, end = total * (blockIdx.x + 1) / gridDim.x;

  // Where this lane reads, in 16-bit words. 16-bit: its rows for ldmatrix, an s2d block in each pair of K slices and 8
  // filters of a pixel. TF32: two channels of an s2d block in one of four K slices, four filters of a pixel.
  int offsets[kWarpSteps];
#pragma unroll
  for (int s = 0; s < kWarpSteps; ++s) {
    const int step = min(first_step + s, kSteps - 1);
    offsets[s] = kIsTF32 ? table.slice[4 * step + lane / 8].offset + quad_lane * 8 + lane / 4 % 2 * 4
                         : table.slice[2 * step + lane / 16].offset + lane % 16 * 8;
  }
  const int row = kIsTF32 ? gradient_at<T, kTile>(quad_lane, lane / 4) * 2
                          : gradient_at<T, kTile>(lane % 8 + lane / 16 * 8, lane / 8 % 2) * 2;

  // Lanes that hold the last k, the bias gradient's: the last of 8 columns in step kLast of the last warp.
  constexpr int kLast = (kSteps - 1) % kWarpSteps;
  const bool has_last = first_step + kLast == kSteps - 1 && lane / 4 == 7;

  float sums[kTile / 16][2 * kWarpSteps][4] = {};
  for (int64_t b = begin; b < end; ++b) {
    // Block of pixels b: a part of a strip of an image.
    const int64_t image = b / (g.blocks * g.strips);
    const int strip = static_cast<int>(b / g.blocks % g.strips), first = static_cast<int>(b % g.blocks) * kPixels<T>;
    // Gradient and s2d blocks of the next pixels to shared memory, once the previous ones have been used.
    __syncthreads();
    stage_gradient<T, kTile>(gradient, gpu::shared_cast<std::conditional_t<kIsTF32, uint32_t, uint16_t>>(masks),
                             grad + image * g.filters * g.out_height * g.out_width, g, strip, first,
                             blockIdx.y * kTile);
    gpu::cp_async_commit();
    const Storage<T>* in = x + image * kChannels * g.height * g.width;
    if (g.channels_last)
      stage_blocks<kChannels, true, kPixels<T>>(shared, in, g, strip, first);
    else
      stage_blocks<kChannels, false, kPixels<T>>(shared, in, g, strip, first);
    gpu::cp_async_wait<0>();
    __syncthreads();
    const int pixels = min(kPixels<T>, g.out_height * g.pitch() - first);
    const gpu::shared<uint16_t> blocks = gpu::shared_cast<uint16_t>(shared);
    const gpu::shared<uint16_t> filters = gpu::shared_cast<uint16_t>(gradient) + row;
    // Each iteration multiplies 8 (TF32) or 16 pixels. Fragments come from shared memory: `right` the warp's part of K,
    // `left` 16 or 32 filters at a time. The gradient is 0 where there is no output, but 0 * NaN is NaN: x is masked.
    if constexpr (kIsTF32) {
#pragma unroll 1
      for (int pixel = 0; pixel < pixels; pixel += 8) {
        uint32_t right[2 * kWarpSteps][2];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const uint32_t keep = masks[pixel + 4 * k + quad_lane];
#pragma unroll
          for (int s = 0; s < kWarpSteps; ++s) {
            const auto two = gpu::load2(gpu::shared_cast<uint32_t>(blocks + (offsets[s] + (pixel + 4 * k) * 8)));
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
            for (int s = 0; s < 2 * kWarpSteps; ++s) mma<T>(sums[m + i][s], left, right[s]);
          }
        }
      }
    } else {
#pragma unroll 1
      for (int pixel = 0; pixel < pixels; pixel += 16) {
        const uint32_t keep0 = masks[pixel / 2 + quad_lane], keep1 = masks[pixel / 2 + quad_lane + 4];
        uint32_t right[kWarpSteps][4];
#pragma unroll
        for (int s = 0; s < kWarpSteps; ++s) {
          gpu::ldmatrix_x4_trans(right[s], blocks + (offsets[s] + pixel * 8));
#pragma unroll
          for (int i = 0; i < 4; ++i) right[s][i] &= i % 2 ? keep1 : keep0;
        }
        if (has_last) right[kLast][2] = right[kLast][3] = kOne<T>;
#pragma unroll
        for (int m = 0; m < kTile / 16; ++m) {
          uint32_t left[4];
          gpu::ldmatrix_x4_trans(left, filters + (pixel * kRow<T, kTile> * 2 + m * 16));
#pragma unroll
          for (int s = 0; s < kWarpSteps; ++s) {
            const uint32_t low[2] = {right[s][0], right[s][1]}, high[2] = {right[s][2], right[s][3]};
            mma<T>(sums[m][2 * s], left, low);
            mma<T>(sums[m][2 * s + 1], left, high);
          }
        }
      }
    }
  }

  // Registers to the workspace, back in the order of filters and k.
  float* out = partial + (int64_t{blockIdx.x} * gridDim.y + blockIdx.y) * (kTile * kSteps * 16);
#pragma unroll
  for (int s = 0; s < kWarpSteps; ++s)
    if (first_step + s < kSteps) {
#pragma unroll
      for (int m = 0; m < kTile / 16; ++m)
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int half = i / 2 % 2, e = i % 2, column = i / 4;  // half of the rows, element of the pair, product
          const int filter = kIsTF32 ? m / 2 * 32 + lane / 4 * 4 + m % 2 * 2 + half : m * 16 + half * 8 + lane / 4;
          const int element = kIsTF32 ? quad_lane * 4 + e * 2 + column : column * 8 + quad_lane * 2 + e;
          out[filter * (kSteps * 16) + (first_step + s) * 16 + element] = sums[m][2 * s + column][half * 2 + e];
        }
    }
}

// Four channels have too many K slices for the registers of 96 filters.
int tile_of(const Conv& conv) {
  return conv.channels == 4 ? 64 : filter_tile(conv);
}
int64_t split_size(DType dtype, const Conv& conv) {
  const int sixteens = dispatch_channels(conv, [&](auto channels) {
    constexpr int kChannels = decltype(channels)::value;
    return dtype == DType::kTF32 ? kSixteens<kChannels, 4> : kSixteens<kChannels, 8>;
  });
  return int64_t{divide_up(conv.filters, tile_of(conv))} * tile_of(conv) * sixteens * 16;
}
// A function of the batch and the layer alone, so that results do not depend on the device.
int splits_of(int64_t images, const StripGeometry& g) {
  return static_cast<int>(std::min(int64_t{128}, images * g.strips * g.blocks));
}

template <class T, int kChannels, int kTile>
gpu::error_t launch_tile(const ConvArguments& args, gpu::stream_t stream) {
  const Conv& conv = args.conv;
  const StripGeometry g = strip_geometry(args.images.channels_last, conv, args.grad, kPixels<T>);
  const int splits = splits_of(args.images.count, g), elements = kSixteens<kChannels, kGroupSize<T>> * 16;
  constexpr int kBytes = 2 * kGroups<T, kChannels> * kGroupStrideFor<kPixels<T>> +
                         kPixels<T> * (4 * kRow<T, kTile> + static_cast<int>(sizeof(T)));
  static_assert(kBytes <= kMinSharedMemory);
  const gpu::error_t error =
      gpu::launch(weight_grad_mma_kernel<T, kChannels, kTile>, dim3(splits, divide_up(conv.filters, kTile)), kThreads,
                  kBytes, stream, args.x, args.grad, args.workspace, args.images.count * g.strips * g.blocks, g,
                  slice_table<kChannels, kGroupSize<T>, kPixels<T>>(g.strip_width + 2));
  if (error != gpu::kSuccess) return error;
  return sum_partials<T>(args, elements, splits, split_size(args.images.dtype, conv),
                         tap_table<kChannels, kGroupSize<T>>(), stream);
}

}  // namespace

int64_t conv2d_weight_grad_workspace(const ConvArguments& args) {
  const Conv& conv = args.conv;
  const DType dtype = args.images.dtype;
  if (!uses_tensor_cores(dtype))
    return conv2d_weight_grad_splits(args) * conv.filters * (conv.channels * kKernelArea + 1);
  const int pixels = dtype == DType::kTF32 ? kPixels<float> : kPixels<gpu::half>;
  return splits_of(args.images.count, strip_geometry(false, conv, nullptr, pixels)) * split_size(dtype, conv);
}

gpu::error_t launch_conv2d_weight_grad_mma(const ConvArguments& args, gpu::stream_t stream) {
  return dispatch_dtype(args.images.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return dispatch_tile(args.conv, tile_of(args.conv), [&](auto channels, auto tile) {
      return launch_tile<T, decltype(channels)::value, decltype(tile)::value>(args, stream);
    });
  });
}

}  // namespace alexnet_cuda
