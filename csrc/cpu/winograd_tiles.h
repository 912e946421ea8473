// The tiles of a convolution with stride 1 in channels_last: 6x6 inputs, M x M outputs, numbered through all images of
// a batch.
#pragma once

#include "winograd.h"

namespace alexnet_cuda::ALEXNET_CPU_LEVEL {

template <int R>
class WinogradTiles {
 public:
  static constexpr int M = 7 - R;

  explicit WinogradTiles(const WinogradTask& a)
      : conv_(a.conv),
        across_((conv_.out_width + M - 1) / M),
        down_((conv_.out_height + M - 1) / M),
        images_(a.images.count),
        zeros_(conv_.channels) {
    for (int64_t c = 0; c < conv_.channels; ++c) zeros_[c] = 0;
  }

  int64_t count() const { return images_ * down_ * across_; }

  // Transforms the inputs of a tile, channels [first, last), and gives each vector to `store(channel, transformed)`.
  // Pixels in the padding and of tiles behind the last are zeros.
  template <class F>
  ALEXNET_INLINE void inputs(const void* x, int64_t tile, int64_t first, int64_t last, F store) {
    const int64_t n = tile / (down_ * across_), top = tile / across_ % down_ * M - conv_.padding,
                  left = tile % across_ * M - conv_.padding;
    const float* from[6][6];
    for (int i = 0; i < 6; ++i) {
      for (int j = 0; j < 6; ++j) {
        const int64_t h = top + i, w = left + j, pixel = (n * conv_.height + h) * conv_.width + w;
        const bool inside = n < images_ && h >= 0 && h < conv_.height && w >= 0 && w < conv_.width;
        from[i][j] = inside ? static_cast<const float*>(x) + pixel * conv_.channels : zeros_ + 0;
      }
    }
    for (int64_t c = first; c < last; c += kLanes<float>) {
      Tile6x6 v;
#pragma GCC unroll 6
      for (int i = 0; i < 6; ++i) {
#pragma GCC unroll 6
        for (int j = 0; j < 6; ++j) v[i][j] = load<float>(from[i][j] + c);
      }
      transform_input(v);
      store(c, v);
    }
  }

  // The outputs of a tile inside the image: rows x columns pixels, the first at `offset`.
  struct Outputs {
    int64_t offset, rows, columns;
  };

  Outputs outputs(int64_t tile) const {
    const int64_t n = tile / (down_ * across_), y = tile / across_ % down_ * M, x = tile % across_ * M;
    return {((n * conv_.out_height + y) * conv_.out_width + x) * conv_.filters, min64(M, conv_.out_height - y),
            min64(M, conv_.out_width - x)};
  }

 private:
  const Conv& conv_;
  const int64_t across_, down_, images_;
  Scratch<float> zeros_;
};

// Collects whether numbers are finite and below 1.8e19: 0 times the square of any other is NaN.
class FiniteCheck {
 public:
  ALEXNET_INLINE void add(Vec<float> v) { zero_ += v * v * 0; }

  void report(bool* finite) const {
    for (int i = 0; i < kLanes<float>; ++i) {
      if (zero_[i] != 0) __atomic_store_n(finite, false, __ATOMIC_RELAXED);
    }
  }

 private:
  Vec<float> zero_ = {};
};

}  // namespace alexnet_cuda::ALEXNET_CPU_LEVEL
