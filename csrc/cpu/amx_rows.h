// 11x11 convolution with stride 4 of three channels in bfloat16, one output row at a time, by the matrix unit
// (amx_conv2d.cpp).
#pragma once

#include "conv.h"

namespace alexnet_cuda::ALEXNET_CPU_LEVEL {

class AmxRows {
 public:
  explicit AmxRows(const ConvTask& a) : a_(a) {
    for (int64_t i = 0; i < 32 * a.conv.out_width; ++i) last_taps_[i] = BFloat16{};
  }

  // Output row `o` of image n.
  void compute(int64_t n, int64_t o, Pixels<float> out) {
    const int64_t first = o * kStride, last = first + kSize;
    if (n != image_ || last < next_) next_ = 0;
    image_ = n;
    for (next_ = max64(next_, first); next_ < last; ++next_) load_row(n, next_);
    amx::ConvRow row{{},       last_taps_, a_.amx_weight, static_cast<const float*>(a_.packed_bias),
                     out.data, out.stride, out.stride,    a_.conv.out_width};
    for (int i = 0; i < kSize; ++i) {
      row.rows[i] = rows_ + (first + i) % kSize * row_size_;
      for (int64_t p = 0; p < row.width; ++p) last_taps_[32 * p + i] = row.rows[i][12 * p + 32];
    }
    amx::conv_row(row);
  }

 private:
  // Row r of image n in bfloat16, whose numbers are exact.
  void load_row(int64_t n, int64_t r) {
    const float* from = input_.load(n, r);
    BFloat16* to = rows_ + r % kSize * row_size_;
    for (int64_t i = 0; i < row_size_; i += kLanes<float>) store<float>(to + i, load<float>(from + i));
  }

  const ConvTask& a_;
  InputRows<BFloat16> input_{a_};
  const int64_t row_size_ = round_up(((a_.conv.out_width - 1) * kStride + kSize) * 3, 32);
  Scratch<BFloat16> rows_{kSize * row_size_}, last_taps_{32 * a_.conv.out_width};
  int64_t image_ = -1, next_ = 0;
};

}  // namespace alexnet_cuda::ALEXNET_CPU_LEVEL
