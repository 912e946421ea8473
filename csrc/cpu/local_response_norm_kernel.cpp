// Local response normalisation across channels (lrn.h) and in the plane, forward and backward.
//
// Memory: across channels, a task is a strip of kStrip pixels; in NHWC it may run from one image into the next.
// In the plane, a task is a block of planes (rows.h), which is converted to scratch memory as a whole.
//
// Numerics: the spatial window sum is separable, rows first, then columns, and every window is summed afresh.
#include "lrn.h"

namespace alexnet_cuda::ALEXNET_CPU_LEVEL {
namespace {

template <class T, bool BACKWARD>
void across_channels(const LrnArguments& a, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const Images& images = a.images;
  const Channels c = channels_of<A>(images, a.lrn.groups);
  const int64_t size = kStrip * c.stride();
  Scratch<A> x(size), grad(BACKWARD ? size : 0), out(size);
  Normaliser<A> normaliser(a.lrn, c);
  const int64_t pixels = images.channels_last ? images.count * images.pixels() : images.pixels();
  const int64_t strips = (pixels + kStrip - 1) / kStrip;
  for (int64_t t = begin; t < end; ++t) {  // one strip: convert, normalise, convert back
    const int64_t first = t % strips * kStrip, count = min64(kStrip, pixels - first);
    const int64_t offset =
        t / strips * images.channels * images.pixels() + first * (images.channels_last ? images.channels : 1);
    const OutputRow<A, T> y(static_cast<T*>(a.out) + offset, c, out, is_nontemporal<T>(images));
    const Pixels<const A> from = pixels_at<A>(static_cast<const T*>(a.x) + offset, c, count, x);
    Pixels<const A> grads = {};
    if (BACKWARD) grads = pixels_at<A>(static_cast<const T*>(a.grad) + offset, c, count, grad);
    normaliser.template run<false, BACKWARD>(from, grads, y.pixels, count);
    y.finish(count);
  }
}

// out = the sum of `in` over rows [h - before, h + after] and the same columns of every pixel of a plane. `rows` holds
// one row of sums.
template <class A>
void plane_sum(const A* in, A* out, A* rows, int64_t height, int64_t width, int64_t before, int64_t after,
               int64_t channels) {
  for (int64_t h = 0; h < height; ++h) {
    const int64_t h0 = max64(0, h - before), h1 = min64(height, h + after + 1);
    for (int64_t i = 0; i < width * channels; i += kLanes<A>) {  // over the window's rows, into `rows`
      Vec<A> sum = {};
      for (int64_t r = h0; r < h1; ++r) sum += load<A>(in + r * width * channels + i);
      store<A>(rows + i, sum);
    }
    for (int64_t w = 0; w < width; ++w) {  // over the window's columns, into `out`
      const int64_t w0 = max64(0, w - before), w1 = min64(width, w + after + 1);
      for (int64_t i = 0; i < channels; i += kLanes<A>) {
        Vec<A> sum = {};
        for (int64_t q = w0; q < w1; ++q) sum += load<A>(rows + q * channels + i);
        store<A>(out + (h * width + w) * channels + i, sum);
      }
    }
  }
}

template <class T, bool BACKWARD>
void in_plane(const LrnArguments& a, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const int64_t pixels = a.images.pixels(), planes = round_up(kPlanes, kLanes<A>);
  const int64_t size = padded_size<A>(pixels, planes);
  Scratch<A> x(size), grad(BACKWARD ? size : 0), squares(size), sums(size);
  Scratch<A> rows(a.images.width * planes);
  const A alpha = a.lrn.alpha, beta = a.lrn.beta, k = a.lrn.k, scale = 2 * alpha * beta;
  const int64_t front = a.lrn.front, back = a.lrn.size - 1 - front;
  for (int64_t t = begin; t < end; ++t) {  // one block of whole planes, [pixel][channel] in scratch memory
    const Planes block = planes_of<A>(a.images, t, kPlanes);
    const Channels c = block.layout(pixels);
    const int64_t n = pixels * c.padded, offset = block.offset(pixels);
    read_pixels<A>(static_cast<const T*>(a.x) + offset, c, pixels, x, c.padded);
    if (BACKWARD) read_pixels<A>(static_cast<const T*>(a.grad) + offset, c, pixels, grad, c.padded);
    for (int64_t i = 0; i < n; i += kLanes<A>) {
      const Vec<A> v = load<A>(x + i);
      store<A>(squares + i, v * v);
    }
    plane_sum<A>(squares, sums, rows, a.images.height, a.images.width, front, back, c.padded);
    if (!BACKWARD) {  // y overwrites the squares
      for (int64_t i = 0; i < n; i += kLanes<A>) {
        const Vec<A> d = k + alpha * load<A>(sums + i);
        store<A>(squares + i, load<A>(x + i) * power<A>(d, rsqrt<A>(d), beta));
      }
    } else {  // g d^-beta overwrites g, the terms of the gradient's sum and then dx overwrite the squares
      for (int64_t i = 0; i < n; i += kLanes<A>) {
        const Vec<A> d = k + alpha * load<A>(sums + i), r = rsqrt<A>(d);
        const Vec<A> direct = load<A>(grad + i) * power<A>(d, r, beta);
        store<A>(grad + i, direct);
        store<A>(squares + i, direct * load<A>(x + i) * (r * r));
      }
      plane_sum<A>(squares, sums, rows, a.images.height, a.images.width, back, front, c.padded);
      for (int64_t i = 0; i < n; i += kLanes<A>) {
        store<A>(squares + i, load<A>(grad + i) - scale * load<A>(x + i) * load<A>(sums + i));
      }
    }
    write_pixels<A>(static_cast<const A*>(squares), c.padded, c, pixels, static_cast<T*>(a.out) + offset);
  }
}

}  // namespace

ALEXNET_CPU_KERNEL_OF(lrn_forward, LrnArguments, across_channels<T, false>)
ALEXNET_CPU_KERNEL_OF(lrn_backward, LrnArguments, across_channels<T, true>)
ALEXNET_CPU_KERNEL_OF(spatial_lrn_forward, LrnArguments, in_plane<T, false>)
ALEXNET_CPU_KERNEL_OF(spatial_lrn_backward, LrnArguments, in_plane<T, true>)

}  // namespace alexnet_cuda::ALEXNET_CPU_LEVEL
