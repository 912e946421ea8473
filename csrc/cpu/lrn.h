// Local response normalisation across channels, and its gradient, for pixels with contiguous channels (rows.h).
//
//   forward    d_i = k + alpha * sum of x_j^2 over the window of i       y_i = x_i d_i^-beta
//   backward   dx_i = g_i d_i^-beta - 2 alpha beta x_i sum of g_j x_j d_j^(-beta-1) over the j whose window contains i
//
// Trick: windows of five channels with beta = 3/4, those of every AlexNet, are summed in registers by lane shifts
// of neighbouring vectors (Window5). Other windows are summed from a small buffer in the cache that has zeros on both
// sides of each pixel's channels, so that a sum is `size` unaligned loads and borders need no test.
//
// Numerics: every window is summed afresh. Sliding sums, which add one square and subtract another, would lose digits.
// Lanes that pad a group are zero in x, so they add nothing to the windows of other channels.
#pragma once

#include "rows.h"

namespace alexnet_cuda::ALEXNET_CPU_LEVEL {

template <class A>
struct LrnPass {
  const Lrn lrn;
  const Channels channels;
  const A alpha = lrn.alpha, beta = lrn.beta, k = lrn.k;
  const int64_t per_group = channels.per_group, padded = channels.padded;
  // Channels of a window before and after its centre, no more than a group has, and all.
  const int64_t front = min64(lrn.front, per_group - 1), back = min64(lrn.size - 1 - lrn.front, per_group - 1);
  const int64_t size = front + 1 + back;
  // Zeros on either side of a group in a buffer; from pixel to pixel.
  const int64_t halo = round_up(max64(front, back), kLanes<A>), stride = padded + 2 * halo;
};

// y = v p, with p = d^-beta. Adding 0 after a ReLU turns -0 into 0, which max_nonnegative (pool.h) relies on.
template <class A, bool RELU>
ALEXNET_INLINE Vec<A> scaled(Vec<A> v, Vec<A> p) {
  return RELU ? v * p + Vec<A>{} : v * p;
}

// The gradient of x after that of a ReLU, which is 0 where the ReLU's input is not positive.
template <class A, bool RELU>
ALEXNET_INLINE Vec<A> through_relu(Vec<A> input, Vec<A> gradient) {
  return RELU ? (input <= A(0) ? Vec<A>{} : gradient) : gradient;
}

// ---- powers

// d^(-beta), the factor of local response normalisation, without calls to powf for the usual exponents.
//
// Trick: the CPU estimates 1 / sqrt(d) in one instruction (12 bits for SSE and AVX2, 14 for AVX-512), and a Newton
// step in plain arithmetic makes it accurate.
//
// Numerics: relative error of at most a few units in the last place of float (2.1e-7 for beta = 3/4). Zero, infinity
// and NaN give what the exact function gives: there the step computes 0 * infinity and the estimate, which is exact, is
// taken instead. Double uses square roots and divisions.
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

// ---- any window

constexpr int64_t kLrnBlock = 16;  // pixels whose squares are in the buffer at a time

// The sum of `size` channels from p on, for each lane.
template <class A>
ALEXNET_INLINE Vec<A> window_sum(const A* p, int64_t size) {
  Vec<A> sum = load<A>(p);
  for (int64_t j = 1; j < size; ++j) sum += load<A>(p + j);
  return sum;
}

// For `count` pixels of one group: out = lrn(x), or lrn(relu(x)) with RELU; BACKWARD: its gradient, given that of y.
// The halos of `squares` and of `terms`, which holds the summands of the gradient's sum, are zero; `direct` holds
// g d^-beta. The forward uses neither of the last two.
template <class A, bool RELU, bool BACKWARD>
__attribute__((noinline)) void lrn_any(const LrnPass<A>& pass, Pixels<const A> x, Pixels<const A> grad, Pixels<A> out,
                                       int64_t count, A* squares, A* terms, A* direct) {
  const A scale = 2 * pass.alpha * pass.beta;
  for (int64_t done = 0; done < count; done += kLrnBlock) {  // the buffer holds one block
    const int64_t block = min64(kLrnBlock, count - done);
    const Pixels<const A> from = {x[done], x.stride};
    // The squares are summed only when the whole block is written: a load that overlaps two recent stores would wait
    // for both.
    for (int64_t p = 0; p < block; ++p) {
      for (int64_t c = 0; c < pass.padded; c += kLanes<A>) {
        const Vec<A> v = activation<A, RELU>(from[p] + c);
        store<A>(squares + p * pass.stride + pass.halo + c, v * v);
      }
    }
    for (int64_t p = 0; p < block; ++p) {  // sum the squares, write y, or g d^-beta and the terms
      const A* window = squares + p * pass.stride + pass.halo - pass.front;
      A* term = terms + p * pass.stride + pass.halo;
      for (int64_t c = 0; c < pass.padded; c += kLanes<A>) {
        const Vec<A> d = pass.k + pass.alpha * window_sum<A>(window + c, pass.size), r = rsqrt<A>(d);
        const Vec<A> power_of_d = power<A>(d, r, pass.beta), v = activation<A, RELU>(from[p] + c);
        if constexpr (BACKWARD) {
          const Vec<A> g = load<A>(grad[done + p] + c) * power_of_d;
          store<A>(direct + p * pass.padded + c, g);
          store<A>(term + c, g * v * (r * r));
        } else {
          store<A>(out[done + p] + c, scaled<A, RELU>(v, power_of_d));
        }
      }
      // In padding lanes d is k. If k is 0 their terms are 0 / 0 and must not enter the windows.
      const int64_t last = pass.padded - kLanes<A>;
      if (BACKWARD && pass.per_group < pass.padded) {
        store<A>(term + last, keep_first<A>(load<A>(term + last), pass.per_group - last));
      }
    }
    for (int64_t p = 0; BACKWARD && p < block; ++p) {  // sum the terms over the mirrored window, write dx
      const A* window = terms + p * pass.stride + pass.halo - pass.back;
      for (int64_t c = 0; c < pass.padded; c += kLanes<A>) {
        const Vec<A> v = load<A>(from[p] + c), sum = window_sum<A>(window + c, pass.size);
        const Vec<A> gradient = load<A>(direct + p * pass.padded + c) - scale * v * sum;
        store<A>(out[done + p] + c, through_relu<A, RELU>(v, gradient));
      }
    }
  }
}

// ---- windows of five channels, two on either side, with beta = 3/4

// Window sums along a pixel's channels. push(v) returns the sums centred on the vector pushed before v. Element i of
// `pairs` is v_(i-1) + v_i; the sum centred on i is pairs_(i-1) + pairs_(i+2) + v_i.
template <class A>
struct Window5 {
  Vec<A> current = {}, pairs = {}, pairs_before = {};

