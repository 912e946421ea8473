// Weight gradient of the 11x11 convolution with stride 4, added up over output rows: [tap][filter] += input x gradient
// over the pixels of a row. One more row of these sums, of the gradient alone, is the bias gradient.
// Taps are counted as (kernel row, kernel column, channel); filters are padded to whole blocks.
#pragma once

#include "winograd_rows.h"

namespace alexnet_cuda::ALEXNET_CPU_LEVEL {

// P taps of one kernel row from `first` on, one block of filters from `f` on.
template <class A, int P>
inline void weight_tile(const ConvTask& a, const A* input, Pixels<const A> grad, int64_t first, int64_t f, A* sum,
                        int64_t sum_stride) {
  Tile<A, P> tile;
  load_tile<A, P>(tile, sum + first * sum_stride + f, sum_stride);
  multiply<A, P>(tile, input + first, 1, kStride * a.conv.channels, grad.data + f, grad.stride, a.conv.out_width);
  store_tile<A, P>(tile, sum + first * sum_stride + f, sum_stride);
}

template <class T>
class DirectWeightGrad {
  using A = Accumulator<T>;

 public:
  static constexpr int kRows = 1;

  explicit DirectWeightGrad(const ConvTask& a) : a_(a) {}

  // Output row `o` of image n.
  void add(int64_t n, int64_t o, A* sum) {
    const int64_t taps = kSize * a_.conv.channels, padded = channels_.padded;
    input_.advance(n, o);
    const Pixels<const A> grad = grad_row<T>(a_, channels_, n, o, grad_ + 0);
    // Each kernel row's taps, as many at a time as there are registers.
    for (int i = 0; i < kSize; ++i, sum += taps * padded) {
      const A* input = input_[o * kStride + i];
      for (int64_t f = 0; f < padded; f += kFilterBlock<A>) {
        int64_t first = 0;
        for (; first + kTileRows <= taps; first += kTileRows) {
          weight_tile<A, kTileRows>(a_, input, grad, first, f, sum, padded);
        }
        for (; first + 3 <= taps; first += 3) weight_tile<A, 3>(a_, input, grad, first, f, sum, padded);
        for (; first < taps; ++first) weight_tile<A, 1>(a_, input, grad, first, f, sum, padded);
      }
    }
    // The bias gradient.
    for (int64_t f = 0; f < padded; f += kLanes<A>) {
      Vec<A> row = {};
      for (int64_t p = 0; p < a_.conv.out_width; ++p) row += load<A>(grad[p] + f);
      store<A>(sum + f, load<A>(sum + f) + row);
    }
  }

  void finish(A*) {}

 private:
  const ConvTask& a_;
  InputRows<T> input_{a_};
  const Channels channels_ = output_channels<A>(a_);
  Scratch<A> grad_{padded_size<A>(a_.conv.out_width, channels_.padded)};
};

// Winograd's algorithm transposed: the sum over all tiles of (B' input B) x (A grad A'), [product][16 C][filter], and
// at the end G' sum G. Rows with values out of range go to DirectWeightGrad.
template <class T>
class WinogradWeightGrad {
 public:
  static constexpr int kRows = 4;

  explicit WinogradWeightGrad(const ConvTask& a) : a_(a) { clear(); }

  // Output rows [first, first + 4) of image n, or fewer at the end of the image.
  void add(int64_t n, int64_t first, float* sum) {
    const Conv& conv = a_.conv;
    const int64_t rows = min64(kRows, conv.out_height - first), padded = channels_.padded;
    Pixels<const float> grad[kRows];
    Bits<float> mask = Bits<float>{} - 1;
    for (int64_t i = 0; i < rows; ++i) {
      grad[i] = grad_row<T>(a_, channels_, n, first + i, rows_ + i * row_size_);
      for (int64_t p = 0; p < conv.out_width; ++p) mask &= within_range(grad[i][p], channels_.per_group);
    }
    if (!all(mask) || !input_.compute(n, first)) {
      for (int64_t i = 0; i < rows; ++i) direct_.add(n, first + i, sum);
      return;
    }
    for (int64_t f = 0; f < padded; f += kBlock) {
      transform(grad, rows, f, sum + kSize * kSize * conv.channels * padded + f);
      multiply_block(f);
    }
  }

  // Adds the sum in the Winograd domain to `sum` and clears it.
  void finish(float* sum) {
    const int64_t padded = channels_.padded;
    for (int64_t c = 0; c < input_.channels; ++c) {
      for (int64_t f = 0; f < padded; f += kLanes<float>) {
        Tile6x6 v;
        load_domain(v, sum_ + c * padded + f, input_.channels * padded);
        transform_weight_grad<3>(v);
        for_each_tap(c, a_.conv.channels, [&](int i, int j, int64_t tap) {
          float* to = sum + tap * padded + f;
          store<float>(to, load<float>(to) + v[i][j]);
        });
      }
    }
    clear();
  }

 private:
  static constexpr int64_t kBlock = kFilterBlock<float>;

  void clear() {
    for (int64_t i = 0; i < sum_size_; ++i) sum_[i] = 0;
  }

  // Gradients of a block of filters, tiles of 4x4 -> [product][tile][filter]; their sum is added to `bias_sum`.
  void transform(const Pixels<const float>* grad, int64_t rows, int64_t filter, float* bias_sum) {
    Vec<float> bias[2] = {};
    for (int64_t t = 0; t < input_.tiles; ++t) {
      const int64_t columns = min64(4, a_.conv.out_width - 4 * t);
      for (int64_t f = 0; f < kBlock; f += kLanes<float>) {
        Tile6x6 v = {};
        for (int i = 0; i < rows; ++i) {
          for (int j = 0; j < columns; ++j) v[i][j] = load<float>(grad[i][4 * t + j] + filter + f);
        }
        for (int i = 0; i < rows; ++i) bias[f / kLanes<float>] += (v[i][0] + v[i][1]) + (v[i][2] + v[i][3]);
        transform_grad<4>(v);
        store_domain(v, grads_ + t * kBlock + f, input_.tiles * kBlock);
      }
    }
    store<float>(bias_sum, load<float>(bias_sum) + bias[0]);
    store<float>(bias_sum + kLanes<float>, load<float>(bias_sum + kLanes<float>) + bias[1]);
  }

  // [channel][tile] x [tile][filter] for each of the 36 products, added to the sum.
  void multiply_block(int64_t filter) {
    constexpr int kChannels = kVectorBytes == 64 ? 8 : 4;
    const int64_t padded = channels_.padded;
    float* sum = sum_ + filter;
    for (int64_t p = 0; p < kWinogradProducts; ++p) {
      for (int64_t c = 0; c < input_.channels; c += kChannels, sum += kChannels * padded) {
        multiply_in_parts<kChannels, 64>(input_[p] + c, 1, input_.channels, grads_ + p * input_.tiles * kBlock,
                                         input_.tiles, sum, padded, true);
      }
    }
  }

  const ConvTask& a_;
  DirectWeightGrad<T> direct_{a_};
  WinogradInput<T> input_{a_};
  const Channels channels_ = output_channels<float>(a_);
  const int64_t row_size_ = padded_size<float>(a_.conv.out_width, channels_.padded);
  const int64_t sum_size_ = kWinogradProducts * input_.channels * channels_.padded;
  Scratch<float> rows_{kRows * row_size_}, grads_{kWinogradProducts * input_.tiles * kBlock}, sum_{sum_size_};
};

}  // namespace alexnet_cuda::ALEXNET_CPU_LEVEL
