#include <tuple>

#include "host.h"

namespace alexnet_cuda {
namespace {

std::tuple<Tensor, Tensor> max_pool2d(const Tensor& x, int64_t kernel_size, int64_t stride, int64_t padding,
                                      bool ceil_mode, bool save_code) {
  const char* op = "max_pool2d";
  check_4d(op, "x", x);
  const Pool pool = checked_pool(op, x.size(2), x.size(3), kernel_size, stride, padding, ceil_mode);
  const MemoryFormat format = format_of(x);
  const Images images = images_of(op, x, format);
  const Tensor input = dense(x, format);
  const std::vector<int64_t> size = {x.size(0), x.size(1), pool.out_height, pool.out_width};
  Tensor y = result(x, size, format);
  Tensor code = save_code ? result(x, size, format, ScalarType::Byte) : no_elements(x, ScalarType::Byte);
  if (y.numel() == 0) return {y, code};
  const PoolArgs args = {
      input.const_data_ptr(), nullptr, save_code ? static_cast<uint8_t*>(code.mutable_data_ptr()) : nullptr,
      y.mutable_data_ptr(),   images,  pool};
  const int64_t channels = images.channels_last ? images.channels : kPlanes;
  run(max_pool_forward_kernel(), args, plane_blocks(images, channels) * pool.out_height,
      pool.stride * pool.width * channels);
  return {y, code};
}

Tensor max_pool2d_backward(const Tensor& grad, const Tensor& code, int64_t height, int64_t width, int64_t kernel_size,
                           int64_t stride, int64_t padding) {
  const char* op = "_max_pool2d_backward";
  check_4d(op, "grad", grad);
  const Pool pool = checked_pool_backward(op, code, height, width, kernel_size, stride, padding);
  check_sizes(op, "code", code, {grad.size(0), grad.size(1), grad.size(2), grad.size(3)});
  const MemoryFormat format = format_of(code);
  const Images images = {
      dtype_of(op, grad), format == MemoryFormat::ChannelsLast, grad.size(0), grad.size(1), height, width};
  const Tensor gradient = dense(grad, format), codes = dense(code, format);
  Tensor dx = result(grad, {grad.size(0), grad.size(1), height, width}, format);
  if (dx.numel() == 0) return dx;
  const PoolArgs args = {nullptr,
                         gradient.const_data_ptr(),
                         const_cast<uint8_t*>(static_cast<const uint8_t*>(codes.const_data_ptr())),
                         dx.mutable_data_ptr(),
                         images,
                         pool};
  if (images.channels_last) {
    run(max_pool_backward_kernel(), args, images.count * height, width * images.channels);
  } else {
    run(max_pool_backward_kernel(), args, images.count * images.channels, height * width);
  }
  return dx;
}

}  // namespace
}  // namespace alexnet_cuda

STABLE_TORCH_LIBRARY_IMPL(alexnet_cuda, CPU, m) {
  m.impl("max_pool2d", TORCH_BOX(&alexnet_cuda::max_pool2d));
  m.impl("_max_pool2d_backward", TORCH_BOX(&alexnet_cuda::max_pool2d_backward));
}
