// The tiles of a convolution with stride 1: 6x6 inputs, M x M outputs, numbered through all images of a batch. Tensors
// are channels_last.
#pragma once

#include "winograd.h"

namespace alexnet_cuda::ALEXNET_CPU_LEVEL {

template <int R>
class WinogradTiles {
 public:
  static constexpr int M = 7 - R;

  WinogradTiles(const Conv& conv, int64_t images)
      : conv_(conv),
        across_((conv.out_width + M - 1) / M),
        down_((conv.out_height + M - 1) / M),
        images_(images),
        zeros_(conv.channels) {
    for (int64_t c = 0; c < conv.channels; ++c) zeros_[c] = 0;
  }

  int64_t count() const { return images_ * down_ * across_; }

  // The points of vectors of channels [first, last), each given to `take(channel, points)`. Behind the last tile all is
  // zero, as in the padding.
  template <class F>
  ALEXNET_INLINE void inputs(const float* x, int64_t tile, int64_t first, int64_t last, F take) {
    const int64_t n = tile / (down_ * across_), top = tile / across_ % down_ * M - conv_.padding,
                  left = tile % across_ * M - conv_.padding;
    const float* from[6][6];
    for (int i = 0; i < 6; ++i) {
      for (int j = 0; j < 6; ++j) {
        const int64_t h = top + i, w = left + j;
        const bool inside = n < images_ && h >= 0 && h < conv_.height && w >= 0 && w < conv_.width;
        from[i][j] = inside ? x + ((n * conv_.height + h) * conv_.width + w) * conv_.channels : zeros_ + 0;
      }
    }
    for (int64_t c = first; c < last; c += kLanes<float>) {
      Square v;
#pragma GCC unroll 6
      for (int i = 0; i < 6; ++i) {
#pragma GCC unroll 6
        for (int j = 0; j < 6; ++j) v[i][j] = load<float>(from[i][j] + c);
      }
      input_points(v);
      take(c, v);
    }
  }

  // The outputs of a tile, as far as they lie in the image: rows x columns pixels from `offset` on.
  struct Outputs {
    int64_t offset, rows, columns;
  };

  Outputs outputs(int64_t tile) const {
    const int64_t n = tile / (down_ * across_), y = tile / across_ % down_ * M, x = tile % across_ * M;
    return {((n * conv_.out_height + y) * conv_.out_width + x) * conv_.filters, lesser(M, conv_.out_height - y),
            lesser(M, conv_.out_width - x)};
  }

 private:
  const Conv& conv_;
  const int64_t across_, down_, images_;
  Scratch<float> zeros_;
};

// Whether `zero`, the sum of zero times the squares of some numbers, tells that these are finite and below 1.8e19.
inline bool all_finite(Vec<float> zero) {
  bool finite = true;
  for (int i = 0; i < kLanes<float>; ++i) finite = finite && zero[i] == 0;
  return finite;
}

}  // namespace alexnet_cuda::ALEXNET_CPU_LEVEL
