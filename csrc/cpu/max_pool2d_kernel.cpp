// Max-pooling and its gradient. Pixels are made of kPlanes planes at a time (NCHW) or of an image's channels (NHWC),
// and a task is one row: the rows that it shares with the previous one are still in the ring. The gradient of an NCHW
// tensor is the exception.
#include "planes.h"
#include "pool.h"

namespace alexnet_cuda::ALEXNET_CPU_LEVEL {
namespace {

int64_t planes_per_block(const Images& images) {
  return images.channels_last ? images.channels : kPlanes;
}

template <class T>
void forward(const PoolArgs& a, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const Pool& pool = a.pool;
  const int64_t in_plane = pool.height * pool.width, out_plane = pool.out_height * pool.out_width;
  const int64_t most = planes_per_block(a.images), widest = round_up(most, kLanes<A>);
  Scratch<A> row(room<A>(pool.width, widest)), out(room<A>(pool.out_width, widest));
  Scratch<A> codes(a.code ? room<A>(pool.out_width, widest) : 0);
  Pooler<A, PoolInput::kAny> pooler(pool, widest, a.code != nullptr);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t o = t % pool.out_height;
    if (o == 0) pooler.restart();
    const Planes block = planes_of<A>(a.images, t / pool.out_height, most);
    const Channels in = block.layout(in_plane), pooled = block.layout(out_plane);
    const T* x = static_cast<const T*>(a.x) + block.offset(in_plane);
    const int64_t offset = block.offset(out_plane) + o * pool.out_width * pooled.pixel_stride;
    const Result<A, T> y(static_cast<T*>(a.out) + offset, pooled, out);
    const auto start = [&](int64_t r) { return x + r * pool.width * in.pixel_stride; };
    if (in.channel_stride == 1 && in.each == in.padded) {
      pooler.row(o, in.padded, y.pixels, codes, [&](int64_t r) { return Pixels<const T>{start(r), in.pixel_stride}; });
    } else {
      pooler.row(o, in.padded, y.pixels, codes, [&](int64_t r) { return pixels_at<A>(start(r), in, pool.width, row); });
    }
    y.finish(pool.out_width);
    if (a.code) write_pixels<A>(codes, in.padded, pooled, pool.out_width, a.code + offset);
  }
}

// NHWC: every input row gathers.
template <class T>
void backward_rows(const PoolArgs& a, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const Pool& pool = a.pool;
  const int64_t in_plane = pool.height * pool.width, out_plane = pool.out_height * pool.out_width;
  const int64_t most = a.images.channels, widest = round_up(most, kLanes<A>);
  const int64_t slots = covering_rows(pool), row_size = room<A>(pool.out_width, widest);
  Scratch<A> grads(slots * row_size), codes(slots * row_size), dx(room<A>(pool.width, widest));
  Ring<Pooled<A>> ring(slots);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t h = t % pool.height;
    if (h == 0) ring.restart();
    const Planes block = planes_of<A>(a.images, t / pool.height, most);
    const Channels in = block.layout(in_plane), pooled = block.layout(out_plane);
    const int64_t start = block.offset(out_plane);
    const Span span = covering(pool, h, pool.out_height);
    ring.advance(span.first, span.last, [&](int64_t row, int slot) {
      const int64_t at = start + row * pool.out_width * pooled.pixel_stride;
      return Pooled<A>{
          pixels_at<A>(static_cast<const T*>(a.grad) + at, pooled, pool.out_width, grads + slot * row_size),
          pixels_at<A>(static_cast<const uint8_t*>(a.code) + at, pooled, pool.out_width, codes + slot * row_size)};
    });
    const int64_t offset = block.offset(in_plane) + h * pool.width * in.pixel_stride;
    const Result<A, T> result(static_cast<T*>(a.out) + offset, in, dx, is_streamed<T>(a.images));
    pool_row_backward<A>(pool, ring, h, in.padded, result.pixels);
    result.finish(pool.width);
  }
}

// NCHW: a plane fits the cache and belongs to one thread, which scatters the few gradients into zeros; they arrive in
// the order in which a gather would add them.
template <class T>
void backward_planes(const PoolArgs& a, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const Pool& pool = a.pool;
  const int64_t in_plane = pool.height * pool.width, out_plane = pool.out_height * pool.out_width;
  Scratch<A> scratch(__is_same(A, T) ? 0 : in_plane);
  int64_t position[256];  // of a code in a window; far outside the plane where there is none
  for (int64_t i = 0; i < 256; ++i) {
    const bool inside = i < pool.kernel_size * pool.kernel_size;
    position[i] = inside ? i / pool.kernel_size * pool.width + i % pool.kernel_size : INT64_MIN / 2;
  }
  for (int64_t t = begin; t < end; ++t) {
    T* out = static_cast<T*>(a.out) + t * in_plane;
    A* dx = scratch;
    if constexpr (__is_same(A, T)) dx = out;
    for (int64_t i = 0; i < in_plane; ++i) dx[i] = 0;
    for (int64_t o = 0; o < pool.out_height; ++o) {
      const T* grad = static_cast<const T*>(a.grad) + t * out_plane + o * pool.out_width;
      const uint8_t* code = a.code + t * out_plane + o * pool.out_width;
      int64_t start = (o * pool.stride - pool.padding) * pool.width - pool.padding;
      for (int64_t w = 0; w < pool.out_width; ++w, start += pool.stride) {
        const uint64_t at = start + position[code[w]];
        if (at < static_cast<uint64_t>(in_plane)) dx[at] += to_accumulator<A>(grad[w]);
      }
    }
    if constexpr (!__is_same(A, T))
      write_pixels<A>(static_cast<const A*>(dx), 0, Channels{0, 1, 1, in_plane, 0}, 1, out);
  }
}

}  // namespace

void max_pool_forward(const PoolArgs& a, int64_t begin, int64_t end) {
  dispatch(a.images.dtype, [&](auto t) { forward<decltype(t)>(a, begin, end); });
}

void max_pool_backward(const PoolArgs& a, int64_t begin, int64_t end) {
  dispatch(a.images.dtype, [&](auto t) {
    if (a.images.channels_last) {
      backward_rows<decltype(t)>(a, begin, end);
    } else {
      backward_planes<decltype(t)>(a, begin, end);
    }
  });
}

}  // namespace alexnet_cuda::ALEXNET_CPU_LEVEL
