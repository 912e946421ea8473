// The forward of ReLU, LRN and max pooling in one pass over rows, which come from a tensor or from a convolution that
// is computed row by row.
//
// Memory: an input row is normalised into a scratch row in the cache and pooled from there (or, if LRN comes
// last, pooled and then normalised). Only pooled rows and their codes are written to memory.
#pragma once

#include "lrn.h"
#include "pool.h"

namespace alexnet_cuda::ALEXNET_CPU_LEVEL {

// Pooled rows [begin, end) of the batch. make(n, row, to) returns the pixels of row `row` of image n, which it may
// write to `to`, memory for one row. It is called once for every row, in ascending order.
template <class T, Order ORDER, class Make>
ALEXNET_INLINE void tail_rows(const TailArguments& a, int64_t begin, int64_t end, Make make) {
  using A = Accumulator<T>;
  constexpr bool kPoolFirst = ORDER == kReluPoolLrn, kReluFirst = ORDER == kReluLrnPool;
  constexpr PoolInput kInput = kPoolFirst   ? PoolInput::kBeforeRelu
                               : kReluFirst ? PoolInput::kNormalised
                                            : PoolInput::kAny;
  const Pool& pool = a.pool;
  const Images images = pooled_images(a.images, pool);
  const Channels pooled = channels_of<A>(images, a.lrn.groups);
  const int64_t stride = pooled.stride(), row_size = padded_size<A>(pool.width, stride);
  const int64_t out_size = padded_size<A>(pool.out_width, stride);
  Scratch<A> made(row_size), normalised(kPoolFirst ? 0 : row_size), maxima(kPoolFirst ? out_size : 0), out(out_size);
  Scratch<A> codes(a.code ? out_size : 0);
  Normaliser<A> normaliser(a.lrn, pooled);
  Pooler<A, kInput> pooler(pool, stride, a.code != nullptr);
  // Normalises and pools the input rows under one pooled row that earlier pooled rows have not needed yet.
  for (int64_t t = begin; t < end; ++t) {
    const int64_t n = t / pool.out_height, o = t % pool.out_height, offset = row_offset(images, pooled, n, o);
    const OutputRow<A, T> y(static_cast<T*>(a.out) + offset, pooled, out);
    if (o == 0) pooler.restart();
    pooler.row(o, stride, kPoolFirst ? Pixels<A>{maxima, stride} : y.pixels, codes, [&](int64_t row) {
      const Pixels<const A> x = make(n, row, made);
      if (kPoolFirst) return x;
      normaliser.template forward<kReluFirst>(x, {normalised, stride}, pool.width);
      return Pixels<const A>{normalised, stride};
    });
    if (kPoolFirst) normaliser.template forward<false>({maxima, stride}, y.pixels, pool.out_width);
    if (ORDER == kLrnPoolRelu) {  // ReLU of the pooled row, in place
      for (int64_t w = 0; w < pool.out_width; ++w) {
        for (int64_t i = 0; i < stride; i += kLanes<A>) store<A>(y.pixels[w] + i, activation<A, true>(y.pixels[w] + i));
      }
    }
    y.finish(pool.out_width);
    if (a.code) write_pixels<A>(codes, stride, pooled, pool.out_width, a.code + offset);
  }
}

template <class T, class Make>
ALEXNET_INLINE void tail_rows(const TailArguments& a, int64_t begin, int64_t end, Make make) {
  a.order == kReluLrnPool   ? tail_rows<T, kReluLrnPool>(a, begin, end, make)
  : a.order == kReluPoolLrn ? tail_rows<T, kReluPoolLrn>(a, begin, end, make)
                            : tail_rows<T, kLrnPoolRelu>(a, begin, end, make);
}

}  // namespace alexnet_cuda::ALEXNET_CPU_LEVEL
