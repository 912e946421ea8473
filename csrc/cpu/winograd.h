// The 11x11 stride-4 convolution with half the multiplications: Winograd's F(2x2, 3x3) (Lavin and Gray,
// arXiv:1509.09308, section 4.1).
//
// A cell is 4x4 pixels of C channels. In cells the convolution is one of 3x3 cells with stride 1 and 16 C channels (the
// twelfth row and column of the kernel are zeros). A tile of 2x2 outputs then takes 16 products per channel and filter,
// one for each point of the transformed 4x4 cells, instead of 4 x 121 / 16: 1.9 times fewer.
//
//   points = B' cells B          [point][tile][channel], of two output rows
//   products = points x weights  [point][tile][filter], of two vectors of filters
//   outputs = A' products A
//
// Sums and differences of cells would turn an infinity into NaN, spread NaN over a tile and overflow where products do
// not. Output rows under which there is a number beyond kWinogradLargest go the direct way (conv.h), as do such
// weights.
#pragma once

#include "conv.h"

namespace alexnet_cuda::ALEXNET_CPU_LEVEL {

// Tiles whose sums stay in registers. AlexNet has 28 in a row.
constexpr int kWinogradTiles = kVectorBytes == 64 ? 14 : 4;
constexpr int kPoints = 16;

// In two dimensions: f makes four results of four operands, here of every column and then of every row of 4x4 vectors.
template <class F>
ALEXNET_INLINE void for_columns_and_rows(Vec<float> (&v)[4][4], F f) {
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) f(v[0][j], v[1][j], v[2][j], v[3][j]);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) f(v[i][0], v[i][1], v[i][2], v[i][3]);
}

// Filters [block, block + 2 vectors): the packed weights' 3x3 cells as points, [point][channel][filter in block].
inline void winograd_weights(const float* packed, float* to, int64_t channels, int64_t block) {
  constexpr int64_t kBlock = kFilters<float>;
  const int64_t taps = 11 * channels, cell = 16 * channels;
  packed += block * 11 * taps * kBlock;
  to += block * kPoints * cell * kBlock;
  for (int64_t c = 0; c < cell; ++c) {
    const int64_t row = c / (4 * channels), tap = c % (4 * channels);
    for (int64_t f = 0; f < kBlock; f += kLanes<float>) {
      Vec<float> v[4][4] = {};
      for (int i = 0; i < 3; ++i) {
        for (int j = 0; j < 3; ++j) {
          const int64_t y = 4 * i + row, x = 4 * j * channels + tap;
          if (y < 11 && x < taps) v[i][j] = load<float>(packed + (y * taps + x) * kBlock + f);
        }
      }
      for_columns_and_rows(v, [](auto& a, auto& b, auto& c, auto& d) {
        const Vec<float> even = 0.5f * (a + c), odd = 0.5f * b;
        d = c;
        b = even + odd;
        c = even - odd;
      });
      for (int p = 0; p < kPoints; ++p) store<float>(to + (p * cell + c) * kBlock + f, v[p / 4][p % 4]);
    }
  }
}

// Output rows as those of DirectRows, computed two at a time.
template <class T>
class WinogradRows {
 public:
  explicit WinogradRows(const ConvArgs& a)
      : a_(a),
        direct_(a),
        input_(a),
        cell_(16 * a.conv.channels),
        tiles_((a.conv.out_width + 1) / 2),
        columns_(2 * tiles_ + 2),
        blocks_((a.conv.filters + kFilters<float> - 1) / kFilters<float>),
        stride_(blocks_ * kFilters<float>),
        cells_(4 * columns_ * cell_),
        points_(kPoints * tiles_ * cell_),
        products_(kPoints * tiles_ * kFilters<float>),
        rows_(4 * tiles_ * stride_) {}

  void compute(int64_t n, int64_t o, Pixels<float> out) {
    if (n != image_ || o / 2 != pair_) compute_pair(n, o / 2);
    if (!moderate_) return direct_.compute(n, o, out);
    const float* from = rows_ + o % 2 * 2 * tiles_ * stride_;
    for (int64_t p = 0; p < a_.conv.out_width; ++p) {
      for (int64_t f = 0; f < lesser(out.stride, stride_); f += kLanes<float>) {
        store<float>(out[p] + f, load<float>(from + p * stride_ + f));
      }
    }
  }

 private:
  float* cells(int64_t row) { return cells_ + row % 4 * columns_ * cell_; }

  void compute_pair(int64_t n, int64_t pair) {
    const int64_t first = 2 * pair;
    if (n != image_ || first + 4 < next_) next_ = 0;
    image_ = n;
    pair_ = pair;
    for (next_ = greater(next_, first); next_ < first + 4; ++next_) fill_cells(next_);
    moderate_ = moderate_cells_[0] && moderate_cells_[1] && moderate_cells_[2] && moderate_cells_[3];
    if (!moderate_) return;
    transform_cells(first);
    for (int64_t block = 0; block < blocks_; ++block) {
      multiply_points(block);
      transform_products(block);
    }
  }

