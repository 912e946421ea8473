// Local response normalisation of pixels whose channels are contiguous (rows.h).
//
//   forward    d_i = k + alpha * sum of x_j^2 over the window of i       y_i = x_i d_i^-beta
//   backward   dx_i = g_i d_i^-beta - 2 alpha beta x_i sum of g_j x_j d_j^(-beta-1) over the j whose window holds i
//
// With a window of five, the usual one, everything stays in registers: Window5. Otherwise a block of pixels is squared
// into a small buffer that has zeros round each pixel's channels, so that a window sum is `size` unaligned loads from
// L1 and borders need no test. (The loads come a block later than the stores: a load that spans two recent stores would
// wait for both.) Every window is summed afresh: sliding sums lose what cancels.
#pragma once

#include "rows.h"

namespace alexnet_cuda::ALEXNET_CPU_LEVEL {

constexpr int64_t kLrnBlock = 16;  // pixels

// d^-3/4, and 1/d. Two estimates give g = d^-1/4, to which one step on h = 1 - d g^4 adds what lacks: d^-3/4 is
// g^3 (1 - h)^-3/4. Every factor stays in range. Where it fails (d is 0, infinite or NaN) the first estimate is
// already the answer.
template <class A>
struct Powers {
  Vec<A> p, inverse;

  explicit ALEXNET_INLINE Powers(Vec<A> d) {
    const Vec<A> r = rsqrt_estimate<A>(d), g = rsqrt_estimate<A>(d * r), square = g * g, cube = square * g;
    const Vec<A> h = 1 - (d * square) * square;
    const Vec<A> better = cube + cube * h * (kCoarseEstimate<A> ? A(0.75) + A(0.65625) * h : fill<A>(0.75));
    p = refined_or<A>(better, d, r);
    const Vec<A> root = refined_or<A>(d * better * better, d, r);
    inverse = root * root;
  }
};

// d^-beta, r being 1 / sqrt(d).
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

template <class A>
struct LrnPass {
  A alpha, beta, k;
  int64_t size, front, back;
  int64_t each, padded, halo, pitch;  // channels of a group, and of a pixel's buffer

  LrnPass(const Lrn& lrn, const Channels& c)
      : alpha(lrn.alpha),
        beta(lrn.beta),
        k(lrn.k),
        size(lrn.size),
        front(lrn.front),
        back(lrn.size - 1 - lrn.front),
        each(c.each),
        padded(c.padded),
        halo(round_up(greater(front, back), kLanes<A>)),
        pitch(padded + 2 * halo) {}

