// Local response normalisation, max pooling, and the operators that fuse them.
#pragma once

#include "conv2d.h"

namespace alexnet_cuda {

template <class Backend>
LrnArguments lrn_arguments(const char* op, const Tensor& x, int64_t size, int64_t front, double alpha, double beta,
                           double k, int64_t groups, bool spatial) {
  LrnArguments args;
  args.lrn = checked_lrn(op, x.size(1), size, front, alpha, beta, k, groups);
  args.spatial = spatial;
  args.images = images_of<Backend>(op, "x", x, size_of(x), format_of(x));
  return args;
}

template <class Backend>
Tensor local_response_norm(const Tensor& x, int64_t size, int64_t front, double alpha, double beta, double k,
                           int64_t groups, bool spatial) {
  const char* op = "local_response_norm";
  check_4d(op, "x", x);
  const LrnArguments args = lrn_arguments<Backend>(op, x, size, front, alpha, beta, k, groups, spatial);
  return run<Backend>(op, &Backend::local_response_norm, args, x, std::nullopt, size_of(x), format_of(x));
}

template <class Backend>
Tensor local_response_norm_backward(const Tensor& grad, const Tensor& x, int64_t size, int64_t front, double alpha,
                                    double beta, double k, int64_t groups, bool spatial) {
  const char* op = "_local_response_norm_backward";
  check_4d(op, "x", x);
  check_same(op, "grad", grad, x);
  check_sizes(op, "grad", grad, size_of(x));
  const LrnArguments args = lrn_arguments<Backend>(op, x, size, front, alpha, beta, k, groups, spatial);
  return run<Backend>(op, &Backend::local_response_norm_backward, args, x, grad, size_of(x), format_of(x));
}

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

// The gradient of x, a tensor of `size`, of such a kernel.
template <class Backend, class Kernel, class Arguments>
Tensor run_pooling_backward(const char* op, Kernel kernel, Arguments args, const std::optional<Tensor>& x,
                            const Tensor& grad, const Tensor& code, const std::vector<int64_t>& size,
                            MemoryFormat format) {
  check_sizes(op, "grad", grad, size_of(code));
  check_device(op, "code", code, grad);
  Backend::check_size(op, "code", code.size(1) * code.size(2) * code.size(3));
  args.images = images_of<Backend>(op, "x", grad, size, format);
  const Tensor codes = Backend::dense(code, format);
  // A backward reads its code; the argument struct is shared with the forward, which writes it.
  args.code = const_cast<uint8_t*>(static_cast<const uint8_t*>(codes.const_data_ptr()));
  return run<Backend>(op, kernel, args, x, grad, size, format);
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
  return run_pooling_backward<Backend>(op, &Backend::max_pool2d_backward, args, std::nullopt, grad, code,
                                       {code.size(0), code.size(1), height, width}, format_of(code));
}

template <class Backend>
std::tuple<Tensor, Tensor> relu_lrn_max_pool2d(const Tensor& x, int64_t order, int64_t size, int64_t front,
                                               double alpha, double beta, double k, int64_t groups, int64_t kernel_size,
                                               int64_t stride, int64_t padding, bool ceil_mode, bool save_code) {
  const char* op = "relu_lrn_max_pool2d";
  check_4d(op, "x", x);
  TailArguments args;
  args.order = checked_order(op, order);
  args.lrn = checked_lrn(op, x.size(1), size, front, alpha, beta, k, groups);
  args.pool = checked_pool(op, x.size(2), x.size(3), kernel_size, stride, padding, ceil_mode);
  return run_pooling<Backend>(op, &Backend::relu_lrn_max_pool2d, args, x, save_code);
}

template <class Backend>
Tensor relu_lrn_max_pool2d_backward(const Tensor& grad, const Tensor& x, const Tensor& code, int64_t order,
                                    int64_t size, int64_t front, double alpha, double beta, double k, int64_t groups,
                                    int64_t kernel_size, int64_t stride, int64_t padding) {
  const char* op = "_relu_lrn_max_pool2d_backward";
  check_4d(op, "x", x);
  TailArguments args;
  args.order = checked_order(op, order);
  args.lrn = checked_lrn(op, x.size(1), size, front, alpha, beta, k, groups);
  args.pool = checked_pool_backward(op, code, x.size(2), x.size(3), kernel_size, stride, padding);
  check_same(op, "grad", grad, x);
  check_sizes(op, "code", code, {x.size(0), x.size(1), args.pool.out_height, args.pool.out_width});
  return run_pooling_backward<Backend>(op, &Backend::relu_lrn_max_pool2d_backward, args, x, grad, code, size_of(x),
                                       format_of(x));
}

// (pooled output, convolution output, code); the last two have no elements unless save.
template <class Backend>
std::tuple<Tensor, Tensor, Tensor> conv2d_relu_lrn_max_pool2d(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t conv_stride, int64_t conv_padding,
    bool conv_ceil_mode, int64_t order, int64_t size, int64_t front, double alpha, double beta, double k,
    int64_t groups, int64_t kernel_size, int64_t stride, int64_t padding, bool ceil_mode, bool save) {
  const char* op = "conv2d_relu_lrn_max_pool2d";
  BlockArguments args;
  const Conv conv = args.conv.conv =
      checked_conv_forward(op, x, weight, bias, conv_stride, conv_padding, 1, conv_ceil_mode);
  args.tail.order = checked_order(op, order);
  args.tail.lrn = checked_lrn(op, conv.filters, size, front, alpha, beta, k, groups);
  const Pool pool = args.tail.pool =
      checked_pool(op, conv.out_height, conv.out_width, kernel_size, stride, padding, ceil_mode);
  const MemoryFormat format = format_of(x);
  const std::vector<int64_t> conv_size = {x.size(0), conv.filters, conv.out_height, conv.out_width};
  args.conv.images = images_of<Backend>(op, "x", x, size_of(x), format);
  args.tail.images = images_of<Backend>(op, "the output", x, conv_size, format);
  const typename Backend::Guard guard(x);
  if (x.numel() != 0 && conv.filters != 0 && Backend::fuses_first_block(args)) {
    const std::vector<int64_t> out_size = {x.size(0), conv.filters, pool.out_height, pool.out_width};
    Tensor y = Backend::allocate(x, out_size, format);
    Tensor a = save ? Backend::allocate(x, conv_size, format) : no_elements(x, x.scalar_type());
    Tensor code = save ? Backend::allocate(x, out_size, format, ScalarType::Byte) : no_elements(x, ScalarType::Byte);
    Inputs<Backend> inputs;
    args.conv.x = inputs.data(x, format);
    args.conv.weight = inputs.data(weight);
    args.conv.bias = inputs.data(bias);
    args.conv.out = save ? a.mutable_data_ptr() : nullptr;
    args.tail.code = code_data(code);
    args.tail.out = y.mutable_data_ptr();
    Backend::conv2d_relu_lrn_max_pool2d(op, args, x);
    return {y, a, code};
  }
  const Tensor a = conv2d<Backend>(x, weight, bias, conv_stride, conv_padding, 1, conv_ceil_mode, false);
  auto [y, code] = relu_lrn_max_pool2d<Backend>(a, order, size, front, alpha, beta, k, groups, kernel_size, stride,
                                                padding, ceil_mode, save);
  return {y, save ? a : no_elements(x, x.scalar_type()), code};
}

}  // namespace alexnet_cuda
