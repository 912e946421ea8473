// The 11x11 stride-4 convolution with a third of the multiplications, by the points of winograd.h.
//
// A cell is 4x4 pixels of C channels. In cells the convolution is one of 3x3 cells with stride 1 and 16 C channels (the
// twelfth row and column of the kernel are zeros). A tile of 4x4 outputs, under which 6x6 cells lie, then takes 36
// products per channel and filter instead of 16 x 121 / 16: 3.4 times fewer.
//
//   points = B' cells B          [point][tile][channel], of four output rows
//   products = points x weights  [point][tile][filter], of two vectors of filters
//   outputs = A' products A
//
// Sums and differences of cells would turn an infinity into NaN, spread NaN over a tile and overflow where products do
// not. Output rows under which there is a number beyond kWinogradLargest go the direct way (conv.h), as do such
// weights.
#pragma once

#include "winograd.h"

namespace alexnet_cuda::ALEXNET_CPU_LEVEL {

// Tiles whose sums stay in registers. AlexNet has 14 in a row.
constexpr int kWinogradTiles = kVectorBytes == 64 ? 14 : 5;

// Filters [block, block + 2 vectors): the packed weights' 3x3 cells as points, [point][channel][filter in block].
inline void winograd_weights(const float* packed, float* to, int64_t channels, int64_t block) {
  constexpr int64_t kBlock = kFilters<float>;
  const int64_t taps = 11 * channels, cell = 16 * channels;
  packed += block * 11 * taps * kBlock;
  to += block * kWinogradPoints * cell * kBlock;
  for (int64_t c = 0; c < cell; ++c) {
    const int64_t row = c / (4 * channels), tap = c % (4 * channels);
    for (int64_t f = 0; f < kBlock; f += kLanes<float>) {
      Square v = {};
      for (int i = 0; i < 3; ++i) {
        for (int j = 0; j < 3; ++j) {
          const int64_t y = 4 * i + row, x = 4 * j * channels + tap;
          if (y < 11 && x < taps) v[i][j] = load<float>(packed + (y * taps + x) * kBlock + f);
        }
      }
      weight_points<3>(v);
      store_points(v, to + c * kBlock + f, cell * kBlock);
    }
  }
}

// The lanes in which v[0, n), n rounded up to whole vectors, has only numbers that may be added up.
inline Bits<float> moderate(const float* v, int64_t n) {
  Bits<float> mask = Bits<float>{} - 1;
  for (int64_t i = 0; i < n; i += kLanes<float>) {
    const Vec<float> part = load<float>(v + i);
    mask &= (part < kWinogradLargest) & (part > -kWinogradLargest);
  }
  return mask;
}

inline bool all(Bits<float> mask) {
  bool all = true;
  for (int i = 0; i < kLanes<float>; ++i) all = all && mask[i];
  return all;
}

// The points of the cells under four output rows.
template <class T>
class WinogradInput {
 public:
  explicit WinogradInput(const ConvArgs& a)
      : cell(16 * a.conv.channels),
        tiles((a.conv.out_width + 3) / 4),
        columns_(4 * tiles + 2),
        input_(a, columns_ * cell / 4 + kLanes<float>),
        cells_(6 * columns_ * cell),
        points_(kWinogradPoints * tiles * cell) {}

  // Output rows [first, first + 4) of image n. False, and no points, if there are numbers too large among their cells.
  bool compute(int64_t n, int64_t first) {
    if (n != image_ || first + 6 < next_) next_ = 0;
    image_ = n;
    for (next_ = greater(next_, first); next_ < first + 6; ++next_) fill_cells(next_);
    for (bool row_moderate : moderate_) {
      if (!row_moderate) return false;
    }
    transform(first);
    return true;
  }

  // [tile][channel]
  const float* operator[](int64_t point) { return points_ + point * tiles * cell; }

  const int64_t cell, tiles;

 private:
  float* cells(int64_t row) { return cells_ + row % 6 * columns_ * cell; }

  void fill_cells(int64_t row) {
    const int64_t run = cell / 4;
    Bits<float> mask = Bits<float>{} - 1;
    for (int64_t i = 0; i < 4; ++i) {
      const float* from = input_.row(image_, 4 * row + i);
      float* to = cells(row) + i * run;
      mask &= moderate(from, columns_ * run);
      for (int64_t x = 0; x < columns_; ++x) __builtin_memcpy(to + x * cell, from + x * run, run * sizeof(float));
    }
    moderate_[row % 6] = all(mask);
  }

  void transform(int64_t first) {
    const float* rows[6];
    for (int i = 0; i < 6; ++i) rows[i] = cells(first + i);
    for (int64_t t = 0; t < tiles; ++t) {
      for (int64_t c = 0; c < cell; c += kLanes<float>) {
        Square v;
#pragma GCC unroll 6
        for (int i = 0; i < 6; ++i) {
#pragma GCC unroll 6
          for (int j = 0; j < 6; ++j) v[i][j] = load<float>(rows[i] + (4 * t + j) * cell + c);
        }
        input_points(v);
        store_points(v, points_ + t * cell + c, tiles * cell);
      }
    }
  }

