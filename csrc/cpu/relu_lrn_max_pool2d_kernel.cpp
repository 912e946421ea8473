// ReLU, LRN and max-pooling in one pass over memory. Rows are normalised once into a ring as long as the pooling
// window is high, and only pooled rows leave the cache. The backward finds again what it needs from x and the codes:
// no intermediate value was ever written.
#include "tail.h"

namespace alexnet_cuda::ALEXNET_CPU_LEVEL {
namespace {

template <class T>
void forward(const TailArgs& a, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const Channels c = channels_of<A>(a.images, a.lrn.groups);
  const int64_t image = a.images.channels * a.images.pixels(), width = a.images.width;
  const T* x = static_cast<const T*>(a.x);
  tail_rows<T>(a, begin, end, [&](int64_t n, int64_t row, A* slot) {
    return pixels_at<A>(x + n * image + row * width * c.pixel_stride, c, width, slot);
  });
}

// dx, a row at a time: the gradient of the pooled side is gathered (and, where LRN comes after pooling, first taken
// through it, from the maxima that are found again in x), then taken through LRN and ReLU.
template <class T>
void backward(const TailArgs& a, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const Pool& pool = a.pool;
  const Channels c = channels_of<A>(a.images, a.lrn.groups), pooled = pooled_channels<A>(a);
  const int64_t width = pool.width, row_size = room<A>(width, c.stride()), slots = covering_rows(pool);
  const int64_t pooled_size = room<A>(pool.out_width, c.stride());
  const bool lrn_last = a.order == kReluPoolLrn;
  Scratch<A> grads(slots * pooled_size), codes(slots * pooled_size), gathered(row_size), x_row(row_size), dx(row_size);
  Scratch<A> pooled_row(lrn_last ? row_size : 0), maxima(lrn_last ? pooled_size : 0);
  Scratch<A> through(lrn_last ? slots * pooled_size : 0);
  Normaliser<A> normaliser(a.lrn, c, true);
  Ring<Pooled<A>> ring(slots);
  Pooler<A, PoolInput::kBeforeRelu> pooler(pool, lrn_last ? c.stride() : 0, false);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t n = t / pool.height, h = t % pool.height;
    if (h == 0) {
      ring.restart();
      pooler.restart();
    }
    const T* x = static_cast<const T*>(a.x) + n * a.images.channels * a.images.pixels();
    const auto read = [&](int64_t row, A* to) { return pixels_at<A>(x + row * width * c.pixel_stride, c, width, to); };
    const Span span = covering(pool, h, pool.out_height);
    ring.advance(span.first, span.last, [&](int64_t o, int slot) {
      const int64_t at =
          n * a.images.channels * pool.out_height * pool.out_width + o * pool.out_width * pooled.pixel_stride;
      Pooled<A> row = {
          pixels_at<A>(static_cast<const T*>(a.grad) + at, pooled, pool.out_width, grads + slot * pooled_size),
          pixels_at<A>(static_cast<const uint8_t*>(a.code) + at, pooled, pool.out_width, codes + slot * pooled_size)};
      if (lrn_last) {
        const Pixels<A> max = {maxima, c.stride()}, out = {through + slot * pooled_size, c.stride()};
        pooler.row(o, c.stride(), max, nullptr, [&](int64_t r) { return read(r, pooled_row); });
        normaliser.template backward<false>({max.data, max.stride}, row.grad, out, pool.out_width);
        row.grad = {out.data, out.stride};
      }
      return row;
    });
    const int64_t offset = n * a.images.channels * a.images.pixels() + h * width * c.pixel_stride;
    const Result<A, T> result(static_cast<T*>(a.out) + offset, c, dx);
    const Pixels<const A> row = read(h, x_row);
    const Pixels<A> sum = lrn_last ? result.pixels : Pixels<A>{gathered, c.stride()};
    pool_row_backward<A>(pool, ring, h, c.stride(), sum);
    if (a.order != kReluLrnPool) {  // the ReLU that x or, with the same sign, x's normalised value went through
      for (int64_t w = 0; w < width; ++w) {
        for (int64_t i = 0; i < c.stride(); i += kLanes<A>) {
          store<A>(sum[w] + i, load<A>(row[w] + i) <= A(0) ? Vec<A>{} : load<A>(sum[w] + i));
        }
      }
    }
    if (a.order == kReluLrnPool) {
      normaliser.template backward<true>(row, {sum.data, sum.stride}, result.pixels, width);
    } else if (a.order == kLrnPoolRelu) {
      normaliser.template backward<false>(row, {sum.data, sum.stride}, result.pixels, width);
    }
    result.finish(width);
  }
}

}  // namespace

void tail_forward(const TailArgs& a, int64_t begin, int64_t end) {
  dispatch(a.images.dtype, [&](auto t) { forward<decltype(t)>(a, begin, end); });
}

void tail_backward(const TailArgs& a, int64_t begin, int64_t end) {
  dispatch(a.images.dtype, [&](auto t) { backward<decltype(t)>(a, begin, end); });
}

}  // namespace alexnet_cuda::ALEXNET_CPU_LEVEL
