// Max pooling of rows of pixels with contiguous channels (rows.h), and its gradient.
//
// Trick: an input row is pooled along itself once, when it is read, and an output row is the maximum of the last few of
// these results, which are still in the cache. A 3x3 window with stride 2 takes 6 comparisons instead of 8.
//
// Numerics: the first maximum in scan order wins, NaN is larger than every number, and the last NaN gives the index, as
// in torch. Both steps keep the scan order. A code is the position of the maximum in its window, row-major from the
// window's unpadded corner. It is computed in the type of the sums, and converted to a byte when it is written.
#pragma once

#include "rows.h"

namespace alexnet_cuda::ALEXNET_CPU_LEVEL {

constexpr int kMaxKernel = 15;

struct Span {
  int64_t first, last;  // [first, last)
};

// The input rows (columns) in the window of output row (column) o.
ALEXNET_INLINE Span window(const Pool& pool, int64_t o, int64_t size) {
  const int64_t start = o * pool.stride - pool.padding;
  return {max64(0, start), min64(size, start + pool.kernel_size)};
}

// The output rows whose windows contain input row i, and how many these can be.
ALEXNET_INLINE Span covering(const Pool& pool, int64_t i, int64_t out_size) {
  const int64_t p = i + pool.padding, first = p - pool.kernel_size + 1;
  return {first <= 0 ? 0 : (first + pool.stride - 1) / pool.stride, min64(out_size, p / pool.stride + 1)};
}

ALEXNET_INLINE int64_t max_covering(const Pool& pool) {
  return (pool.kernel_size + pool.stride - 1) / pool.stride + 1;
}

ALEXNET_INLINE Images pooled_images(const Images& images, const Pool& pool) {
  return {images.dtype, images.channels_last, images.count, images.channels, pool.out_height, pool.out_width};
}

// The larger of two numbers, NaN if either is.
template <class A>
ALEXNET_INLINE Vec<A> max_nan(Vec<A> a, Vec<A> b) {
  const Vec<A> m = a > b ? a : b;  // b where either is NaN
  return a == a ? m : a;
}

// The same for numbers that are neither negative nor -0: their bits as unsigned integers have the same order, and those
// of NaN are larger than all others.
template <class A>
ALEXNET_INLINE Vec<A> max_nonnegative(Vec<A> a, Vec<A> b) {
  using U = Unsigned<A>;
  const U x = __builtin_bit_cast(U, a), y = __builtin_bit_cast(U, b);
  return __builtin_bit_cast(Vec<A>, x > y ? x : y);
}

// The input of a Pooler: any numbers; any numbers, to which it applies ReLU first; results of ReLU and LRN, which are
// not negative and lie in the cache.
enum class PoolInput { kAny, kBeforeRelu, kNormalised };

// Pools the rows of an image in ascending order. Two ring buffers of kernel_size rows hold the maxima along each input
// row, [out_width][channels], and their columns in the windows.
template <class A, PoolInput INPUT>
class Pooler {
 public:
  Pooler(const Pool& pool, int64_t channels, bool code)
      : pool_(pool), code_(code), row_size_(padded_size<A>(pool.out_width, channels)) {}

  void restart() { next_ = 0; }  // before the first row of another image

  // Writes output row `o`, and its codes if the constructor's `code` was true, of `channels` channels, at most the
  // constructor's number. make(row) returns the Pixels of an input row, of any type; they are read at once.
  template <class Make>
  void row(int64_t o, int64_t channels, Pixels<A> y, A* code, Make make) {
    channels_ = channels;
    const Span rows = window(pool_, o, pool_.height);
    for (next_ = max64(next_, rows.first); next_ < rows.last; ++next_) {
      const auto x = make(next_);
      code_ ? along<true>(x, next_) : along<false>(x, next_);
    }
    const int64_t top = o * pool_.stride - pool_.padding;
    code_ ? across<true>(rows, top, y, code) : across<false>(rows, top, y, code);
  }

 private:
  static constexpr bool kRelu = INPUT == PoolInput::kBeforeRelu, kNonnegative = INPUT == PoolInput::kNormalised;

  // Replaces `best`, and with CODE its position, where v wins.
  template <bool CODE>
  static ALEXNET_INLINE void update_max(Vec<A> v, Vec<A> position, Vec<A>& best, Vec<A>& best_position) {
    if constexpr (CODE) {
      const auto wins = (v > best) | (v != v);
      best = wins ? v : best;
      best_position = wins ? position : best_position;
    } else {
      best = kNonnegative ? max_nonnegative<A>(best, v) : max_nan<A>(best, v);
    }
  }

