// Local response normalisation of pixels whose channels are contiguous (rows.h).
//
//   forward    d_i = k + alpha * sum of x_j^2 over the window of i       y_i = x_i d_i^-beta
//   backward   dx_i = g_i d_i^-beta - 2 alpha beta x_i sum of g_j x_j d_j^(-beta-1) over the j whose window holds i
//
// A block of pixels is squared into a small buffer that has zeros round each pixel's channels, so that a window sum is
// `size` unaligned loads from L1 and borders need no test. (The loads come a block later than the stores: a load that
// spans two recent stores would wait for both.) Every window is summed afresh: sliding sums lose what cancels.
#pragma once

#include "rows.h"

namespace alexnet_cuda::ALEXNET_CPU_LEVEL {

constexpr int64_t kLrnBlock = 16;  // pixels

// d^-beta; for the usual betas from r = 1/sqrt(d) by multiplications.
template <class A>
ALEXNET_INLINE Vec<A> power(Vec<A> d, Vec<A> r, A beta) {
  if (beta == A(0.75)) {
    const Vec<A> p = r * r * rsqrt<A>(r);
    return p == p ? p : r;  // d is 0, infinite or NaN
  }
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

// The sum of `size` channels from p on; SIZE is the size where that is known.
template <class A, int SIZE>
ALEXNET_INLINE Vec<A> window_sum(const A* p, int64_t size) {
  if constexpr (SIZE == 5) {
    return ((load<A>(p) + load<A>(p + 1)) + (load<A>(p + 3) + load<A>(p + 4))) + load<A>(p + 2);
  }
  Vec<A> sum = load<A>(p);
  for (int64_t j = 1; j < size; ++j) sum += load<A>(p + j);
  return sum;
}

template <class A, bool RELU>
ALEXNET_INLINE Vec<A> activation(const A* p) {
  return RELU ? relu<A>(load<A>(p)) : load<A>(p);
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
template <class A, int SIZE, bool RELU>
inline void lrn_group(const LrnPass<A>& pass, Pixels<const A> x, Pixels<A> y, int64_t count, A* squares) {
  for (int64_t done = 0; done < count; done += kLrnBlock) {
    const int64_t block = lesser(kLrnBlock, count - done);
    const Pixels<const A> from = {x[done], x.stride};
    square<A, RELU>(pass, from, block, squares);
    for (int64_t p = 0; p < block; ++p) {
      const A* window = squares + p * pass.pitch + pass.halo - pass.front;
      for (int64_t c = 0; c < pass.padded; c += kLanes<A>) {
        const Vec<A> d = pass.k + pass.alpha * window_sum<A, SIZE>(window + c, pass.size);
        store<A>(y[done + p] + c, activation<A, RELU>(from[p] + c) * power<A>(d, rsqrt<A>(d), pass.beta));
      }
    }
  }
}

// dx for `count` pixels of one group; with RELU the gradient of lrn(relu(x)). `squares` and `terms` (what the sum of
// the gradient runs over) have been cleared; `direct` holds g d^-beta.
template <class A, int SIZE, bool RELU>
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
        const Vec<A> d = pass.k + pass.alpha * window_sum<A, SIZE>(window + c, pass.size), r = rsqrt<A>(d);
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
        const Vec<A> v = load<A>(from[p] + c), sum = window_sum<A, SIZE>(window + c, pass.size);
        const Vec<A> gradient = load<A>(direct + p * pass.padded + c) - scale * v * sum;
        store<A>(dx[done + p] + c, RELU ? (v <= A(0) ? Vec<A>{} : gradient) : gradient);
      }
    }
  }
}

// The same for all groups, with memory of its own.
template <class A>
class Normaliser {
 public:
  Normaliser(const Lrn& lrn, const Channels& c, bool backward)
      : pass_(lrn, c),
        groups_(c.groups),
        squares_(pass_.buffer_size()),
        terms_(backward ? pass_.buffer_size() : 0),
        direct_(backward ? kLrnBlock * c.padded : 0) {
    pass_.clear(squares_);
    if (backward) pass_.clear(terms_);
  }

  template <bool RELU>
  void forward(Pixels<const A> x, Pixels<A> y, int64_t count) {
    for (int64_t g = 0; g < groups_; ++g, x.data += pass_.padded, y.data += pass_.padded) {
      if (pass_.size == 5) {
        lrn_group<A, 5, RELU>(pass_, x, y, count, squares_);
      } else {
        lrn_group<A, 0, RELU>(pass_, x, y, count, squares_);
      }
    }
  }

  template <bool RELU>
  void backward(Pixels<const A> x, Pixels<const A> grad, Pixels<A> dx, int64_t count) {
    for (int64_t g = 0; g < groups_; ++g, x.data += pass_.padded, grad.data += pass_.padded, dx.data += pass_.padded) {
      if (pass_.size == 5) {
        lrn_group_backward<A, 5, RELU>(pass_, x, grad, dx, count, squares_, terms_, direct_);
      } else {
        lrn_group_backward<A, 0, RELU>(pass_, x, grad, dx, count, squares_, terms_, direct_);
      }
    }
  }

 private:
  LrnPass<A> pass_;
  int64_t groups_;
  Scratch<A> squares_, terms_, direct_;
};

}  // namespace alexnet_cuda::ALEXNET_CPU_LEVEL
