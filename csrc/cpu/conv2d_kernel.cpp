// Convolution with its two gradients (conv.h has the tile that all three are made of, weight_grad.h the weight
// gradient).
#include "weight_grad.h"

namespace alexnet_cuda::ALEXNET_CPU_LEVEL {
namespace {

template <class T, class Rows>
void forward(const ConvArgs& a, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const Conv& conv = a.conv;
  const Channels c = output_channels<A>(a);
  Scratch<A> out(room<A>(conv.out_width, c.padded));
  Rows rows(a);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t n = t / conv.out_height, o = t % conv.out_height;
    const Result<A, T> y(static_cast<T*>(a.out) + n * conv.filters * conv.out_height * conv.out_width +
                             o * conv.out_width * c.pixel_stride,
                         c, out);
    rows.compute(n, o, y.pixels);
    y.finish(conv.out_width);
  }
}

// Chunk t adds up its share of the batch's rows, in order, into a sum of its own: [taps + 1][padded filters].
template <class A, class Grad>
void weight_grad(const ConvArgs& a, int64_t begin, int64_t end) {
  const Conv& conv = a.conv;
  const int64_t taps = conv.kernel_size * conv.kernel_size * conv.channels;
  const int64_t size = (taps + 1) * round_up(conv.filters, kFilters<A>);
  const int64_t steps = (conv.out_height + Grad::kRows - 1) / Grad::kRows, total = a.images.count * steps;
  Grad grad(a);
  for (int64_t t = begin; t < end; ++t) {
    A* sum = static_cast<A*>(a.out) + t * size;
    for (int64_t i = 0; i < size; ++i) sum[i] = 0;
    for (int64_t s = total * t / a.chunks; s < total * (t + 1) / a.chunks; ++s) {
      grad.add(s / steps, s % steps * Grad::kRows, sum);
    }
    grad.finish(sum);
  }
}

// P output pixels' share of an input row, for two vectors of the taps of one kernel row.
template <class A, int P>
inline void input_tile(const ConvArgs& a, const A* weight, Pixels<const A> grad, int64_t first, A* dx) {
  Tile<A, P> tile = {};
  multiply<A, P>(tile, grad[first], grad.stride, 1, weight, kFilters<A>, a.conv.filters);
#pragma GCC unroll 11
  for (int p = 0; p < P; ++p) {
    A* to = dx + (first + p) * a.conv.stride * a.conv.channels;
    store<A>(to, load<A>(to) + tile.sum[p][0]);
    store<A>(to + kLanes<A>, load<A>(to + kLanes<A>) + tile.sum[p][1]);
  }
}

// A row of dx gathers from the output rows whose windows cover it, in their order; within one, from pixel to pixel.
template <class T>
void input_grad(const ConvArgs& a, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const Conv& conv = a.conv;
  const Channels in = channels_of<A>(a.images), c = output_channels<A>(a);
  const int64_t taps = conv.kernel_size * conv.channels, blocks = (taps + kFilters<A> - 1) / kFilters<A>;
  const int64_t row_size = room<A>(conv.out_width, c.padded),
                slots = (conv.kernel_size + conv.stride - 1) / conv.stride + 1;
  const int64_t width = greater((conv.out_width - 1) * conv.stride + conv.kernel_size, conv.padding + conv.width);
  const int64_t dx_size = (width + kLanes<A>)*conv.channels + blocks * kFilters<A>;
  Scratch<A> grads(slots * row_size), dx(dx_size);
  Ring<Pixels<const A>> ring(slots);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t n = t / conv.height, h = t % conv.height, r = h + conv.padding;
    if (h == 0) ring.restart();
    const T* grad = static_cast<const T*>(a.grad) + n * conv.filters * conv.out_height * conv.out_width;
    const int64_t first = r < conv.kernel_size ? 0 : (r - conv.kernel_size) / conv.stride + 1;
    const int64_t last = lesser(conv.out_height, r / conv.stride + 1);
    ring.advance(first, last, [&](int64_t o, int slot) {
      return pixels_at<A>(grad + o * conv.out_width * c.pixel_stride, c, conv.out_width, grads + slot * row_size);
    });
    for (int64_t i = 0; i < dx_size; ++i) dx[i] = 0;
    for (int64_t o = first; o < last; ++o) {
      for (int64_t block = 0; block < blocks; ++block) {
        const A* weight =
            static_cast<const A*>(a.weight) + ((r - o * conv.stride) * blocks + block) * conv.filters * kFilters<A>;
        A* to = dx + block * kFilters<A>;
        int64_t w = 0;
        for (; w + kTile <= conv.out_width; w += kTile) input_tile<A, kTile>(a, weight, ring[o], w, to);
        for (; w < conv.out_width; ++w) input_tile<A, 1>(a, weight, ring[o], w, to);
      }
    }
    T* out = static_cast<T*>(a.out) + n * conv.channels * conv.height * conv.width + h * conv.width * in.pixel_stride;
    const A* from = dx + conv.padding * conv.channels;
    if (in.channel_stride == 1) {  // one run of width * C numbers
      write_pixels<A>(from, 0, Channels{0, 1, 1, conv.width * conv.channels, 0}, 1, out);
    } else {
      write_pixels<A>(from, conv.channels, in, conv.width, out);
    }
  }
}

}  // namespace

void conv2d_winograd_weight(const ConvArgs& a, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    winograd_weights(static_cast<const float*>(a.weight), static_cast<float*>(a.points), a.conv.channels, block);
  }
}

void conv2d_forward(const ConvArgs& a, int64_t begin, int64_t end) {
  dispatch_rows(a, [&](auto t, auto rows) { forward<decltype(t), typename decltype(rows)::Type>(a, begin, end); });
}

void conv2d_weight_grad(const ConvArgs& a, int64_t begin, int64_t end) {
  dispatch(a.images.dtype, [&](auto t) {
    using T = decltype(t);
    using A = Accumulator<T>;
    if constexpr (!__is_same(T, double)) {
      if (a.winograd) return weight_grad<A, WinogradWeightGrad<T>>(a, begin, end);
    }
    weight_grad<A, DirectWeightGrad<T>>(a, begin, end);
  });
}

void conv2d_input_grad(const ConvArgs& a, int64_t begin, int64_t end) {
  dispatch(a.images.dtype, [&](auto t) { input_grad<decltype(t)>(a, begin, end); });
}

}  // namespace alexnet_cuda::ALEXNET_CPU_LEVEL