  A* maxima(int64_t row) { return maxima_ + row % pool_.kernel_size * row_size_; }
  A* columns(int64_t row) { return columns_ + row % pool_.kernel_size * row_size_; }

  // Input row `row` to the ring buffers: the maximum over the columns of every window.
  template <bool CODE, class T>
  __attribute__((noinline)) void along(Pixels<T> x, int64_t row) {
    A *maximum = maxima(row), *column = CODE ? columns(row) : nullptr;
    for (int64_t w = 0; w < pool_.out_width; ++w, maximum += channels_, column += CODE ? channels_ : 0) {
      const Span span = window(pool_, w, pool_.width);
      const A first = A(span.first - (w * pool_.stride - pool_.padding));
      const int64_t n = span.last - span.first;
      pool_.kernel_size == 3 && n == 3 ? along_window<3, CODE>(x[span.first], x.stride, n, first, maximum, column)
                                       : along_window<0, CODE>(x[span.first], x.stride, n, first, maximum, column);
    }
  }

  // The maximum of K pixels (0: of `count`) of all channels; `first` is the first pixel's column in the window.
  template <int K, bool CODE, class T>
  ALEXNET_INLINE void along_window(const T* x, int64_t stride, int64_t count, A first, A* maximum, A* column) {
    const int64_t n = K > 0 ? K : count;
    for (int64_t c = 0; c < channels_; c += kLanes<A>) {  // from the tensor (kNonnegative: the cache) to the ring
      if constexpr (!kNonnegative) {
        prefetch(x + 32 * stride + c);
        prefetch(x + 33 * stride + c);
      }
      Vec<A> best = activation<A, kRelu>(x + c), position = fill<A>(first);
#pragma GCC unroll 3
      for (int64_t j = 1; j < n; ++j) {
        update_max<CODE>(activation<A, kRelu>(x + j * stride + c), fill<A>(first + A(j)), best, position);
      }
      store<A>(maximum + c, best);
      if constexpr (CODE) store<A>(column + c, position);
    }
  }

  // The maximum over `rows`, from the ring buffers to y; `top` is the first row of the unpadded window.
  template <bool CODE>
  __attribute__((noinline)) void across(Span rows, int64_t top, Pixels<A> y, A* code) {
    const A *maximum[kMaxKernel], *column[kMaxKernel];
    const int64_t n = rows.last - rows.first;
    const A first = A((rows.first - top) * pool_.kernel_size);
    for (int64_t i = 0; i < n; ++i) maximum[i] = maxima(rows.first + i), column[i] = columns(rows.first + i);
    for (int64_t w = 0; w < pool_.out_width; ++w) {  // one vector of channels of all rows at a time
      for (int64_t c = 0, at = w * channels_; c < channels_; c += kLanes<A>, at += kLanes<A>) {
        prefetch(y[w + kPrefetchPixels] + c);
        Vec<A> best = load<A>(maximum[0] + at), position = {};
        if constexpr (CODE) position = load<A>(column[0] + at) + first;
        for (int64_t i = 1; i < n; ++i) {
          const Vec<A> position_i = CODE ? load<A>(column[i] + at) + (first + A(i * pool_.kernel_size)) : Vec<A>{};
          update_max<CODE>(load<A>(maximum[i] + at), position_i, best, position);
        }
        store<A>(y[w] + c, best);
        if constexpr (CODE) store<A>(code + at, position);
      }
    }
  }

