// The launchers: everything that the host (register.cpp) and the emulator's module call. Each puts its kernels on
// `stream` and returns at once; pointers are device memory, dense in the given memory format, and nothing may be empty.
#pragma once

#include "../shapes.h"
#include "gpu.h"

namespace alexnet_cuda {

// kTF32: float in memory, but a convolution may round what it multiplies to TF32.
enum DType : int { kFloat = 0, kHalf = 1, kBFloat16 = 2, kTF32 = 3 };

// A batch in memory: (n, c, h, w) elements of `dtype`, as NCHW or, with channels_last, as NHWC. Every other image-like
// argument of a launcher has the same dtype and the same format.
struct Images {
  DType dtype;
  bool channels_last;
  int64_t n, c, h, w;
};

gpu::error_t launch_local_response_norm(const Images& images, const void* x, void* y, const Lrn& lrn, bool spatial,
                                        gpu::stream_t stream);
// The spatial form needs a workspace of one float per element of x; across channels none.
gpu::error_t launch_local_response_norm_backward(const Images& images, const void* grad, const void* x, void* dx,
                                                 const Lrn& lrn, bool spatial, float* workspace, gpu::stream_t stream);

// `code` may be null. In the backward launchers `images` describes dx.
gpu::error_t launch_max_pool2d(const Images& images, const void* x, void* y, uint8_t* code, const Pool& pool,
                               gpu::stream_t stream);
gpu::error_t launch_max_pool2d_backward(const Images& images, const void* grad, const uint8_t* code, void* dx,
                                        const Pool& pool, gpu::stream_t stream);

// Across channels only. The backward of relu-pool-lrn needs a workspace of one float per element of grad.
gpu::error_t launch_relu_lrn_max_pool2d(const Images& images, const void* x, void* y, uint8_t* code, Order order,
                                        const Lrn& lrn, const Pool& pool, gpu::stream_t stream);
gpu::error_t launch_relu_lrn_max_pool2d_backward(const Images& images, const void* grad, const void* x,
                                                 const uint8_t* code, void* dx, Order order, const Lrn& lrn,
                                                 const Pool& pool, float* workspace, gpu::stream_t stream);

// What the convolution's kernels are made for: AlexNet's first layer. Their launchers refuse all others.
inline bool is_alexnet(const Conv& conv) {
  return conv.kernel_size == 11 && conv.stride == 4 && (conv.channels == 1 || conv.channels == 3 || conv.channels == 4);
}

// A grid has at most 65535 blocks in y, each with at least 32 filters.
constexpr int64_t kMostFilters = 65535 * 32;

// weight is (filters, channels, 11, 11), contiguous; bias may be null. `images` describes x (or dx).
gpu::error_t launch_conv2d(const Images& images, const void* x, const void* weight, const void* bias, void* y,
                           const Conv& conv, float* workspace, gpu::stream_t stream);
// Floats that the launcher needs; none where it does not use tensor cores, which are the business of ..._mma.
int64_t conv2d_workspace(DType dtype, const Conv& conv);
gpu::error_t launch_conv2d_mma(const Images& images, const void* x, const void* weight, const void* bias, void* y,
                               const Conv& conv, float* workspace, gpu::stream_t stream);
gpu::error_t launch_conv2d_weight_grad(const Images& images, const void* grad, const void* x, void* dweight,
                                       void* dbias, const Conv& conv, float* workspace, gpu::stream_t stream);
// Floats that launch_conv2d_weight_grad needs, wherever it runs.
int64_t conv2d_weight_grad_workspace(DType dtype, int64_t n, const Conv& conv);
gpu::error_t launch_conv2d_weight_grad_mma(const Images& images, const void* grad, const void* x, void* dweight,
                                           void* dbias, const Conv& conv, float* workspace, gpu::stream_t stream);
gpu::error_t launch_conv2d_input_grad(const Images& images, const void* grad, const void* weight, void* dx,
                                      const Conv& conv, float* workspace, gpu::stream_t stream);
int64_t conv2d_input_grad_workspace(DType dtype, const Conv& conv);
gpu::error_t launch_conv2d_input_grad_mma(const Images& images, const void* grad, const void* weight, void* dx,
                                          const Conv& conv, float* workspace, gpu::stream_t stream);

// The whole first block in one kernel, for what `fuses` says it can do on a device whose blocks may have that much
// shared memory. `images` describes x; a (the convolution's output) and code are both null or both not, and the outputs
// are aligned to 16 bytes. The workspace is conv2d_workspace's; `processors` is the number of the device's
// multiprocessors.
int conv2d_relu_lrn_max_pool2d_bytes(const Conv& conv);  // of shared memory that a block has
bool fuses_conv2d_relu_lrn_max_pool2d(DType dtype, const Conv& conv, const Lrn& lrn, const Pool& pool, Order order,
                                      int shared_memory_optin);
gpu::error_t launch_conv2d_relu_lrn_max_pool2d(const Images& images, const void* x, const void* weight,
                                               const void* bias, void* y, void* a, uint8_t* code, const Conv& conv,
                                               const Lrn& lrn, const Pool& pool, int processors, float* workspace,
                                               gpu::stream_t stream);
// The same for compute capability 9.0 alone, and only in code for sm_90a.
gpu::error_t launch_conv2d_relu_lrn_max_pool2d_wgmma(const Images& images, const void* x, const void* weight,
                                                     const void* bias, void* y, void* a, uint8_t* code,
                                                     const Conv& conv, const Lrn& lrn, const Pool& pool, int processors,
                                                     float* workspace, gpu::stream_t stream);

// The number of slices depends on the batch alone, so that a result does not depend on the device.
inline int64_t conv2d_weight_grad_slices(int64_t n) {
  return n < 16 ? 4 * n : 64;
}

}  // namespace alexnet_cuda
