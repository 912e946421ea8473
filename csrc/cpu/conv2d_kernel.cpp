// Convolution with its two gradients (conv.h has the tile that all three are made of).
#include "conv.h"

namespace alexnet_cuda::ALEXNET_CPU_LEVEL {
namespace {

// The convolution's output side: filters padded to whole blocks.
template <class A>
Channels output_channels(const ConvArgs& a) {
  Images images = a.images;
  images.channels = a.conv.filters;
  images.height = a.conv.out_height;
  images.width = a.conv.out_width;
  Channels c = channels_of<A>(images);
  c.padded = round_up(c.each, kFilters<A>);
  return c;
}

template <class T, class E>
void forward(const ConvArgs& a, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const Conv& conv = a.conv;
  const Channels c = output_channels<A>(a);
  Scratch<A> out(room<A>(conv.out_width, c.padded));
  InputRows<T, E> input(a);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t n = t / conv.out_height, o = t % conv.out_height;
    const Result<A, T> y(static_cast<T*>(a.out) + n * conv.filters * conv.out_height * conv.out_width +
                             o * conv.out_width * c.pixel_stride, c, out);
    conv_row<A, T, E>(a, input, n, o, y.pixels);
    y.finish(conv.out_width);
  }
}

// P taps of one kernel row from `first` on, two vectors of filters: += input x gradient over the pixels of a row.
template <class A, int P>
inline void weight_tile(const ConvArgs& a, const A* row, Pixels<const A> grad, int64_t first, int64_t f, A* sum,
                        int64_t sum_stride) {
  Tile<A, P> tile;
#pragma GCC unroll 11
  for (int p = 0; p < P; ++p) {
    tile.sum[p][0] = load<A>(sum + (first + p) * sum_stride + f);
    tile.sum[p][1] = load<A>(sum + (first + p) * sum_stride + f + kLanes<A>);
  }
  multiply<A, P>(tile, row + first, 1, a.conv.stride * a.conv.channels, grad.data + f, grad.stride, a.conv.out_width);
#pragma GCC unroll 11
  for (int p = 0; p < P; ++p) {
    store<A>(sum + (first + p) * sum_stride + f, tile.sum[p][0]);
    store<A>(sum + (first + p) * sum_stride + f + kLanes<A>, tile.sum[p][1]);
  }
}

// Chunk t adds up its share of the batch's rows, in order, into a sum of its own: [taps][padded filters].
template <class T>
void weight_grad(const ConvArgs& a, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const Conv& conv = a.conv;
  const Channels c = output_channels<A>(a);
  const int64_t taps = conv.kernel_size * conv.channels, rows = a.images.count * conv.out_height;
  Scratch<A> scratch(room<A>(conv.out_width, c.padded));
  InputRows<T, A> input(a);
  for (int64_t t = begin; t < end; ++t) {
    A* sum = static_cast<A*>(a.out) + t * conv.kernel_size * taps * c.padded;
    for (int64_t i = 0; i < conv.kernel_size * taps * c.padded; ++i) sum[i] = 0;
    for (int64_t r = rows * t / a.chunks; r < rows * (t + 1) / a.chunks; ++r) {
      const int64_t n = r / conv.out_height, o = r % conv.out_height;
      input.advance(n, o);
      const Pixels<const A> grad =
          pixels_at<A>(static_cast<const T*>(a.grad) + n * conv.filters * conv.out_height * conv.out_width +
                           o * conv.out_width * c.pixel_stride, c, conv.out_width, scratch);
      for (int i = 0; i < conv.kernel_size; ++i) {
        const A* row = input[o * conv.stride + i];
        A* to = sum + i * taps * c.padded;
        for (int64_t f = 0; f < c.padded; f += kFilters<A>) {
          int64_t first = 0;
          for (; first + kTile <= taps; first += kTile) weight_tile<A, kTile>(a, row, grad, first, f, to, c.padded);
          for (; first + 3 <= taps; first += 3) weight_tile<A, 3>(a, row, grad, first, f, to, c.padded);
          for (; first < taps; ++first) weight_tile<A, 1>(a, row, grad, first, f, to, c.padded);
        }
      }
    }
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
  const int64_t row_size = room<A>(conv.out_width, c.padded), slots = (conv.kernel_size + conv.stride - 1) / conv.stride + 1;
  const int64_t width = greater((conv.out_width - 1) * conv.stride + conv.kernel_size, conv.padding + conv.width);
  const int64_t dx_size = (width + kLanes<A>) * conv.channels + blocks * kFilters<A>;
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
        const A* weight = static_cast<const A*>(a.weight) +
                          ((r - o * conv.stride) * blocks + block) * conv.filters * kFilters<A>;
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

void conv2d_forward(const ConvArgs& a, int64_t begin, int64_t end) {
#if defined(__AVX512F__)
  if (a.products) return forward<BFloat16, BFloat16>(a, begin, end);
#endif
  dispatch(a.images.dtype, [&](auto t) { forward<decltype(t), Accumulator<decltype(t)>>(a, begin, end); });
}

void conv2d_weight_grad(const ConvArgs& a, int64_t begin, int64_t end) {
  dispatch(a.images.dtype, [&](auto t) { weight_grad<decltype(t)>(a, begin, end); });
}

void conv2d_input_grad(const ConvArgs& a, int64_t begin, int64_t end) {
  dispatch(a.images.dtype, [&](auto t) { input_grad<decltype(t)>(a, begin, end); });
}

}  // namespace alexnet_cuda::ALEXNET_CPU_LEVEL