  ALEXNET_INLINE Vec<A> push(Vec<A> next) {
    constexpr int kN = kLanes<A>;
    const Vec<A> pairs_next = shifted<A, kN - 1>(current, next) + next;
    const Vec<A> sum = (shifted<A, kN - 1>(pairs_before, pairs) + shifted<A, 2>(pairs, pairs_next)) + current;
    pairs_before = pairs;
    pairs = pairs_next;
    current = next;
    return sum;
  }
};

// As lrn_any's forward. A vector's sums need the vector behind it, which is loaded one step ahead.
template <class A, bool RELU>
__attribute__((noinline)) void lrn5(const LrnPass<A>& pass, Pixels<const A> x, Pixels<A> y, int64_t count) {
  const A alpha = pass.alpha, k = pass.k;
  const int64_t last = pass.padded - kLanes<A>;
  for (int64_t p = 0; p < count; ++p) {
    Window5<A> squares;
    Vec<A> v = activation<A, RELU>(x[p]);
    squares.push(v * v);
    for (int64_t c = 0; c <= last; c += kLanes<A>) {  // v is the vector at c, `next` the one behind it
      prefetch(x[p + kPrefetchPixels] + c);
      if (!y.nontemporal) prefetch(y[p + kPrefetchPixels] + c);
      const Vec<A> next = c < last ? activation<A, RELU>(x[p] + c + kLanes<A>) : Vec<A>{};
      y.write(y[p] + c, scaled<A, RELU>(v, Powers<A>(k + alpha * squares.push(next * next)).p));
      v = next;
    }
  }
}

// As lrn_any's backward, two steps behind the loads: one for the squares and one for the terms.
template <class A, bool RELU>
__attribute__((noinline)) void lrn5_backward(const LrnPass<A>& pass, Pixels<const A> x, Pixels<const A> grad,
                                             Pixels<A> dx, int64_t count) {
  const A alpha = pass.alpha, k = pass.k, scale = 2 * pass.alpha * pass.beta;
  const int64_t last = pass.padded - kLanes<A>;
  for (int64_t p = 0; p < count; ++p) {
    Window5<A> squares, terms;
    Vec<A> v = activation<A, RELU>(x[p]), before = {}, direct_before = {};
    squares.push(v * v);
    const auto finish = [&](int64_t c, Vec<A> sum) {
      dx.write(dx[p] + c, through_relu<A, RELU>(before, direct_before - scale * before * sum));
    };
    // The terms of the vector at c complete the window sums of the vector before it, whose gradient is then written.
    for (int64_t c = 0; c <= last; c += kLanes<A>) {
      prefetch(x[p + kPrefetchPixels] + c);
      prefetch(grad[p + kPrefetchPixels] + c);
      if (!dx.nontemporal) prefetch(dx[p + kPrefetchPixels] + c);
      const Vec<A> next = c < last ? activation<A, RELU>(x[p] + c + kLanes<A>) : Vec<A>{};
      const Powers<A> powers(k + alpha * squares.push(next * next));
      const Vec<A> direct = load<A>(grad[p] + c) * powers.p, term = direct * v * powers.inverse;
      // In padding lanes d is k. If k is 0 their terms are 0 / 0 and must not enter the windows.
      const Vec<A> sum =
          terms.push(c < last || pass.per_group == pass.padded ? term : keep_first<A>(term, pass.per_group - last));
      if (c > 0) finish(c - kLanes<A>, sum);
      before = v;
      direct_before = direct;
      v = next;
    }
    finish(last, terms.push(Vec<A>{}));
  }
}

// LRN of all groups of a pixel, with the buffers that it needs.
template <class A>
class Normaliser {
 public:
  Normaliser(const Lrn& lrn, const Channels& c) : pass_{lrn, c} {
    for (int64_t i = 0; i < size_; ++i) squares_[i] = terms_[i] = 0;
  }

