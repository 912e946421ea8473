// The convolution's weight gradient, which adds up output rows: [tap][filter] += input x gradient over the pixels. One
// more row of sums, of the gradient alone, is the bias gradient.
#pragma once

#include "winograd_rows.h"

namespace alexnet_cuda::ALEXNET_CPU_LEVEL {

// Rows of the gradient, with the filters padded.
template <class T>
class GradRows {
  using A = Accumulator<T>;

 public:
  GradRows(const ConvArgs& a, int64_t rows)
      : channels(output_channels<A>(a)),
        a_(a),
        row_size_(room<A>(a.conv.out_width, channels.padded)),
        scratch_(rows * row_size_) {}

  // Row `o` of image n, in slot `slot` if it has to be converted.
  Pixels<const A> row(int64_t n, int64_t o, int64_t slot = 0) {
    const Conv& conv = a_.conv;
    return pixels_at<A>(static_cast<const T*>(a_.grad) + n * conv.filters * conv.out_height * conv.out_width +
                            o * conv.out_width * channels.pixel_stride,
                        channels, conv.out_width, scratch_ + slot * row_size_);
  }

  const Channels channels;

 private:
  const ConvArgs& a_;
  const int64_t row_size_;
  Scratch<A> scratch_;
};

// P taps of one kernel row from `first` on, two vectors of filters: += input x gradient over the pixels of a row.
template <class A, int P>
inline void weight_tile(const ConvArgs& a, const A* input, Pixels<const A> grad, int64_t first, int64_t f, A* sum,
                        int64_t sum_stride) {
  Tile<A, P> tile;
  load_tile<A, P>(tile, sum + first * sum_stride + f, sum_stride);
  multiply<A, P>(tile, input + first, 1, a.conv.stride * a.conv.channels, grad.data + f, grad.stride, a.conv.out_width);
  store_tile<A, P>(tile, sum + first * sum_stride + f, sum_stride);
}

template <class T>
class DirectWeightGrad {
  using A = Accumulator<T>;

 public:
  static constexpr int kRows = 1;

  explicit DirectWeightGrad(const ConvArgs& a) : a_(a), input_(a), grads_(a, 1) {}

  // Output row `o` of image n.
  void add(int64_t n, int64_t o, A* sum) {
    const Conv& conv = a_.conv;
    const int64_t taps = conv.kernel_size * conv.channels, padded = grads_.channels.padded;
    input_.advance(n, o);
    const Pixels<const A> grad = grads_.row(n, o);
    for (int i = 0; i < conv.kernel_size; ++i, sum += taps * padded) {
      const A* input = input_[o * conv.stride + i];
      for (int64_t f = 0; f < padded; f += kFilters<A>) {
        int64_t first = 0;
        for (; first + kTile <= taps; first += kTile) weight_tile<A, kTile>(a_, input, grad, first, f, sum, padded);
        for (; first + 3 <= taps; first += 3) weight_tile<A, 3>(a_, input, grad, first, f, sum, padded);
        for (; first < taps; ++first) weight_tile<A, 1>(a_, input, grad, first, f, sum, padded);
      }
    }
    for (int64_t f = 0; f < padded; f += kLanes<A>) {
      Vec<A> row = {};
      for (int64_t p = 0; p < conv.out_width; ++p) row += load<A>(grad[p] + f);
      store<A>(sum + f, load<A>(sum + f) + row);
    }
  }

  void finish(A*) {}

 private:
  const ConvArgs& a_;
  InputRows<T> input_;
  GradRows<T> grads_;
};

// The transpose of the forward way, A, B and G as there: the sum over all tiles of (B' cells B) x (A gradients A'),
// [point][channel][filter], and at the end G' sum G.
template <class T>
class WinogradWeightGrad {
 public:
  static constexpr int kRows = 4;

  explicit WinogradWeightGrad(const ConvArgs& a)
      : a_(a),
        direct_(a),
        input_(a),
        grads_(a, kRows),
        points_(kWinogradPoints * input_.tiles * kFilters<float>),
        sum_size_(kWinogradPoints * input_.cell * grads_.channels.padded),
        sum_(sum_size_) {
    clear();
  }

