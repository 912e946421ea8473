// The CUDA side of every operator of ops.cpp: check, allocate, launch on torch's current stream.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <limits>
#include <optional>
#include <string_view>
#include <tuple>

#include "../check.h"
#include "kernels.h"
#include "torch_cuda.h"

namespace alexnet_cuda {
namespace {

using torch::stable::accelerator::DeviceGuard;

DType dtype_of(const char* op, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return kFloat;
    case ScalarType::Half:
      return kHalf;
    case ScalarType::BFloat16:
      return kBFloat16;
    default:
      break;
  }
  STD_TORCH_CHECK(false, op, ": expected x to be float32, float16 or bfloat16 on CUDA, got scalar type ",
                  static_cast<int>(x.scalar_type()));
}

// Kernels count the elements of one image in 32 bits, those of a batch in 64.
void check_image_size(const char* op, const char* name, int64_t elements) {
  STD_TORCH_CHECK(elements <= std::numeric_limits<int32_t>::max(), op, ": expected one image of ", name,
                  " to have fewer than 2^31 elements, got ", elements);
}

Images images_of(const char* op, const Tensor& x, MemoryFormat format) {
  check_image_size(op, "x", x.size(1) * x.size(2) * x.size(3));
  return {dtype_of(op, x), format == MemoryFormat::ChannelsLast, x.size(0), x.size(1), x.size(2), x.size(3)};
}

// The same for a convolution, which takes float32 as TF32 wherever torch's own does.
Images conv_images_of(const char* op, const Tensor& x, MemoryFormat format) {
  Images images = images_of(op, x, format);
  if (images.dtype != kFloat) return images;
  StableIValue allowed;
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("alexnet_cuda::_allows_tf32", "", &allowed, TORCH_ABI_VERSION));
  if (torch::stable::detail::to<bool>(allowed)) images.dtype = kTF32;
  return images;
}

Tensor dense(const Tensor& x, MemoryFormat format) {
  return torch::stable::contiguous(x, format);
}
std::optional<Tensor> dense(const std::optional<Tensor>& x) {
  return x ? std::optional(dense(*x, MemoryFormat::Contiguous)) : std::nullopt;
}
const void* data_or_null(const std::optional<Tensor>& x) {
  return x ? x->const_data_ptr() : nullptr;
}
Tensor floats(const Tensor& like, int64_t n) {
  return empty(like, {n}, MemoryFormat::Contiguous, ScalarType::Float);
}
cudaStream_t stream_of(const Tensor& x) {
  return current_stream(x.get_device_index());
}
float* float_data(Tensor& x) {
  return static_cast<float*>(x.mutable_data_ptr());
}
uint8_t* code_data(Tensor& code) {
  return code.numel() ? static_cast<uint8_t*>(code.mutable_data_ptr()) : nullptr;
}
const uint8_t* code_data(const Tensor& code) {
  return static_cast<const uint8_t*>(code.const_data_ptr());
}

int attribute(const char* op, const Tensor& x, cudaDeviceAttr which) {
  int value = 0;
  cuda_check(cudaDeviceGetAttribute(&value, which, x.get_device_index()), op);
  return value;
}

void check_on_device(const char* op, const char* name, const Tensor& x, const Tensor& like) {
  STD_TORCH_CHECK(x.device() == like.device(), op, ": expected ", name, " to be on the device of the other tensors");
}

// ---- convolution ---------------------------------------------------------------------------------------------------

void check_alexnet(const char* op, const Conv& conv) {
  STD_TORCH_CHECK(is_alexnet(conv), op,
                  ": expected 11x11 filters of 1, 3 or 4 channels and a stride of 4 on CUDA, got ", conv.kernel_size,
                  "x", conv.kernel_size, ", ", conv.channels, " and ", conv.stride);
  STD_TORCH_CHECK(conv.filters <= kMostFilters, op, ": expected at most ", kMostFilters, " filters on CUDA, got ",
                  conv.filters);
}

