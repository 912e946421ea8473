// The interface between the CPU back end and its kernels. A kernel does the tasks [begin, end) on one thread; every
// task writes its own part of the output and computes it in the same order whatever the range, so results do not depend
// on the number of threads. No torch header here: every *_kernel.cpp is compiled once per instruction set, and an
// inline function shared with host code could be linked in with instructions that this CPU lacks.
#pragma once

#include "../arguments.h"
#include "level.h"

namespace alexnet_cuda {

enum class Half : uint16_t {};
enum class BFloat16 : uint16_t {};

// LRN across channels: a task is kStrip pixels of one image (channels_last: of the whole batch).
// Spatial LRN: a task is kPlanes channels of one image (contiguous: kPlanes of the batch's planes).
// Pooling: a task is one output row of all channels of an image (channels_last) or of kPlanes planes (contiguous);
// of the backward, one row of the gradient of x (channels_last) or one plane of it (contiguous).
constexpr int64_t kStrip = 64;
constexpr int64_t kPlanes = 32;

ALEXNET_CPU_KERNEL(lrn_forward, LrnArguments)
ALEXNET_CPU_KERNEL(lrn_backward, LrnArguments)
ALEXNET_CPU_KERNEL(spatial_lrn_forward, LrnArguments)
ALEXNET_CPU_KERNEL(spatial_lrn_backward, LrnArguments)

ALEXNET_CPU_KERNEL(max_pool_forward, PoolArguments)
ALEXNET_CPU_KERNEL(max_pool_backward, PoolArguments)

// ReLU, LRN and pooling: a task is one pooled row of one image; of the backward, one row of the gradient of x.
ALEXNET_CPU_KERNEL(tail_forward, TailArguments)
ALEXNET_CPU_KERNEL(tail_backward, TailArguments)

// Batch normalisation in training, channels_last: a task is kNormStrip pixels of the batch. The arrays are in the type
// of the sums, one number per channel.
constexpr int64_t kNormStrip = 256;
struct NormTask : Operands {
  bool relu = false;
  const void *mean = nullptr, *scale = nullptr, *bias = nullptr;  // y = (x - mean) * scale + bias
  const void *slope = nullptr, *offset = nullptr;                 // input_grad only
  void* sums = nullptr;  // [task][sum of the first term, of the second, pivot][channel]
};
ALEXNET_CPU_KERNEL(batch_norm_sums, NormTask)
ALEXNET_CPU_KERNEL(batch_norm_grad_sums, NormTask)
ALEXNET_CPU_KERNEL(batch_norm_apply, NormTask)
ALEXNET_CPU_KERNEL(batch_norm_input_grad, NormTask)

// Winograd's algorithm works on tiles of 6x6 inputs and makes this many products for each channel and filter.
constexpr int kWinogradProducts = 36;

// 11x11 convolution with stride 4. conv2d_pack_weight brings weight and bias into the order in which the forward reads
// them, conv2d_pack_taps the weight for the input gradient; both in the type of the sums. The weight gradient adds up
// `chunks` fixed ranges of output rows and then these sums.
constexpr float kWinogradLimit = 1e15f;  // rows or weights with larger absolute values use direct convolution
struct ConvTask : ConvArguments {
  void* packed_weight = nullptr;     // [block of filters][kernel row][kernel column][channel][filter in block]; for the
                                     // input gradient [kernel row][block of taps][filter][tap in block]
  void* packed_bias = nullptr;       // padded to whole blocks of filters
  bool winograd = false;             // winograd_rows.h serves this call
  float* winograd_weight = nullptr;  // [block of filters][product][channel][filter in block]
  bool amx = false;                  // the matrix unit serves this call
  // [16 filters][11 kernel rows of taps 0 to 31; tap 32 of the kernel rows][pair of taps][filter][tap in pair]
  BFloat16* amx_weight = nullptr;
  bool* in_range = nullptr;  // set to false if a weight is beyond kWinogradLimit
  void* sums = nullptr;      // [chunk][taps, then the bias][padded filters]
  int64_t chunks = 0;
};
ALEXNET_CPU_KERNEL(conv2d_pack_weight, ConvTask)         // a task is a block of filters
ALEXNET_CPU_KERNEL(conv2d_forward, ConvTask)             // an output row
ALEXNET_CPU_KERNEL(conv2d_weight_grad, ConvTask)         // a chunk
ALEXNET_CPU_KERNEL(conv2d_weight_grad_reduce, ConvTask)  // a block of filters
ALEXNET_CPU_KERNEL(conv2d_pack_taps, ConvTask)           // a kernel row
ALEXNET_CPU_KERNEL(conv2d_input_grad, ConvTask)          // a row of the gradient of x

// The first block: a task is one pooled row of one image. conv.out, when not null, receives the convolution's output;
// tail.x is null.
struct BlockTask {
  ConvTask conv;
  TailArguments tail;
};
ALEXNET_CPU_KERNEL(block_forward, BlockTask)

// 3x3 and 5x5 convolutions with stride 1: float32, channels_last, groups of a multiple of 16 channels and filters.
constexpr int kWinogradTask = 8;  // tiles of a task of the forward
struct WinogradTask : ConvArguments {
  bool transposed = false;  // weight is laid out as torch.conv_transpose2d expects it: this is an input gradient
  float* winograd_weight = nullptr;  // [group][block of filters][product][channel][filter in block], zero-padded
  bool* finite = nullptr;            // set to false if an output is not finite or its square overflows

