// Winograd's convolution (Lavin and Gray, arXiv:1509.09308, section 4) of tiles of 6x6 inputs: F(4x4, 3x3) takes 36
// products for 16 outputs instead of 144, F(2x2, 5x5) 36 for 4 instead of 100.
//
//   inputs   V = B' v B          6x6 numbers in the "Winograd domain"
//   weights  U = G w G'
//   outputs  A' (sum of U * V over channels) A
//
// B, G and A evaluate and interpolate polynomials at 0, +-5/8, +-3/2 and infinity; they are the same for both kernel
// sizes but for how many numbers go in or come out. Vectors run along channels or filters.
// Numerics: these evaluation points are exact in float32 and give a quarter of the error of the usual 0, +-1, +-2: that
// of a direct float32 sum, if sums over channels are added up in short parts (multiply_in_parts).
#pragma once

#include "tile.h"

namespace alexnet_cuda::ALEXNET_CPU_LEVEL {

// The evaluation points, and the denominators of Lagrange's polynomials there.
constexpr float kA = 0.625f, kA2 = kA * kA, kB = 1.5f, kB2 = kB * kB;
constexpr float kScale0 = 1 / (kA2 * kB2), kScaleA = 1 / (2 * kA2 * (kA2 - kB2)), kScaleB = 1 / (2 * kB2 * (kB2 - kA2));

using Tile6x6 = Vec<float>[6][6];

// A transform in two dimensions: f replaces six numbers, first of every column and then of every row.
template <class F>
ALEXNET_INLINE void for_columns_and_rows(Tile6x6& v, F f) {
#pragma GCC unroll 6
  for (int j = 0; j < 6; ++j) f(v[0][j], v[1][j], v[2][j], v[3][j], v[4][j], v[5][j]);
#pragma GCC unroll 6
  for (int i = 0; i < 6; ++i) f(v[i][0], v[i][1], v[i][2], v[i][3], v[i][4], v[i][5]);
}

inline bool all(Bits<float> mask) {
  bool all = true;
  for (int i = 0; i < kLanes<float>; ++i) all = all && mask[i];
  return all;
}

// B' v B of the inputs of a tile, at(row, column) being the address of one.
template <class F>
ALEXNET_INLINE void load_input(Tile6x6& v, F at) {
#pragma GCC unroll 6
  for (int i = 0; i < 6; ++i) {
#pragma GCC unroll 6
    for (int j = 0; j < 6; ++j) v[i][j] = load<float>(at(i, j));
  }
  for_columns_and_rows(v, [](auto& v0, auto& v1, auto& v2, auto& v3, auto& v4, auto& v5) {
    const Vec<float> even_a = v4 - kB2 * v2, odd_a = kA * (v3 - kB2 * v1);
    const Vec<float> even_b = v4 - kA2 * v2, odd_b = kB * (v3 - kA2 * v1);
    v0 = kA2 * kB2 * v0 - (kA2 + kB2) * v2 + v4;
    v5 = kA2 * kB2 * v1 - (kA2 + kB2) * v3 + v5;
    v1 = even_a + odd_a;
    v2 = even_a - odd_a;
    v3 = even_b + odd_b;
    v4 = even_b - odd_b;
  });
}

// The values of a polynomial with N coefficients at the six evaluation points.
template <int N>
ALEXNET_INLINE void evaluate(Vec<float>& v0, Vec<float>& v1, Vec<float>& v2, Vec<float>& v3, Vec<float>& v4,
                             Vec<float>& v5) {
  Vec<float> even_a = v0, even_b = v0, odd_a = kA * v1, odd_b = kB * v1;
  if constexpr (N > 2) even_a += kA2 * v2, even_b += kB2 * v2;
  if constexpr (N > 3) odd_a += kA2 * kA * v3, odd_b += kB2 * kB * v3;
  if constexpr (N > 4) even_a += kA2 * kA2 * v4, even_b += kB2 * kB2 * v4;
  v5 = N == 2 ? v1 : N == 3 ? v2 : N == 4 ? v3 : v4;
  v1 = even_a + odd_a;
  v2 = even_a - odd_a;
  v3 = even_b + odd_b;
  v4 = even_b - odd_b;
}

// G w G' of R x R weights; the other numbers of v are not read.
template <int R>
ALEXNET_INLINE void transform_weight(Tile6x6& v) {
  for_columns_and_rows(v, [](auto& v0, auto& v1, auto& v2, auto& v3, auto& v4, auto& v5) {
    evaluate<R>(v0, v1, v2, v3, v4, v5);
    v0 *= kScale0;
    v1 *= kScaleA;
    v2 *= kScaleA;
    v3 *= kScaleB;
    v4 *= kScaleB;
  });
}

// A' v A: M x M outputs; the other numbers of v mean nothing afterwards.
template <int M>
ALEXNET_INLINE void transform_output(Tile6x6& v) {
  for_columns_and_rows(v, [](auto& v0, auto& v1, auto& v2, auto& v3, auto& v4, auto& v5) {
    const Vec<float> even_a = v1 + v2, odd_a = v1 - v2, even_b = v3 + v4, odd_b = v3 - v4;
    v0 += even_a + even_b;
    v1 = kA * odd_a + kB * odd_b;
    if constexpr (M == 2) {
      v1 += v5;
    } else {
      v2 = kA2 * even_a + kB2 * even_b;
      v3 = kA2 * kA * odd_a + kB2 * kB * odd_b + v5;
    }
  });
}

// For the weight gradient, G' (sum of V * (A g A') over tiles) G: A g A' of M x M gradients of the output,
template <int M>
ALEXNET_INLINE void transform_grad(Tile6x6& v) {
  for_columns_and_rows(v, [](auto&... operands) { evaluate<M>(operands...); });
}

// and G' v G, the R x R gradients of the weights.
template <int R>
ALEXNET_INLINE void transform_weight_grad(Tile6x6& v) {
  for_columns_and_rows(v, [](auto& v0, auto& v1, auto& v2, auto& v3, auto& v4, auto& v5) {
    const Vec<float> even_a = kScaleA * (v1 + v2), odd_a = kScaleA * (v1 - v2);
    const Vec<float> even_b = kScaleB * (v3 + v4), odd_b = kScaleB * (v3 - v4);
    v0 = kScale0 * v0 + even_a + even_b;
    v1 = kA * odd_a + kB * odd_b;
    v2 = kA2 * even_a + kB2 * even_b;
    if constexpr (R == 5) {
      v3 = kA2 * kA * odd_a + kB2 * kB * odd_b;
      v4 = kA2 * kA2 * even_a + kB2 * kB2 * even_b + v5;
    } else {
      v2 += v5;
    }
  });
}

// The 36 numbers of a tile, `stride` apart in memory.
ALEXNET_INLINE void load_domain(Tile6x6& v, const float* from, int64_t stride) {
#pragma GCC unroll 36
  for (int p = 0; p < kWinogradProducts; ++p) v[p / 6][p % 6] = load<float>(from + p * stride);
}

ALEXNET_INLINE void store_domain(const Tile6x6& v, float* to, int64_t stride) {
#pragma GCC unroll 36
  for (int p = 0; p < kWinogradProducts; ++p) store<float>(to + p * stride, v[p / 6][p % 6]);
}

}  // namespace alexnet_cuda::ALEXNET_CPU_LEVEL