  const int64_t columns_;
  InputRows<T> input_;
  Scratch<float> cells_, points_;
  int64_t image_ = -1, next_ = 0;
  bool moderate_[6];
};

// Output rows as those of DirectRows, computed four at a time.
template <class T>
class WinogradRows {
 public:
  explicit WinogradRows(const ConvArgs& a)
      : a_(a),
        direct_(a),
        input_(a),
        blocks_((a.conv.filters + kFilters<float> - 1) / kFilters<float>),
        stride_(blocks_ * kFilters<float>),
        products_(kWinogradPoints * input_.tiles * kFilters<float>),
        rows_(16 * input_.tiles * stride_) {}

  void compute(int64_t n, int64_t o, Pixels<float> out) {
    if (n != image_ || o - o % 4 != first_) compute_four(n, o - o % 4);
    if (!moderate_) return direct_.compute(n, o, out);
    const float* from = rows_ + o % 4 * 4 * input_.tiles * stride_;
    for (int64_t p = 0; p < a_.conv.out_width; ++p) {
      for (int64_t f = 0; f < lesser(out.stride, stride_); f += kLanes<float>) {
        store<float>(out[p] + f, load<float>(from + p * stride_ + f));
      }
    }
  }

 private:
  void compute_four(int64_t n, int64_t first) {
    image_ = n;
    first_ = first;
    moderate_ = input_.compute(n, first);
    for (int64_t block = 0; moderate_ && block < blocks_; ++block) {
      multiply_points(block);
      transform_products(block);
    }
  }

  void multiply_points(int64_t block) {
    const float* weights =
        static_cast<const float*>(a_.points) + block * kWinogradPoints * input_.cell * kFilters<float>;
    for (int64_t p = 0; p < kWinogradPoints; ++p, weights += input_.cell * kFilters<float>) {
      float* products = products_ + p * input_.tiles * kFilters<float>;
      if (input_.tiles >= kWinogradTiles) {
        multiply_tiles<kWinogradTiles>(input_[p], weights, products);
      } else if (input_.tiles >= 4) {
        multiply_tiles<4>(input_[p], weights, products);
      } else {
        multiply_tiles<1>(input_[p], weights, products);
      }
    }
  }

  // P tiles at a time. The last of them are moved back to end with the row. 16 channels at a time: shorter sums have
  // smaller rounding errors.
  template <int P>
  ALEXNET_INLINE void multiply_tiles(const float* points, const float* weights, float* products) {
    for (int64_t begin = 0; begin < input_.tiles; begin += P) {
      const int64_t t = lesser(begin, input_.tiles - P);
      for (int64_t c = 0; c < input_.cell; c += 16) {
        Tile<float, P> tile = {};
        multiply<float, P>(tile, points + t * input_.cell + c, input_.cell, 1, weights + c * kFilters<float>,
                           kFilters<float>, 16);
#pragma GCC unroll 16
        for (int p = 0; p < P; ++p) {
          for (int i = 0; i < 2; ++i) {
            float* to = products + (t + p) * kFilters<float> + i * kLanes<float>;
            store<float>(to, c == 0 ? tile.sum[p][i] : tile.sum[p][i] + load<float>(to));
          }
        }
      }
    }
  }

  void transform_products(int64_t block) {
    for (int64_t t = 0; t < input_.tiles; ++t) {
      for (int64_t f = 0; f < kFilters<float>; f += kLanes<float>) {
        Square v;
        load_points(v, products_ + t * kFilters<float> + f, input_.tiles * kFilters<float>);
        outputs<4>(v);
        const int64_t filter = block * kFilters<float> + f;
        const Vec<float> bias = load<float>(static_cast<const float*>(a_.bias) + filter);
        for (int i = 0; i < 4; ++i) {
          for (int j = 0; j < 4; ++j) {
            store<float>(rows_ + ((i * input_.tiles + t) * 4 + j) * stride_ + filter, v[i][j] + bias);
          }
        }
      }
    }
  }

  const ConvArgs& a_;
  DirectRows<T> direct_;
  WinogradInput<T> input_;
  const int64_t blocks_, stride_;
  Scratch<float> products_, rows_;
  int64_t image_ = -1, first_ = -1;
  bool moderate_ = true;
};

template <class R>
struct RowsOf {
  using Type = R;
};

// Calls f(T{}, RowsOf<...>{}) with the tensor type and the way to compute its output rows.
template <class F>
ALEXNET_INLINE void dispatch_rows(const ConvArgs& a, F f) {
  dispatch(a.images.dtype, [&](auto t) {
    using T = decltype(t);
    if constexpr (!__is_same(T, double)) {
      if (a.winograd) return f(t, RowsOf<WinogradRows<T>>{});
    }
    f(t, RowsOf<DirectRows<T>>{});
  });
}

}  // namespace alexnet_cuda::ALEXNET_CPU_LEVEL
