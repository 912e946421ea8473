#pragma once

#include <tuple>

#include "images.h"

namespace alexnet_cuda {

template <class Backend>
std::tuple<Tensor, Tensor> max_pool2d(const Tensor& x, int64_t kernel_size, int64_t stride, int64_t padding,
                                      bool ceil_mode, bool save_code) {
  const char* op = "max_pool2d";
  check_4d(op, "x", x);
  PoolArguments args;
  args.pool = checked_pool(op, x.size(2), x.size(3), kernel_size, stride, padding, ceil_mode);
  const MemoryFormat format = format_of(x);
  args.images = images_of<Backend>(op, "x", x, format);
  const std::vector<int64_t> size = {x.size(0), x.size(1), args.pool.out_height, args.pool.out_width};
  Backend::check_size(op, "the output", size[1] * size[2] * size[3]);
  const typename Backend::Guard guard(x);
  Tensor y = Backend::allocate(x, size, format);
  Tensor code = save_code ? Backend::allocate(x, size, format, ScalarType::Byte) : no_elements(x, ScalarType::Byte);
  if (y.numel() == 0) return {y, code};
  const Tensor input = Backend::dense(x, format);
  args.x = input.const_data_ptr();
  args.code = code_data(code);
  args.out = y.mutable_data_ptr();
  Backend::max_pool2d(op, args, x);
  return {y, code};
}

template <class Backend>
Tensor max_pool2d_backward(const Tensor& grad, const Tensor& code, int64_t height, int64_t width, int64_t kernel_size,
                           int64_t stride, int64_t padding) {
  const char* op = "_max_pool2d_backward";
  PoolArguments args;
  args.pool = checked_pool_backward(op, code, height, width, kernel_size, stride, padding);
  check_sizes(op, "grad", grad, size_of(code));
  check_device(op, "code", code, grad);
  Backend::check_size(op, "code", code.size(1) * code.size(2) * code.size(3));
  const MemoryFormat format = format_of(code);
  const typename Backend::Guard guard(grad);
  Tensor dx = Backend::allocate(grad, {code.size(0), code.size(1), height, width}, format);
  args.images = images_of<Backend>(op, "x", dx, format);
  if (dx.numel() == 0) return dx;
  const Tensor gradient = Backend::dense(grad, format), codes = Backend::dense(code, format);
  args.grad = gradient.const_data_ptr();
  args.code = code_data(codes);
  args.out = dx.mutable_data_ptr();
  Backend::max_pool2d_backward(op, args, grad);
  return dx;
}

}  // namespace alexnet_cuda
