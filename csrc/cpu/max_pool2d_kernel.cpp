// Max pooling (pool.h) and its gradient.
//
// Memory: a task is one row of a block of kPlanes planes (NCHW) or of all channels of an image (NHWC); the input
// rows that it shares with the previous task are still in ring buffers. The gradient of an NCHW tensor is different: a
// task is one plane, which fits the cache.
#include "pool.h"

namespace alexnet_cuda::ALEXNET_CPU_LEVEL {
namespace {

template <class T>
void forward(const PoolArguments& a, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const Pool& pool = a.pool;
  const int64_t in_plane = pool.height * pool.width, out_plane = pool.out_height * pool.out_width;
  const int64_t planes = a.images.channels_last ? a.images.channels : kPlanes, padded = round_up(planes, kLanes<A>);
  Scratch<A> row(padded_size<A>(pool.width, padded)), out(padded_size<A>(pool.out_width, padded));
  Scratch<A> codes(a.code ? padded_size<A>(pool.out_width, padded) : 0);
  Pooler<A, PoolInput::kAny> pooler(pool, padded, a.code != nullptr);
  for (int64_t t = begin; t < end; ++t) {  // one pooled row of a block
    const int64_t o = t % pool.out_height;
    if (o == 0) pooler.restart();
    const Planes block = planes_of<A>(a.images, t / pool.out_height, planes);
    const Channels in = block.layout(in_plane), pooled = block.layout(out_plane);
    const T* x = static_cast<const T*>(a.x) + block.offset(in_plane);
    const int64_t offset = block.offset(out_plane) + o * pool.out_width * pooled.pixel_stride;
    const OutputRow<A, T> y(static_cast<T*>(a.out) + offset, pooled, out);
    const auto start = [&](int64_t r) { return x + r * pool.width * in.pixel_stride; };
    if (in.in_place()) {  // pooled from where it lies, also float16 and bfloat16
      pooler.row(o, in.padded, y.pixels, codes, [&](int64_t r) { return Pixels<const T>{start(r), in.pixel_stride}; });
    } else {
      pooler.row(o, in.padded, y.pixels, codes, [&](int64_t r) { return pixels_at<A>(start(r), in, pool.width, row); });
    }
    y.finish(pool.out_width);
    if (a.code) write_pixels<A>(codes, in.padded, pooled, pool.out_width, a.code + offset);
  }
}

// NHWC: every pixel of an input row gathers its gradients.
template <class T>
void backward_rows(const PoolArguments& a, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const Channels c = channels_of<A>(a.images);
  Scratch<A> dx(padded_size<A>(a.images.width, c.padded));
  PoolGradient<T> gradient(a.pool, a.images, 1, a.grad, a.code);
  for (int64_t t = begin; t < end; ++t) {  // row h of dx of image n
    const int64_t n = t / a.pool.height, h = t % a.pool.height;
    const OutputRow<A, T> row(static_cast<T*>(a.out) + row_offset(a.images, c, n, h), c, dx,
                              is_nontemporal<T>(a.images));
    gradient.row(n, h, row.pixels, [](auto&&...) {});
    row.finish(a.images.width);
  }
}

// NCHW: one thread scatters the gradients of a plane into zeros, in the order in which a gather would add them. They
// are few: one for every stride^2 pixels.
template <class T>
void backward_planes(const PoolArguments& a, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const Pool& pool = a.pool;
  const int64_t in_plane = pool.height * pool.width, out_plane = pool.out_height * pool.out_width;
  Scratch<A> scratch(__is_same(A, T) ? 0 : in_plane);
  int64_t position[256];  // a code's offset from the window's corner; for codes that do not exist, outside every plane
  for (int64_t i = 0; i < 256; ++i) {
    const bool inside = i < pool.kernel_size * pool.kernel_size;
    position[i] = inside ? i / pool.kernel_size * pool.width + i % pool.kernel_size : INT64_MIN / 2;
  }
  for (int64_t t = begin; t < end; ++t) {  // one plane
    T* out = static_cast<T*>(a.out) + t * in_plane;
    A* dx = scratch;
    if constexpr (__is_same(A, T)) dx = out;
    for (int64_t i = 0; i < in_plane; ++i) dx[i] = 0;
    for (int64_t o = 0; o < pool.out_height; ++o) {  // add each pooled pixel's gradient where its maximum was
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

ALEXNET_CPU_KERNEL_OF(max_pool_forward, PoolArguments, forward<T>)
ALEXNET_CPU_KERNEL_OF(max_pool_backward, PoolArguments, a.images.channels_last ? backward_rows<T> : backward_planes<T>)

}  // namespace alexnet_cuda::ALEXNET_CPU_LEVEL
