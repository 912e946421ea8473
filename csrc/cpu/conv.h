// Direct convolution of a few input channels with many filters (11x11, stride 4, 3 channels), one output row at a time.
//
// The k input rows under an output row lie in a ring, zero-padded and with interleaved channels, so that one kernel
// row is k * C contiguous numbers and the next output pixel's window begins stride * C further on. A tile of output
// pixels x two vectors of filters stays in registers over all k * k * C taps; each step loads two vectors of weights
// and broadcasts one input for every pixel. Sums run over taps in one order whatever the tile.
#pragma once

#include "rows.h"

namespace alexnet_cuda::ALEXNET_CPU_LEVEL {

// Pixels of a tile: with two vectors of filters, as many sums as the registers hold beside operands. 55 is 5 x 11.
constexpr int kTile = kVectorBytes == 64 ? 11 : 5;
template <class A>
constexpr int64_t kFilters = 2 * kLanes<A>;

template <class A, int P>
struct Tile {
  Vec<A> sum[P][2];
};

template <class A, int P>
ALEXNET_INLINE void load_tile(Tile<A, P>& tile, const A* from, int64_t stride) {
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p) {
    tile.sum[p][0] = load<A>(from + p * stride);
    tile.sum[p][1] = load<A>(from + p * stride + kLanes<A>);
  }
}

template <class A, int P>
ALEXNET_INLINE void store_tile(const Tile<A, P>& tile, A* to, int64_t stride) {
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p) {
    store<A>(to + p * stride, tile.sum[p][0]);
    store<A>(to + p * stride + kLanes<A>, tile.sum[p][1]);
  }
}

// sum[p] += a[p * pixel_step + i * step] * w[i * w_step ...] over i < n.
template <class A, int P>
ALEXNET_INLINE void multiply(Tile<A, P>& tile, const A* a, int64_t pixel_step, int64_t step, const A* w, int64_t w_step,
                             int64_t n) {
  for (int64_t i = 0; i < n; ++i, a += step, w += w_step) {
    const Vec<A> w0 = load<A>(w), w1 = load<A>(w + kLanes<A>);
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
      const Vec<A> v = fill<A>(a[p * pixel_step]);
      tile.sum[p][0] += v * w0;
      tile.sum[p][1] += v * w1;
    }
  }
}

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

// Rows of the zero-padded input, as E: the type of the sums, or BFloat16 for AVX512_BF16. Row r is input row
// r - padding.
template <class T, class E>
class InputRows {
 public:
  // `least`: numbers of a row that will be read, zeros behind the last window.
  explicit InputRows(const ConvArgs& a, int64_t least = 0)
      : x_(static_cast<const T*>(a.x)),
        conv_(a.conv),
        channels_(channels_of<Accumulator<T>>(a.images)),
        width_((conv_.out_width - 1) * conv_.stride + conv_.kernel_size),
        row_size_(greater(
            least, room<Accumulator<T>>(width_, conv_.channels) + (1 + conv_.channels) * kLanes<Accumulator<T>>)),
        rows_(conv_.kernel_size * row_size_) {}

  // Makes the rows under output row `o` of image n available.
  void advance(int64_t n, int64_t o) {
    const int64_t first = o * conv_.stride, last = first + conv_.kernel_size;
    if (n != image_ || last < next_) next_ = 0;
    image_ = n;
    for (next_ = greater(next_, first); next_ < last; ++next_) fill_row(next_);
  }

  const E* operator[](int64_t r) { return rows_ + r % conv_.kernel_size * row_size_; }

  // Row r of image n alone, until the next.
  const E* row(int64_t n, int64_t r) {
    image_ = n;
    fill_row(r);
    return (*this)[r];
  }

 private:
  void fill_row(int64_t r) {
    E* to = rows_ + r % conv_.kernel_size * row_size_;
    const int64_t row = r - conv_.padding, c = conv_.channels, left = conv_.padding * c;
    const int64_t count = lesser(conv_.width, width_ - conv_.padding);
    const bool run = channels_.channel_stride == 1;  // of count * C numbers
    int64_t filled = 0;
    if (row >= 0 && row < conv_.height && count > 0) {
      const T* from = x_ + image_ * c * conv_.height * conv_.width + row * conv_.width * channels_.pixel_stride;
      for (int64_t i = 0; i < left; ++i) to[i] = E{};
      filled = left + count * c;
      if constexpr (__is_same(E, BFloat16)) {
        if (run) {
          __builtin_memcpy(to + left, from, count * c * sizeof(E));
        } else {
          for (int64_t i = 0; i < c; ++i) {
            for (int64_t p = 0; p < count; ++p) to[left + p * c + i] = from[i * channels_.channel_stride + p];
          }
        }
      } else if (run) {
        read_pixels<E>(from, Channels{0, 1, 1, count * c, count * c}, 1, to + left, count * c);
      } else if (c == 3) {
        interleave3<E>(from, channels_.channel_stride, count, to + left);
      } else {
        read_pixels<E>(from, channels_, count, to + left, c);
      }
    }
    for (int64_t i = filled; i < row_size_; ++i) to[i] = E{};
  }

  const T* x_;
  const Conv& conv_;
  Channels channels_;
  int64_t width_, row_size_;
  Scratch<E> rows_;
  int64_t image_ = -1, next_ = 0;
};

#if defined(__AVX512F__)
#define ALEXNET_BFLOAT16 __attribute__((target("avx512bf16")))