  void fill_cells(int64_t row) {
    const int64_t run = 4 * a_.conv.channels;
    Bits<float> moderate = Bits<float>{} - 1;
    for (int64_t i = 0; i < 4; ++i) {
      const float* from = input_.row(image_, 4 * row + i);
      float* to = cells(row) + i * run;
      for (int64_t x = 0; x < columns_ * run; x += kLanes<float>) {
        const Vec<float> v = load<float>(from + x);
        moderate &= (v < kWinogradLargest) & (v > -kWinogradLargest);
      }
      for (int64_t x = 0; x < columns_; ++x) __builtin_memcpy(to + x * cell_, from + x * run, run * sizeof(float));
    }
    bool all = true;
    for (int i = 0; i < kLanes<float>; ++i) all = all && moderate[i];
    moderate_cells_[row % 4] = all;
  }

  void transform_cells(int64_t first) {
    const float* rows[4];
    for (int i = 0; i < 4; ++i) rows[i] = cells(first + i);
    for (int64_t t = 0; t < tiles_; ++t) {
      for (int64_t c = 0; c < cell_; c += kLanes<float>) {
        Vec<float> v[4][4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 4
          for (int j = 0; j < 4; ++j) v[i][j] = load<float>(rows[i] + (2 * t + j) * cell_ + c);
        }
        for_columns_and_rows(v, [](auto& a, auto& b, auto& c, auto& d) {
          const Vec<float> sum = b + c, difference = c - b;
          a -= c;
          d = b - d;
          b = sum;
          c = difference;
        });
#pragma GCC unroll 16
        for (int p = 0; p < kPoints; ++p) store<float>(points_ + (p * tiles_ + t) * cell_ + c, v[p / 4][p % 4]);
      }
    }
  }

  void multiply_points(int64_t block) {
    const float* weights = static_cast<const float*>(a_.winograd) + block * kPoints * cell_ * kFilters<float>;
    for (int64_t p = 0; p < kPoints; ++p, weights += cell_ * kFilters<float>) {
      const float* points = points_ + p * tiles_ * cell_;
      float* products = products_ + p * tiles_ * kFilters<float>;
      if (tiles_ >= kWinogradTiles) {
        for (int64_t t = 0; t < tiles_; t += kWinogradTiles)
          multiply_tiles<kWinogradTiles>(points, weights, products, lesser(t, tiles_ - kWinogradTiles));
      } else {
        for (int64_t t = 0; t < tiles_; ++t) multiply_tiles<1>(points, weights, products, t);
      }
    }
  }

  template <int P>
  ALEXNET_INLINE void multiply_tiles(const float* points, const float* weights, float* products, int64_t t) {
    Tile<float, P> tile = {};
    multiply<float, P>(tile, points + t * cell_, cell_, 1, weights, kFilters<float>, cell_);
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
      store<float>(products + (t + p) * kFilters<float>, tile.sum[p][0]);
      store<float>(products + (t + p) * kFilters<float> + kLanes<float>, tile.sum[p][1]);
    }
  }

  void transform_products(int64_t block) {
    for (int64_t t = 0; t < tiles_; ++t) {
      for (int64_t f = 0; f < kFilters<float>; f += kLanes<float>) {
        Vec<float> v[4][4];
#pragma GCC unroll 16
        for (int p = 0; p < kPoints; ++p) {
          v[p / 4][p % 4] = load<float>(products_ + (p * tiles_ + t) * kFilters<float> + f);
        }
        for_columns_and_rows(v, [](auto& a, auto& b, auto& c, auto& d) {
          a += b + c;
          b -= c + d;
        });
        const int64_t filter = block * kFilters<float> + f;
        const Vec<float> bias = load<float>(static_cast<const float*>(a_.bias) + filter);
        for (int i = 0; i < 2; ++i) {
          for (int j = 0; j < 2; ++j) {
            store<float>(rows_ + ((i * tiles_ + t) * 2 + j) * stride_ + filter, v[i][j] + bias);
          }
        }
      }
    }
  }

  const ConvArgs& a_;
  DirectRows<T, float> direct_;
  InputRows<T, float> input_;
  int64_t cell_, tiles_, columns_, blocks_, stride_;
  Scratch<float> cells_, points_, products_, rows_;
  int64_t image_ = -1, pair_ = -1, next_ = 0;
  bool moderate_cells_[4], moderate_ = true;
};

template <class R>
struct RowsOf {
  using Type = R;
};

// Calls f(T{}, RowsOf<...>{}) with the tensor type and the way to compute its output rows.
template <class F>
ALEXNET_INLINE void dispatch_rows(const ConvArgs& a, F f) {
#if defined(__AVX512F__)
  if (a.products) return f(BFloat16{}, RowsOf<DirectRows<BFloat16, BFloat16>>{});
#endif
  dispatch(a.images.dtype, [&](auto t) {
    using T = decltype(t);
    if constexpr (!__is_same(T, double)) {
      if (a.winograd != nullptr) return f(t, RowsOf<WinogradRows<T>>{});
    }
    f(t, RowsOf<DirectRows<T, Accumulator<T>>>{});
  });
}

}  // namespace alexnet_cuda::ALEXNET_CPU_LEVEL
