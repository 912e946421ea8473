// The float32 matrix product of conv2d.cu: acc[row][column] += sum over k of left[row][k] right[k][column].
//
// A thread block of 128 threads makes a 128 x kColumns tile, 8 x kColumns / 8 of it per thread in registers.
//
// Memory: K slices of 11 values of k go through shared memory, left as [k][128], right as [k][kColumns + 4]. Two
// buffers: while slice s is multiplied from one, slice s + 1 is loaded from global memory to registers.
// Numerics: FFMA only; every sum runs over k in ascending order.
#pragma once

#include "channel_runs.h"

namespace alexnet_cuda {

constexpr int kTileRows = 128, kSlice = 11, kConvThreads = 128;

struct ConvGeometry {
  int height, width, filters, padding, out_height, out_width;

  explicit ConvGeometry(const Conv& c)
      : height(static_cast<int>(c.height)),
        width(static_cast<int>(c.width)),
        filters(static_cast<int>(c.filters)),
        padding(c.padding),
        out_height(static_cast<int>(c.out_height)),
        out_width(static_cast<int>(c.out_width)) {}
};

// One row of the left matrix: v[k] = x at channel c, row y, column x0 + k kStep of an image; `outside` beyond its edges
// and from column `end` on.
template <int kStep, int kChannels, bool kNhwc>
GPU_DEVICE void fetch_left(const View<const float, kNhwc>& x, const float* image, const ConvGeometry& conv, int c,
                           int y, int x0, int end, float outside, float (&v)[kSlice]) {
  // As unsigned numbers, negative coordinates are too large: one comparison tests both borders.
  const bool inside = static_cast<unsigned>(y) < static_cast<unsigned>(conv.height);
  const float* from = image + x.offset(y * conv.width + x0, c);
#pragma unroll
  for (int k = 0; k < kSlice; ++k) {
    const bool valid = inside && static_cast<unsigned>(x0 + k * kStep) < static_cast<unsigned>(end);
    v[k] = valid ? from[k * kStep * (kNhwc ? kChannels : 1)] : outside;
  }
}

// The i-th element of a right slice that a thread moves. Consecutive threads take what is consecutive in memory: k with
// kAlongK, else columns.
template <bool kAlongK>
struct RightElement {
  int k, column;

  GPU_DEVICE explicit RightElement(int i)
      : k(kAlongK ? threadIdx.x % kSlice : threadIdx.x / 32 + i % 3 * 4),
        column(kAlongK ? threadIdx.x / kSlice + i * kSlice : threadIdx.x % 32 + i / 3 * 32) {}
  GPU_DEVICE bool exists(int columns) const {
    return (kAlongK ? threadIdx.x < kSlice * kSlice : k < kSlice) && column < columns;
  }
};
template <int kColumns>
constexpr int kRightElements = kColumns / 32 * 3;  // per thread
static_assert(kRightElements<96> == (96 + kSlice - 1) / kSlice && kRightElements<32> == (32 + kSlice - 1) / kSlice);
static_assert(kSlice <= 3 * 4);

// v[i] = the thread's i-th element of the right slice that begins at `from`; 0 from k = ks and from `columns` on.
// `pitch` is the stride of the index that is not contiguous.
template <bool kAlongK, int n>
GPU_DEVICE void fetch_right(const float* from, int pitch, int ks, int columns, float (&v)[n]) {
  const RightElement<kAlongK> first(0);
  from += kAlongK ? first.column * pitch + first.k : first.k * pitch + first.column;
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const RightElement<kAlongK> e(i);
    const int along = kAlongK ? 0 : e.column - first.column, across = kAlongK ? i * kSlice : i % 3 * 4;
    v[i] = e.k < ks && e.column < columns ? from[across * pitch + along] : 0.f;
  }
}

// Adds `slices` K slices to acc. Thread t calls fetch_left(v) for row t of each left slice, then fetch_right(v) for its
// elements of the right one, slice by slice.
template <int kColumns, bool kAlongK, class FetchLeft, class FetchRight>
GPU_DEVICE void multiply(int slices, float (&acc)[8][kColumns / 8], FetchLeft fetch_left, FetchRight fetch_right) {
  constexpr int kRightRow = kColumns + 4;
  GPU_SHARED_ARRAY(float, left, 2 * kSlice * kTileRows);
  GPU_SHARED_ARRAY(float, right, 2 * kSlice * kRightRow);
  const int t = threadIdx.x, row = t / 8 * 4, column = t % 8 * 4;
  float next_left[kSlice], next_right[kRightElements<kColumns>];
  fetch_left(next_left);
  fetch_right(next_right);
  for (int slice = 0; slice < slices; ++slice) {
    // Registers to shared memory.
    const int a = slice % 2 * kSlice * kTileRows, b = slice % 2 * kSlice * kRightRow;
#pragma unroll
    for (int k = 0; k < kSlice; ++k) left[a + k * kTileRows + t] = next_left[k];
#pragma unroll
    for (int i = 0; i < kRightElements<kColumns>; ++i) {
      const RightElement<kAlongK> e(i);
      if (e.exists(kColumns)) right[b + e.k * kRightRow + e.column] = next_right[i];
    }
    __syncthreads();  // one barrier per slice is enough: the other buffer was last read before it
    // The next slice: global memory to registers.
    if (slice + 1 < slices) {
      fetch_left(next_left);
      fetch_right(next_right);
    }
    // Multiply. A thread has rows 4 (t / 8) .. + 3 and the same 64 further down, columns 4 (t % 8) .. + 3 and those at
    // distances of 32: a warp reads whole 128-byte rows of shared memory.
#pragma unroll
    for (int k = 0; k < kSlice; ++k) {
      const gpu::Vec4<float> a0 = gpu::load4(left + (a + k * kTileRows + row));
      const gpu::Vec4<float> a1 = gpu::load4(left + (a + k * kTileRows + row + 64));
#pragma unroll
      for (int c = 0; c < kColumns / 32; ++c) {
        const gpu::Vec4<float> b0 = gpu::load4(right + (b + k * kRightRow + 32 * c + column));
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            acc[i][4 * c + j] = fmaf(a0.v[i], b0.v[j], acc[i][4 * c + j]);
            acc[i + 4][4 * c + j] = fmaf(a1.v[i], b0.v[j], acc[i + 4][4 * c + j]);
          }
      }
    }
  }
}

// Row i and column j of a thread's part of the tile.
GPU_DEVICE int result_row(int i) {
  return threadIdx.x / 8 * 4 + i % 4 + i / 4 * 64;
}
GPU_DEVICE int result_column(int j) {
  return threadIdx.x % 8 * 4 + j % 4 + j / 4 * 32;
}

}  // namespace alexnet_cuda
