// Winograd's algorithm (winograd.h) for the 11x11 convolution with stride 4: a third of the multiplications.
//
// Trick: after space-to-depth, in which each block of 4x4 pixels becomes one pixel of 16 C channels, this is a 3x3
// convolution with stride 1 (the kernel's twelfth row and column are zeros), which F(4x4, 3x3) serves: 36 products per
// channel and filter for 16 outputs instead of 16 x 121 / 16.
// Memory, four output rows at a time:
//   space-to-depth rows   [6][column][16 C], a ring
//   inputs                [product][tile][16 C]
//   products              [product][tile][filter], of one block of filters
// Numerics: sums over at most 16 channels at a time. The transforms would turn an infinity into NaN, spread NaN over a
// tile and overflow where a direct sum does not, so output rows that depend on a value beyond kWinogradLimit are
// computed by conv.h. If a weight is beyond it, all rows are.
//
// The 3x3 and 5x5 kernels (winograd_conv2d_kernel.cpp) share the transforms and the multiplication but not the loops:
// here the fused first block asks for single rows of one image in any dtype and layout; there a batch of tiles runs
// across images, as those are small, and channels are many.
#pragma once

#include "conv.h"
#include "winograd.h"

namespace alexnet_cuda::ALEXNET_CPU_LEVEL {

// Tiles that are multiplied at once. AlexNet has 14 in a row.
constexpr int kWinogradTiles = kVectorBytes == 64 ? 14 : 5;

// The lanes in which v[0, n), n rounded up to whole vectors, holds no NaN and nothing beyond kWinogradLimit.
inline Bits<float> within_range(const float* v, int64_t n) {
  Bits<float> mask = Bits<float>{} - 1;
  for (int64_t i = 0; i < n; i += kLanes<float>) {
    const Vec<float> part = load<float>(v + i);
    mask &= (part < kWinogradLimit) & (part > -kWinogradLimit);
  }
  return mask;
}

// Calls f(i, j, tap) for each tap of the 11x11 kernel, counted as (kernel row, kernel column, channel), that is tap
// (i, j) of the 3x3 kernel for channel `depth` of the space-to-depth image.
template <class F>
ALEXNET_INLINE void for_each_tap(int64_t depth, int64_t channels, F f) {
  const int64_t row = depth / (4 * channels), rest = depth % (4 * channels);
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 3; ++j) {
      const int64_t y = 4 * i + row, x = 4 * j * channels + rest;
      if (y < kSize && x < kSize * channels) f(i, j, y * kSize * channels + x);
    }
  }
}

// Transforms one block of packed filters: [tap][filter] -> [product][16 C][filter].
inline void transform_filters(const float* packed, float* to, int64_t channels) {
  constexpr int64_t kBlock = kFilterBlock<float>;
  for (int64_t c = 0; c < 16 * channels; ++c) {
    for (int64_t f = 0; f < kBlock; f += kLanes<float>) {
      Tile6x6 v = {};
      for_each_tap(c, channels, [&](int i, int j, int64_t tap) { v[i][j] = load<float>(packed + tap * kBlock + f); });
      transform_weight<3>(v);
      store_domain(v, to + c * kBlock + f, 16 * channels * kBlock);
    }
  }
}

// The transformed inputs under four output rows.
template <class T>
class WinogradInput {
 public:
  explicit WinogradInput(const ConvTask& a)
      : channels(16 * a.conv.channels),
        tiles((a.conv.out_width + 3) / 4),
        input_(a, columns_ * channels / 4 + kLanes<float>) {}

  // For output rows [first, first + 4) of image n. False, with nothing computed, if an input is out of range.
  bool compute(int64_t n, int64_t first) {
    if (n != image_ || first + 6 < next_) next_ = 0;
    image_ = n;
    for (next_ = max64(next_, first); next_ < first + 6; ++next_) load_row(next_);
    for (bool in_range : in_range_) {
      if (!in_range) return false;
    }
    // Tiles of 6x6 columns, 4 apart, a vector of channels at a time.
    const float* rows[6];
    for (int i = 0; i < 6; ++i) rows[i] = row(first + i);
    for (int64_t t = 0; t < tiles; ++t) {
      for (int64_t c = 0; c < channels; c += kLanes<float>) {
        Tile6x6 v;
        load_input(v, [&](int i, int j) { return rows[i] + (4 * t + j) * channels + c; });
        store_domain(v, inputs_ + t * channels + c, tiles * channels);
      }
    }
    return true;
  }

  // [tile][channel]
  const float* operator[](int64_t product) { return inputs_ + product * tiles * channels; }

  const int64_t channels, tiles;  // channels of the space-to-depth image

 private:
  float* row(int64_t r) { return rows_ + r % 6 * columns_ * channels; }

