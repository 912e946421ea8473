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

// One output pixel: the window of `rows` x `columns` at `row`, whose first element has the code `first`. K = 3 is
// unrolled.
template <class A, int K, bool RELU, bool CODE>
ALEXNET_INLINE void pool_pixel(const A* const* row, int64_t stride, int64_t rows, int64_t columns, int64_t first,
                               int64_t kernel_size, int64_t channels, A* y, A* code) {
  if (K > 0) rows = columns = kernel_size = K;
  for (int64_t c = 0; c < channels; c += kLanes<A>) {
    Vec<A> best = activation<A, RELU>(row[0] + c), position = fill<A>(A(first));
#pragma GCC unroll 3
    for (int64_t i = 0; i < rows; ++i) {
#pragma GCC unroll 3
      for (int64_t j = 0; j < columns; ++j) {
        const Vec<A> v = activation<A, RELU>(row[i] + j * stride + c);
        if constexpr (CODE) {
          const auto wins = (v > best) | (v != v);
          best = wins ? v : best;
          position = wins ? fill<A>(A(first + i * kernel_size + j)) : position;
        } else {
          best = larger<A>(best, v);
        }
      }
    }
    store<A>(y + c, best);
    if constexpr (CODE) store<A>(code + c, position);
  }
}

// Output row `o` from the rows of the image in `ring`. `code` may be null.
template <class A, bool RELU>
inline void pool_row(const Pool& pool, Ring<Pixels<const A>>& ring, int64_t o, int64_t channels, Pixels<A> y, A* code,
                     int64_t code_stride) {
  const Span rows = window(pool, o, pool.height);
  const int64_t count = rows.last - rows.first,
                first_code = (rows.first - (o * pool.stride - pool.padding)) * pool.kernel_size;
  const A *row[kMaxKernel], *at[kMaxKernel];
  for (int64_t i = 0; i < count; ++i) row[i] = ring[rows.first + i].data;
  const int64_t stride = ring[rows.first].stride;
  for (int64_t w = 0; w < pool.out_width; ++w) {
    const Span columns = window(pool, w, pool.width);
    const int64_t width = columns.last - columns.first;
    const int64_t first = first_code + columns.first - (w * pool.stride - pool.padding);
    for (int64_t i = 0; i < count; ++i) at[i] = row[i] + columns.first * stride;
    A* to = y[w];
    const bool three = pool.kernel_size == 3 && count == 3 && width == 3;
    if (code != nullptr) {
      A* position = code + w * code_stride;
      if (three) {
        pool_pixel<A, 3, RELU, true>(at, stride, 3, 3, first, 3, channels, to, position);
      } else {
        pool_pixel<A, 0, RELU, true>(at, stride, count, width, first, pool.kernel_size, channels, to, position);
      }
    } else if (three) {
      pool_pixel<A, 3, RELU, false>(at, stride, 3, 3, first, 3, channels, to, nullptr);
    } else {
      pool_pixel<A, 0, RELU, false>(at, stride, count, width, first, pool.kernel_size, channels, to, nullptr);
    }
  }
}

// A row of pooled gradients and their codes.
template <class A>
struct Pooled {
  Pixels<const A> grad, code;
};

// The sum over N windows (0: over `count`) of the gradients whose code is `tap`, the pixel's place in that window.
template <class A, int N>
ALEXNET_INLINE void gather(const A* const* grad, const A* const* code, const A* tap, int count, int64_t channels,
                           A* dx) {
  const int n = N > 0 ? N : count;
  for (int64_t c = 0; c < channels; c += kLanes<A>) {
    Vec<A> sum = {};
    for (int t = 0; t < n; ++t) sum += load<A>(code[t] + c) == tap[t] ? load<A>(grad[t] + c) : Vec<A>{};
    store<A>(dx + c, sum);
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
        gather<A, 1>(grad, code, tap, count, channels, dx[w]);
        break;
      case 2:
        gather<A, 2>(grad, code, tap, count, channels, dx[w]);
        break;
      case 4:
        gather<A, 4>(grad, code, tap, count, channels, dx[w]);
        break;
      default:
        gather<A, 0>(grad, code, tap, count, channels, dx[w]);
    }
  }
}

}  // namespace alexnet_cuda::ALEXNET_CPU_LEVEL
