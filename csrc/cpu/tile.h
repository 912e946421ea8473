// The register tile that every convolution kernel multiplies with: P rows (pixels, tiles or taps) x two vectors of
// columns (filters or taps). Each step loads two vectors and broadcasts one number per row.
#pragma once

#include "rows.h"

namespace alexnet_cuda::ALEXNET_CPU_LEVEL {

// Columns of a tile; weights are packed in blocks of so many filters.
template <class A>
constexpr int64_t kFilterBlock = 2 * kLanes<A>;

// Rows of the tallest tile that leaves registers for the operands. AlexNet's 55 output columns are 5 x 11.
constexpr int kTileRows = kVectorBytes == 64 ? 11 : 5;

template <class A, int P>
using Tile = Vec<A>[P][2];

// Calls f(vector, address) for the vectors of a tile whose rows lie `stride` numbers apart in memory.
template <class A, int P, class Number, class F>
ALEXNET_INLINE void for_each_vector(Tile<A, P>& tile, Number* memory, int64_t stride, F f) {
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p) {
    f(tile[p][0], memory + p * stride);
    f(tile[p][1], memory + p * stride + kLanes<A>);
  }
}

// sum[p] += a[p * row_step + i * step] * w[i * w_step ...] over i < n.
template <class A, int P>
ALEXNET_INLINE void multiply(Tile<A, P>& tile, const A* a, int64_t row_step, int64_t step, const A* w, int64_t w_step,
                             int64_t n) {
  for (int64_t i = 0; i < n; ++i, a += step, w += w_step) {
    const Vec<A> w0 = load<A>(w), w1 = load<A>(w + kLanes<A>);
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
      const Vec<A> v = fill<A>(a[p * row_step]);
      tile[p][0] += v * w0;
      tile[p][1] += v * w1;
    }
  }
}

// The same sums, N products of each at a time, written to `out` or (`add`) added to what is there: shorter sums in
// registers have smaller rounding errors.
template <int P, int N>
ALEXNET_INLINE void multiply_in_parts(const float* a, int64_t row_step, int64_t step, const float* w, int64_t n,
                                      float* out, int64_t out_stride, bool add) {
  for (int64_t i = 0; i < n; i += N, add = true) {
    Tile<float, P> tile = {};
    multiply<float, P>(tile, a + i * step, row_step, step, w + i * kFilterBlock<float>, kFilterBlock<float>,
                       min64(N, n - i));
    if (add) for_each_vector<float, P>(tile, out, out_stride, [](Vec<float>& sum, float* p) { sum += load<float>(p); });
    for_each_vector<float, P>(tile, out, out_stride, [](Vec<float>& sum, float* p) { store<float>(p, sum); });
  }
}

}  // namespace alexnet_cuda::ALEXNET_CPU_LEVEL
