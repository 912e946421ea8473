// The operands of conv2d_weight_grad_mma.cu in shared memory: how large a stage is, where a pixel's gradient and s2d
// blocks lie, and how a lane takes its fragments of a product from there.
//
// Both operands have to be transposed: products sum over pixels, and a pixel's filters, or channels, are contiguous.
//
//   16-bit   ldmatrix.trans. Rows of 8 pixels of the gradient are an odd multiple of 16 bytes apart, s2d blocks 16
//            bytes: the 8 addresses of a matrix are in different banks.
//   TF32     A lane loads 16 bytes of the gradient, two filters of two pixels, all that it has of a 16x8 fragment, and
//            8 bytes of an s2d block, two of its channels: one column of each of two products.
#pragma once

#include "pixel_sequence.h"

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
// 1 in every element of an operand word.
template <class T>
constexpr uint32_t kOne = sizeof(T) == 4                 ? 0x3f800000
                          : std::is_same_v<T, gpu::half> ? 0x3c003c00
                                                         : 0x3f803f80;
template <class T>
constexpr int kPixels = kThreads / sizeof(T);  // of a stage
template <class T>
constexpr int kParts = kThreads / kPixels<T>;   // threads that share an s2d block, or a pixel of the gradient
constexpr int kMaxWidth = 61;                   // of a strip: with it the halo is a whole number of stages
constexpr int kHalo = 2 * (kMaxWidth + 2) + 2;  // s2d blocks that a pixel needs after its own
template <class T>
constexpr int kLead = kHalo / kPixels<T>;  // so many stages before its own, the s2d blocks of a stage are loaded
static_assert(kHalo % kPixels<float> == 0 && kHalo % kPixels<gpu::half> == 0);
template <class T>
constexpr int kRing = (2 + kLead<T>)*kPixels<T>;  // s2d blocks in shared memory
static_assert((kRing<float> & (kRing<float> - 1)) == 0);
// Words per pixel of the gradient. 16-bit: an odd multiple of 16 bytes, against bank conflicts.
template <class T, int kTile>
constexpr int kRow = sizeof(T) == 4 ? kTile : kTile / 2 + 4;

// The word where 16 bytes (a run) of a pixel's filters begin. TF32 lies as [8 pixels][pair of filters][pixel % 4]
// [pixel / 4][filter of the pair], so that the second half of a run is 16 words behind the first.
template <class T, int kTile>
GPU_DEVICE int gradient_at(int pixel, int run) {
  return sizeof(T) == 4 ? pixel / 8 * 8 * kTile + run * 32 + pixel % 4 * 4 + pixel / 4 % 2 * 2
                        : pixel * kRow<T, kTile> + run * 4;
}
template <class E>
GPU_DEVICE void store_run(gpu::shared<uint32_t> to, int run, const E (&v)[16 / sizeof(E)]) {
  if constexpr (sizeof(E) == 4) {
    // Neighbouring runs take their halves in opposite order: they are in the same banks.
    const int first = run % 2;
    const gpu::Vec2<uint32_t> low = {operand_word(v), operand_word(v + 1)};
    const gpu::Vec2<uint32_t> high = {operand_word(v + 2), operand_word(v + 3)};
    gpu::shared_cast<gpu::Vec2<uint32_t>>(to + first * 16)[0] = first ? high : low;
    gpu::shared_cast<gpu::Vec2<uint32_t>>(to + (1 - first) * 16)[0] = first ? low : high;
  } else {
    store_group(to, v);
  }
}

// 16 of K of the next 8 (TF32) or 16 pixels, from where `offset` in the ring is, which moves on. The gradient is 0
// where there is no output, but 0 * NaN is NaN: s2d blocks are masked.
template <class T>
GPU_DEVICE void load_right(gpu::shared<uint16_t> ring, const uint32_t (&keep)[2], int end, int& offset,
                           uint32_t (*right)[2]) {
  constexpr bool kIsTF32 = sizeof(T) == 4;
  const auto advance = [&](int blocks) {
    const int next = offset + blocks * 8;
    if constexpr (kIsTF32)  // the ring is a power of two
      offset = (offset & -8 * kRing<T>) | (next & (8 * kRing<T> - 1));
    else
      offset = next < end ? next : next - 8 * kRing<T>;
  };
  if constexpr (kIsTF32) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const auto two = gpu::load2(gpu::shared_cast<uint32_t>(ring + offset));
#pragma unroll
      for (int i = 0; i < 2; ++i) right[i][k] = two.v[i] & keep[k];
      advance(4);
    }
  } else {
    uint32_t four[4];
    gpu::ldmatrix_x4_trans(four, ring + offset);
#pragma unroll
    for (int i = 0; i < 4; ++i) right[i / 2][i % 2] = four[i] & keep[i % 2];
    advance(16);
  }
}

// 16 filters of the gradient of 8 (TF32) or 16 pixels.
template <class T>
GPU_DEVICE void load_left(gpu::shared<uint16_t> from, uint32_t (&left)[4]) {
  if constexpr (sizeof(T) == 4) {
    const gpu::Vec4<uint32_t> words = gpu::load4(gpu::shared_cast<uint32_t>(from));
#pragma unroll
    for (int i = 0; i < 4; ++i) left[i] = words.v[i];
  } else {
    gpu::ldmatrix_x4_trans(left, from);
  }
}

}  // namespace
}  // namespace alexnet_cuda
