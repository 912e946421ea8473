// Convolution with its two gradients (conv.h has the tile that all three are made of).
#include "winograd.h"

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

// One output row's input, a kernel row of it, and gradient for the weight gradient: numbers of type E, or pairs of
// bfloat16 of which one is of the next pixel.
template <class E>
struct WeightRow {
  const E* input;
  const E* grad;
  int64_t grad_stride;
};

// P taps of one kernel row from `first` on, two vectors of filters: += input x gradient over the pixels of a row.
template <class A, class E, int P>
inline void weight_tile(const ConvArgs& a, const WeightRow<E>& row, int64_t first, int64_t f, A* sum,
                        int64_t sum_stride) {
  const int64_t step = a.conv.stride * a.conv.channels;
  Tile<A, P> tile;
#pragma GCC unroll 11
  for (int p = 0; p < P; ++p) {
    tile.sum[p][0] = load<A>(sum + (first + p) * sum_stride + f);
    tile.sum[p][1] = load<A>(sum + (first + p) * sum_stride + f + kLanes<A>);
  }
  if constexpr (__is_same(E, A)) {
    multiply<A, P>(tile, row.input + first, 1, step, row.grad + f, row.grad_stride, a.conv.out_width);
  }
#if defined(__AVX512F__)
  if constexpr (__is_same(E, BFloat16)) {
    multiply_pairs<P>(tile, row.input + 2 * first, 2, 4 * step, row.grad + 2 * f, 2 * row.grad_stride,
                      a.conv.out_width);
  }
#endif
#pragma GCC unroll 11
  for (int p = 0; p < P; ++p) {
    store<A>(sum + (first + p) * sum_stride + f, tile.sum[p][0]);
    store<A>(sum + (first + p) * sum_stride + f + kLanes<A>, tile.sum[p][1]);
  }
}

#if defined(__AVX512F__)
// Every input of a row with the one that the next output pixel multiplies by the same weight.
void pair_input(const BFloat16* row, int64_t step, int64_t n, uint32_t* pairs) {
  for (int64_t i = 0; i < n; ++i) pairs[i] = row[i].bits | static_cast<uint32_t>(row[i + step].bits) << 16;
}

// [pixel / 2][filter]: two pixels' gradients, bfloat16 numbers that were read as floats; 0 beyond the last.
void pair_grad(Pixels<const float> grad, int64_t count, int64_t filters, uint32_t* pairs) {
  for (int64_t p = 0; p < count; p += 2, pairs += filters) {
    for (int64_t f = 0; f < filters; ++f) {
      const uint32_t next = p + 1 < count ? bit_cast<uint32_t>(grad[p + 1][f]) : 0;
      pairs[f] = bit_cast<uint32_t>(grad[p][f]) >> 16 | (next & 0xffff0000);
    }
  }
}
#endif

// Chunk t adds up its share of the batch's rows, in order, into a sum of its own: [taps][padded filters].
template <class T, class E>
void weight_grad(const ConvArgs& a, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const Conv& conv = a.conv;
  const Channels c = output_channels<A>(a);
  const int64_t taps = conv.kernel_size * conv.channels, rows = a.images.count * conv.out_height;
  Scratch<A> scratch(room<A>(conv.out_width, c.padded));
  InputRows<T, E> input(a);
  const int64_t step = conv.stride * conv.channels, pairs = (conv.out_width - 1) * step + taps;
  Scratch<uint32_t> input_pairs(a.products ? pairs : 0),
      grad_pairs(a.products ? (conv.out_width + 1) / 2 * c.padded : 0);
  for (int64_t t = begin; t < end; ++t) {
    A* sum = static_cast<A*>(a.out) + t * conv.kernel_size * taps * c.padded;
    for (int64_t i = 0; i < conv.kernel_size * taps * c.padded; ++i) sum[i] = 0;
    for (int64_t r = rows * t / a.chunks; r < rows * (t + 1) / a.chunks; ++r) {
      const int64_t n = r / conv.out_height, o = r % conv.out_height;
      input.advance(n, o);
      const Pixels<const A> grad =
          pixels_at<A>(static_cast<const T*>(a.grad) + n * conv.filters * conv.out_height * conv.out_width +
                           o * conv.out_width * c.pixel_stride,
                       c, conv.out_width, scratch);
#if defined(__AVX512F__)
      if constexpr (!__is_same(E, A)) pair_grad(grad, conv.out_width, c.padded, grad_pairs);
#endif
      for (int i = 0; i < conv.kernel_size; ++i) {
        WeightRow<E> row;
        if constexpr (__is_same(E, A)) row = {input[o * conv.stride + i], grad.data, grad.stride};
#if defined(__AVX512F__)
        if constexpr (!__is_same(E, A)) {
          pair_input(input[o * conv.stride + i], step, pairs, input_pairs);
          row = {reinterpret_cast<const E*>(static_cast<uint32_t*>(input_pairs)),
                 reinterpret_cast<const E*>(static_cast<uint32_t*>(grad_pairs)), c.padded};
        }
#endif
        A* to = sum + i * taps * c.padded;
        for (int64_t f = 0; f < c.padded; f += kFilters<A>) {
          int64_t first = 0;
          for (; first + kTile <= taps; first += kTile) weight_tile<A, E, kTile>(a, row, first, f, to, c.padded);
          for (; first + 3 <= taps; first += 3) weight_tile<A, E, 3>(a, row, first, f, to, c.padded);
          for (; first < taps; ++first) weight_tile<A, E, 1>(a, row, first, f, to, c.padded);
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
    winograd_weights(static_cast<const float*>(a.weight), static_cast<float*>(a.winograd), a.conv.channels, block);
  }
}

void conv2d_forward(const ConvArgs& a, int64_t begin, int64_t end) {
  dispatch_rows(a, [&](auto t, auto rows) { forward<decltype(t), typename decltype(rows)::Type>(a, begin, end); });
}

void conv2d_weight_grad(const ConvArgs& a, int64_t begin, int64_t end) {
#if defined(__AVX512F__)
  if (a.products) return weight_grad<BFloat16, BFloat16>(a, begin, end);
#endif
  dispatch(a.images.dtype, [&](auto t) { weight_grad<decltype(t), Accumulator<decltype(t)>>(a, begin, end); });
}

void conv2d_input_grad(const ConvArgs& a, int64_t begin, int64_t end) {
  dispatch(a.images.dtype, [&](auto t) { input_grad<decltype(t)>(a, begin, end); });
}

}  // namespace alexnet_cuda::ALEXNET_CPU_LEVEL
