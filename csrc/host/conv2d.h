// The convolutions: by a kernel of the back end or, where none serves and for results that Winograd cannot represent,
// by torch's own.
#pragma once

#include <algorithm>
#include <array>
#include <tuple>

#include "checks.h"

namespace alexnet_cuda {

using Pair = std::vector<int64_t>;

// Calls an operator of torch and returns its results, which stand where the first arguments were. Each result that is a
// tensor has to be taken by to<Tensor>, which frees it at the end.
template <class... Arguments>
std::array<StableIValue, sizeof...(Arguments)> call_torch(const char* op, const char* overload,
                                                          const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack = {torch::stable::detail::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION));
  return stack;
}

inline Tensor torch_convolution(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                const Conv& conv, int64_t padding, bool transposed, const Pair& output_padding) {
  const auto results = call_torch("aten::convolution", "", x, weight, bias, Pair{conv.stride, conv.stride},
                                  Pair{padding, padding}, Pair{1, 1}, transposed, output_padding, int64_t{conv.groups});
  return torch::stable::detail::to<Tensor>(results[0]);
}

// Zeros below and to the right of x that ceil_mode's last windows read.
inline Tensor padded_for_ceil_mode(const Tensor& x, const Conv& c) {
  const int64_t rows = (c.out_height - 1) * c.stride + c.kernel_size - c.height - 2 * c.padding;
  const int64_t columns = (c.out_width - 1) * c.stride + c.kernel_size - c.width - 2 * c.padding;
  if (rows <= 0 && columns <= 0) return x;
  return torch::stable::pad(x, {0, std::max<int64_t>(columns, 0), 0, std::max<int64_t>(rows, 0)});
}

inline Tensor torch_conv2d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Conv& conv,
                           bool relu) {
  Tensor y = torch_convolution(padded_for_ceil_mode(x, conv), weight, bias, conv, conv.padding, false, {0, 0});
  return relu ? torch::stable::detail::to<Tensor>(call_torch("aten::relu_", "", y)[0]) : y;
}

// The gradients of weight and bias.
inline std::tuple<Tensor, Tensor> torch_conv2d_weight_grad(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                           const Conv& conv, bool with_bias) {
  const bool mask[] = {false, true, with_bias};
  const auto results = call_torch("aten::convolution_backward", "", grad, padded_for_ceil_mode(x, conv), weight,
                                  std::optional(Pair{conv.filters}), Pair{conv.stride, conv.stride},
                                  Pair{conv.padding, conv.padding}, Pair{1, 1}, false, Pair{0, 0}, int64_t{conv.groups},
                                  torch::headeronly::HeaderOnlyArrayRef<bool>(mask, 3));
  const auto result = [&](int i) { return torch::stable::detail::to<Tensor>(results[i]); };
  const Tensor unused = result(0), grad_weight = result(1), grad_bias = result(2);
  return {torch::stable::contiguous(grad_weight, MemoryFormat::Contiguous),
          with_bias ? grad_bias : no_elements(grad, grad.scalar_type())};
}

// The transposed convolution. Its result is cut where ceil_mode let windows hang over the edge.
inline Tensor torch_conv2d_input_grad(const Tensor& grad, const Tensor& weight, const Conv& c) {
  const int64_t rows = c.height - ((c.out_height - 1) * c.stride - 2 * c.padding + c.kernel_size);
  const int64_t columns = c.width - ((c.out_width - 1) * c.stride - 2 * c.padding + c.kernel_size);
  Tensor dx = torch_convolution(grad, weight, std::nullopt, c, c.padding, true,
                                {std::max<int64_t>(rows, 0), std::max<int64_t>(columns, 0)});
  if (rows < 0) dx = torch::stable::narrow(dx, 2, 0, c.height);
  if (columns < 0) dx = torch::stable::narrow(dx, 3, 0, c.width);
  return dx;
}

inline Conv checked_conv_forward(const char* op, const Tensor& x, const Tensor& weight,
                                 const std::optional<Tensor>& bias, int64_t stride, int64_t padding, int64_t groups,
                                 bool ceil_mode) {
  check_4d(op, "x", x);
  check_same(op, "weight", weight, x);
  if (bias) {
    check_same(op, "bias", *bias, x);
    check_sizes(op, "bias", *bias, {weight.size(0)});
  }
  return checked_conv(op, x.size(1), x.size(2), x.size(3), size_of(weight), stride, padding, groups, ceil_mode);
}

// The result of a kernel, conv2d or conv2d_input_grad of the back end, in `format`; none if torch must compute it.
template <class Backend, class Kernel>
std::optional<Tensor> run_conv2d(const char* op, Kernel kernel, ConvArguments args, const std::optional<Tensor>& x,
                                 const std::optional<Tensor>& grad, const Tensor& weight,
                                 const std::optional<Tensor>& bias, const std::vector<int64_t>& size,
                                 MemoryFormat format) {
  if (size[0] * size[1] * size[2] * size[3] == 0) return Backend::allocate(weight, size, format);
  if (weight.numel() == 0) return torch::stable::fill_(Backend::allocate(weight, size, format), 0.0);  // of no filters
  const std::optional<MemoryFormat> computed = Backend::conv2d_format(args.images, args.conv, format);
  if (!computed) return std::nullopt;
  Inputs<Backend> inputs;
  args.images.channels_last = *computed == MemoryFormat::ChannelsLast;
  args.x = inputs.data(x, *computed);
  args.grad = inputs.data(grad, *computed);
  args.weight = inputs.data(weight);
  args.bias = inputs.data(bias);
  Tensor out = Backend::allocate(weight, size, *computed);
  args.out = out.mutable_data_ptr();
  if (!kernel(op, args, weight)) return std::nullopt;
  return *computed == format ? out : torch::stable::contiguous(out, format);
}

