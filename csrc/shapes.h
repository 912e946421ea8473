// What a kernel needs to know about its layer: plain structs, shared by host code, CPU kernels and CUDA kernels.
#pragma once

#include <cstdint>

namespace alexnet_cuda {

// y_c = x_c / (k + alpha * sum over the window of x^2)^beta; the window is [c - front, c - front + size) cut at the
// borders of the group (or, for the spatial form, at those of the plane, in both directions).
struct Lrn {
  int size, front;
  double alpha, beta, k;
  int groups;
};

struct Pool {
  int kernel_size, stride, padding;
  int64_t height, width, out_height, out_width;
};

struct Conv {
  int64_t channels, height, width, filters;
  int kernel_size, stride, padding;
  int64_t out_height, out_width;
};

enum Order { kReluLrnPool = 0, kReluPoolLrn = 1, kLrnPoolRelu = 2 };

// With ceil_mode the last window may hang over the edge. A pooling window must still start inside the input or its
// left padding, as in torch; a convolution reads zeros there, as in cuda-convnet.
inline int64_t output_size(int64_t size, int64_t kernel_size, int64_t stride, int64_t padding, bool ceil_mode,
                           bool pool) {
  const int64_t span = size + 2 * padding - kernel_size + (ceil_mode ? stride - 1 : 0);
  if (span < 0) return 0;
  const int64_t out = span / stride + 1;
  return pool && ceil_mode && (out - 1) * stride >= size + padding ? out - 1 : out;
}

}  // namespace alexnet_cuda
