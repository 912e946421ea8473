// d^(-beta), the factor of local response normalisation, without calls to powf for the usual exponents.
//
// Trick: the CPU estimates 1 / sqrt(d) in one instruction (12 bits for SSE and AVX2, 14 for AVX-512), and a Newton
// step in plain arithmetic makes it accurate.
//
// Numerics: relative error of at most a few units in the last place of float (2.1e-7 for beta = 3/4). Zero, infinity
// and NaN give what the exact function gives: there the step computes 0 * infinity and the estimate, which is exact, is
// taken instead. Double uses square roots and divisions.
#pragma once

#include "vec.h"

namespace alexnet_cuda::ALEXNET_CPU_LEVEL {

template <class A>
ALEXNET_INLINE Vec<A> rsqrt_estimate(Vec<A> d) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) return (Vec<A>)_mm512_maskz_rsqrt14_ps(0xffff, (__m512)d);
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 4) return (Vec<A>)_mm256_rsqrt_ps((__m256)d);
#elif defined(__SSE2__)
  if constexpr (sizeof(A) == 4) return (Vec<A>)_mm_rsqrt_ps((__m128)d);
#endif
  Vec<A> r = {};
  for (int i = 0; i < kLanes<A>; ++i)
    r[i] = sizeof(A) == 4 ? A(1 / __builtin_sqrtf(d[i])) : A(1 / __builtin_sqrt(d[i]));
  return r;
}

// `refined`, a negative power of d after a Newton step, or `estimate` where the step gave NaN.
template <class A>
ALEXNET_INLINE Vec<A> refined_or(Vec<A> refined, [[maybe_unused]] Vec<A> d, Vec<A> estimate) {
#if defined(__AVX512F__)  // one instruction that sets infinity where d is 0, and 0 where d is infinite
  if constexpr (sizeof(A) == 4) {
    return (Vec<A>)_mm512_fixupimm_ps((__m512)refined, (__m512)d, _mm512_set1_epi32(0x00800500), 0);
  }
#endif
  return refined == refined ? refined : estimate;
}

// d^(-1/2): r + r (1 - d r^2) / 2.
template <class A>
ALEXNET_INLINE Vec<A> rsqrt(Vec<A> d) {
  const Vec<A> r = rsqrt_estimate<A>(d);
  if constexpr (sizeof(A) == 8) return r;
  return refined_or<A>(r * (A(1.5) - A(0.5) * (d * r) * r), d, r);
}

// d^(-3/4) and 1/d. Two estimates give g, nearly d^(-1/4). With its error h = 1 - d g^4, d^(-3/4) = g^3 (1 - h)^(-3/4),
// of which the power series is cut after the first term, or after the second where estimates have 12 bits. No
// intermediate result leaves the range of float.
template <class A>
struct Powers {
  Vec<A> p, inverse;

  explicit ALEXNET_INLINE Powers(Vec<A> d) {
    const Vec<A> r = rsqrt_estimate<A>(d), g = rsqrt_estimate<A>(d * r), square = g * g, cube = square * g;
    const Vec<A> h = 1 - (d * square) * square;
    constexpr bool kTwelveBits = sizeof(A) == 4 && kVectorBytes < 64;
    const Vec<A> better = cube + cube * h * (kTwelveBits ? A(0.75) + A(0.65625) * h : fill<A>(0.75));
    p = refined_or<A>(better, d, r);
    const Vec<A> root = refined_or<A>(d * better * better, d, r);
    inverse = root * root;
  }
};

// d^(-beta), with r = d^(-1/2).
template <class A>
ALEXNET_INLINE Vec<A> power(Vec<A> d, Vec<A> r, A beta) {
  if (beta == A(0.75)) return Powers<A>(d).p;
  if (beta == A(0.5)) return r;
  if (beta == A(1)) return r * r;
  Vec<A> p;
  for (int i = 0; i < kLanes<A>; ++i)
    p[i] = sizeof(A) == 4 ? A(__builtin_powf(d[i], -beta)) : A(__builtin_pow(d[i], -beta));
  return p;
}

}  // namespace alexnet_cuda::ALEXNET_CPU_LEVEL