  const Pool& pool_;
  const bool code_;
  const int64_t row_size_;
  Scratch<A> maxima_{pool_.kernel_size * row_size_}, columns_{code_ ? pool_.kernel_size * row_size_ : 0};
  int64_t channels_ = 0, next_ = 0;
};

// A row of gradients of the pooled side, and their codes.
template <class A>
struct PooledRow {
  Pixels<const A> grad, code;
};

// The pooled pixels whose windows contain a pixel of dx: their gradients and codes, and its position in each window.
template <class A>
struct Windows {
  const A *grad[kMaxKernel * kMaxKernel], *code[kMaxKernel * kMaxKernel];
  A position[kMaxKernel * kMaxKernel];
};

// dx at pixel w: the sum of the gradients of N windows (0: of `count`) whose maximum was there.
template <class A, int N>
ALEXNET_INLINE void gather_gradients(const Windows<A>& windows, int count, int64_t channels, Pixels<A> dx, int64_t w) {
  const int n = N > 0 ? N : count;
  for (int64_t c = 0; c < channels; c += kLanes<A>) {
    if (!dx.nontemporal) prefetch(dx[w + 2 * kPrefetchPixels] + c);
    Vec<A> sum = {};
    for (int t = 0; t < n; ++t) {
      sum += load<A>(windows.code[t] + c) == windows.position[t] ? load<A>(windows.grad[t] + c) : Vec<A>{};
    }
    dx.write(dx[w] + c, sum);
  }
}

// The gradient of input row h, from the pooled rows that cover it. Every pixel adds up the windows that contain it in
// their order, so the result does not depend on the number of threads.
template <class A>
__attribute__((noinline)) void pool_row_backward(const Pool& pool, Ring<PooledRow<A>>& ring, int64_t h,
                                                 int64_t channels, Pixels<A> dx) {
  const Span rows = covering(pool, h, pool.out_height);
  PooledRow<A> row[kMaxKernel];
  for (int64_t i = rows.first; i < rows.last; ++i) row[i - rows.first] = ring[i];
  const int64_t top = h + pool.padding, k = pool.kernel_size;
  Span columns = {0, 0};
  for (int64_t w = 0; w < pool.width; ++w) {  // `columns`: the output columns whose windows contain w
    const int64_t left = w + pool.padding;
    while (columns.first * pool.stride + k <= left) ++columns.first;
    while (columns.last < pool.out_width && columns.last * pool.stride <= left) ++columns.last;
    Windows<A> windows;  // list them row by row, the order of the sum
    int count = 0;
    for (int64_t i = rows.first; i < rows.last; ++i) {
      for (int64_t j = columns.first; j < columns.last; ++j, ++count) {
        windows.grad[count] = row[i - rows.first].grad[j];
        windows.code[count] = row[i - rows.first].code[j];
        windows.position[count] = A((top - i * pool.stride) * k + left - j * pool.stride);
      }
    }
    count == 1   ? gather_gradients<A, 1>(windows, count, channels, dx, w)
    : count == 2 ? gather_gradients<A, 2>(windows, count, channels, dx, w)
    : count == 4 ? gather_gradients<A, 4>(windows, count, channels, dx, w)
                 : gather_gradients<A, 0>(windows, count, channels, dx, w);
  }
}

// The gradient of pooling, one input row after the other. A ring buffer holds the pooled rows that cover the input row.
template <class T>
class PoolGradient {
  using A = Accumulator<T>;

 public:
  // `images`: the input of pooling. Its channels lie in `groups` groups in scratch memory.
  PoolGradient(const Pool& pool, const Images& images, int64_t groups, const void* grad, const uint8_t* code)
      : pool_(pool),
        images_(pooled_images(images, pool)),
        channels_(channels_of<A>(images_, groups)),
        grad_(static_cast<const T*>(grad)),
        code_(code) {}

  // Writes the gradient of row h of image n, in ascending order. change(o, slot, row) may replace the gradients of
  // pooled row o before they are used.
  template <class F>
  void row(int64_t n, int64_t h, Pixels<A> dx, F change) {
    if (h == 0) ring_.restart();
    const Span span = covering(pool_, h, pool_.out_height);
    ring_.advance(span.first, span.last, [&](int64_t o, int64_t slot) {
      const int64_t at = row_offset(images_, channels_, n, o);
      PooledRow<A> row = {pixels_at<A>(grad_ + at, channels_, pool_.out_width, grads_ + slot * row_size_),
                          pixels_at<A>(code_ + at, channels_, pool_.out_width, codes_ + slot * row_size_)};
      change(o, slot, row);
      return row;
    });
    pool_row_backward<A>(pool_, ring_, h, channels_.stride(), dx);
  }

 private:
  const Pool& pool_;
  const Images images_;  // after pooling
  const Channels channels_;
  const T* grad_;
  const uint8_t* code_;
  const int64_t slots_ = max_covering(pool_), row_size_ = padded_size<A>(pool_.out_width, channels_.stride());
  Scratch<A> grads_{slots_ * row_size_}, codes_{slots_ * row_size_};
  Ring<PooledRow<A>> ring_{slots_};
};

}  // namespace alexnet_cuda::ALEXNET_CPU_LEVEL