  int64_t buffer_size() const { return kLrnBlock * pitch; }
  void clear(A* buffer) const {
    for (int64_t i = 0; i < buffer_size(); ++i) buffer[i] = 0;
  }
};

// The sum of `size` channels from p on.
template <class A>
ALEXNET_INLINE Vec<A> window_sum(const A* p, int64_t size) {
  Vec<A> sum = load<A>(p);
  for (int64_t j = 1; j < size; ++j) sum += load<A>(p + j);
  return sum;
}

template <class A, bool RELU, class T>
ALEXNET_INLINE Vec<A> activation(const T* p) {
  return RELU ? relu<A>(load<A>(p)) : load<A>(p);
}

// y = v p, p being d^-beta. Behind a ReLU it is never -0 (larger_positive, pool.h).
template <class A, bool RELU>
ALEXNET_INLINE Vec<A> scaled(Vec<A> v, Vec<A> p) {
  return RELU ? v * p + Vec<A>{} : v * p;
}

template <class A, bool RELU>
ALEXNET_INLINE void square(const LrnPass<A>& pass, Pixels<const A> x, int64_t count, A* squares) {
  for (int64_t p = 0; p < count; ++p) {
    A* to = squares + p * pass.pitch + pass.halo;
    for (int64_t c = 0; c < pass.padded; c += kLanes<A>) {
      const Vec<A> v = activation<A, RELU>(x[p] + c);
      store<A>(to + c, v * v);
    }
  }
}

// y = lrn(x), or lrn(relu(x)), for `count` pixels of one group. `squares` has been cleared.
template <class A, bool RELU>
inline void lrn_group(const LrnPass<A>& pass, Pixels<const A> x, Pixels<A> y, int64_t count, A* squares) {
  for (int64_t done = 0; done < count; done += kLrnBlock) {
    const int64_t block = lesser(kLrnBlock, count - done);
    const Pixels<const A> from = {x[done], x.stride};
    square<A, RELU>(pass, from, block, squares);
    for (int64_t p = 0; p < block; ++p) {
      const A* window = squares + p * pass.pitch + pass.halo - pass.front;
      for (int64_t c = 0; c < pass.padded; c += kLanes<A>) {
        const Vec<A> d = pass.k + pass.alpha * window_sum<A>(window + c, pass.size);
        const Vec<A> v = activation<A, RELU>(from[p] + c);
        store<A>(y[done + p] + c, scaled<A, RELU>(v, power<A>(d, rsqrt<A>(d), pass.beta)));
      }
    }
  }
}

// dx for `count` pixels of one group; with RELU the gradient of lrn(relu(x)). `squares` and `terms` (what the sum of
// the gradient runs over) have been cleared; `direct` holds g d^-beta.
template <class A, bool RELU>
inline void lrn_group_backward(const LrnPass<A>& pass, Pixels<const A> x, Pixels<const A> grad, Pixels<A> dx,
                               int64_t count, A* squares, A* terms, A* direct) {
  const A scale = 2 * pass.alpha * pass.beta;
  for (int64_t done = 0; done < count; done += kLrnBlock) {
    const int64_t block = lesser(kLrnBlock, count - done);
    const Pixels<const A> from = {x[done], x.stride};
    square<A, RELU>(pass, from, block, squares);
    for (int64_t p = 0; p < block; ++p) {
      const A* window = squares + p * pass.pitch + pass.halo - pass.front;
      A* term = terms + p * pass.pitch + pass.halo;
      for (int64_t c = 0; c < pass.padded; c += kLanes<A>) {
        const Vec<A> d = pass.k + pass.alpha * window_sum<A>(window + c, pass.size), r = rsqrt<A>(d);
        const Vec<A> v = load<A>(grad[done + p] + c) * power<A>(d, r, pass.beta);
        store<A>(direct + p * pass.padded + c, v);
        store<A>(term + c, v * activation<A, RELU>(from[p] + c) * (r * r));
      }
      // Beyond the last channel d is k, perhaps 0, and 0 / 0 must not reach the windows.
      const int64_t last = pass.padded - kLanes<A>;
      if (pass.each < pass.padded) store<A>(term + last, keep<A>(load<A>(term + last), pass.each - last));
    }
    for (int64_t p = 0; p < block; ++p) {
      const A* window = terms + p * pass.pitch + pass.halo - pass.back;  // mirrored
      for (int64_t c = 0; c < pass.padded; c += kLanes<A>) {
        const Vec<A> v = load<A>(from[p] + c), sum = window_sum<A>(window + c, pass.size);
        const Vec<A> gradient = load<A>(direct + p * pass.padded + c) - scale * v * sum;
        store<A>(dx[done + p] + c, RELU ? (v <= A(0) ? Vec<A>{} : gradient) : gradient);
      }
    }
  }
}

// ---- windows of five with beta = 3/4: what every AlexNet has

// Sums of five neighbours, two on either side, along a pixel: push(v) gives those of the vector pushed before v.
// `pairs` are sums of an element and the one before it, which serve two windows.
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

// In pixels.
constexpr int64_t kAhead = 8;

template <class A, bool RELU>
__attribute__((noinline)) void lrn_group5(const LrnPass<A>& pass, Pixels<const A> x, Pixels<A> y, int64_t count) {
  const A alpha = pass.alpha, k = pass.k;
  const int64_t last = pass.padded - kLanes<A>;
  for (int64_t p = 0; p < count; ++p) {
    Window5<A> squares;
    Vec<A> v = activation<A, RELU>(x[p]);
    squares.push(v * v);
    for (int64_t c = 0; c <= last; c += kLanes<A>) {
      prefetch(x[p + kAhead] + c);
      if (!y.streamed) prefetch(y[p + kAhead] + c);
      const Vec<A> next = c < last ? activation<A, RELU>(x[p] + c + kLanes<A>) : Vec<A>{};
      y.write(y[p] + c, scaled<A, RELU>(v, Powers<A>(k + alpha * squares.push(next * next)).p));
      v = next;
    }
  }
}

// A vector's gradient needs the terms of the next one and is written a step later.
template <class A, bool RELU>
__attribute__((noinline)) void lrn_group5_backward(const LrnPass<A>& pass, Pixels<const A> x, Pixels<const A> grad,
                                                   Pixels<A> dx, int64_t count) {
  const A alpha = pass.alpha, k = pass.k, scale = 2 * pass.alpha * pass.beta;
  const int64_t last = pass.padded - kLanes<A>;
  for (int64_t p = 0; p < count; ++p) {
    Window5<A> squares, terms;
    Vec<A> v = activation<A, RELU>(x[p]), before = {}, direct_before = {};
    squares.push(v * v);
    const auto finish = [&](int64_t c, Vec<A> sum) {
      const Vec<A> gradient = direct_before - scale * before * sum;
      dx.write(dx[p] + c, RELU ? (before <= A(0) ? Vec<A>{} : gradient) : gradient);
    };
    for (int64_t c = 0; c <= last; c += kLanes<A>) {
      prefetch(x[p + kAhead] + c);
      prefetch(grad[p + kAhead] + c);
      if (!dx.streamed) prefetch(dx[p + kAhead] + c);
      const Vec<A> next = c < last ? activation<A, RELU>(x[p] + c + kLanes<A>) : Vec<A>{};
      const Powers<A> powers(k + alpha * squares.push(next * next));
      const Vec<A> direct = load<A>(grad[p] + c) * powers.p, term = direct * v * powers.inverse;
      // Beyond the last channel d is k, perhaps 0, and 0 / 0 must not reach the windows.
      const Vec<A> sum = terms.push(c < last || pass.each == pass.padded ? term : keep<A>(term, pass.each - last));
      if (c > 0) finish(c - kLanes<A>, sum);
      before = v;
      direct_before = direct;
      v = next;
    }
    finish(last, terms.push(Vec<A>{}));
  }
}

// The same for all groups, with memory of its own where that is needed.
template <class A>
class Normaliser {
 public:
  Normaliser(const Lrn& lrn, const Channels& c, bool backward)
      : pass_(lrn, c),
        groups_(c.groups),
        usual_(lrn.size == 5 && lrn.front == 2 && lrn.beta == 0.75),
        squares_(usual_ ? 0 : pass_.buffer_size()),
        terms_(usual_ || !backward ? 0 : pass_.buffer_size()),
        direct_(usual_ || !backward ? 0 : kLrnBlock * c.padded) {
    if (usual_) return;
    pass_.clear(squares_);
    if (backward) pass_.clear(terms_);
  }

  template <bool RELU>
  void forward(Pixels<const A> x, Pixels<A> y, int64_t count) {
    for (int64_t g = 0; g < groups_; ++g, x.data += pass_.padded, y.data += pass_.padded) {
      if (usual_) {
        lrn_group5<A, RELU>(pass_, x, y, count);
      } else {
        lrn_group<A, RELU>(pass_, x, y, count, squares_);
      }
    }
  }

  template <bool RELU>
  void backward(Pixels<const A> x, Pixels<const A> grad, Pixels<A> dx, int64_t count) {
    for (int64_t g = 0; g < groups_; ++g, x.data += pass_.padded, grad.data += pass_.padded, dx.data += pass_.padded) {
      if (usual_) {
        lrn_group5_backward<A, RELU>(pass_, x, grad, dx, count);
      } else {
        lrn_group_backward<A, RELU>(pass_, x, grad, dx, count, squares_, terms_, direct_);
      }
    }
  }

 private:
  LrnPass<A> pass_;
  int64_t groups_;
  bool usual_;
  Scratch<A> squares_, terms_, direct_;
};

}  // namespace alexnet_cuda::ALEXNET_CPU_LEVEL
