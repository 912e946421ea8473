// Arguments of the operators' kernels on every back end: structs without torch or CUDA headers, filled by host/.
#pragma once

#include <cstdint>

namespace alexnet_cuda {

// Float in memory: kTF32, whose products may be rounded to TF32, and kTF32x3, whose exact products tensor cores make of
// three in TF32.
enum class DType { kFloat, kDouble, kHalf, kBFloat16, kTF32, kTF32x3 };

inline int element_size(DType dtype) {
  return dtype == DType::kDouble ? 8 : dtype == DType::kHalf || dtype == DType::kBFloat16 ? 2 : 4;
}

// A dense batch in memory, NCHW or, with channels_last, NHWC.
struct Images {
  DType dtype;
  bool channels_last;
  int64_t count, channels, height, width;

  int64_t pixels() const { return height * width; }
};

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
  int kernel_size, stride, padding, groups;
  int64_t out_height, out_width;
};

// The geometry of AlexNet's first layer, for which every back end has kernels, without groups.
inline bool is_conv11x11s4(const Conv& c) {
  return c.kernel_size == 11 && c.stride == 4 && c.groups == 1 &&
         (c.channels == 1 || c.channels == 3 || c.channels == 4);
}

enum Order { kReluLrnPool = 0, kReluPoolLrn = 1, kLrnPoolRelu = 2 };

// One struct per operator, for its forward and its backward. `images` describes x (in a backward also the gradient of
// x); every other image is dense in the same dtype and memory format. Pointers that a call does not use are null.
struct Operands {
  Images images;
  const void* x = nullptr;
  const void* grad = nullptr;  // of y; backward only
  void* out = nullptr;         // y, or the gradient of x
};

struct LrnArguments : Operands {
  Lrn lrn;
  bool spatial = false;
  float* workspace = nullptr;  // CUDA, spatial backward: one float per element of x
};

struct PoolArguments : Operands {
  uint8_t* code = nullptr;  // position of each maximum in its window: written by the forward if not null, read by the
                            // backward
  Pool pool;
};

// ReLU, LRN across channels and max pooling in one pass.
struct TailArguments : PoolArguments {
  Order order = kReluLrnPool;
  Lrn lrn;
  float* workspace = nullptr;  // CUDA, kReluPoolLrn
};

// The forward reads x, weight and bias (or null) and writes out; the weight gradient reads x and grad and writes
// grad_weight and grad_bias (or null); the input gradient reads grad and weight and writes out. Weights are
// (filters, channels / groups, kernel_size, kernel_size), contiguous.
struct ConvArguments : Operands {
  const void *weight = nullptr, *bias = nullptr;
  void *grad_weight = nullptr, *grad_bias = nullptr;
  Conv conv;
  bool relu = false;           // forward only, not in BlockArguments: max(0, result)
  float* workspace = nullptr;  // CUDA
};

// The first block. conv.out receives the convolution's output unless null; tail.images describes that output, tail.x is
// null.
struct BlockArguments {
  ConvArguments conv;
  TailArguments tail;
};

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