Conv conv_of(const char* op, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t stride,
             int64_t padding, bool ceil_mode) {
  check_4d(op, "x", x);
  check_4d(op, "weight", weight);
  check_same(op, "weight", weight, x);
  STD_TORCH_CHECK(weight.size(1) == x.size(1), op, ": weight expects ", weight.size(1), " channels, x has ", x.size(1));
  STD_TORCH_CHECK(weight.size(2) == weight.size(3), op, ": expected a square weight, got ", weight.size(2), "x",
                  weight.size(3));
  if (bias) {
    check_same(op, "bias", *bias, x);
    check_sizes(op, "bias", *bias, {weight.size(0)});
  }
  const Conv conv =
      checked_conv(op, x.size(1), x.size(2), x.size(3), weight.size(0), weight.size(2), stride, padding, ceil_mode);
  check_alexnet(op, conv);
  check_image_size(op, "the output", conv.filters * conv.out_height * conv.out_width);
  return conv;
}

Tensor conv2d(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, int64_t stride, int64_t padding,
              bool ceil_mode) {
  const char* op = "conv2d";
  const Conv conv = conv_of(op, x, weight, bias, stride, padding, ceil_mode);
  const MemoryFormat format = format_of(x);
  const DeviceGuard guard(x.get_device_index());
  Tensor y = empty(x, {x.size(0), conv.filters, conv.out_height, conv.out_width}, format);
  if (y.numel() == 0) return y;
  const Tensor in = dense(x, format), w = dense(weight, MemoryFormat::Contiguous);
  const std::optional<Tensor> b = dense(bias);
  const Images images = conv_images_of(op, x, format);
  Tensor workspace = floats(x, conv2d_workspace(images.dtype, conv));
  cuda_check(launch_conv2d(images, in.const_data_ptr(), w.const_data_ptr(), data_or_null(b), y.mutable_data_ptr(), conv,
                           float_data(workspace), stream_of(x)),
             op);
  return y;
}

std::tuple<Tensor, Tensor> conv2d_weight_grad(const Tensor& grad, const Tensor& x, int64_t kernel_size, int64_t stride,
                                              int64_t padding) {
  const char* op = "_conv2d_weight_grad";
  check_4d(op, "x", x);
  check_same(op, "grad", grad, x);
  const Conv conv = checked_conv_backward(op, grad, x.size(1), x.size(2), x.size(3), kernel_size, stride, padding);
  check_alexnet(op, conv);
  check_image_size(op, "grad", conv.filters * conv.out_height * conv.out_width);
  STD_TORCH_CHECK(grad.size(0) == x.size(0), op, ": grad has ", grad.size(0), " images, x has ", x.size(0));
  const MemoryFormat format = format_of(x);
  const DeviceGuard guard(x.get_device_index());
  Tensor dw = empty(x, {conv.filters, conv.channels, kernel_size, kernel_size}, MemoryFormat::Contiguous);
  Tensor db = empty(x, {conv.filters}, MemoryFormat::Contiguous);
  if (x.numel() == 0 || dw.numel() == 0) return {torch::stable::fill_(dw, 0.0), torch::stable::fill_(db, 0.0)};
  const Tensor in = dense(x, format), g = dense(grad, format);
  const Images images = conv_images_of(op, x, format);
  Tensor workspace = floats(x, conv2d_weight_grad_workspace(images.dtype, x.size(0), conv));
  cuda_check(launch_conv2d_weight_grad(images, g.const_data_ptr(), in.const_data_ptr(), dw.mutable_data_ptr(),
                                       db.mutable_data_ptr(), conv, float_data(workspace), stream_of(x)),
             op);
  return {dw, db};
}

Tensor conv2d_input_grad(const Tensor& grad, const Tensor& weight, int64_t height, int64_t width, int64_t stride,
                         int64_t padding) {
  const char* op = "_conv2d_input_grad";
  check_4d(op, "weight", weight);
  check_same(op, "weight", weight, grad);
  const Conv conv = checked_conv_backward(op, grad, weight.size(1), height, width, weight.size(2), stride, padding);
  check_alexnet(op, conv);
  check_image_size(op, "grad", conv.filters * conv.out_height * conv.out_width);
  STD_TORCH_CHECK(weight.size(0) == grad.size(1) && weight.size(2) == weight.size(3), op, ": expected a weight of ",
                  grad.size(1), " square filters, got ", weight.size(0), " of ", weight.size(2), "x", weight.size(3));
  const MemoryFormat format = format_of(grad);
  const DeviceGuard guard(grad.get_device_index());
  Tensor dx = empty(grad, {grad.size(0), conv.channels, height, width}, format);
  if (dx.numel() == 0) return dx;
  const Tensor g = dense(grad, format), w = dense(weight, MemoryFormat::Contiguous);
  const Images images = conv_images_of(op, dx, format);
  Tensor workspace = floats(grad, conv2d_input_grad_workspace(images.dtype, conv));
  cuda_check(launch_conv2d_input_grad(images, g.const_data_ptr(), w.const_data_ptr(), dx.mutable_data_ptr(), conv,
                                      float_data(workspace), stream_of(grad)),
             op);
  return dx;
}

