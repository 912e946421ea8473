// SIMD vectors of the instruction-set level being compiled, as GCC and Clang vector types: arithmetic, comparisons and
// `mask ? a : b` are operators, so every kernel is written once for all levels. This file adds what operators lack:
// loads and stores with conversion, shuffles and a transpose.
//
// Memory: lane i is element i. A tensor of float, float16 or bfloat16 is summed in float, one of double in
// double; a vector always has the lanes of the type of the sums.
//
// Numerics: conversions to float16 and bfloat16 round to nearest even, keep infinities and NaN, and overflow to
// infinity. Where the level has no conversion instruction the same result is computed with integers.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"

#ifndef ALEXNET_CPU_LEVEL
#define ALEXNET_CPU_LEVEL baseline
#endif
#define ALEXNET_INLINE inline __attribute__((always_inline))

namespace alexnet_cuda::ALEXNET_CPU_LEVEL {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class E, int N>
struct VectorOf {
  typedef E type __attribute__((vector_size(N * sizeof(E))));
};
template <class E, int N>
using Vector = typename VectorOf<E, N>::type;

// The type of the sums of a tensor type T, the lanes of a vector of it, and integers of the same width.
template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;
template <class A>
constexpr int kLanes = kVectorBytes / sizeof(A);
template <class A>
using Vec = Vector<A, kLanes<A>>;
template <class A>
using Bits = Vector<int32_t, kLanes<A>>;
template <class A>
using Unsigned = Vector<std::conditional_t<sizeof(A) == 4, uint32_t, uint64_t>, kLanes<A>>;

// The type of an element in memory (Half and BFloat16: a 16-bit integer), and kLanes<A> of them.
template <class T>
using Storage = std::conditional_t<sizeof(T) == 2, uint16_t, T>;
template <class A, class T>
using Raw = Vector<Storage<T>, kLanes<A>>;

template <class A>
ALEXNET_INLINE Vec<A> fill(A value) {
  return value - Vec<A>{};  // broadcasts; subtracting 0 keeps every value, also -0
}

template <class A>
ALEXNET_INLINE Vec<A> relu(Vec<A> v) {
  const Vec<A> zero = {};
  return zero > v ? zero : v;  // one max instruction; keeps NaN and -0
}

// ---- conversions

#if !defined(__AVX2__)  // levels without the F16C conversion instructions
// float16 to float: the exponent and mantissa bits move to their place in a float, and a multiplication by 2^112
// corrects the exponent's bias; it also normalises subnormal numbers.
template <class V, class I>
ALEXNET_INLINE V half_to_float(I h) {
  const I magnitude = (h & 0x7fff) << 13;
  const V scaled = __builtin_bit_cast(V, magnitude) * 0x1p112f;
  const I special = __builtin_bit_cast(I, scaled) | 0x7f800000;  // exponent 31: infinity or NaN
  return __builtin_bit_cast(
      V, ((magnitude >= (0x7c00 << 13)) ? special : __builtin_bit_cast(I, scaled)) | ((h & 0x8000) << 16));
}

// float to float16, to nearest even. A normal result: add almost half of the last kept bit, plus that bit, then cut. A
// subnormal result: adding 0.5 aligns the mantissa so that the addition itself rounds at the last bit of a float16.
template <class V, class I>
ALEXNET_INLINE I float_to_half(V v) {
  const I bits = __builtin_bit_cast(I, v), magnitude = bits & 0x7fffffff;
  const I subnormal = __builtin_bit_cast(I, __builtin_bit_cast(V, magnitude) + 0.5f) - 0x3f000000;
  const I normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const I infinity = I{} + 0x7c00;
  I half = magnitude < (113 << 23) ? subnormal : normal;
  half = magnitude >= 0x477ff000 ? infinity : half;         // 65520 and more
  half = magnitude > 0x7f800000 ? infinity | 0x200 : half;  // NaN
  return half | ((bits >> 16) & 0x8000);
}
#endif

// 8- or 16-bit integers to 32 bits. GCC 12 compiles __builtin_convertvector to one move per element, so the levels with
// an instruction for it use the intrinsic.
template <class A, class R>
ALEXNET_INLINE Bits<A> extend(R raw) {
#if defined(__AVX512F__)
  if constexpr (sizeof(R) == 32) return (Bits<A>)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)raw);
  if constexpr (sizeof(R) == 16) return (Bits<A>)_mm512_maskz_cvtepu8_epi32(0xffff, (__m128i)raw);
