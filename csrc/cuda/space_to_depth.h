// Space-to-depth (s2d) blocks in shared memory for the tensor core convolutions; k_schedule.h defines the terms.
//
// Layout: [channel group][s2d block][16 bytes], so a shift is an address offset and the rows that ldmatrix reads are
// consecutive. Output columns are cut into strips of at most 64. The pixels of a strip are numbered along its rows of
// s2d blocks, which are 2 longer than the rows of outputs: two results in each row are computed and not stored. Of
// AlexNet's 55 columns:
//
//     0   1   2  ..  54 |  55  56       so the pixel below pixel i is i + 57, whatever i, and a shift by (by, bx) is an
//    57  58  59  .. 111 | 112 113       offset of 57 by + bx s2d blocks for every pixel; warps take 32 numbers, also
//   114 115  ..                         across the ends of rows
#pragma once

#include <array>

#include "k_schedule.h"

namespace alexnet_cuda {

// A float of which tensor cores make products as exact as a float's (3xTF32): with a = high + low, both TF32, a b is
// high high + high low + low high; low low is less than a float's rounding. Of numbers below 1e-35 low is incomplete.
struct TF32x3 {
  float value;

  TF32x3() = default;
  GPU_DEVICE explicit TF32x3(float v) : value(v) {}
  GPU_DEVICE explicit operator float() const { return value; }
};
template <class T>
constexpr bool kIsTF32x3 = std::is_same_v<T, TF32x3>;

// How an element T lies in memory for tensor cores (float is TF32), and how many make a channel group.
template <class T>
using Storage = std::conditional_t<sizeof(T) == 4, T, uint16_t>;
template <class T>
constexpr int kGroupSize = 16 / sizeof(T);
template <class T, int kChannels>
constexpr int kGroups = 16 * kChannels / kGroupSize<T>;

constexpr int kWarpPixels = 32, kBlockPixels = kThreads / 32 * kWarpPixels;
constexpr int kMaxStripWidth = 64;
constexpr int kMinSharedMemory = 99 << 10;  // bytes that a thread block may have on every GPU from 8.0 on
constexpr int kStagedBlocks =
    kBlockPixels + 2 * (kMaxStripWidth + 2) + 2;  // two rows and two s2d blocks past the pixels
constexpr int kGroupStride = 8 * kStagedBlocks;   // 16-bit words from one channel group to the next

// One 32-bit operand word: two elements of 16 bits, one rounded to TF32, or all bits of a float.
GPU_DEVICE uint32_t operand_word(const uint16_t* v) {
  return v[0] | uint32_t{v[1]} << 16;
}
GPU_DEVICE uint32_t operand_word(const float* v) {
  return gpu::to_tf32(v[0]);
}
GPU_DEVICE uint32_t operand_word(const TF32x3* v) {
  return __float_as_uint(v[0].value);
}

// Splits a float's bits into high, rounded to TF32, and low, of which tensor cores ignore the last bits. Where high is
// infinite, low is infinite too, or NaN: no sum of such products is finite.
GPU_DEVICE void split(uint32_t bits, uint32_t& high, uint32_t& low) {
  high = (bits + 0x1000) & ~0x1fffu;
  low = __float_as_uint(__uint_as_float(bits) - __uint_as_float(high));
}

// Writes word `index` of packed weights, whose order is [..][lane][4]: b[0] and b[1] of two products. TF32x3 has two
// words for each, [..][2 products][lane][4]: high b[0] and b[1], then low ones.
template <class E>
GPU_DEVICE void store_weight(uint32_t* packed, int index, const E* v) {
  const auto i = static_cast<uint32_t>(index);  // 2 i may not fit in 31 bits
  if constexpr (kIsTF32x3<E>) {
    uint32_t* to = packed + (i / 128 * 256 + i % 4 / 2 * 128 + i / 4 % 32 * 4 + i % 2);
    split(operand_word(v), to[0], to[2]);
  } else {
    packed[i] = operand_word(v);
  }
}

// The product of one k step.
template <class T>
GPU_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (sizeof(T) == 4)
    gpu::mma_m16n8k8_tf32(d, a, b);
  else
    gpu::mma_m16n8k16<T>(d, a, b);
}

