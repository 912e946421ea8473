// The whole first block: convolution rows are computed as the tail asks for them and, unless they are to be saved,
// stay in the cache.
#include "tail.h"
#include "winograd_rows.h"

namespace alexnet_cuda::ALEXNET_CPU_LEVEL {
namespace {

template <class T, class Rows>
void forward(const BlockArgs& a, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const Conv& conv = a.conv.conv;
  const Pool& pool = a.tail.pool;
  const int64_t k = conv.filters, width = conv.out_width, padded = round_up(k, kFilters<A>);
  const int64_t plane = conv.out_height * width;
  const Channels saved = channels_of<A>(a.tail.images, a.tail.lrn.groups);
  const Channels passing = {k, 1, saved.groups, saved.each, saved.padded};  // a row of its own, always NHWC
  Scratch<A> out(room<A>(width, padded));
  Scratch<T> unsaved(width * k);
  Rows rows(a.conv);

  // The tail reads what was rounded to T, as it would from a saved tensor.
  const auto compute = [&](int64_t n, int64_t row, T* to, const Channels& layout) {
    const Channels all = {layout.pixel_stride, layout.channel_stride, 1, k, padded};
    const Result<A, T> y(to, all, out);
    rows.compute(n, row, y.pixels);
    y.finish(width);
  };
  const auto saved_row = [&](int64_t n, int64_t row) {
    return static_cast<T*>(a.conv.out) + n * k * plane + row * width * saved.pixel_stride;
  };
  tail_rows<T>(a.tail, begin, end, [&](int64_t n, int64_t row, A* slot) {
    // A row belongs to one pooled row, although the windows of others overlap it: only its thread writes it.
    const int64_t owner = n * pool.out_height + lesser((row + pool.padding) / pool.stride, pool.out_height - 1);
    const bool save = a.conv.out != nullptr && owner >= begin && owner < end;
    T* to = save ? saved_row(n, row) : static_cast<T*>(unsaved);
    const Channels& layout = save ? saved : passing;
    compute(n, row, to, layout);
    return pixels_at<A>(static_cast<const T*>(to), layout, width, slot);
  });
  if (a.conv.out == nullptr) return;
  for (int64_t t = begin; t < end; ++t) {  // rows that no window reads are saved too
    const int64_t n = t / pool.out_height, o = t % pool.out_height;
    const int64_t last = o + 1 == pool.out_height ? pool.height : window(pool, o + 1, pool.height).first;
    for (int64_t row = window(pool, o, pool.height).last; row < last; ++row) compute(n, row, saved_row(n, row), saved);
  }
}

}  // namespace

void block_forward(const BlockArgs& a, int64_t begin, int64_t end) {
  dispatch_rows(a.conv, [&](auto t, auto rows) { forward<decltype(t), typename decltype(rows)::Type>(a, begin, end); });
}

}  // namespace alexnet_cuda::ALEXNET_CPU_LEVEL