// ---- local response normalisation ----------------------------------------------------------------------------------

Tensor local_response_norm(const Tensor& x, int64_t size, int64_t front, double alpha, double beta, double k,
                           int64_t groups, bool spatial) {
  const char* op = "local_response_norm";
  check_4d(op, "x", x);
  const Lrn lrn = checked_lrn(op, x.size(1), size, front, alpha, beta, k, groups);
  const MemoryFormat format = format_of(x);
  const DeviceGuard guard(x.get_device_index());
  Tensor y = empty(x, {x.size(0), x.size(1), x.size(2), x.size(3)}, format);
  if (y.numel() == 0) return y;
  const Tensor in = dense(x, format);
  cuda_check(launch_local_response_norm(images_of(op, x, format), in.const_data_ptr(), y.mutable_data_ptr(), lrn,
                                        spatial, stream_of(x)),
             op);
  return y;
}

Tensor local_response_norm_backward(const Tensor& grad, const Tensor& x, int64_t size, int64_t front, double alpha,
                                    double beta, double k, int64_t groups, bool spatial) {
  const char* op = "_local_response_norm_backward";
  check_4d(op, "x", x);
  const Lrn lrn = checked_lrn(op, x.size(1), size, front, alpha, beta, k, groups);
  check_same(op, "grad", grad, x);
  check_sizes(op, "grad", grad, {x.size(0), x.size(1), x.size(2), x.size(3)});
  const MemoryFormat format = format_of(x);
  const DeviceGuard guard(x.get_device_index());
  Tensor dx = empty(x, {x.size(0), x.size(1), x.size(2), x.size(3)}, format);
  if (dx.numel() == 0) return dx;
  const Tensor in = dense(x, format), g = dense(grad, format);
  Tensor workspace = floats(x, spatial ? x.numel() : 0);
  cuda_check(launch_local_response_norm_backward(images_of(op, x, format), g.const_data_ptr(), in.const_data_ptr(),
                                                 dx.mutable_data_ptr(), lrn, spatial,
                                                 spatial ? float_data(workspace) : nullptr, stream_of(x)),
             op);
  return dx;
}

// ---- max pooling ---------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> max_pool2d(const Tensor& x, int64_t kernel_size, int64_t stride, int64_t padding,
                                      bool ceil_mode, bool save_code) {
  const char* op = "max_pool2d";
  check_4d(op, "x", x);
  const Pool pool = checked_pool(op, x.size(2), x.size(3), kernel_size, stride, padding, ceil_mode);
  check_image_size(op, "the output", x.size(1) * pool.out_height * pool.out_width);
  const MemoryFormat format = format_of(x);
  const std::vector<int64_t> size = {x.size(0), x.size(1), pool.out_height, pool.out_width};
  const DeviceGuard guard(x.get_device_index());
  Tensor y = empty(x, size, format);
  Tensor code = save_code ? empty(x, size, format, ScalarType::Byte) : no_elements(x, ScalarType::Byte);
  if (y.numel() == 0) return {y, code};
  const Tensor in = dense(x, format);
  cuda_check(launch_max_pool2d(images_of(op, x, format), in.const_data_ptr(), y.mutable_data_ptr(), code_data(code),
                               pool, stream_of(x)),
             op);
  return {y, code};
}

Tensor max_pool2d_backward(const Tensor& grad, const Tensor& code, int64_t height, int64_t width, int64_t kernel_size,
                           int64_t stride, int64_t padding) {
  const char* op = "_max_pool2d_backward";
  const Pool pool = checked_pool_backward(op, code, height, width, kernel_size, stride, padding);
  check_image_size(op, "code", code.size(1) * pool.out_height * pool.out_width);
  check_sizes(op, "grad", grad, {code.size(0), code.size(1), code.size(2), code.size(3)});
  check_on_device(op, "code", code, grad);
  const MemoryFormat format = format_of(code);
  const DeviceGuard guard(grad.get_device_index());
  Tensor dx = empty(grad, {code.size(0), code.size(1), height, width}, format);
  if (dx.numel() == 0) return dx;
  const Tensor g = dense(grad, format), where = dense(code, format);
  cuda_check(launch_max_pool2d_backward(images_of(op, dx, format), g.const_data_ptr(), code_data(where),
                                        dx.mutable_data_ptr(), pool, stream_of(grad)),
             op);
  return dx;
}