  // `count` pixels: out = lrn(x), or lrn(relu(x)) with RELU; BACKWARD: its gradient, given that of y. The forward does
  // not read grad.
  template <bool RELU, bool BACKWARD>
  void run(Pixels<const A> x, Pixels<const A> grad, Pixels<A> out, int64_t count) {
    for (int64_t g = 0; g < pass_.channels.groups; ++g) {
      if (!is_lrn5_) {
        lrn_any<A, RELU, BACKWARD>(pass_, x, grad, out, count, squares_, terms_, direct_);
      } else if constexpr (BACKWARD) {
        lrn5_backward<A, RELU>(pass_, x, grad, out, count);
      } else {
        lrn5<A, RELU>(pass_, x, out, count);
      }
      x.data += pass_.padded, grad.data += pass_.padded, out.data += pass_.padded;
    }
  }

 private:
  const LrnPass<A> pass_;
  const bool is_lrn5_ = pass_.lrn.size == 5 && pass_.lrn.front == 2 && pass_.lrn.beta == 0.75;
  const int64_t size_ = is_lrn5_ ? 0 : kLrnBlock * pass_.stride;
  Scratch<A> squares_{size_}, terms_{size_}, direct_{size_};
};

}  // namespace alexnet_cuda::ALEXNET_CPU_LEVEL
