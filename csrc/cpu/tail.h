// The forward of ReLU, LRN and max-pooling, whatever its rows come from: a tensor, or a convolution on the fly.
#pragma once

#include "pool.h"

namespace alexnet_cuda::ALEXNET_CPU_LEVEL {

template <class A>
ALEXNET_INLINE Channels pooled_channels(const TailArgs& a) {
  Images images = a.images;
  images.height = a.pool.out_height;
  images.width = a.pool.out_width;
  return channels_of<A>(images, a.lrn.groups);
}

// Pooled rows [begin, end) of the batch. make(n, row, slot) gives the pixels of row `row` of image n; it may put them
// into `slot`, memory for one row, and is called once for every row, in ascending order.
template <class T, class Make>
ALEXNET_INLINE void tail_rows(const TailArgs& a, int64_t begin, int64_t end, Make make) {
  using A = Accumulator<T>;
  const Pool& pool = a.pool;
  const Channels pooled = pooled_channels<A>(a);
  const int64_t stride = pooled.stride(), row_size = room<A>(pool.width, stride);
  const bool lrn_last = a.order == kReluPoolLrn;
  const int64_t out_size = room<A>(pool.out_width, stride);
  Scratch<A> made(lrn_last ? 0 : row_size), rows(pool.kernel_size * row_size), maxima(out_size), out(out_size);
  Scratch<A> codes(a.code ? out_size : 0);
  Normaliser<A> normaliser(a.lrn, pooled, false);
  Ring<Pixels<const A>> ring(pool.kernel_size);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t n = t / pool.out_height, o = t % pool.out_height;
    if (o == 0) ring.restart();
    const Span span = window(pool, o, pool.height);
    ring.advance(span.first, span.last, [&](int64_t row, int slot) -> Pixels<const A> {
      A* to = rows + slot * row_size;
      if (lrn_last) return make(n, row, to);
      const Pixels<const A> x = make(n, row, made);
      if (a.order == kReluLrnPool) {
        normaliser.template forward<true>(x, {to, stride}, pool.width);
      } else {
        normaliser.template forward<false>(x, {to, stride}, pool.width);
      }
      return {to, stride};
    });

    const int64_t offset =
        n * a.images.channels * pool.out_height * pool.out_width + o * pool.out_width * pooled.pixel_stride;
    const Result<A, T> y(static_cast<T*>(a.out) + offset, pooled, out);
    A* code = a.code ? static_cast<A*>(codes) : nullptr;
    if (lrn_last) {
      const Pixels<A> max = {maxima, stride};
      pool_row<A, true>(pool, ring, o, stride, max, code, stride);
      normaliser.template forward<false>({max.data, max.stride}, y.pixels, pool.out_width);
    } else {
      pool_row<A, false>(pool, ring, o, stride, y.pixels, code, stride);
      if (a.order == kLrnPoolRelu) {
        for (int64_t w = 0; w < pool.out_width; ++w) {
          for (int64_t i = 0; i < stride; i += kLanes<A>) store<A>(y.pixels[w] + i, relu<A>(load<A>(y.pixels[w] + i)));
        }
      }
    }
    y.finish(pool.out_width);
    if (a.code) write_pixels<A>(codes, stride, pooled, pool.out_width, a.code + offset);
  }
}

}  // namespace alexnet_cuda::ALEXNET_CPU_LEVEL
