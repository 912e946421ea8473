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

// Pooled rows [begin, end) of the batch. make(n, row, to) gives the pixels of row `row` of image n; it may put them at
// `to`, memory for one row, and is called once for every row, in ascending order.
template <class T, Order ORDER, class Make>
ALEXNET_INLINE void tail_rows(const TailArgs& a, int64_t begin, int64_t end, Make make) {
  using A = Accumulator<T>;
  constexpr bool kPoolFirst = ORDER == kReluPoolLrn, kReluFirst = ORDER == kReluLrnPool;
  constexpr PoolInput kInput = kPoolFirst   ? PoolInput::kBeforeRelu
                               : kReluFirst ? PoolInput::kNormalised
                                            : PoolInput::kAny;
  const Pool& pool = a.pool;
  const Channels pooled = pooled_channels<A>(a);
  const int64_t stride = pooled.stride(), row_size = room<A>(pool.width, stride);
  const int64_t out_size = room<A>(pool.out_width, stride);
  Scratch<A> made(row_size), normalised(kPoolFirst ? 0 : row_size), maxima(kPoolFirst ? out_size : 0), out(out_size);
  Scratch<A> codes(a.code ? out_size : 0);
  Normaliser<A> normaliser(a.lrn, pooled, false);
  Pooler<A, kInput> pooler(pool, stride, a.code != nullptr);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t n = t / pool.out_height, o = t % pool.out_height;
    const int64_t offset =
        n * a.images.channels * pool.out_height * pool.out_width + o * pool.out_width * pooled.pixel_stride;
    const Result<A, T> y(static_cast<T*>(a.out) + offset, pooled, out);
    if (o == 0) pooler.restart();
    pooler.row(o, stride, kPoolFirst ? Pixels<A>{maxima, stride} : y.pixels, codes, [&](int64_t row) {
      const Pixels<const A> x = make(n, row, made);
      if (kPoolFirst) return x;
      normaliser.template forward<kReluFirst>(x, {normalised, stride}, pool.width);
      return Pixels<const A>{normalised, stride};
    });
    if (kPoolFirst) normaliser.template forward<false>({maxima, stride}, y.pixels, pool.out_width);
    if (ORDER == kLrnPoolRelu) {
      for (int64_t w = 0; w < pool.out_width; ++w) {
        for (int64_t i = 0; i < stride; i += kLanes<A>) store<A>(y.pixels[w] + i, relu<A>(load<A>(y.pixels[w] + i)));
      }
    }
    y.finish(pool.out_width);
    if (a.code) write_pixels<A>(codes, stride, pooled, pool.out_width, a.code + offset);
  }
}

template <class T, class Make>
ALEXNET_INLINE void tail_rows(const TailArgs& a, int64_t begin, int64_t end, Make make) {
  switch (a.order) {
    case kReluLrnPool:
      return tail_rows<T, kReluLrnPool>(a, begin, end, make);
    case kReluPoolLrn:
      return tail_rows<T, kReluPoolLrn>(a, begin, end, make);
    case kLrnPoolRelu:
      return tail_rows<T, kLrnPoolRelu>(a, begin, end, make);
  }
}

}  // namespace alexnet_cuda::ALEXNET_CPU_LEVEL