// ---- the fused tail, and the whole first block ---------------------------------------------------------------------

std::tuple<Tensor, Tensor> relu_lrn_max_pool2d(const Tensor& x, int64_t order, int64_t size, int64_t front,
                                               double alpha, double beta, double k, int64_t groups, int64_t kernel_size,
                                               int64_t stride, int64_t padding, bool ceil_mode, bool save_code) {
  const char* op = "relu_lrn_max_pool2d";
  check_4d(op, "x", x);
  const Lrn lrn = checked_lrn(op, x.size(1), size, front, alpha, beta, k, groups);
  const Pool pool = checked_pool(op, x.size(2), x.size(3), kernel_size, stride, padding, ceil_mode);
  check_image_size(op, "the output", x.size(1) * pool.out_height * pool.out_width);
  const Order which = checked_order(op, order);
  const MemoryFormat format = format_of(x);
  const std::vector<int64_t> out_size = {x.size(0), x.size(1), pool.out_height, pool.out_width};
  const DeviceGuard guard(x.get_device_index());
  Tensor y = empty(x, out_size, format);
  Tensor code = save_code ? empty(x, out_size, format, ScalarType::Byte) : no_elements(x, ScalarType::Byte);
  if (y.numel() == 0) return {y, code};
  const Tensor in = dense(x, format);
  cuda_check(launch_relu_lrn_max_pool2d(images_of(op, x, format), in.const_data_ptr(), y.mutable_data_ptr(),
                                        code_data(code), which, lrn, pool, stream_of(x)),
             op);
  return {y, code};
}

Tensor relu_lrn_max_pool2d_backward(const Tensor& grad, const Tensor& x, const Tensor& code, int64_t order,
                                    int64_t size, int64_t front, double alpha, double beta, double k, int64_t groups,
                                    int64_t kernel_size, int64_t stride, int64_t padding) {
  const char* op = "_relu_lrn_max_pool2d_backward";
  check_4d(op, "x", x);
  const Lrn lrn = checked_lrn(op, x.size(1), size, front, alpha, beta, k, groups);
  check_same(op, "grad", grad, x);
  const Pool pool = checked_pool_backward(op, code, x.size(2), x.size(3), kernel_size, stride, padding);
  check_image_size(op, "code", code.size(1) * pool.out_height * pool.out_width);
  check_sizes(op, "code", code, {x.size(0), x.size(1), code.size(2), code.size(3)});
  check_sizes(op, "grad", grad, {x.size(0), x.size(1), code.size(2), code.size(3)});
  check_on_device(op, "code", code, x);
  const Order which = checked_order(op, order);
  const MemoryFormat format = format_of(x);
  const DeviceGuard guard(x.get_device_index());
  Tensor dx = empty(x, {x.size(0), x.size(1), x.size(2), x.size(3)}, format);
  if (dx.numel() == 0) return dx;
  const Tensor in = dense(x, format), g = dense(grad, format), where = dense(code, format);
  Tensor workspace = floats(x, which == kReluPoolLrn ? code.numel() : 0);
  cuda_check(launch_relu_lrn_max_pool2d_backward(images_of(op, x, format), g.const_data_ptr(), in.const_data_ptr(),
                                                 code_data(where), dx.mutable_data_ptr(), which, lrn, pool,
                                                 which == kReluPoolLrn ? float_data(workspace) : nullptr, stream_of(x)),
             op);
  return dx;
}

// The first block's kernel of wgmma, for those who ask for it (alexnet_cuda/kernels.py) on a device that has it.
bool wants_wgmma([[maybe_unused]] const char* op, [[maybe_unused]] const Tensor& x, [[maybe_unused]] bool wgmma) {
#ifdef ALEXNET_CUDA_WGMMA
  const char* kernels = std::getenv("ALEXNET_CUDA_KERNELS");
  return (wgmma || (kernels && std::string_view(kernels) == "wgmma")) &&
         attribute(op, x, cudaDevAttrComputeCapabilityMajor) == 9;
#else
  return false;
#endif
}

