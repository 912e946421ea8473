#pragma once

#include "conv2d.h"
#include "relu_lrn_max_pool2d.h"

namespace alexnet_cuda {

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
  if (x.numel() != 0 && conv.filters != 0 && Backend::fuses_first_block(args, x)) {
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
