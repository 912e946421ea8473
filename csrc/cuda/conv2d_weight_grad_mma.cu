// The weight and bias gradient of AlexNet's first convolution on tensor cores: float16, bfloat16, TF32, and float32 by
// TF32x3.
//
//   dw[filter, k] = sum over output pixels of  dy[pixel, filter]  x[pixel + shift of k, channel of k]
//
// where k counts the elements of all K slices (k_schedule.h). The last k meets no filter element; its x is taken as 1,
// so that its sums are the bias gradient. A thread block keeps the sums of 64 or 96 filters and all k in registers:
// each of its 8 warps has all the filters and an eighth of the K slices. It goes through its share of the pixels of all
// images (split-K); sum_partials adds the partial sums of the thread blocks in a fixed order.
//
// Memory: a thread block takes its pixels (pixel_sequence.h) in stages. Shared memory holds the gradient of two stages,
// as [pixel][filter], and s2d blocks in a ring, so that each is loaded once. The next stage is loaded during the
// products of this one, in three parts to spare registers: s2d blocks, and the two halves of the gradient. A part goes
// from global memory to registers before some of the products, to shared memory after them. A 16-bit gradient in NHWC
// is copied by cp.async. During stage s, of 128 pixels (TF32: 64, where s2d blocks are loaded one stage earlier):
//
//   products of stage s        4 eighths          2 eighths              2 eighths
//   loaded for stage s + 1     s2d blocks         first half of dy       second half of dy
//
//   s2d blocks in the ring     s  s + 1 (the products read both) | s + 2 (is loaded, over those of s - 1)
//   gradient in two buffers    s  (the products read it)         | s + 1 (is loaded, over that of s - 1)
//
// The trick: products sum over pixels, which neither operand has as its contiguous index. For 16-bit elements ldmatrix
// transposes both. It cannot for TF32, but filters and k may be assigned to rows and columns of the products freely
// (conv2d_weight_grad_operands.h).
//
// Numerics: products of T, float sums. TF32x3 (space_to_depth.h) masks no operand: sums that are not finite are made
// again by float products.
//
// Count: 8 pixels x 96 filters x 48 k of TF32x3 take a warp 429 instructions on sm_90 (108 HMMA, 180 FADD). As many
// FFMA are 1152, of conv2d.cu 1363 instructions with their loads.
#include "conv2d_weight_grad_operands.h"
#include "float_products.h"

namespace alexnet_cuda {
namespace {

// partial[split][filter tile][filter][k]: the sums over the split's share of `total` stages.
template <class T, int kChannels, int kTile>
__global__ void __launch_bounds__(kThreads, 1)
    weight_grad_mma_kernel(const Storage<T>* __restrict__ x, const Storage<T>* __restrict__ grad,
                           float* __restrict__ partial, int64_t total, Pixels g, SliceTable table) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  if constexpr (kIsTF32x3<T>) {  // not used: has_tf32x3_weight_grad
    __trap();
    return;
  }
#endif
  constexpr bool kIsTF32 = sizeof(T) == 4;
  constexpr int kSize = kGroupSize<T>, kSteps = kSixteens<kChannels, kSize>, kWarpSteps = (kSteps + 7) / 8;
  constexpr int kStepPixels = kPixels<T> / 8, kGradient = kPixels<T> * kRow<T, kTile>;
  constexpr int kItems = kGroups<T, kChannels> / kParts<T>, kRuns = kTile / kSize / kParts<T> / 2;
  const gpu::shared<uint32_t> ring = gpu::dynamic_shared<uint32_t>();
  const gpu::shared<uint32_t> gradients = ring + kGroups<T, kChannels> * kRing<T> * 4;
  const gpu::shared<uint32_t> masks = gradients + 2 * kGradient;  // of two stages: 64 words of an element per pixel
  const int lane = threadIdx.x % 32, quad_lane = lane % 4, first_step = threadIdx.x / 32 * kWarpSteps;
  const int64_t begin = total * blockIdx.x / gridDim.x, end = total * (blockIdx.x + 1) / gridDim.x;

