// ReLU, LRN and max pooling in one pass over memory, forward (tail.h) and backward.
//
// Memory: a task is one pooled row of an image; of the backward, one row of dx. All intermediate rows are
// scratch memory in the cache, and none was saved by the forward: the backward computes what it needs from x and the
// codes.
#include "tail.h"

namespace alexnet_cuda::ALEXNET_CPU_LEVEL {
namespace {

template <class T>
void forward(const TailArguments& a, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const Channels c = channels_of<A>(a.images, a.lrn.groups);
  tail_rows<T>(a, begin, end, [&](int64_t n, int64_t row, A* to) {
    return pixels_at<A>(static_cast<const T*>(a.x) + row_offset(a.images, c, n, row), c, a.images.width, to);
  });
}

// A row of dx: gather the gradients of pooling, then apply the gradients of LRN and ReLU. Where LRN comes after
// pooling, its gradient is applied to each pooled row before the gather, from the maxima, which are pooled from x
// again.
template <class T>
void backward(const TailArguments& a, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const Pool& pool = a.pool;
  const Channels c = channels_of<A>(a.images, a.lrn.groups);
  const int64_t width = pool.width, stride = c.stride(), row_size = padded_size<A>(width, stride);
  const bool lrn_last = a.order == kReluPoolLrn;
  const int64_t pooled_size = lrn_last ? padded_size<A>(pool.out_width, stride) : 0;
  Scratch<A> gathered(row_size), x_row(row_size), dx(row_size), pooled_row(lrn_last ? row_size : 0);
  Scratch<A> maxima(pooled_size), lrn_grads(max_covering(pool) * pooled_size);
  Normaliser<A> normaliser(a.lrn, c);
  PoolGradient<T> gradient(pool, a.images, a.lrn.groups, a.grad, a.code);
  Pooler<A, PoolInput::kBeforeRelu> pooler(pool, lrn_last ? stride : 0, false);
  for (int64_t t = begin; t < end; ++t) {  // row h of dx of image n
    const int64_t n = t / pool.height, h = t % pool.height;
    if (h == 0) pooler.restart();
    const auto read = [&](int64_t row, A* to) {
      return pixels_at<A>(static_cast<const T*>(a.x) + row_offset(a.images, c, n, row), c, width, to);
    };
    const OutputRow<A, T> result(static_cast<T*>(a.out) + row_offset(a.images, c, n, h), c, dx);
    const Pixels<A> sum = lrn_last ? result.pixels : Pixels<A>{gathered, stride};
    gradient.row(n, h, sum, [&](int64_t o, int slot, PooledRow<A>& row) {
      if (!lrn_last) return;
      const Pixels<A> out = {lrn_grads + slot * pooled_size, stride};
      pooler.row(o, stride, {maxima, stride}, nullptr, [&](int64_t r) { return read(r, pooled_row); });
      normaliser.template backward<false>({maxima, stride}, row.grad, out, pool.out_width);
      row.grad = {out.data, stride};
    });
    const Pixels<const A> x = read(h, x_row);
    if (a.order != kReluLrnPool) {  // the gradient of ReLU, whose input had the sign of x
      for (int64_t w = 0; w < width; ++w) {
        for (int64_t i = 0; i < stride; i += kLanes<A>) {
          store<A>(sum[w] + i, through_relu<A, true>(load<A>(x[w] + i), load<A>(sum[w] + i)));
        }
      }
    }
    if (a.order == kReluLrnPool) {
      normaliser.template backward<true>(x, {sum.data, sum.stride}, result.pixels, width);
    } else if (a.order == kLrnPoolRelu) {
      normaliser.template backward<false>(x, {sum.data, sum.stride}, result.pixels, width);
    }
    result.finish(width);
  }
}

}  // namespace

ALEXNET_CPU_KERNEL_OF(tail_forward, TailArguments, forward<T>)
ALEXNET_CPU_KERNEL_OF(tail_backward, TailArguments, backward<T>)

}  // namespace alexnet_cuda::ALEXNET_CPU_LEVEL