// sum[p] += the pair at a[p * pixel_step] times the pairs of weights at w; SINGLE: only the first of each pair.
template <int P, bool SINGLE>
ALEXNET_BFLOAT16 ALEXNET_INLINE void add_pairs(__m512 (&sum)[P][2], const BFloat16* a, int64_t pixel_step,
                                               const BFloat16* w) {
  const __m512bh w0 = (__m512bh)_mm512_loadu_si512(w), w1 = (__m512bh)_mm512_loadu_si512(w + 2 * kLanes<float>);
#pragma GCC unroll 11
  for (int p = 0; p < P; ++p) {
    int32_t pair;
    __builtin_memcpy(&pair, a + p * pixel_step, sizeof(pair));
    const __m512bh v = (__m512bh)_mm512_set1_epi32(SINGLE ? pair & 0xffff : pair);
    sum[p][0] = _mm512_dpbf16_ps(sum[p][0], v, w0);
    sum[p][1] = _mm512_dpbf16_ps(sum[p][1], v, w1);
  }
}

// multiply() in bfloat16: every instruction adds a pair of products, n products in all. The partner of an odd last one
// may be anything, NaN too, and is masked.
template <int P>
ALEXNET_BFLOAT16 inline void multiply_pairs(Tile<float, P>& tile, const BFloat16* a, int64_t pixel_step, int64_t step,
                                            const BFloat16* w, int64_t w_step, int64_t n) {
  __m512 sum[P][2];
#pragma GCC unroll 11
  for (int p = 0; p < P; ++p) {
    sum[p][0] = (__m512)tile.sum[p][0];
    sum[p][1] = (__m512)tile.sum[p][1];
  }
  for (; n > 1; n -= 2, a += step, w += w_step) add_pairs<P, false>(sum, a, pixel_step, w);
  if (n == 1) add_pairs<P, true>(sum, a, pixel_step, w);
#pragma GCC unroll 11
  for (int p = 0; p < P; ++p) {
    tile.sum[p][0] = (Vec<float>)sum[p][0];
    tile.sum[p][1] = (Vec<float>)sum[p][1];
  }
}
#endif

// P output pixels from `first` on, filters [block, block + 2 vectors). RGB: 11x11, stride 4, 3 channels.
template <class A, class E, int P, bool RGB>
inline void conv_tile(const ConvArgs& a, const E* const* row, int64_t first, int64_t block, Pixels<A> out) {
  const int64_t step = RGB ? 12 : a.conv.stride * a.conv.channels;
  const int64_t taps = RGB ? 33 : a.conv.kernel_size * a.conv.channels, f = block * kFilters<A>;
  Tile<A, P> tile;
  const Vec<A> b0 = load<A>(static_cast<const A*>(a.bias) + f);
  const Vec<A> b1 = load<A>(static_cast<const A*>(a.bias) + f + kLanes<A>);
#pragma GCC unroll 11
  for (int p = 0; p < P; ++p) tile.sum[p][0] = b0, tile.sum[p][1] = b1;
  for (int i = 0; i < a.conv.kernel_size; ++i) {
    const int64_t kernel_row = block * a.conv.kernel_size + i;
#if defined(__AVX512F__)
    if constexpr (__is_same(E, BFloat16)) {
      const BFloat16* w = static_cast<const BFloat16*>(a.weight) + kernel_row * round_up(taps, 2) * kFilters<A>;
      multiply_pairs<P>(tile, row[i] + first * step, step, 2, w, 2 * kFilters<A>, taps);
      continue;
    }
#endif
    if constexpr (__is_same(E, A)) {
      const A* w = static_cast<const A*>(a.weight) + kernel_row * taps * kFilters<A>;
      multiply<A, P>(tile, row[i] + first * step, step, 1, w, kFilters<A>, taps);
    }
  }
#pragma GCC unroll 11
  for (int p = 0; p < P; ++p) {
    store<A>(out[first + p] + f, tile.sum[p][0]);
    if (f + kLanes<A> < out.stride) store<A>(out[first + p] + f + kLanes<A>, tile.sum[p][1]);
  }
}

// Output rows, one at a time. The last tile of a row is moved back to end with it.
template <class T, class E>
class DirectRows {
  using A = Accumulator<T>;

 public:
  explicit DirectRows(const ConvArgs& a) : a_(a), input_(a), row_(a.conv.kernel_size) {}

  // Output row `o` of image n.
  void compute(int64_t n, int64_t o, Pixels<A> out) {
    input_.advance(n, o);
    const Conv& conv = a_.conv;
    for (int i = 0; i < conv.kernel_size; ++i) row_[i] = input_[o * conv.stride + i];
    const int64_t width = conv.out_width, blocks = (conv.filters + kFilters<A> - 1) / kFilters<A>;
    const int tile = width >= kTile ? kTile : width >= 4 ? 4 : 1;
    const bool rgb = conv.kernel_size == 11 && conv.stride == 4 && conv.channels == 3;
    const auto run = tile == kTile ? (rgb ? &conv_tile<A, E, kTile, true> : &conv_tile<A, E, kTile, false>)
                     : tile == 4   ? &conv_tile<A, E, 4, false>
                                   : &conv_tile<A, E, 1, false>;
    for (int64_t block = 0; block < blocks; ++block) {
      for (int64_t w = 0; w < width; w += tile) run(a_, row_, lesser(w, width - tile), block, out);
    }
  }

 private:
  const ConvArgs& a_;
  InputRows<T, E> input_;
  Scratch<const E*> row_;
};

}  // namespace alexnet_cuda::ALEXNET_CPU_LEVEL