  // Where this lane reads, in 16-bit words. 16-bit: its rows for ldmatrix, an s2d block in each pair of K slices and 8
  // filters of a pixel. TF32: two channels of an s2d block in one of four K slices, two filters of two pixels. At the
  // end of a channel group's s2d blocks it goes back to their beginning.
  int offsets[kWarpSteps], ends[kWarpSteps];
#pragma unroll
  for (int s = 0; s < kWarpSteps; ++s) {
    const int step = min(first_step + s, kSteps - 1);
    const int slice = kIsTF32 ? table.slice[4 * step + lane / 8].offset : table.slice[2 * step + lane / 16].offset;
    offsets[s] = slice + (kIsTF32 ? quad_lane * 8 + lane / 4 % 2 * 4 : lane % 16 * 8);
    ends[s] = (slice / (8 * kRing<T>)+1) * (8 * kRing<T>);
  }
  const int row = kIsTF32 ? lane * 8 : gradient_at<T, kTile>(lane % 8 + lane / 16 * 8, lane / 8 % 2) * 2;

  // What this thread moves: every kParts-th channel group of an s2d block, every kParts-th run of filters of a pixel.
  // Consecutive threads take what is consecutive in memory: pixels, or in NHWC a pixel's runs.
  const int block = threadIdx.x % kPixels<T>, first_group = threadIdx.x / kPixels<T>;
  const int pixel = g.channels_last ? threadIdx.x / kParts<T> : block;
  const int first_run = g.channels_last ? threadIdx.x % kParts<T> : first_group;
  const bool copied = sizeof(T) == 2 && g.vectors && g.channels_last;
  Place block_place(g, begin * kPixels<T> + block), pixel_place(g, begin * kPixels<T> + pixel);

  // Lanes that hold the last k, the bias gradient's: the last of 8 columns in step kLast of the last warp.
  constexpr int kLast = (kSteps - 1) % kWarpSteps;
  const bool has_last = first_step + kLast == kSteps - 1 && lane / 4 == 7;