#elif defined(__AVX2__)
  if constexpr (sizeof(R) == 16) return (Bits<A>)_mm256_cvtepu16_epi32((__m128i)raw);
  if constexpr (sizeof(R) == 8) return (Bits<A>)_mm256_cvtepu8_epi32(_mm_loadu_si64(&raw));
#endif
  return __builtin_convertvector(raw, Bits<A>);
}

// A vector as it lies in memory to the type of the sums, and back. T may also be uint8_t.
template <class A, class T>
ALEXNET_INLINE Vec<A> widen(Raw<A, T> raw) {
  if constexpr (sizeof(T) == sizeof(A)) {
    return raw;
  } else if constexpr (sizeof(T) == 1) {
    return __builtin_convertvector(extend<A>(raw), Vec<A>);
  } else if constexpr (__is_same(T, BFloat16)) {
    return __builtin_bit_cast(Vec<A>, extend<A>(raw) << 16);
  } else {
#if defined(__AVX512F__)
    return (Vec<A>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)raw);
#elif defined(__AVX2__)
    return (Vec<A>)_mm256_cvtph_ps((__m128i)raw);
#else
    return half_to_float<Vec<A>>(extend<A>(raw));
#endif
  }
}

template <class A, class T>
ALEXNET_INLINE Raw<A, T> narrow(Vec<A> v) {
  if constexpr (sizeof(T) == sizeof(A)) {
    return v;
  } else if constexpr (sizeof(T) == 1) {
    return __builtin_convertvector(__builtin_convertvector(v, Bits<A>), Raw<A, T>);
  } else if constexpr (__is_same(T, BFloat16)) {  // round to nearest even; a NaN stays one
    const Unsigned<A> bits = __builtin_bit_cast(Unsigned<A>, v);
    const Unsigned<A> rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector(v == v ? rounded : (bits >> 16) | 0x40, Raw<A, T>);
  } else {
#if defined(__AVX512F__)
    return (Raw<A, T>)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
    return (Raw<A, T>)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    return __builtin_convertvector(float_to_half<Vec<A>, Bits<A>>(v), Raw<A, T>);
#endif
  }
}

// ---- loads and stores; addresses need no alignment except for stream()

template <class A, class T>
ALEXNET_INLINE Vec<A> load(const T* p) {
  Raw<A, T> raw;
  __builtin_memcpy(&raw, p, sizeof(raw));
  return widen<A, T>(raw);
}

template <class A, class T>
ALEXNET_INLINE void store(T* p, Vec<A> v) {
  const Raw<A, T> raw = narrow<A, T>(v);
  __builtin_memcpy(p, &raw, sizeof(raw));
}

// Non-temporal store: writes to memory without keeping the line in the caches. p is aligned to a whole vector.
template <class A>
ALEXNET_INLINE void stream(A* p, Vec<A> v) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#elif defined(__SSE2__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)v);
#else
  store<A>(p, v);
#endif
}

template <class A, class T>
ALEXNET_INLINE A to_accumulator(T value) {
  Raw<A, T> raw = {};
  raw[0] = __builtin_bit_cast(Storage<T>, value);
  return widen<A, T>(raw)[0];
}

// The first n elements alone, 0 < n <= kLanes; the other lanes become zero. No memory behind them is touched.
template <class A, class T>
ALEXNET_INLINE Vec<A> load_part(const T* p, int64_t n) {
#if defined(__AVX512F__)
  const uint64_t bytes = ~uint64_t(0) >> (64 - n * sizeof(T));
  if constexpr (sizeof(Raw<A, T>) == 64) return widen<A, T>((Raw<A, T>)_mm512_maskz_loadu_epi8(bytes, p));
  if constexpr (sizeof(Raw<A, T>) == 32) return widen<A, T>((Raw<A, T>)_mm256_maskz_loadu_epi8(bytes, p));
  if constexpr (sizeof(Raw<A, T>) == 16) return widen<A, T>((Raw<A, T>)_mm_maskz_loadu_epi8(bytes, p));
#endif
  Raw<A, T> raw = {};
  for (int64_t i = 0; i < n; ++i) raw[i] = __builtin_bit_cast(Storage<T>, p[i]);
  return widen<A, T>(raw);
}

