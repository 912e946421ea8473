// 11x11 convolution with stride 4 of three channels in bfloat16 by the matrix unit (amx_conv2d.cpp): packing of
// weights, the forward, one output row at a time, and the weight gradient.
#pragma once

#include "conv.h"

namespace alexnet_cuda::ALEXNET_CPU_LEVEL {

// A block of packed filters of three channels for the matrix unit.
inline void pack_amx_weight(const float* weight, BFloat16* to) {
  constexpr int kTaps = 3 * kSize, kBlock = kFilterBlock<float>;
  for (int f = 0; f < kBlock; f += 16, to += 12 * 512) {
    for (int i = 0; i < 12 * 512; ++i) {
      const int pair = i / 32 % 16, filter = i / 2 % 16, tap = 2 * pair + i % 2;
      const int row = i < 11 * 512 ? i / 512 : tap, column = i < 11 * 512 ? tap : 32;
      const float value = row < kSize ? weight[(row * kTaps + column) * kBlock + f + filter] : 0.0f;
      to[i] = static_cast<BFloat16>(__builtin_bit_cast(uint32_t, value) >> 16);
    }
  }
}

class AmxRows {
 public:
  explicit AmxRows(const ConvTask& a) : a_(a) {
    for (int64_t i = 0; i < 32 * a.conv.out_width; ++i) last_taps_[i] = BFloat16{};
  }

  // Output row `o` of image n.
  void compute(int64_t n, int64_t o, Pixels<float> out) {
    input_.advance(n, o, [&](int64_t r, const float* from) {  // to bfloat16, in which the numbers are exact
      BFloat16* to = rows_ + r % kSize * row_size_;
      for (int64_t i = 0; i < row_size_; i += kLanes<float>) store<float>(to + i, load<float>(from + i));
    });
    amx::ConvRow row{{},       last_taps_, a_.amx_weight, static_cast<const float*>(a_.packed_bias),
                     out.data, out.stride, out.stride,    a_.conv.out_width};
    for (int i = 0; i < kSize; ++i) {
      row.rows[i] = rows_ + (o * kStride + i) % kSize * row_size_;
      for (int64_t p = 0; p < row.width; ++p) last_taps_[32 * p + i] = row.rows[i][12 * p + 32];
    }
    amx::conv_row(row);
  }

 private:
  const ConvTask& a_;
  InputRows<BFloat16> input_{a_};
  const int64_t row_size_ = round_up(((a_.conv.out_width - 1) * kStride + kSize) * 3, 32);
  Scratch<BFloat16> rows_{kSize * row_size_}, last_taps_{32 * a_.conv.out_width};
};

// By the matrix unit, three channels in bfloat16 (amx_conv2d.cpp).
class AmxWeightGrad {
 public:
  static constexpr int kRows = amx::kRows;

  explicit AmxWeightGrad(const ConvTask& a) : a_(a) {
    for (int64_t i = 0; i < inputs_size_; ++i) inputs_[i] = BFloat16{};
    for (int64_t i = 0; i < kRows * pixels_ * channels_.padded; ++i) grads_[i] = BFloat16{};
    clear();
  }

  // Output rows [first, first + 8) of image n, or fewer at the end of the image.
  void add(int64_t n, int64_t first, float* sum) {
    const int64_t rows = min64(kRows, a_.conv.out_height - first), padded = channels_.padded;
    for (int64_t i = 0; i < kStride * (rows - 1) + kSize; ++i) {
      load_row(input_.load(n, first * kStride + i), inputs_ + i * kTaps * pixels_);
    }
    for (int64_t i = 0; i < rows; ++i) {
      const Pixels<const float> grad = grad_row<BFloat16>(a_, channels_, n, first + i, row_ + 0);
      for (int64_t f = 0; f < padded; f += 16) {
        load_grads(grad, f, grads_ + (f / 16 * kRows + i) * pixels_ * 16, sum + kSize * kTaps * padded + f);
      }
    }
    amx::add_weight_grad({inputs_, grads_, sums_, rows, pixels_, padded});
  }

  // Adds what the matrix unit added up to `sum` and clears it.
  void finish(float* sum) {
    const int64_t size = kSize * kTaps * channels_.padded;
    for (int64_t i = 0; i < size; i += kLanes<float>) {
      store<float>(sum + i, load<float>(sum + i) + load<float>(sums_ + i));
    }
    clear();
  }

 private:
  static constexpr int64_t kTaps = 3 * kSize, kStep = 3 * kStride, kPadded = 384;

  void clear() {
    for (int64_t i = 0; i < kPadded * channels_.padded; ++i) sums_[i] = 0;
  }

  // An input row as [tap][pixel]; what lies under no window is zero.
  void load_row(const float* from, BFloat16* to) {
    constexpr int kN = kLanes<float>;
    for (int64_t p = 0; p < pixels_; p += kN) {
      for (int64_t tap = 0; tap < 16; tap += kN) {
        Vec<float> v[kN];
        for (int i = 0; i < kN; ++i) v[i] = load<float>(from + kStep * (p + i) + tap);
        transpose<float>(v);
        for (int i = 0; i < kN; ++i) store<float>(to + (tap + i) * pixels_ + p, v[i]);
      }
    }
    // The pixel after has tap `tap - 12` where this one has `tap`.
    for (int64_t tap = 16; tap < kTaps; ++tap) {
      const BFloat16* earlier = to + (tap - kStep) * pixels_ + 1;
      for (int64_t p = 0; p < pixels_; p += kN) store<float>(to + tap * pixels_ + p, load<float>(earlier + p));
    }
    for (int64_t tap = 0; tap < kTaps; ++tap) {
      for (int64_t p = a_.conv.out_width; p < pixels_; ++p) to[tap * pixels_ + p] = BFloat16{};
    }
  }

  // A row of gradients of 16 filters as pairs of pixels; their sum is added to `bias_sum`.
  void load_grads(Pixels<const float> grad, int64_t filter, BFloat16* to, float* bias_sum) {
    for (int64_t f = 0; f < 16; f += kLanes<float>) {
      Vec<float> bias = load<float>(bias_sum + f);
      for (int64_t p = 0; p < a_.conv.out_width; p += 2) {
        const Vec<float> even = load<float>(grad[p] + filter + f);
        const Vec<float> odd = p + 1 < a_.conv.out_width ? load<float>(grad[p + 1] + filter + f) : Vec<float>{};
        const auto pair =
            (__builtin_bit_cast(Unsigned<float>, even) >> 16) | (__builtin_bit_cast(Unsigned<float>, odd) & 0xffff0000);
        __builtin_memcpy(to + (p / 2 * 16 + f) * 2, &pair, sizeof(pair));
        bias += even + odd;
      }
      store<float>(bias_sum + f, bias);
    }
  }

  const ConvTask& a_;
  const Channels channels_ = output_channels<float>(a_);
  const int64_t pixels_ = round_up(a_.conv.out_width + 2, 32);
  const int64_t inputs_size_ = ((kStride * (kRows - 1) + kSize) * kTaps + kPadded) * pixels_;
  InputRows<BFloat16> input_{a_, kStep * pixels_ + 16};
  Scratch<BFloat16> inputs_{inputs_size_}, grads_{kRows * pixels_ * channels_.padded};
  Scratch<float> row_{padded_size<float>(a_.conv.out_width, channels_.padded)}, sums_{kPadded * channels_.padded};
};

}  // namespace alexnet_cuda::ALEXNET_CPU_LEVEL