  // Four input rows become one space-to-depth row: each run of 4 pixels goes to its column.
  void load_row(int64_t r) {
    const int64_t run = channels / 4;
    Bits<float> mask = Bits<float>{} - 1;
    for (int64_t i = 0; i < 4; ++i) {
      const float* from = input_.load(image_, 4 * r + i);
      float* to = row(r) + i * run;
      mask &= within_range(from, columns_ * run);
      for (int64_t x = 0; x < columns_; ++x) __builtin_memcpy(to + x * channels, from + x * run, run * sizeof(float));
    }
    in_range_[r % 6] = all(mask);
  }

  const int64_t columns_ = 4 * tiles + 2;
  InputRows<T> input_;
  Scratch<float> rows_{6 * columns_ * channels}, inputs_{kWinogradProducts * tiles * channels};
  int64_t image_ = -1, next_ = 0;
  bool in_range_[6];
};

// As DirectRows; rows are computed four at a time.
template <class T>
class WinogradRows {
 public:
  explicit WinogradRows(const ConvTask& a) : a_(a) {}

  // Output row `o` of image n.
  void compute(int64_t n, int64_t o, Pixels<float> out) {
    if (n != image_ || o - o % 4 != first_) compute_four(n, o - o % 4);
    if (!in_range_) return direct_.compute(n, o, out);
    const float* from = rows_ + o % 4 * 4 * input_.tiles * filters_;
    for (int64_t p = 0; p < a_.conv.out_width; ++p) {
      for (int64_t f = 0; f < min64(out.stride, filters_); f += kLanes<float>) {
        store<float>(out[p] + f, load<float>(from + p * filters_ + f));
      }
    }
  }

 private:
  static constexpr int64_t kBlock = kFilterBlock<float>;

  void compute_four(int64_t n, int64_t first) {
    image_ = n;
    first_ = first;
    in_range_ = input_.compute(n, first);
    for (int64_t f = 0; in_range_ && f < filters_; f += kBlock) {
      input_.tiles >= kWinogradTiles ? multiply_tiles<kWinogradTiles>(f)
      : input_.tiles >= 4            ? multiply_tiles<4>(f)
                                     : multiply_tiles<1>(f);
      transform_products(f);
    }
  }

  // One matrix product [tile][channel] x [channel][filter] for each of the 36 products, P tiles at a time; the last P
  // overlap those before, so that they end with the row.
  template <int P>
  void multiply_tiles(int64_t filter) {
    const int64_t channels = input_.channels;
    const float* weight = a_.winograd_weight + filter * kWinogradProducts * channels;
    for (int64_t p = 0; p < kWinogradProducts; ++p, weight += channels * kBlock) {
      for (int64_t begin = 0; begin < input_.tiles; begin += P) {
        const int64_t t = min64(begin, input_.tiles - P);
        multiply_in_parts<P, 16>(input_[p] + t * channels, channels, 1, weight, channels,
                                 products_ + (p * input_.tiles + t) * kBlock, kBlock, false);
      }
    }
  }

  // Products of a block of filters -> four output rows.
  void transform_products(int64_t filter) {
    for (int64_t t = 0; t < input_.tiles; ++t) {
      for (int64_t f = 0; f < kBlock; f += kLanes<float>) {
        Tile6x6 v;
        load_domain(v, products_ + t * kBlock + f, input_.tiles * kBlock);
        transform_output<4>(v);
        const Vec<float> bias = load<float>(static_cast<const float*>(a_.packed_bias) + filter + f);
        for (int i = 0; i < 4; ++i) {
          for (int j = 0; j < 4; ++j) {
            store<float>(rows_ + ((i * input_.tiles + t) * 4 + j) * filters_ + filter + f, v[i][j] + bias);
          }
        }
      }
    }
  }

  const ConvTask& a_;
  DirectRows<T> direct_{a_};
  WinogradInput<T> input_{a_};
  const int64_t filters_ = round_up(a_.conv.filters, kBlock);
  Scratch<float> products_{kWinogradProducts * input_.tiles * kBlock}, rows_{16 * input_.tiles * filters_};
  int64_t image_ = -1, first_ = -1;
  bool in_range_ = true;
};

// Calls f<T, Direct<T>>() or, where the matrix unit or Winograd's algorithm serves, f<T, Amx>() or f<T, Winograd<T>>(),
// T being the tensor type.
template <template <class> class Direct, template <class> class Winograd, class Amx = void, class F>
ALEXNET_INLINE void dispatch_rows(const ConvTask& a, F f) {
  dispatch(a.images.dtype, [&]<class T>() {
    if constexpr (__is_same(T, BFloat16) && !__is_same(Amx, void)) {
      if (a.amx) return f.template operator()<T, Amx>();
    }
    if constexpr (!__is_same(T, double)) {
      if (a.winograd) return f.template operator()<T, Winograd<T>>();
    }
    f.template operator()<T, Direct<T>>();
  });
}

}  // namespace alexnet_cuda::ALEXNET_CPU_LEVEL