// d += the product of one k step of TF32x3. Tensor cores truncate their sums, a bias that would grow with every step:
// they add a step's products, the small ones first, and ordinary additions, which round, add the steps.
GPU_DEVICE void mma_tf32x3(float (&d)[4], const uint32_t (&a_high)[4], const uint32_t (&a_low)[4],
                           const uint32_t (&b_high)[2], const uint32_t (&b_low)[2]) {
  float step[4] = {};
  gpu::mma_m16n8k8_tf32(step, a_low, b_high);
  gpu::mma_m16n8k8_tf32(step, a_high, b_low);
  gpu::mma_m16n8k8_tf32(step, a_high, b_high);
#pragma unroll
  for (int i = 0; i < 4; ++i) d[i] += step[i];
}

struct StripGeometry : ConvGeometry {
  int strips, strip_width, blocks;  // thread blocks per strip
  bool channels_last, vectors;      // vectors: runs of 8 filters of an output are aligned to 16 bytes

  GPU_DEVICE int pitch() const { return strip_width + 2; }
  // Index of a strip's pixel in the output image, or -1.
  GPU_DEVICE int output_index(int strip, int pixel) const {
    const int row = pixel / pitch(), column = pixel % pitch(), x = strip * strip_width + column;
    return row < out_height && column < strip_width && x < out_width ? row * out_width + x : -1;
  }
};

// Channel group kIndex of the s2d block whose upper left pixel is (y, x); 0 outside the image.
template <int kChannels, bool kNhwc, int kIndex, class E>
GPU_DEVICE void load_group(const ConvGeometry& conv, const E* image, int y, int x, E (&v)[16 / sizeof(E)]) {
  // Which pixel and channel each element is, is known at compile time: one address per row, constant offsets.
  constexpr int kSize = kGroupSize<E>;
  const int height = conv.height, width = conv.width;
  const E* corner = image + (y * width + x) * (kNhwc ? kChannels : 1);
  unroll<kSize>([&](auto e) {
    constexpr S2dChannel at = s2d_channel(kChannels, kSize * kIndex + decltype(e)::value, kSize);
    const bool inside = is_inside(y + at.y, height) && is_inside(x + at.x, width);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200  // where ptxas would spill addresses of rows
    if constexpr (!kNhwc) {
      const int pixel = y * width + x + at.y * width + at.x;
      v[e] = inside ? image[at.c * height * width + pixel] : E{0};
      return;
    }
#endif
    const E* row = corner + (kNhwc ? at.y * kChannels : at.c * height + at.y) * width;
    v[e] = inside ? row[kNhwc ? at.x * kChannels + at.c : at.x] : E{0};
  });
}
template <class E>
GPU_DEVICE gpu::Vec4<uint32_t> pack_group(const E (&v)[16 / sizeof(E)]) {
  gpu::Vec4<uint32_t> words;
#pragma unroll
  for (int k = 0; k < 4; ++k) words.v[k] = operand_word(v + k * kGroupSize<E> / 4);
  return words;
}
template <class E>
GPU_DEVICE void store_group(gpu::shared<uint32_t> to, const E (&v)[16 / sizeof(E)]) {
  gpu::store4(to, pack_group(v));
}

// Moves what a thread block's pixels of a strip from `first` on need, from an image to shared memory: s2d blocks first
// .. first + kBlockPixels + 2 pitch + 1, one per thread at a time, group by group through registers; 0 outside the
// image. Lanes have s2d blocks side by side, 4 pixels apart: a warp's loads of a row of pixels, one element per lane
// at a time, end up in the same cache lines (in NHWC of 3 channels and 16 bits 768 bytes). They are many, but of the
// image alone, which has half as many elements as the result. Stores of 16 bytes a lane fill all banks evenly.
template <int kChannels, bool kNhwc, class E>
GPU_DEVICE void stage_blocks(gpu::shared<uint32_t> to, const E* image, const StripGeometry& g, int strip, int first) {
  const int pitch = g.pitch();
  for (int i = threadIdx.x; i < kBlockPixels + 2 * pitch + 2; i += kThreads) {
    const int row = (first + i) / pitch, column = (first + i) % pitch + strip * g.strip_width;
    unroll<kGroups<E, kChannels>>([&](auto p) {
      E v[kGroupSize<E>];
      load_group<kChannels, kNhwc, decltype(p)::value>(g, image, 4 * row - g.padding, 4 * column - g.padding, v);
      store_group(to + (p * (kGroupStride / 2) + i * 4), v);
    });
  }
}