  float sums[kTile / 16][2 * kWarpSteps][4] = {};
  const int stages = static_cast<int>(end - begin);
  int slot = block;  // of the ring
#pragma unroll 1
  for (int stage = -1 - kLead<T>; stage < stages; ++stage) {
    gpu::cp_async_wait<0>();
    __syncthreads();
    const int now = stage & 1, next = now ^ 1;
    const bool loads_blocks = stage + 1 < stages, loads_gradient = loads_blocks && stage >= -1;
#pragma unroll 1
    for (int load = 0; load < 3; ++load) {
      // The next stage's data to registers, or on their way to shared memory.
      Storage<T> v[std::max(kItems, kRuns)][kSize];
      const Storage<T>* image = grad + int64_t{pixel_place.image} * g.filters * g.out_height * g.out_width;
      const int output = pixel_place.output_index(g), run = first_run + (load == 2 ? kRuns * kParts<T> : 0);
      const int filter = blockIdx.y * kTile + run * kSize;
      const gpu::shared<uint32_t> to = gradients + (next * kGradient + gradient_at<T, kTile>(pixel, run));
      if (load == 0 && loads_blocks) {
        if (copied && loads_gradient) {
#pragma unroll
          for (int i = 0; i < 2 * kRuns; ++i) {
            const int more = i * kParts<T> * kSize;  // filters
            const bool inside = output >= 0 && filter + more < g.filters;
            gpu::cp_async16(to + gradient_at<T, kTile>(0, i * kParts<T>),
                            inside ? image + (output * g.filters + filter + more) : grad, inside);
          }
          gpu::cp_async_commit();
        }
        if (g.channels_last)
          load_blocks<kChannels, true, kParts<T>>(x, g, block_place, first_group, v);
        else
          load_blocks<kChannels, false, kParts<T>>(x, g, block_place, first_group, v);
      } else if (load > 0 && loads_gradient && !copied) {
#pragma unroll
        for (int i = 0; i < kRuns; ++i) load_filters(image, g, output, filter + i * kParts<T> * kSize, v[i]);
      }
      // Four, two and two eighths of this stage's products.
#pragma unroll 1
      for (int step = load == 0 ? 0 : 2 + 2 * load; stage >= 0 && step < 4 + 2 * load; ++step) {
        const gpu::shared<uint32_t> mask = masks + (now * 64 + step * 8 + quad_lane);
        const uint32_t keep[2] = {mask[0], mask[4]};
        uint32_t right[2 * kWarpSteps][2], right_low[2 * kWarpSteps][2];
#pragma unroll
        for (int s = 0; s < kWarpSteps; ++s)
          load_right<T>(gpu::shared_cast<uint16_t>(ring), keep, ends[s], offsets[s], right + 2 * s);
        if (has_last) right[2 * kLast + 1][0] = right[2 * kLast + 1][1] = kOne<T>;
        if constexpr (kIsTF32x3<T>) {
#pragma unroll
          for (int s = 0; s < 4 * kWarpSteps; ++s)
            split(right[s / 2][s % 2], right[s / 2][s % 2], right_low[s / 2][s % 2]);
        }
        const gpu::shared<uint16_t> filters =
            gpu::shared_cast<uint16_t>(gradients + (now * kGradient + step * kStepPixels * kRow<T, kTile>)) + row;
#pragma unroll
        for (int m = 0; m < kTile / 16; ++m) {
          uint32_t left[4], left_low[4];
          load_left<T>(filters + m * (kIsTF32 ? 256 : 16), left);
          if constexpr (kIsTF32x3<T>) {
#pragma unroll
            for (int k = 0; k < 4; ++k) split(left[k], left[k], left_low[k]);
          }
#pragma unroll
          for (int s = 0; s < 2 * kWarpSteps; ++s) {
            if constexpr (kIsTF32x3<T>)
              mma_tf32x3(sums[m][s], left, left_low, right[s], right_low[s]);
            else
              mma<T>(sums[m][s], left, right[s]);
          }
        }
      }
      // Registers to shared memory.
      if (load == 0 && loads_blocks) {
#pragma unroll
        for (int i = 0; i < kItems; ++i) store_group(ring + ((first_group + i * kParts<T>)*kRing<T> + slot) * 4, v[i]);
        slot += slot + kPixels<T> < kRing<T> ? kPixels<T> : kPixels<T> - kRing<T>;
        block_place.advance(g);
      } else if (load > 0 && loads_gradient && !copied) {
#pragma unroll
        for (int i = 0; i < kRuns; ++i) store_run(to + gradient_at<T, kTile>(0, i * kParts<T>), first_run, v[i]);
      }
      if (load == 2 && loads_gradient) {
        using Mask = std::conditional_t<kIsTF32, uint32_t, uint16_t>;
        if (first_run == 0) gpu::shared_cast<Mask>(masks + next * 64)[pixel] = static_cast<Mask>(output >= 0 ? ~0u : 0);
        pixel_place.advance(g);
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
          const int filter = m * 16 + (kIsTF32 ? lane / 4 * 2 + half : half * 8 + lane / 4);
          const int element = kIsTF32 ? quad_lane * 4 + e * 2 + column : column * 8 + quad_lane * 2 + e;
          out[filter * (kSteps * 16) + (first_step + s) * 16 + element] = sums[m][2 * s + column][half * 2 + e];
        }
    }
}

// ---- host ----------------------------------------------------------------------------------------------------------

// Four channels have too many K slices for the registers of 96 filters.
int tile_of(const Conv& conv) {
  return conv.channels == 4 ? 64 : filter_tile(conv);
}
// body(channels, filters of a thread block), integral constants.
template <class Body>
auto dispatch_tile(const Conv& conv, Body body) {
  return dispatch_channels(conv, [&](auto channels) {
    constexpr int kChannels = decltype(channels)::value;
    if constexpr (kChannels < 4)
      if (tile_of(conv) == 96) return body(channels, std::integral_constant<int, 96>{});
    return body(channels, std::integral_constant<int, 64>{});
  });
}
int64_t split_size(DType dtype, const Conv& conv) {
  const int sixteens = dispatch_channels(conv, [&](auto channels) {
    constexpr int kChannels = decltype(channels)::value;
    return is_16bit(dtype) ? kSixteens<kChannels, 8> : kSixteens<kChannels, 4>;
  });
  return int64_t{divide_up(conv.filters, tile_of(conv))} * tile_of(conv) * sixteens * 16;
}
template <class T>
Pixels pixels_of(const ConvArguments& args) {
  const StripGeometry g = strip_geometry(args.images.channels_last, args.conv, args.grad, kPixels<T>, kMaxWidth);
  const int pitch = g.strip_width + 2;
  return {g, static_cast<int>(args.images.count), g.out_height + 2, kPixels<T> / pitch, kPixels<T> % pitch};
}
template <class T>
int64_t stages_of(const ConvArguments& args) {
  const Pixels g = pixels_of<T>(args);
  return (int64_t{g.images} * g.strips * g.rows * (g.strip_width + 2) + kPixels<T> - 1) / kPixels<T>;
}
// A function of the batch and the layer alone, so that results do not depend on the device. With several tiles of
// filters each has fewer splits, so that the workspace does not grow with the filters.
int splits_of(int64_t stages, const Conv& conv) {
  const int64_t most = kMaxSplits / divide_up(conv.filters, tile_of(conv));
  return static_cast<int>(std::clamp<int64_t>(most, 1, stages));
}

template <class T, int kChannels, int kTile>
gpu::error_t launch_tile(const ConvArguments& args, gpu::stream_t stream) {
  const Conv& conv = args.conv;
  const Pixels g = pixels_of<T>(args);
  const int64_t stages = stages_of<T>(args);
  const int splits = splits_of(stages, conv), elements = kSixteens<kChannels, kGroupSize<T>> * 16;
  constexpr int kBytes = 16 * kGroups<T, kChannels> * kRing<T> + 2 * (4 * kPixels<T> * kRow<T, kTile> + 4 * 64);
  static_assert(kBytes <= kMinSharedMemory);
  const gpu::error_t error =
      gpu::launch(weight_grad_mma_kernel<T, kChannels, kTile>, dim3(splits, divide_up(conv.filters, kTile)), kThreads,
                  kBytes, stream, args.x, args.grad, args.workspace, stages, g,
                  slice_table<kChannels, kGroupSize<T>, 8 * kRing<T>>(g.strip_width + 2));
  if (error != gpu::kSuccess) return error;
  const gpu::error_t summed = sum_partials<T>(args, elements, splits, split_size(args.images.dtype, conv),
                                              tap_table<kChannels, kGroupSize<T>>(), stream);
  if (!kIsTF32x3<T> || summed != gpu::kSuccess) return summed;
  return gpu::launch(remake_kernel<kChannels>, dim3(divide_up(conv.filters * (kChannels * kKernelArea + 1), kThreads)),
                     kThreads, 0, stream, args.x, args.grad, args.grad_weight, args.grad_bias,
                     static_cast<const StripGeometry&>(g), g.images);
}

}  // namespace

int64_t conv2d_weight_grad_workspace(const ConvArguments& args) {
  const Conv& conv = args.conv;
  const DType dtype = args.images.dtype;
  if (!uses_tensor_cores(dtype))
    return conv2d_weight_grad_splits(args) * conv.filters * (conv.channels * kKernelArea + 1);
  const int64_t stages = is_16bit(dtype) ? stages_of<gpu::half>(args) : stages_of<float>(args);
  return splits_of(stages, conv) * split_size(dtype, conv);
}

gpu::error_t launch_conv2d_weight_grad_mma(const ConvArguments& args, gpu::stream_t stream) {
  return dispatch_product(args.images.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return dispatch_tile(args.conv, [&](auto channels, auto tile) {
      constexpr int kChannels = decltype(channels)::value;
      if constexpr (kIsTF32x3<T> && kChannels == 4)
        return gpu::kSuccess;  // not used: has_tf32x3_weight_grad
      else
        return launch_tile<T, kChannels, decltype(tile)::value>(args, stream);
    });
  });
}

}  // namespace alexnet_cuda
