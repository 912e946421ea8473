#include <tuple>

#include "host.h"

namespace alexnet_cuda {
namespace {

std::tuple<Tensor, Tensor> relu_lrn_max_pool2d(const Tensor& x, int64_t order, int64_t size, int64_t front,
                                               double alpha, double beta, double k, int64_t groups, int64_t kernel_size,
                                               int64_t stride, int64_t padding, bool ceil_mode, bool save_code) {
  const char* op = "relu_lrn_max_pool2d";
  check_4d(op, "x", x);
  const Lrn lrn = checked_lrn(op, x.size(1), size, front, alpha, beta, k, groups);
  const Pool pool = checked_pool(op, x.size(2), x.size(3), kernel_size, stride, padding, ceil_mode);
  const Order which = checked_order(op, order);
  const MemoryFormat format = format_of(x);
  const Images images = images_of(op, x, format);
  const Tensor input = dense(x, format);
  const std::vector<int64_t> out_size = {x.size(0), x.size(1), pool.out_height, pool.out_width};
  Tensor y = result(x, out_size, format);
  Tensor code = save_code ? result(x, out_size, format, ScalarType::Byte) : no_elements(x, ScalarType::Byte);
  if (y.numel() == 0) return {y, code};
  const TailArgs args = {input.const_data_ptr(),
                         nullptr,
                         save_code ? static_cast<uint8_t*>(code.mutable_data_ptr()) : nullptr,
                         y.mutable_data_ptr(),
                         images,
                         which,
                         lrn,
                         pool};
  run(tail_forward_kernel(), args, images.count * pool.out_height, pool.stride * pool.width * images.channels);
  return {y, code};
}

Tensor relu_lrn_max_pool2d_backward(const Tensor& grad, const Tensor& x, const Tensor& code, int64_t order,
                                    int64_t size, int64_t front, double alpha, double beta, double k, int64_t groups,
                                    int64_t kernel_size, int64_t stride, int64_t padding) {
  const char* op = "_relu_lrn_max_pool2d_backward";
  check_4d(op, "x", x);
  const Lrn lrn = checked_lrn(op, x.size(1), size, front, alpha, beta, k, groups);
  const Pool pool = checked_pool_backward(op, code, x.size(2), x.size(3), kernel_size, stride, padding);
  check_same(op, "grad", grad, x);
  check_sizes(op, "code", code, {x.size(0), x.size(1), code.size(2), code.size(3)});
  check_sizes(op, "grad", grad, {x.size(0), x.size(1), code.size(2), code.size(3)});
  const Order which = checked_order(op, order);
  const MemoryFormat format = format_of(x);
  const Images images = images_of(op, x, format);
  const Tensor input = dense(x, format), gradient = dense(grad, format), codes = dense(code, format);
  Tensor dx = result(x, {x.size(0), x.size(1), x.size(2), x.size(3)}, format);
  if (dx.numel() == 0) return dx;
  const TailArgs args = {input.const_data_ptr(),
                         gradient.const_data_ptr(),
                         const_cast<uint8_t*>(static_cast<const uint8_t*>(codes.const_data_ptr())),
                         dx.mutable_data_ptr(),
                         images,
                         which,
                         lrn,
                         pool};
  run(tail_backward_kernel(), args, images.count * pool.height, pool.width * images.channels);
  return dx;
}

}  // namespace
}  // namespace alexnet_cuda

STABLE_TORCH_LIBRARY_IMPL(alexnet_cuda, CPU, m) {
  m.impl("relu_lrn_max_pool2d", TORCH_BOX(&alexnet_cuda::relu_lrn_max_pool2d));
  m.impl("_relu_lrn_max_pool2d_backward", TORCH_BOX(&alexnet_cuda::relu_lrn_max_pool2d_backward));
}