template <class Backend>
Tensor conv2d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t stride, int64_t padding,
              int64_t groups, bool ceil_mode, bool relu) {
  const char* op = "conv2d";
  ConvArguments args;
  args.conv = checked_conv_forward(op, x, weight, bias, stride, padding, groups, ceil_mode);
  args.relu = relu;
  const MemoryFormat format = format_of(x);
  args.images = images_of<Backend>(op, "x", x, size_of(x), format);
  const std::vector<int64_t> size = {x.size(0), args.conv.filters, args.conv.out_height, args.conv.out_width};
  Backend::check_size(op, "the output", size[1] * size[2] * size[3]);
  const typename Backend::Guard guard(x);
  const auto y = run_conv2d<Backend>(op, &Backend::conv2d, args, x, std::nullopt, weight, bias, size, format);
  return y ? *y : torch::stable::contiguous(torch_conv2d(x, weight, bias, args.conv, relu), format);
}

// The gradients of weight and bias; the latter has no elements unless with_bias.
template <class Backend>
std::tuple<Tensor, Tensor> conv2d_weight_grad(const Tensor& grad, const Tensor& x, int64_t kernel_size, int64_t stride,
                                              int64_t padding, int64_t groups, bool with_bias) {
  const char* op = "_conv2d_weight_grad";
  check_4d(op, "grad", grad);
  check_4d(op, "x", x);
  check_same(op, "grad", grad, x);
  check_range(op, "groups", groups, 1);
  const std::vector<int64_t> weight_size = {grad.size(1), x.size(1) / groups, kernel_size, kernel_size};
  ConvArguments args;
  args.conv = checked_conv_backward(op, grad, x.size(1), x.size(2), x.size(3), weight_size, stride, padding, groups);
  STD_TORCH_CHECK(grad.size(0) == x.size(0), op, ": grad has ", grad.size(0), " images, x has ", x.size(0));
  Backend::check_size(op, "grad", grad.size(1) * grad.size(2) * grad.size(3));
  const MemoryFormat format = format_of(x);
  args.images = images_of<Backend>(op, "x", x, size_of(x), format);
  const typename Backend::Guard guard(x);
  Tensor dw = Backend::allocate(x, weight_size, MemoryFormat::Contiguous);
  Tensor db =
      with_bias ? Backend::allocate(x, {args.conv.filters}, MemoryFormat::Contiguous) : no_elements(x, x.scalar_type());
  if (x.numel() == 0 || dw.numel() == 0) return {torch::stable::fill_(dw, 0.0), torch::stable::fill_(db, 0.0)};
  const std::optional<MemoryFormat> computed = Backend::conv2d_weight_grad_format(args.images, args.conv, format);
  if (computed) {
    Inputs<Backend> inputs;
    args.images.channels_last = *computed == MemoryFormat::ChannelsLast;
    args.x = inputs.data(x, *computed);
    args.grad = inputs.data(grad, *computed);
    args.grad_weight = dw.mutable_data_ptr();
    args.grad_bias = with_bias ? db.mutable_data_ptr() : nullptr;
    if (Backend::conv2d_weight_grad(op, args, x)) return {dw, db};
  }
  return torch_conv2d_weight_grad(grad, x, dw, args.conv, with_bias);
}

template <class Backend>
Tensor conv2d_input_grad(const Tensor& grad, const Tensor& weight, int64_t height, int64_t width, int64_t stride,
                         int64_t padding, int64_t groups) {
  const char* op = "_conv2d_input_grad";
  check_4d(op, "weight", weight);
  check_same(op, "weight", weight, grad);
  check_range(op, "groups", groups, 1);
  ConvArguments args;
  args.conv =
      checked_conv_backward(op, grad, weight.size(1) * groups, height, width, size_of(weight), stride, padding, groups);
  Backend::check_size(op, "grad", grad.size(1) * grad.size(2) * grad.size(3));
  const MemoryFormat format = format_of(grad);
  const std::vector<int64_t> size = {grad.size(0), args.conv.channels, height, width};
  args.images = images_of<Backend>(op, "x", grad, size, format);
  const typename Backend::Guard guard(grad);
  const auto dx = run_conv2d<Backend>(op, &Backend::conv2d_input_grad, args, std::nullopt, grad, weight, std::nullopt,
                                      size, format);
  return dx ? *dx : torch::stable::contiguous(torch_conv2d_input_grad(grad, weight, args.conv), format);
}

}  // namespace alexnet_cuda