  // Output rows [first, first + 4) of image n, as far as there are so many.
  void add(int64_t n, int64_t first, float* sum) {
    const Conv& conv = a_.conv;
    const int64_t rows = lesser(kRows, conv.out_height - first);
    Pixels<const float> grad[kRows];
    Bits<float> mask = Bits<float>{} - 1;
    for (int64_t i = 0; i < rows; ++i) {
      grad[i] = grads_.row(n, first + i, i);
      for (int64_t p = 0; p < conv.out_width; ++p) mask &= moderate(grad[i][p], grads_.channels.each);
    }
    const bool direct = !input_.compute(n, first) || !all(mask);
    if (direct) {
      for (int64_t i = 0; i < rows; ++i) direct_.add(n, first + i, sum);
      return;
    }
    for (int64_t f = 0; f < grads_.channels.padded; f += kFilters<float>) {
      transform(grad, rows, f, sum + 121 * conv.channels * grads_.channels.padded + f);
      multiply_points(f);
    }
  }

  // Adds what was summed as points, and forgets it.
  void finish(float* sum) {
    const int64_t channels = a_.conv.channels, padded = grads_.channels.padded;
    for (int64_t c = 0; c < input_.cell; ++c) {
      const int64_t row = c / (4 * channels), tap = c % (4 * channels);
      for (int64_t f = 0; f < padded; f += kLanes<float>) {
        Square v;
        load_points(v, sum_ + c * padded + f, input_.cell * padded);
        weight_grads<3>(v);
        for (int i = 0; i < 3; ++i) {
          for (int j = 0; j < 3; ++j) {
            const int64_t y = 4 * i + row, x = 4 * j * channels + tap;
            if (y >= 11 || x >= 11 * channels) continue;
            float* to = sum + (y * 11 * channels + x) * padded + f;
            store<float>(to, load<float>(to) + v[i][j]);
          }
        }
      }
    }
    clear();
  }

 private:
  void clear() {
    for (int64_t i = 0; i < sum_size_; ++i) sum_[i] = 0;
  }

  // The gradients of two vectors of filters as points, [point][tile][filter]; and added to `sum`.
  void transform(const Pixels<const float>* grad, int64_t rows, int64_t filter, float* sum) {
    Vec<float> bias[2] = {};
    for (int64_t t = 0; t < input_.tiles; ++t) {
      const int64_t columns = lesser(4, a_.conv.out_width - 4 * t);
      for (int64_t f = 0; f < kFilters<float>; f += kLanes<float>) {
        Square v = {};
        for (int i = 0; i < rows; ++i) {
          for (int j = 0; j < columns; ++j) v[i][j] = load<float>(grad[i][4 * t + j] + filter + f);
        }
        for (int i = 0; i < rows; ++i) bias[f / kLanes<float>] += (v[i][0] + v[i][1]) + (v[i][2] + v[i][3]);
        grad_points<4>(v);
        store_points(v, points_ + t * kFilters<float> + f, input_.tiles * kFilters<float>);
      }
    }
    store<float>(sum, load<float>(sum) + bias[0]);
    store<float>(sum + kLanes<float>, load<float>(sum + kLanes<float>) + bias[1]);
  }

  void multiply_points(int64_t filter) {
    constexpr int kTaps = kVectorBytes == 64 ? 8 : 4;
    const int64_t padded = grads_.channels.padded;
    float* sum = sum_ + filter;
    for (int64_t p = 0; p < kWinogradPoints; ++p) {
      for (int64_t c = 0; c < input_.cell; c += kTaps, sum += kTaps * padded) {
        Tile<float, kTaps> tile;
        load_tile<float, kTaps>(tile, sum, padded);
        multiply<float, kTaps>(tile, input_[p] + c, 1, input_.cell, points_ + p * input_.tiles * kFilters<float>,
                               kFilters<float>, input_.tiles);
        store_tile<float, kTaps>(tile, sum, padded);
      }
    }
  }

  const ConvArgs& a_;
  DirectWeightGrad<T> direct_;
  WinogradInput<T> input_;
  GradRows<T> grads_;
  Scratch<float> points_;
  const int64_t sum_size_;
  Scratch<float> sum_;
};

}  // namespace alexnet_cuda::ALEXNET_CPU_LEVEL
