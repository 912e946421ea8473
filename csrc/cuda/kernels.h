// The launchers of all CUDA kernels: what backend.h calls. Each puts its kernels on `stream` and returns at once;
// pointers are device memory and nothing is empty. Geometry was checked by the caller.
#pragma once

#include "../arguments.h"
#include "gpu.h"

namespace alexnet_cuda {

gpu::error_t launch_local_response_norm(const LrnArguments& args, gpu::stream_t stream);
gpu::error_t launch_local_response_norm_backward(const LrnArguments& args, gpu::stream_t stream);

// With relu, ReLU of the maxima; a window whose maximum is not positive has a code that names none of its elements.
gpu::error_t launch_max_pool2d(const PoolArguments& args, gpu::stream_t stream, bool relu = false);
gpu::error_t launch_max_pool2d_backward(const PoolArguments& args, gpu::stream_t stream);
// The same for 3x3 windows of stride 2 without padding, which the launchers above choose.
bool has_max_pool2d_3x3s2(const PoolArguments& args);
gpu::error_t launch_max_pool2d_3x3s2(const PoolArguments& args, gpu::stream_t stream, bool relu);
gpu::error_t launch_max_pool2d_3x3s2_backward(const PoolArguments& args, gpu::stream_t stream);

gpu::error_t launch_relu_lrn_max_pool2d(const TailArguments& args, gpu::stream_t stream);
gpu::error_t launch_relu_lrn_max_pool2d_backward(const TailArguments& args, gpu::stream_t stream);
int64_t relu_lrn_max_pool2d_workspace(const TailArguments& args);  // floats that each of the two needs
// The same for AlexNets' settings, which the launchers above choose.
bool has_alexnet_tail(const TailArguments& args);
gpu::error_t launch_alexnet_tail(const TailArguments& args, gpu::stream_t stream);
gpu::error_t launch_alexnet_tail_backward(const TailArguments& args, gpu::stream_t stream);
gpu::error_t launch_alexnet_tail_backward_nchw(const TailArguments& args, gpu::stream_t stream);

// Whether a float32 convolution and its input gradient run on tensor cores (TF32x3), by compute capability (10 major +
// minor): where TF32 has at least 4 times the rate of float32. On 8.6, 8.9 and 12.x the two are equal.
inline bool has_fast_tf32(int capability) {
  return capability == 80 || capability == 90 || capability / 10 == 10;
}

// The same for the weight gradient: elsewhere ptxas would spill a few registers.
inline bool has_tf32x3_weight_grad(int capability, const Conv& conv) {
  return has_fast_tf32(capability) && capability <= 90 && conv.channels < 4;
}

// A grid has at most 65535 blocks in y, each with at least 32 filters.
constexpr int64_t kMaxFilters = 65535 * 32;

// Convolutions of is_conv11x11s4; the forward applies ReLU if ConvArguments::relu. Each launcher needs a workspace of
// as many floats as the function beside it says. The weight gradient always writes grad_bias, too: it is the gradient
// of one more element of each filter.
gpu::error_t launch_conv2d(const ConvArguments& args, gpu::stream_t stream);
int64_t conv2d_workspace(DType dtype, const Conv& conv);
gpu::error_t launch_conv2d_weight_grad(const ConvArguments& args, gpu::stream_t stream);
int64_t conv2d_weight_grad_workspace(const ConvArguments& args);
int64_t conv2d_weight_grad_splits(const ConvArguments& args);  // of the sums over pixels, without tensor cores
gpu::error_t launch_conv2d_input_grad(const ConvArguments& args, gpu::stream_t stream);
int64_t conv2d_input_grad_workspace(DType dtype, const Conv& conv);

// The tensor core versions, which the launchers above choose for float16, bfloat16, TF32 and TF32x3.
gpu::error_t launch_conv2d_mma(const ConvArguments& args, gpu::stream_t stream);
gpu::error_t launch_conv2d_weight_grad_mma(const ConvArguments& args, gpu::stream_t stream);
gpu::error_t launch_conv2d_input_grad_mma(const ConvArguments& args, gpu::stream_t stream);

// The whole first block in one kernel, for what `fuses_first_block` accepts. args.conv.out and args.tail.code are both
// null or both not; outputs are aligned to 16 bytes; args.conv.workspace is conv2d_workspace's; `multiprocessors` is
// the device's number of them.
bool fuses_first_block(const BlockArguments& args);
gpu::error_t launch_conv2d_relu_lrn_max_pool2d(const BlockArguments& args, int multiprocessors, gpu::stream_t stream);
// The shared memory that it needs, in bytes of a thread block.
int first_block_bytes(const BlockArguments& args);
// The same for devices whose thread blocks may have less: at least 99 KB.
gpu::error_t launch_conv2d_relu_lrn_max_pool2d_streamed(const BlockArguments& args, int multiprocessors,
                                                        gpu::stream_t stream);
// The same with wgmma, for compute capability 9.0 and only in code for sm_90a.
gpu::error_t launch_conv2d_relu_lrn_max_pool2d_wgmma(const BlockArguments& args, int multiprocessors,
                                                     gpu::stream_t stream);

}  // namespace alexnet_cuda
