// The CPU kernels as the host sees them: what each is told, and into which tasks its work falls. A kernel does tasks
// [begin, end) on one thread and every task writes its own part of the output, computed in the same way whatever the
// range, so results do not depend on the number of threads. Plain structs and no torch header: a *_kernel.cpp must not
// include inline functions that another level compiles too, or the linker would mix instruction sets.
#pragma once

#include "../shapes.h"
#include "level.h"

namespace alexnet_cuda {

enum class DType { kFloat, kDouble, kHalf, kBFloat16 };

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// A dense batch of images: of the larger, unpooled side of an op.
struct Images {
  DType dtype;
  bool channels_last;
  int64_t count, channels, height, width;

  int64_t pixels() const { return height * width; }
};

// LRN across channels: a task is kStrip pixels of one image (channels_last: of the whole batch).
// LRN in the plane: a task is the whole plane of kPlanes channels of one image (contiguous: kPlanes of all the planes).
// Pooling: a task is one output row, of all channels of an image (channels_last) or of kPlanes planes (contiguous);
// of the backward, one row of dx (channels_last) or a plane (contiguous).
constexpr int64_t kStrip = 64;
constexpr int64_t kPlanes = 32;

struct LrnArgs {
  const void *x, *grad;  // grad only for the backward, as below
  void* out;
  Images images;
  Lrn lrn;
};
ALEXNET_CPU_KERNEL(lrn_forward, LrnArgs)
ALEXNET_CPU_KERNEL(lrn_backward, LrnArgs)
ALEXNET_CPU_KERNEL(spatial_lrn_forward, LrnArgs)
ALEXNET_CPU_KERNEL(spatial_lrn_backward, LrnArgs)

struct PoolArgs {
  const void *x, *grad;
  uint8_t* code;  // written by the forward (null: not wanted), read by the backward
  void* out;
  Images images;
  Pool pool;
};
ALEXNET_CPU_KERNEL(max_pool_forward, PoolArgs)
ALEXNET_CPU_KERNEL(max_pool_backward, PoolArgs)

// A task is one pooled row of one image; of the backward, one row of dx.
struct TailArgs {
  const void *x, *grad;
  uint8_t* code;
  void* out;
  Images images;
  Order order;
  Lrn lrn;
  Pool pool;
};
ALEXNET_CPU_KERNEL(tail_forward, TailArgs)
ALEXNET_CPU_KERNEL(tail_backward, TailArgs)

// A task is one row of the convolution's output; of the input gradient, one row of dx. The weight gradient sums a
// fixed set of chunks of rows, each a task with a partial sum of its own, which the host adds up in order.
constexpr float kWinogradLargest = 1e15f;  // the absolute value of numbers that take this way
constexpr int kWinogradPoints = 36;        // of a tile of 4x4 outputs
struct ConvArgs {
  const void *x, *grad;
  const void* weight;  // packed: see conv2d.h
  void* points;        // the same for the forward way of winograd_rows.h
  const void* bias;    // padded to whole blocks of filters, in the type of the sums
  void* out;
  Images images;
  Conv conv;
  bool winograd;   // the way of winograd_rows.h, where the numbers allow
  int64_t chunks;  // of the weight gradient
};
ALEXNET_CPU_KERNEL(conv2d_winograd_weight, ConvArgs)  // a task is a block of filters
ALEXNET_CPU_KERNEL(conv2d_forward, ConvArgs)
ALEXNET_CPU_KERNEL(conv2d_weight_grad, ConvArgs)
ALEXNET_CPU_KERNEL(conv2d_input_grad, ConvArgs)

// 3x3 and 5x5 convolutions with stride 1: float32, channels_last, groups of a multiple of 16 channels and filters.
constexpr int kWinogradTask = 8;  // tiles of a task
struct WinogradConvArgs {
  const float *x, *weight;
  const float* bias;  // or null
  float* points;      // the weights': [group][block of filters][point][channel][filter in block], padded with zeros
  float* out;
  bool* finite;  // becomes false if an output is not, or huge
  Conv conv;
  int64_t count;  // images
  int groups;
  bool transposed;  // weights as torch.conv_transpose2d's; conv.padding is what the kernel pads in any case
  bool relu;
};
ALEXNET_CPU_KERNEL(winograd_conv2d_weights, WinogradConvArgs)  // a task is a block of filters
ALEXNET_CPU_KERNEL(winograd_conv2d, WinogradConvArgs)

// Their weight gradient: the points of a part of the tiles, the products of these, and after the last part the weights.
struct WinogradGradArgs {
  const float *x, *grad;
  float *inputs, *grads;  // points of `tiles` tiles from `first` on
  float* sums;            // [group][block of filters][point][channel][filter in block]
  float* weight;
  bool* finite;  // becomes false if a weight's is not, or huge
  Conv conv;
  int64_t count;  // images
  int groups;
  int64_t first, tiles;
};
ALEXNET_CPU_KERNEL(winograd_grad_points, WinogradGradArgs)    // a task is a tile
ALEXNET_CPU_KERNEL(winograd_grad_products, WinogradGradArgs)  // a task is a point of a block of filters
ALEXNET_CPU_KERNEL(winograd_grad_weights, WinogradGradArgs)   // a task is a block of filters

// A task is one pooled row of one image. conv.out, when not null, receives the convolution's output; tail.x is unused.
struct BlockArgs {
  ConvArgs conv;
  TailArgs tail;
};
ALEXNET_CPU_KERNEL(block_forward, BlockArgs)

}  // namespace alexnet_cuda
