// torch's own convolution, for what no kernel of ours computes and for results that Winograd cannot represent.
#pragma once

#include <array>
#include <tuple>

#include "checks.h"

namespace alexnet_cuda {

using Pair = std::vector<int64_t>;

// Calls an operator of torch and returns its results, which stand where the first arguments were.
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
  const Tensor grad_weight = torch::stable::detail::to<Tensor>(results[1]);
  return {grad_weight,
          with_bias ? torch::stable::detail::to<Tensor>(results[2]) : no_elements(grad, grad.scalar_type())};
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

}  // namespace alexnet_cuda