std::tuple<Tensor, Tensor, Tensor> conv2d_relu_lrn_max_pool2d(
    const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, int64_t conv_stride, int64_t conv_padding,
    bool conv_ceil_mode, int64_t order, int64_t size, int64_t front, double alpha, double beta, double k,
    int64_t groups, int64_t kernel_size, int64_t stride, int64_t padding, bool ceil_mode, bool save, bool wgmma) {
  const char* op = "conv2d_relu_lrn_max_pool2d";
  const Conv conv = conv_of(op, x, weight, bias, conv_stride, conv_padding, conv_ceil_mode);
  const Lrn lrn = checked_lrn(op, conv.filters, size, front, alpha, beta, k, groups);
  const Pool pool = checked_pool(op, conv.out_height, conv.out_width, kernel_size, stride, padding, ceil_mode);
  const DeviceGuard guard(x.get_device_index());
  const int shared_memory = attribute(op, x, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (x.size(0) == 0 ||
      !fuses_conv2d_relu_lrn_max_pool2d(dtype_of(op, x), conv, lrn, pool, checked_order(op, order), shared_memory)) {
    Tensor a = conv2d(x, weight, bias, conv_stride, conv_padding, conv_ceil_mode);
    auto [y, code] = relu_lrn_max_pool2d(a, order, size, front, alpha, beta, k, groups, kernel_size, stride, padding,
                                         ceil_mode, save);
    return {y, save ? a : no_elements(x, x.scalar_type()), code};
  }
  const MemoryFormat format = format_of(x);
  const std::vector<int64_t> out_size = {x.size(0), conv.filters, pool.out_height, pool.out_width};
  Tensor y = empty(x, out_size, format);
  Tensor a = save ? empty(x, {x.size(0), conv.filters, conv.out_height, conv.out_width}, format)
                  : no_elements(x, x.scalar_type());
  Tensor code = save ? empty(x, out_size, format, ScalarType::Byte) : no_elements(x, ScalarType::Byte);
  const Tensor in = dense(x, format), w = dense(weight, MemoryFormat::Contiguous);
  const std::optional<Tensor> b = dense(bias);
  Tensor workspace = floats(x, conv2d_workspace(dtype_of(op, x), conv));
  const auto launch =
      wants_wgmma(op, x, wgmma) ? launch_conv2d_relu_lrn_max_pool2d_wgmma : launch_conv2d_relu_lrn_max_pool2d;
  cuda_check(launch(images_of(op, x, format), in.const_data_ptr(), w.const_data_ptr(), data_or_null(b),
                    y.mutable_data_ptr(), save ? a.mutable_data_ptr() : nullptr, code_data(code), conv, lrn, pool,
                    attribute(op, x, cudaDevAttrMultiProcessorCount), float_data(workspace), stream_of(x)),
             op);
  return {y, a, code};
}

int64_t first_block_bytes(int64_t channels, int64_t filters) {
  return conv2d_relu_lrn_max_pool2d_bytes({channels, 0, 0, filters, 11, 4, 0, 0, 0});
}

}  // namespace
}  // namespace alexnet_cuda

STABLE_TORCH_LIBRARY_IMPL(alexnet_cuda, CUDA, m) {
  using namespace alexnet_cuda;
  m.impl("conv2d", TORCH_BOX(&conv2d));
  m.impl("_conv2d_weight_grad", TORCH_BOX(&conv2d_weight_grad));
  m.impl("_conv2d_input_grad", TORCH_BOX(&conv2d_input_grad));
  m.impl("local_response_norm", TORCH_BOX(&local_response_norm));
  m.impl("_local_response_norm_backward", TORCH_BOX(&local_response_norm_backward));
  m.impl("max_pool2d", TORCH_BOX(&max_pool2d));
  m.impl("_max_pool2d_backward", TORCH_BOX(&max_pool2d_backward));
  m.impl("relu_lrn_max_pool2d", TORCH_BOX(&relu_lrn_max_pool2d));
  m.impl("_relu_lrn_max_pool2d_backward", TORCH_BOX(&relu_lrn_max_pool2d_backward));
  m.impl("conv2d_relu_lrn_max_pool2d", TORCH_BOX(&conv2d_relu_lrn_max_pool2d));
}
STABLE_TORCH_LIBRARY_IMPL(alexnet_cuda, CompositeExplicitAutograd, m) {
  m.impl("_first_block_bytes", TORCH_BOX(&alexnet_cuda::first_block_bytes));
}
