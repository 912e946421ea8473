// Max-pooling of rows of pixels whose channels are contiguous (rows.h), and its gradient.
//
// The first maximum in scan order wins and NaN wins over everything, the last NaN keeping the index, as in torch. A
// code is the position of the maximum in its window, row-major from the window's unpadded start. It is computed as a
// number of the sums' type, like everything else here, and becomes a byte when it is written.
#pragma once

#include "lrn.h"

namespace alexnet_cuda::ALEXNET_CPU_LEVEL {

constexpr int kMaxKernel = 15;

// [first, last): the input rows (columns) of output row (column) o, and the output rows that input row i belongs to.
struct Span {
  int64_t first, last;
};

ALEXNET_INLINE Span window(const Pool& pool, int64_t o, int64_t size) {
  const int64_t start = o * pool.stride - pool.padding;
  return {greater(0, start), lesser(size, start + pool.kernel_size)};
}

ALEXNET_INLINE Span covering(const Pool& pool, int64_t i, int64_t out_size) {
  const int64_t p = i + pool.padding, first = p - pool.kernel_size + 1;
  return {first <= 0 ? 0 : (first + pool.stride - 1) / pool.stride, lesser(out_size, p / pool.stride + 1)};
}

// How many rows of the output the windows over one input row can span.
ALEXNET_INLINE int64_t covering_rows(const Pool& pool) {
  return (pool.kernel_size + pool.stride - 1) / pool.stride + 1;
}

template <class A>
ALEXNET_INLINE Vec<A> larger(Vec<A> a, Vec<A> b) {
  const Vec<A> m = a > b ? a : b;  // b where either is NaN
  return a == a ? m : a;
}

// The same where neither is negative or -0: their bits compare as they do, and those of a NaN are larger than any.
template <class A>
ALEXNET_INLINE Vec<A> larger_positive(Vec<A> a, Vec<A> b) {
  using U = Unsigned<A>;
  const U x = bit_cast<U>(a), y = bit_cast<U>(b);
  return bit_cast<Vec<A>>(x > y ? x : y);
}

// Takes v, which has the code `position`, into the maximum `best`.
template <class A>
ALEXNET_INLINE void take(Vec<A> v, Vec<A> position, Vec<A>& best, Vec<A>& best_position) {
  const auto wins = (v > best) | (v != v);
  best = wins ? v : best;
  best_position = wins ? position : best_position;
}

// What a Pooler reads: any numbers; numbers that are to pass a ReLU first; what came out of ReLU and LRN, in the cache.
enum class PoolInput { kAny, kBeforeRelu, kNormalised };

// Pools an image's rows in ascending order. A row is pooled along itself when it comes, once, while it is read from end
// to end; an output row is the maximum of the last few of these, which stay in the cache. Ties and NaN come out as in a
// scan of the window, because both steps keep its order.
template <class A, PoolInput INPUT>
class Pooler {
 public:
  Pooler(const Pool& pool, int64_t channels, bool code)
      : pool_(pool),
        row_size_(room<A>(pool.out_width, channels)),
        maxima_(pool.kernel_size * row_size_),
        columns_(code ? pool.kernel_size * row_size_ : 0),
        code_(code) {}

  void restart() { next_ = 0; }

  // Output row `o` and, if wanted, its codes, `channels` a pixel (no more than the constructor was told). make(row)
  // gives the pixels of an input row, of any type, which are read at once.
  template <class Make>
  void row(int64_t o, int64_t channels, Pixels<A> y, A* code, Make make) {
    channels_ = channels;
    const Span rows = window(pool_, o, pool_.height);
    for (next_ = greater(next_, rows.first); next_ < rows.last; ++next_) {
      const auto x = make(next_);
      code_ ? along<true>(x, next_) : along<false>(x, next_);
    }
    const int64_t top = o * pool_.stride - pool_.padding;
    code_ ? across<true>(rows, top, y, code) : across<false>(rows, top, y, code);
  }

 private:
  static constexpr bool kRelu = INPUT == PoolInput::kBeforeRelu, kPositive = INPUT == PoolInput::kNormalised;

  static ALEXNET_INLINE Vec<A> largest(Vec<A> a, Vec<A> b) {
    return kPositive ? larger_positive<A>(a, b) : larger<A>(a, b);
  }

  A* maxima(int64_t row) { return maxima_ + row % pool_.kernel_size * row_size_; }
  A* columns(int64_t row) { return columns_ + row % pool_.kernel_size * row_size_; }

  template <bool CODE, class T>
  __attribute__((noinline)) void along(Pixels<T> x, int64_t row) {
    A *max = maxima(row), *column = CODE ? columns(row) : nullptr;
    for (int64_t w = 0; w < pool_.out_width; ++w, max += channels_, column += CODE ? channels_ : 0) {
      const Span span = window(pool_, w, pool_.width);
      const A first = A(span.first - (w * pool_.stride - pool_.padding));
      if (pool_.kernel_size == 3 && span.last - span.first == 3) {
        along_window<3, CODE>(x[span.first], x.stride, 3, first, max, column);
      } else {
        along_window<0, CODE>(x[span.first], x.stride, span.last - span.first, first, max, column);
      }
    }
  }

