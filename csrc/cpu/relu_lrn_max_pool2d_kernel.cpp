// ReLU, LRN and max pooling in one pass over rows, forward and backward. The forward's rows come from a tensor or, in
// the first block, from a convolution that is computed row by row.
//
// Memory: a task is one pooled row of an image. An input row is normalised into a scratch row in the cache and pooled
// from there (or, if LRN comes last, pooled and then normalised). Only pooled rows and their codes are written to
// memory. Of the backward, a task is one row of dx. All intermediate rows are scratch memory in the cache, and none was
// saved by the forward: the backward computes what it needs from x and the codes.
#include <functional>

#include "amx_rows.h"
#include "lrn.h"
#include "pool.h"
#include "winograd_rows.h"

namespace alexnet_cuda::ALEXNET_CPU_LEVEL {
namespace {

// make(n, row, to) returns the pixels of row `row` of image n, which it may write to `to`, memory for one row. A call
// through a pointer costs nothing beside a row, and lets all sources of rows share the code below.
template <class A>
using MakeRow = std::function<Pixels<const A>(int64_t n, int64_t row, A* to)>;

// Pooled rows [begin, end) of the batch. `make` is called once for every row, in ascending order.
template <class T, Order ORDER>
void tail_rows(const TailArguments& a, int64_t begin, int64_t end, const MakeRow<Accumulator<T>>& make) {
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
      normaliser.template run<kReluFirst, false>(x, {}, {normalised, stride}, pool.width);
      return Pixels<const A>{normalised, stride};
    });
    if (kPoolFirst) normaliser.template run<false, false>({maxima, stride}, {}, y.pixels, pool.out_width);
    if (ORDER == kLrnPoolRelu) {  // ReLU of the pooled row, in place
      for (int64_t w = 0; w < pool.out_width; ++w) {
        for (int64_t i = 0; i < stride; i += kLanes<A>) store<A>(y.pixels[w] + i, activation<A, true>(y.pixels[w] + i));
      }
    }
    y.finish(pool.out_width);
    if (a.code) write_pixels<A>(codes, stride, pooled, pool.out_width, a.code + offset);
  }
}

template <class T>
void tail_rows(const TailArguments& a, int64_t begin, int64_t end, const MakeRow<Accumulator<T>>& make) {
  a.order == kReluLrnPool   ? tail_rows<T, kReluLrnPool>(a, begin, end, make)
  : a.order == kReluPoolLrn ? tail_rows<T, kReluPoolLrn>(a, begin, end, make)
                            : tail_rows<T, kLrnPoolRelu>(a, begin, end, make);
}

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
    gradient.row(n, h, sum, [&](int64_t o, int64_t slot, PooledRow<A>& row) {
      if (!lrn_last) return;
      const Pixels<A> out = {lrn_grads + slot * pooled_size, stride};
      pooler.row(o, stride, {maxima, stride}, nullptr, [&](int64_t r) { return read(r, pooled_row); });
      normaliser.template run<false, true>({maxima, stride}, row.grad, out, pool.out_width);
      row.grad = {out.data, stride};
    });
    const Pixels<const A> x = read(h, x_row);
    const Pixels<const A> grad = {sum.data, sum.stride};
    if (a.order == kReluLrnPool) {
      normaliser.template run<true, true>(x, grad, result.pixels, width);
    } else {  // the gradient of ReLU, whose input had the sign of x
      for (int64_t w = 0; w < width; ++w) {
        for (int64_t i = 0; i < stride; i += kLanes<A>) {
          store<A>(sum[w] + i, through_relu<A, true>(load<A>(x[w] + i), load<A>(sum[w] + i)));
        }
      }
      if (!lrn_last) normaliser.template run<false, true>(x, grad, result.pixels, width);
    }
    result.finish(width);
  }
}

// The first block. A convolution row stays in the cache, in NHWC, unless the convolution's output is saved for the
// backward: then it is written there and read back. Either way it is rounded to T first, so both give the same result.
template <class T, class Rows>
void block_rows(const BlockTask& a, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const Images& images = a.tail.images;  // the convolution's output
  const Pool& pool = a.tail.pool;
  const int64_t filters = images.channels, width = images.width, padded = round_up(filters, kFilterBlock<A>);
  const Channels saved = channels_of<A>(images, a.tail.lrn.groups);
  const Channels unsaved = {filters, 1, saved.groups, saved.per_group, saved.padded};
  Scratch<A> out(padded_size<A>(width, padded));
  Scratch<T> unsaved_row(width * filters);
  Rows rows(a.conv);

  const auto compute = [&](int64_t n, int64_t row, T* to, const Channels& layout) {
    const Channels all = {layout.pixel_stride, layout.channel_stride, 1, filters, padded};
    const OutputRow<A, T> y(to, all, out);
    rows.compute(n, row, y.pixels);
    y.finish(width);
  };
  const auto saved_row = [&](int64_t n, int64_t row) {
    return static_cast<T*>(a.conv.out) + row_offset(images, saved, n, row);
  };
  tail_rows<T>(a.tail, begin, end, [&](int64_t n, int64_t row, A* slot) {
    // Windows of several pooled rows may contain a row. One of them, the last, saves it: `owner`.
    const int64_t owner = n * pool.out_height + min64((row + pool.padding) / pool.stride, pool.out_height - 1);
    const bool save = a.conv.out != nullptr && owner >= begin && owner < end;
    T* to = save ? saved_row(n, row) : static_cast<T*>(unsaved_row);
    const Channels& layout = save ? saved : unsaved;
    compute(n, row, to, layout);
    return pixels_at<A>(static_cast<const T*>(to), layout, width, slot);
  });
  if (a.conv.out == nullptr) return;
  for (int64_t t = begin; t < end; ++t) {  // save the rows between and below windows, too
    const int64_t n = t / pool.out_height, o = t % pool.out_height;
    const int64_t last = o + 1 == pool.out_height ? pool.height : window(pool, o + 1, pool.height).first;
    for (int64_t row = window(pool, o, pool.height).last; row < last; ++row) compute(n, row, saved_row(n, row), saved);
  }
}

}  // namespace

ALEXNET_CPU_KERNEL_OF(tail_forward, TailArguments, forward<T>)
ALEXNET_CPU_KERNEL_OF(tail_backward, TailArguments, backward<T>)

void block_forward(const BlockTask& a, int64_t begin, int64_t end) {
  dispatch_rows<DirectRows, WinogradRows, AmxRows>(a.conv,
                                                   [&]<class T, class Rows>() { block_rows<T, Rows>(a, begin, end); });
}

}  // namespace alexnet_cuda::ALEXNET_CPU_LEVEL
