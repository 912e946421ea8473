// Direct convolution of a few input channels with many filters, one output row at a time. AlexNet's own (11x11, stride
// 4, 3 channels) comes here in double alone, and for numbers that Winograd's way (winograd_rows.h) must not be given.
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

// Rows of the zero-padded input. Row r is input row r - padding.
template <class T>
class InputRows {
  using A = Accumulator<T>;

 public:
  // `least`: numbers of a row that will be read, zeros behind the last window.
  explicit InputRows(const ConvArgs& a, int64_t least = 0)
      : x_(static_cast<const T*>(a.x)),
        conv_(a.conv),
        channels_(channels_of<A>(a.images)),
        width_((conv_.out_width - 1) * conv_.stride + conv_.kernel_size),
        row_size_(greater(least, room<A>(width_, conv_.channels) + (1 + conv_.channels) * kLanes<A>)),
        rows_(conv_.kernel_size * row_size_) {}

  // Makes the rows under output row `o` of image n available.
  void advance(int64_t n, int64_t o) {
    const int64_t first = o * conv_.stride, last = first + conv_.kernel_size;
    if (n != image_ || last < next_) next_ = 0;
    image_ = n;
    for (next_ = greater(next_, first); next_ < last; ++next_) fill_row(next_);
  }

  const A* operator[](int64_t r) { return rows_ + r % conv_.kernel_size * row_size_; }

  // Row r of image n alone, until the next.
  const A* row(int64_t n, int64_t r) {
    image_ = n;
    fill_row(r);
    return (*this)[r];
  }

 private:
  void fill_row(int64_t r) {
    A* to = rows_ + r % conv_.kernel_size * row_size_;
    const int64_t row = r - conv_.padding, c = conv_.channels, left = conv_.padding * c;
    const int64_t count = lesser(conv_.width, width_ - conv_.padding);
    const bool run = channels_.channel_stride == 1;  // of count * C numbers
    int64_t filled = 0;
    if (row >= 0 && row < conv_.height && count > 0) {
      const T* from = x_ + image_ * c * conv_.height * conv_.width + row * conv_.width * channels_.pixel_stride;
      for (int64_t i = 0; i < left; ++i) to[i] = A{};
      filled = left + count * c;
      if (run) {
        read_pixels<A>(from, Channels{0, 1, 1, count * c, count * c}, 1, to + left, count * c);
      } else if (c == 3) {
        interleave3<A>(from, channels_.channel_stride, count, to + left);
      } else {
        read_pixels<A>(from, channels_, count, to + left, c);
      }
    }
    for (int64_t i = filled; i < row_size_; ++i) to[i] = A{};
  }

  const T* x_;
  const Conv& conv_;
  Channels channels_;
  int64_t width_, row_size_;
  Scratch<A> rows_;
  int64_t image_ = -1, next_ = 0;
};

// P output pixels from `first` on, filters [block, block + 2 vectors).
template <class A, int P>
inline void conv_tile(const ConvArgs& a, const A* const* row, int64_t first, int64_t block, Pixels<A> out) {
  const int64_t step = a.conv.stride * a.conv.channels, taps = a.conv.kernel_size * a.conv.channels;
  const int64_t f = block * kFilters<A>;
  Tile<A, P> tile;
  const Vec<A> b0 = load<A>(static_cast<const A*>(a.bias) + f);
  const Vec<A> b1 = load<A>(static_cast<const A*>(a.bias) + f + kLanes<A>);
#pragma GCC unroll 11
  for (int p = 0; p < P; ++p) tile.sum[p][0] = b0, tile.sum[p][1] = b1;
  for (int i = 0; i < a.conv.kernel_size; ++i) {
    const A* w = static_cast<const A*>(a.weight) + (block * a.conv.kernel_size + i) * taps * kFilters<A>;
    multiply<A, P>(tile, row[i] + first * step, step, 1, w, kFilters<A>, taps);
  }
#pragma GCC unroll 11
  for (int p = 0; p < P; ++p) {
    store<A>(out[first + p] + f, tile.sum[p][0]);
    if (f + kLanes<A> < out.stride) store<A>(out[first + p] + f + kLanes<A>, tile.sum[p][1]);
  }
}

// Output rows, one at a time. The last tile of a row is moved back to end with it.
template <class T>
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
    const auto run = tile == kTile ? &conv_tile<A, kTile> : tile == 4 ? &conv_tile<A, 4> : &conv_tile<A, 1>;
    for (int64_t block = 0; block < blocks; ++block) {
      for (int64_t w = 0; w < width; w += tile) run(a_, row_, lesser(w, width - tile), block, out);
    }
  }

 private:
  const ConvArgs& a_;
  InputRows<T> input_;
  Scratch<const A*> row_;
};

}  // namespace alexnet_cuda::ALEXNET_CPU_LEVEL
