#pragma once

#include <tuple>

#include "images.h"

namespace alexnet_cuda {

// The result of a kernel that ends with pooling, args.pool, and its code, which has no elements unless save_code.
template <class Backend, class Kernel, class Arguments>
std::tuple<Tensor, Tensor> run_pooling(const char* op, Kernel kernel, Arguments args, const Tensor& x, bool save_code) {
  const MemoryFormat format = format_of(x);
  args.images = images_of<Backend>(op, "x", x, size_of(x), format);
  const std::vector<int64_t> size = {x.size(0), x.size(1), args.pool.out_height, args.pool.out_width};
  Backend::check_size(op, "the output", size[1] * size[2] * size[3]);
  Tensor code = save_code ? Backend::allocate(x, size, format, ScalarType::Byte) : no_elements(x, ScalarType::Byte);
  args.code = code_data(code);
  return {run<Backend>(op, kernel, args, x, std::nullopt, size, format), code};
}

template <class Backend>
std::tuple<Tensor, Tensor> max_pool2d(const Tensor& x, int64_t kernel_size, int64_t stride, int64_t padding,
                                      bool ceil_mode, bool save_code) {
  const char* op = "max_pool2d";
  check_4d(op, "x", x);
  PoolArguments args;
  args.pool = checked_pool(op, x.size(2), x.size(3), kernel_size, stride, padding, ceil_mode);
  return run_pooling<Backend>(op, &Backend::max_pool2d, args, x, save_code);
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
  const std::vector<int64_t> size = {code.size(0), code.size(1), height, width};
  args.images = images_of<Backend>(op, "x", grad, size, format);
  const Tensor codes = Backend::dense(code, format);
  args.code = code_data(codes);
  return run<Backend>(op, &Backend::max_pool2d_backward, args, std::nullopt, grad, size, format);
}

}  // namespace alexnet_cuda