template <class A, class T>
ALEXNET_INLINE void store_part(T* p, Vec<A> v, int64_t n) {
  const Raw<A, T> raw = narrow<A, T>(v);
#if defined(__AVX512F__)
  const uint64_t bytes = ~uint64_t(0) >> (64 - n * sizeof(T));
  if constexpr (sizeof(Raw<A, T>) == 64) return _mm512_mask_storeu_epi8(p, bytes, (__m512i)raw);
  if constexpr (sizeof(Raw<A, T>) == 32) return _mm256_mask_storeu_epi8(p, bytes, (__m256i)raw);
  if constexpr (sizeof(Raw<A, T>) == 16) return _mm_mask_storeu_epi8(p, bytes, (__m128i)raw);
#endif
  for (int64_t i = 0; i < n; ++i) {
    const Storage<T> element = raw[i];  // Clang casts element 0 where the cast is of raw[i] itself
    p[i] = __builtin_bit_cast(T, element);
  }
}

// Sets all lanes but the first n to zero.
template <class A>
ALEXNET_INLINE Vec<A> keep_first(Vec<A> v, int64_t n) {
  Vec<A> lane;
  for (int i = 0; i < kLanes<A>; ++i) lane[i] = A(i);
  return lane < A(n) ? v : Vec<A>{};
}

// ---- shuffles

// Lane i of the result is element F{}(i) of a followed by b; F is the type of a lambda without captures.
template <class A, class F>
ALEXNET_INLINE Vec<A> permute(Vec<A> a, Vec<A> b, F) {
  return [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, F{}(I)...);
#else
    return __builtin_shuffle(a, b, decltype(a < b){std::integral_constant<int, F{}(I)>::value...});
#endif
  }(std::make_integer_sequence<int, kLanes<A>>{});
}

// Elements SHIFT, SHIFT + 1, ... of a followed by b.
template <class A, int SHIFT>
ALEXNET_INLINE Vec<A> shifted(Vec<A> a, Vec<A> b) {
#if defined(__AVX512F__)  // GCC 12 would choose a slower permutation that overwrites an operand
  if constexpr (sizeof(A) == 4) return (Vec<A>)_mm512_maskz_alignr_epi32(0xffff, (__m512i)b, (__m512i)a, SHIFT);
#endif
  return permute<A>(a, b, [](int i) { return i + SHIFT; });
}

// Vector PART (0, 1, 2) of the sequence a0 b0 c0 a1 b1 c1 ...: first the elements of a and b, then those of c.
template <class A, int PART>
ALEXNET_INLINE Vec<A> interleaved(Vec<A> a, Vec<A> b, Vec<A> c) {
  constexpr int kN = kLanes<A>, kFirst = PART * kN;
  const Vec<A> ab = permute<A>(a, b, [](int i) { return (kFirst + i) % 3 * kN % (2 * kN) + (kFirst + i) / 3; });
  return permute<A>(ab, c, [](int i) { return (kFirst + i) % 3 < 2 ? i : kN + (kFirst + i) / 3; });
}

// Transposes a square of kLanes vectors in log2(kLanes) steps: each exchanges the off-diagonal blocks of STEP x STEP
// elements in all squares of 2 STEP x 2 STEP.
template <class A, int STEP = 1>
ALEXNET_INLINE void transpose(Vec<A>* v) {
  constexpr int kN = kLanes<A>;
  if constexpr (STEP < kN) {
#pragma GCC unroll 16
    for (int i = 0; i < kN; ++i) {
      if (i & STEP) continue;
      const Vec<A> a = v[i], b = v[i + STEP];
      v[i] = permute<A>(a, b, [](int lane) { return lane & STEP ? kN + lane - STEP : lane; });
      v[i + STEP] = permute<A>(a, b, [](int lane) { return lane & STEP ? kN + lane : lane + STEP; });
    }
    transpose<A, 2 * STEP>(v);
  }
}

// Calls f<T>() for the tensor type T of a dtype.
template <class F>
ALEXNET_INLINE void dispatch(DType dtype, F f) {
  if (dtype == DType::kDouble) return f.template operator()<double>();
  if (dtype == DType::kHalf) return f.template operator()<Half>();
  if (dtype == DType::kBFloat16) return f.template operator()<BFloat16>();
  f.template operator()<float>();
}

// Defines the kernel `name` (kernels.h): `function` for the tensor type T of its images.
#define ALEXNET_CPU_KERNEL_OF(name, Arguments, ...)                             \
  void name(const Arguments& a, int64_t begin, int64_t end) {                   \
    dispatch(a.images.dtype, [&]<class T>() { (__VA_ARGS__)(a, begin, end); }); \
  }

}  // namespace alexnet_cuda::ALEXNET_CPU_LEVEL
