// Local response normalisation across channels and in the plane, forward and backward.
#include "lrn.h"
#include "planes.h"

namespace alexnet_cuda::ALEXNET_CPU_LEVEL {
namespace {

// A strip is kStrip pixels; in NHWC it may run from one image into the next.
template <class F>
ALEXNET_INLINE void for_each_strip(const Images& images, int64_t begin, int64_t end, F f) {
  const int64_t pixels = images.channels_last ? images.count * images.pixels() : images.pixels();
  const int64_t strips = (pixels + kStrip - 1) / kStrip;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t first = t % strips * kStrip;
    f(t / strips * images.channels * images.pixels() + first * (images.channels_last ? images.channels : 1),
      lesser(kStrip, pixels - first));
  }
}

template <class T>
void forward(const LrnArgs& a, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const Channels c = channels_of<A>(a.images, a.lrn.groups);
  Scratch<A> x(kStrip * c.stride()), y(kStrip * c.stride());
  Normaliser<A> normaliser(a.lrn, c, false);
  for_each_strip(a.images, begin, end, [&](int64_t offset, int64_t count) {
    const Result<A, T> result(static_cast<T*>(a.out) + offset, c, y, is_streamed<T>(a.images));
    normaliser.template forward<false>(pixels_at<A>(static_cast<const T*>(a.x) + offset, c, count, x), result.pixels,
                                       count);
    result.finish(count);
  });
}

template <class T>
void backward(const LrnArgs& a, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const Channels c = channels_of<A>(a.images, a.lrn.groups);
  Scratch<A> x(kStrip * c.stride()), grad(kStrip * c.stride()), dx(kStrip * c.stride());
  Normaliser<A> normaliser(a.lrn, c, true);
  for_each_strip(a.images, begin, end, [&](int64_t offset, int64_t count) {
    const Result<A, T> result(static_cast<T*>(a.out) + offset, c, dx, is_streamed<T>(a.images));
    normaliser.template backward<false>(pixels_at<A>(static_cast<const T*>(a.x) + offset, c, count, x),
                                        pixels_at<A>(static_cast<const T*>(a.grad) + offset, c, count, grad),
                                        result.pixels, count);
    result.finish(count);
  });
}

// out = the sum of `in` over the window of every pixel of a plane, rows [h - before, h + after] and columns likewise.
// Separable: columns first, into `rows`.
template <class A>
void plane_sum(const A* in, A* out, A* rows, int64_t height, int64_t width, int64_t before, int64_t after,
               int64_t channels) {
  for (int64_t h = 0; h < height; ++h) {
    const int64_t h0 = greater(0, h - before), h1 = lesser(height, h + after + 1);
    for (int64_t i = 0; i < width * channels; i += kLanes<A>) {
      Vec<A> sum = {};
      for (int64_t r = h0; r < h1; ++r) sum += load<A>(in + r * width * channels + i);
      store<A>(rows + i, sum);
    }
    for (int64_t w = 0; w < width; ++w) {
      const int64_t w0 = greater(0, w - before), w1 = lesser(width, w + after + 1);
      for (int64_t i = 0; i < channels; i += kLanes<A>) {
        Vec<A> sum = {};
        for (int64_t q = w0; q < w1; ++q) sum += load<A>(rows + q * channels + i);
        store<A>(out + (h * width + w) * channels + i, sum);
      }
    }
  }
}

template <class T, bool BACKWARD>
void spatial(const LrnArgs& a, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const int64_t pixels = a.images.pixels(), planes = round_up(kPlanes, kLanes<A>);
  const int64_t size = room<A>(pixels, planes);
  Scratch<A> x(size), grad(BACKWARD ? size : 0), squares(size), sums(size);
  Scratch<A> rows(a.images.width * planes);
  const A alpha = a.lrn.alpha, beta = a.lrn.beta, k = a.lrn.k, scale = 2 * alpha * beta;
  const int64_t front = a.lrn.front, back = a.lrn.size - 1 - front;
  for (int64_t t = begin; t < end; ++t) {
    const Planes block = planes_of<A>(a.images, t, kPlanes);
    const Channels c = block.layout(pixels);
    const int64_t n = pixels * c.padded;
    read_pixels<A>(static_cast<const T*>(a.x) + block.offset(pixels), c, pixels, x, c.padded);
    if (BACKWARD) {
      read_pixels<A>(static_cast<const T*>(a.grad) + block.offset(pixels), c, pixels, grad, c.padded);
    }
    for (int64_t i = 0; i < n; i += kLanes<A>) {
      const Vec<A> v = load<A>(x + i);
      store<A>(squares + i, v * v);
    }
    plane_sum<A>(squares, sums, rows, a.images.height, a.images.width, front, back, c.padded);
    if (!BACKWARD) {
      for (int64_t i = 0; i < n; i += kLanes<A>) {
        const Vec<A> d = k + alpha * load<A>(sums + i);
        store<A>(squares + i, load<A>(x + i) * power<A>(d, rsqrt<A>(d), beta));
      }
    } else {
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
    write_pixels<A>(static_cast<const A*>(squares), c.padded, c, pixels, static_cast<T*>(a.out) + block.offset(pixels));
  }
}

}  // namespace

void lrn_forward(const LrnArgs& a, int64_t begin, int64_t end) {
  dispatch(a.images.dtype, [&](auto t) { forward<decltype(t)>(a, begin, end); });
}

void lrn_backward(const LrnArgs& a, int64_t begin, int64_t end) {
  dispatch(a.images.dtype, [&](auto t) { backward<decltype(t)>(a, begin, end); });
}

void spatial_lrn_forward(const LrnArgs& a, int64_t begin, int64_t end) {
  dispatch(a.images.dtype, [&](auto t) { spatial<decltype(t), false>(a, begin, end); });
}

void spatial_lrn_backward(const LrnArgs& a, int64_t begin, int64_t end) {
  dispatch(a.images.dtype, [&](auto t) { spatial<decltype(t), true>(a, begin, end); });
}

}  // namespace alexnet_cuda::ALEXNET_CPU_LEVEL