// Clears the channels of a fragment that meet no weight at this shift: their weights are 0, but 0 * NaN is NaN.
template <class T>
GPU_DEVICE void mask_fragment(int mask, uint32_t& first, uint32_t& second) {
  // A lane holds, per register, 2 neighbouring channels of 16 bits or one of TF32 (fragment layout of mma).
  const int lane_mask = mask >> threadIdx.x % 4 * (kGroupSize<T> / 4);
  const uint32_t keep =
      sizeof(T) == 4 ? (lane_mask & 1 ? ~0u : 0) : (lane_mask & 1 ? 0xffffu : 0) | (lane_mask & 2 ? 0xffff0000u : 0);
  first &= keep;
  second &= keep;
}

// Where a kernel finds each K slice, by value (constant bank): offset in 16-bit words of shared memory, and mask.
struct SliceTable {
  struct {
    int offset, mask;
  } slice[kMaxSlices];
};

// ---- host ----------------------------------------------------------------------------------------------------------

// The tables of all pitches are made at the first call.
template <int kChannels, int kSize = 8, int kGroupWords = kGroupStride>
const SliceTable& slice_table(int pitch) {
  static const auto tables = [] {
    std::array<SliceTable, kMaxStripWidth + 3> tables;
    for (int pitch = 0; pitch < static_cast<int>(tables.size()); ++pitch)
      for (int i = 0; i < kMaxSlices; ++i) {
        const KSlice& slice = kSchedule<kChannels, kSize>.slices[i];
        const int offset = slice.group * kGroupWords + (slice.by * pitch + slice.bx) * 8;
        tables[pitch].slice[i] = {offset, slice.mask};
      }
    return tables;
  }();
  return tables[pitch];
}

// `pixels`: of a strip, per thread block. `y`: the output or its gradient.
inline StripGeometry strip_geometry(bool channels_last, const Conv& conv, const void* y, int pixels = kBlockPixels,
                                    int max_width = kMaxStripWidth) {
  const int strips = divide_up(conv.out_width, max_width), strip_width = divide_up(conv.out_width, strips);
  const int blocks = divide_up(conv.out_height * (strip_width + 2), pixels);
  const bool vectors = conv.filters % 8 == 0 && are_aligned(16, y);
  return {ConvGeometry(conv), strips, strip_width, blocks, channels_last, vectors};
}

// body(Type<T>) with the element type of a tensor core convolution.
template <class Body>
auto dispatch_product(DType dtype, Body body) {
  return dtype == DType::kTF32x3 ? body(Type<TF32x3>{}) : dispatch_dtype(dtype, body);
}

inline bool uses_tensor_cores(DType dtype) {
  return dtype != DType::kFloat;
}

// 64 or 96 filters per thread block, whichever leaves less of the last tile empty.
inline int filter_tile(const Conv& conv) {
  return divide_up(conv.filters, 96) * 96 <= divide_up(conv.filters, 64) * 64 ? 96 : 64;
}

// Adds the splits in order, one (filter, element) per thread, and writes the sum to the weight or bias that the element
// stands for. Consecutive threads read consecutive sums of a split; eight loads of a thread are on their way at once.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_partials_kernel(const float* partial, T* dweight, T* dbias, int filters, int elements, int splits,
                        int64_t split_size, int taps_per_filter, TapTable taps) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x, filter = i / elements;
  if (filter >= filters) return;
  const int element = static_cast<int>(i % elements), tap = taps.tap[element];
  if (tap < 0 && element != elements - 1) return;
  float sum = 0;
#pragma unroll 8
  for (int s = 0; s < splits; ++s) sum += partial[s * split_size + i];
  T* to = tap < 0 ? dbias + filter : dweight + filter * taps_per_filter + tap;
  *to = gpu::from_float<T>(sum);
}

template <class T>
gpu::error_t sum_partials(const ConvArguments& args, int elements, int64_t splits, int64_t split_size,
                          const TapTable& taps, gpu::stream_t stream) {
  const Conv& conv = args.conv;
  return gpu::launch(sum_partials_kernel<T>, dim3(divide_up(conv.filters * elements, kThreads)), kThreads, 0, stream,
                     args.workspace, args.grad_weight, args.grad_bias, conv.filters, elements, splits, split_size,
                     conv.channels * kKernelArea, taps);
}

// Writes the weights, conv2d_workspace floats, in the order that conv2d_mma.cu documents. It runs at every call, a
// kernel that moves 70 KB: writes through a parameter's .data, or in a captured graph, do not change its version
// counter, so packed weights that were kept would sooner or later be stale.
gpu::error_t pack_conv2d_weight(DType dtype, const void* weight, const Conv& conv, float* packed, gpu::stream_t stream);

}  // namespace alexnet_cuda
