// Direct 11x11 convolution with stride 4, one output row at a time: for float64, and for rows or weights with values
// beyond kWinogradLimit, where Winograd's algorithm (winograd_rows.h) loses precision.
//
// Memory: the 11 input rows under an output row lie in a ring, zero-padded and with interleaved channels, so one kernel
// row covers 11 C contiguous numbers and the next output pixel's begin 4 C further on. Weights are packed
// [block of filters][kernel row][kernel column][channel][filter in block].
// The sums of kTileRows output pixels x two vectors of filters stay in registers over all 121 C taps.
// Numerics: taps are added in one order whatever the tile.
#pragma once

#include "tile.h"

namespace alexnet_cuda::ALEXNET_CPU_LEVEL {

constexpr int kSize = 11, kStride = 4;

inline Images output_images(const ConvTask& a) {
  return {a.images.dtype, a.images.channels_last, a.images.count, a.conv.filters, a.conv.out_height, a.conv.out_width};
}

// The filters, padded to whole blocks.
template <class A>
Channels output_channels(const ConvTask& a) {
  Channels c = channels_of<A>(output_images(a));
  c.padded = round_up(c.per_group, kFilterBlock<A>);
  return c;
}

// Row `o` of image n of the output's gradient, converted to `scratch` if necessary.
template <class T, class A = Accumulator<T>>
Pixels<const A> grad_row(const ConvTask& a, const Channels& c, int64_t n, int64_t o, A* scratch) {
  return pixels_at<A>(static_cast<const T*>(a.grad) + row_offset(output_images(a), c, n, o), c, a.conv.out_width,
                      scratch);
}

// Zero-padded input rows; row r is row r - padding of the image.
template <class T>
class InputRows {
  using A = Accumulator<T>;

 public:
  // A row is followed by zeros up to `min_size` numbers.
  explicit InputRows(const ConvTask& a, int64_t min_size = 0)
      : a_(a), row_size_(max64(min_size, padded_size<A>(width_, conv_.channels) + (1 + conv_.channels) * kLanes<A>)) {}

  // Loads the rows under output row `o` of image n, if not there yet, and calls loaded(r, row) for each of these.
  template <class F>
  void advance(int64_t n, int64_t o, F loaded) {
    const int64_t first = o * kStride, last = first + kSize;
    if (n != image_ || last < next_) next_ = 0;
    image_ = n;
    for (next_ = max64(next_, first); next_ < last; ++next_) loaded(next_, load(n, next_));
  }
  void advance(int64_t n, int64_t o) {
    advance(n, o, [](int64_t, const A*) {});
  }

  const A* operator[](int64_t r) { return rows_ + r % kSize * row_size_; }

  // Loads row r of image n.
  const A* load(int64_t n, int64_t r) {
    A* to = rows_ + r % kSize * row_size_;
    const int64_t row = r - conv_.padding, c = conv_.channels, left = conv_.padding * c;
    const int64_t count = min64(conv_.width, width_ - conv_.padding);
    int64_t filled = 0;
    if (row >= 0 && row < conv_.height && count > 0) {
      const T* from = static_cast<const T*>(a_.x) + row_offset(a_.images, channels_, n, row);
      for (int64_t i = 0; i < left; ++i) to[i] = A{};
      filled = left + count * c;
      if (channels_.channel_stride == 1) {  // count * C contiguous numbers
        read_pixels<A>(from, Channels{0, 1, 1, count * c, count * c}, 1, to + left, count * c);
      } else if (c == 3) {
        interleave3<A>(from, channels_.channel_stride, count, to + left);
      } else {
        read_pixels<A>(from, channels_, count, to + left, c);
      }
    }
    for (int64_t i = filled; i < row_size_; ++i) to[i] = A{};
    return to;
  }

 private:
  const ConvTask& a_;
  const Conv& conv_ = a_.conv;
  const Channels channels_ = channels_of<A>(a_.images);
  const int64_t width_ = (conv_.out_width - 1) * kStride + kSize, row_size_;
  Scratch<A> rows_{kSize * row_size_};
  int64_t image_ = -1, next_ = 0;
};

// P output pixels from `first` on, filters of one block.
template <class A, int P>
inline void conv_tile(const ConvTask& a, const A* const* row, int64_t first, int64_t block, Pixels<A> out) {
  const int64_t step = kStride * a.conv.channels, taps = kSize * a.conv.channels, f = block * kFilterBlock<A>;
  const A* weight = static_cast<const A*>(a.packed_weight) + block * kSize * taps * kFilterBlock<A>;
  Tile<A, P> tile;
  for_each_vector<A, P>(tile, static_cast<const A*>(a.packed_bias) + f, 0,
                        [](Vec<A>& sum, const A* bias) { sum = load<A>(bias); });
  // One kernel row: each tap's two vectors of weights times that tap's input of every pixel.
  for (int i = 0; i < kSize; ++i, weight += taps * kFilterBlock<A>) {
    multiply<A, P>(tile, row[i] + first * step, step, 1, weight, kFilterBlock<A>, taps);
  }
#pragma GCC unroll 11
  for (int p = 0; p < P; ++p) {
    store<A>(out[first + p] + f, tile[p][0]);
    if (f + kLanes<A> < out.stride) store<A>(out[first + p] + f + kLanes<A>, tile[p][1]);
  }
}

template <class T>
class DirectRows {
  using A = Accumulator<T>;

 public:
  explicit DirectRows(const ConvTask& a) : a_(a) {}

  // Output row `o` of image n.
  void compute(int64_t n, int64_t o, Pixels<A> out) {
    const A* row[kSize];
    input_.advance(n, o);
    for (int i = 0; i < kSize; ++i) row[i] = input_[o * kStride + i];
    const int64_t width = a_.conv.out_width, blocks = (a_.conv.filters + kFilterBlock<A> - 1) / kFilterBlock<A>;
    const int tile = width >= kTileRows ? kTileRows : width >= 4 ? 4 : 1;
    const auto run = tile == kTileRows ? &conv_tile<A, kTileRows> : tile == 4 ? &conv_tile<A, 4> : &conv_tile<A, 1>;
    // The last tile of a row overlaps the one before, so that it ends with the row.
    for (int64_t block = 0; block < blocks; ++block) {
      for (int64_t w = 0; w < width; w += tile) run(a_, row, min64(w, width - tile), block, out);
    }
  }

 private:
  const ConvTask& a_;
  InputRows<T> input_{a_};
};

}  // namespace alexnet_cuda::ALEXNET_CPU_LEVEL