  template <int K, bool CODE, class T>
  ALEXNET_INLINE void along_window(const T* x, int64_t stride, int64_t count, A first, A* max, A* column) {
    const int64_t n = K > 0 ? K : count;
    for (int64_t c = 0; c < channels_; c += kLanes<A>) {
      if constexpr (!kPositive) {
        prefetch(x + 32 * stride + c);
        prefetch(x + 33 * stride + c);
      }
      Vec<A> best = activation<A, kRelu>(x + c), position = fill<A>(first);
#pragma GCC unroll 3
      for (int64_t j = 1; j < n; ++j) {
        const Vec<A> v = activation<A, kRelu>(x + j * stride + c);
        if constexpr (CODE) {
          take<A>(v, fill<A>(first + A(j)), best, position);
        } else {
          best = largest(best, v);
        }
      }
      store<A>(max + c, best);
      if constexpr (CODE) store<A>(column + c, position);
    }
  }

  template <bool CODE>
  __attribute__((noinline)) void across(Span rows, int64_t top, Pixels<A> y, A* code) {
    const A *max[kMaxKernel], *column[kMaxKernel];
    const int64_t n = rows.last - rows.first;
    const A first = A((rows.first - top) * pool_.kernel_size);
    for (int64_t i = 0; i < n; ++i) max[i] = maxima(rows.first + i), column[i] = columns(rows.first + i);
    for (int64_t w = 0; w < pool_.out_width; ++w) {
      for (int64_t c = 0, at = w * channels_; c < channels_; c += kLanes<A>, at += kLanes<A>) {
        prefetch(y[w + kAhead] + c);
        Vec<A> best = load<A>(max[0] + at), position = {};
        if constexpr (CODE) position = load<A>(column[0] + at) + first;
        for (int64_t i = 1; i < n; ++i) {
          const Vec<A> v = load<A>(max[i] + at);
          if constexpr (CODE) {
            take<A>(v, load<A>(column[i] + at) + (first + A(i * pool_.kernel_size)), best, position);
          } else {
            best = largest(best, v);
          }
        }
        store<A>(y[w] + c, best);
        if constexpr (CODE) store<A>(code + at, position);
      }
    }
  }

  const Pool& pool_;
  int64_t row_size_;
  Scratch<A> maxima_, columns_;
  bool code_;
  int64_t channels_ = 0, next_ = 0;
};

// A row of pooled gradients and their codes.
template <class A>
struct Pooled {
  Pixels<const A> grad, code;
};

// The sum over N windows (0: over `count`) of the gradients whose code is `tap`, the pixel's place in that window.
template <class A, int N>
ALEXNET_INLINE void gather(const A* const* grad, const A* const* code, const A* tap, int count, int64_t channels,
                           Pixels<A> dx, int64_t w) {
  const int n = N > 0 ? N : count;
  for (int64_t c = 0; c < channels; c += kLanes<A>) {
    if (!dx.streamed) prefetch(dx[w + 2 * kAhead] + c);
    Vec<A> sum = {};
    for (int t = 0; t < n; ++t) sum += load<A>(code[t] + c) == tap[t] ? load<A>(grad[t] + c) : Vec<A>{};
    dx.write(dx[w] + c, sum);
  }
}

// The gradient of input row `h`: every pixel gathers from the windows that it belongs to, in their order.
template <class A>
inline void pool_row_backward(const Pool& pool, Ring<Pooled<A>>& ring, int64_t h, int64_t channels, Pixels<A> dx) {
  const Span rows = covering(pool, h, pool.out_height);
  Pooled<A> row[kMaxKernel];
  for (int64_t i = rows.first; i < rows.last; ++i) row[i - rows.first] = ring[i];
  const int64_t top = h + pool.padding, k = pool.kernel_size;
  Span columns = {0, 0};
  for (int64_t w = 0; w < pool.width; ++w) {
    const int64_t left = w + pool.padding;
    while (columns.first * pool.stride + k <= left) ++columns.first;
    while (columns.last < pool.out_width && columns.last * pool.stride <= left) ++columns.last;
    const A *grad[kMaxKernel * kMaxKernel], *code[kMaxKernel * kMaxKernel];
    A tap[kMaxKernel * kMaxKernel];
    int count = 0;
    for (int64_t i = rows.first; i < rows.last; ++i) {
      const Pooled<A>& from = row[i - rows.first];
      for (int64_t j = columns.first; j < columns.last; ++j, ++count) {
        grad[count] = from.grad[j];
        code[count] = from.code[j];
        tap[count] = A((top - i * pool.stride) * k + left - j * pool.stride);
      }
    }
    switch (count) {
      case 1:
        gather<A, 1>(grad, code, tap, count, channels, dx, w);
        break;
      case 2:
        gather<A, 2>(grad, code, tap, count, channels, dx, w);
        break;
      case 4:
        gather<A, 4>(grad, code, tap, count, channels, dx, w);
        break;
      default:
        gather<A, 0>(grad, code, tap, count, channels, dx, w);
    }
  }
}

}  // namespace alexnet_cuda::ALEXNET_CPU_LEVEL