  // The weight gradient transforms tiles [first, first + tiles), adds their products to `sums` and transforms these at
  // the end.
  float *inputs = nullptr, *grads = nullptr;
  float* sums = nullptr;  // [group][block of filters][product][channel][filter in block]
  int64_t first = 0, tiles = 0;
};
ALEXNET_CPU_KERNEL(winograd_weights, WinogradTask)  // a task is a block of filters
ALEXNET_CPU_KERNEL(winograd_forward, WinogradTask)
ALEXNET_CPU_KERNEL(winograd_grad_inputs, WinogradTask)    // a task is a tile
ALEXNET_CPU_KERNEL(winograd_grad_products, WinogradTask)  // a task is one product of a block of filters
ALEXNET_CPU_KERNEL(winograd_grad_weights, WinogradTask)   // a task is a block of filters

// The weight gradient of a convolution with stride 1 in bfloat16, for CPUs with has_amx() alone: images [first, first +
// count) are packed as `positions` positions, multiplied and added to `sums`, which are written at the end.
struct AmxTask : ConvArguments {
  int64_t channels = 0, filters = 0;  // of a group
  int64_t down = 0, across = 0;       // blocks of 32 channels and of 32 filters of a group
  int64_t first = 0, count = 0;
  int64_t pitch = 0, span = 0;                   // positions of a row of pixels and of an image
  int64_t positions = 0, stride = 0;             // of the part, a multiple of 32; between the inputs of two channels
  const BFloat16* zeros = nullptr;               // as many as there are channels, or filters
  BFloat16 *inputs = nullptr, *grads = nullptr;  // [channel][position]; [16 filters][2 positions][filter][position]
  float* sums = nullptr;       // [group][32 channels][32 filters][tap][16 channels][16 filters][channel][filter]
  float* bias_sums = nullptr;  // [filter]
  bool* finite = nullptr;      // set to false if a sum is not finite
};
namespace amx {
constexpr int kRows = 8;

// An output row of an 11x11 convolution with stride 4 of three channels in bfloat16.
struct ConvRow {
  const BFloat16* rows[11];   // the input rows under it, with interleaved channels
  const BFloat16* last_taps;  // [pixel][kernel row, padded to 32]: the 33rd number under each kernel row
  const BFloat16* weight;     // ConvTask::amx_weight
  const float* bias;          // [filter]
  float* out;                 // [pixel][filter]
  int64_t stride;             // of a pixel in `out`
  int64_t filters, width;     // a multiple of 32; at least 16
};
void conv_row(const ConvRow&);

// What up to kRows output rows of such a convolution add to its weight gradient. A tap is (kernel row, kernel column,
// channel).
struct ConvWeightGrad {
  const BFloat16* inputs;         // [input row][33 taps of a kernel row][pixel]
  const BFloat16* grads;          // [16 filters][kRows output rows][32 pixels][pair of pixels][filter][pixel in pair]
  float* sums;                    // [tap, padded to 384][filter]
  int64_t rows, pixels, filters;  // `pixels` and `filters` are multiples of 32
};
void add_weight_grad(const ConvWeightGrad&);

void pack(const AmxTask&, int64_t begin, int64_t end);      // a task is 32 positions
void multiply(const AmxTask&, int64_t begin, int64_t end);  // 32 channels and 32 filters of a group
void write(const AmxTask&, int64_t begin, int64_t end);     // 16 filters
}  // namespace amx

}  // namespace alexnet_cuda
