// The first block, convolution, ReLU, LRN and max pooling, in one pass: tail.h asks for the convolution's rows, and
// these are computed one at a time.
//
// Memory: a convolution row stays in the cache, in NHWC, unless the convolution's output is saved for the backward:
// then it is written there and read back. Numerics: either way the row is rounded to T first, so both give the same
// result.
#include "tail.h"
#include "winograd_rows.h"

namespace alexnet_cuda::ALEXNET_CPU_LEVEL {
namespace {

template <class T, class Rows>
void forward(const BlockTask& a, int64_t begin, int64_t end) {
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

void block_forward(const BlockTask& a, int64_t begin, int64_t end) {
  dispatch_rows<DirectRows, WinogradRows>(a.conv, [&]<class T, class Rows>() { forward<T, Rows>(a, begin, end); });
}

}  // namespace alexnet_cuda::ALEXNET_CPU_LEVEL
