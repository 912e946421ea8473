// Argument checks, output sizes and memory formats of all operators, and the call of their kernels.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "../arguments.h"

namespace alexnet_cuda {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Tensor::suggest_memory_format of a 4-D tensor: channels_last if strides are ordered C, W, H, N.
inline MemoryFormat format_of(const Tensor& x) {
  if (x.stride(1) == 0) return MemoryFormat::Contiguous;
  int64_t smallest = 0;
  for (int d : {1, 3, 2, 0}) {
    if (x.size(d) == 0 || x.stride(d) < smallest) return MemoryFormat::Contiguous;
    if (d == 0 && smallest == x.stride(1))
      return MemoryFormat::Contiguous;  // N111: both fit, torch calls it contiguous
    smallest = x.stride(d);
    if (x.size(d) > 1) smallest *= x.size(d);
  }
  return MemoryFormat::ChannelsLast;
}

inline std::vector<int64_t> size_of(const Tensor& x) {
  return {x.sizes().begin(), x.sizes().end()};
}

inline Tensor empty(const Tensor& like, const std::vector<int64_t>& size, MemoryFormat format,
                    std::optional<ScalarType> dtype = std::nullopt) {
  return torch::stable::empty(size, dtype.value_or(like.scalar_type()), std::nullopt, like.device(), std::nullopt,
                              format);
}

inline Tensor no_elements(const Tensor& like, ScalarType dtype) {
  return empty(like, {0}, MemoryFormat::Contiguous, dtype);
}

inline void check_4d(const char* op, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4, op, ": expected ", name, " to be 4-D (N, C, H, W), got ", x.dim(), "-D");
}

inline void check_device(const char* op, const char* name, const Tensor& x, const Tensor& like) {
  STD_TORCH_CHECK(x.device() == like.device(), op, ": expected ", name, " to be on the device of the other tensors");
}

inline void check_same(const char* op, const char* name, const Tensor& x, const Tensor& like) {
  STD_TORCH_CHECK(x.scalar_type() == like.scalar_type(), op, ": expected ", name, " to have the same dtype as x, got ",
                  static_cast<int>(x.scalar_type()), " and ", static_cast<int>(like.scalar_type()));
  check_device(op, name, x, like);
}

inline void check_sizes(const char* op, const char* name, const Tensor& x, const std::vector<int64_t>& size) {
  STD_TORCH_CHECK(size_of(x) == size, op, ": ", name, " does not have the size that the other arguments give");
}

inline void check_range(const char* op, const char* name, int64_t value, int64_t least) {
  STD_TORCH_CHECK(value >= least && value <= std::numeric_limits<int>::max(), op, ": expected ", name,
                  " to be at least ", least, " and less than 2^31, got ", value);
}

inline Lrn checked_lrn(const char* op, int64_t channels, int64_t size, int64_t front, double alpha, double beta,
                       double k, int64_t groups) {
  check_range(op, "size", size, 1);
  STD_TORCH_CHECK(front >= 0 && front < size, op, ": expected front to be in [0, size), got ", front);
  STD_TORCH_CHECK(groups >= 1 && channels % groups == 0, op, ": expected groups to divide the ", channels,
                  " channels of x, got ", groups);
  return {.size = int(size), .front = int(front), .alpha = alpha, .beta = beta, .k = k, .groups = int(groups)};
}

// The pooling of a height x width image.
inline Pool checked_pool(const char* op, int64_t height, int64_t width, int64_t kernel_size, int64_t stride,
                         int64_t padding, bool ceil_mode) {
  STD_TORCH_CHECK(kernel_size >= 1 && kernel_size <= 15, op, ": expected kernel_size to be in [1, 15], got ",
                  kernel_size);
  check_range(op, "stride", stride, 1);
  STD_TORCH_CHECK(padding >= 0 && 2 * padding <= kernel_size, op,
                  ": expected padding to be between 0 and half of kernel_size, got ", padding);
  const auto out = [&](int64_t n) { return output_size(n, kernel_size, stride, padding, ceil_mode, true); };
  const Pool p = {int(kernel_size), int(stride), int(padding), height, width, out(height), out(width)};
  STD_TORCH_CHECK(p.out_height >= 1 && p.out_width >= 1, op, ": an input of ", height, "x", width,
                  " is too small for kernel_size ", kernel_size);
  return p;
}

// The same in a backward, where the size of `code` shows whether the output size was rounded up.
inline Pool checked_pool_backward(const char* op, const Tensor& code, int64_t height, int64_t width,
                                  int64_t kernel_size, int64_t stride, int64_t padding) {
  check_4d(op, "code", code);
  STD_TORCH_CHECK(code.scalar_type() == ScalarType::Byte, op, ": expected code to be uint8, got scalar type ",
                  static_cast<int>(code.scalar_type()));
  for (bool ceil_mode : {true, false}) {  // an image smaller than the window passes with ceil_mode alone
    const Pool p = checked_pool(op, height, width, kernel_size, stride, padding, ceil_mode);
    if (code.size(2) == p.out_height && code.size(3) == p.out_width) return p;
  }
  STD_TORCH_CHECK(false, op, ": code has ", code.size(2), "x", code.size(3), " windows, which pooling ", height, "x",
                  width, " does not give");
}

inline Order checked_order(const char* op, int64_t order) {
  STD_TORCH_CHECK(order >= 0 && order <= 2, op, ": expected order to be 0, 1 or 2, got ", order);
  return static_cast<Order>(order);
}

// The convolution of a height x width image with `channels` channels; weight_size is that of the weight.
inline Conv checked_conv(const char* op, int64_t channels, int64_t height, int64_t width,
                         const std::vector<int64_t>& weight_size, int64_t stride, int64_t padding, int64_t groups,
                         bool ceil_mode) {
  STD_TORCH_CHECK(weight_size.size() == 4 && weight_size[2] == weight_size[3], op,
                  ": expected weight to be 4-D with square filters");
  const int64_t filters = weight_size[0], kernel_size = weight_size[2];
  check_range(op, "kernel_size", kernel_size, 1);
  check_range(op, "stride", stride, 1);
  check_range(op, "padding", padding, 0);
  check_range(op, "groups", groups, 1);
  STD_TORCH_CHECK(channels % groups == 0 && filters % groups == 0 && weight_size[1] == channels / groups, op,
                  ": weight has ", filters, " filters of ", weight_size[1], " channels, which ", groups,
                  " groups of an input with ", channels, " channels do not fit");
  const auto out = [&](int64_t n) { return output_size(n, kernel_size, stride, padding, ceil_mode, false); };
  const Conv c = {channels,    height,       width,       filters,     int(kernel_size),
                  int(stride), int(padding), int(groups), out(height), out(width)};
  STD_TORCH_CHECK(c.out_height >= 1 && c.out_width >= 1, op, ": an input of ", height, "x", width,
                  " is too small for kernel_size ", kernel_size);
  return c;
}

// The same in a backward, where the size of grad, which is the output's, shows whether it was rounded up.
inline Conv checked_conv_backward(const char* op, const Tensor& grad, int64_t channels, int64_t height, int64_t width,
                                  const std::vector<int64_t>& weight_size, int64_t stride, int64_t padding,
                                  int64_t groups) {
  check_4d(op, "grad", grad);
  Conv conv = checked_conv(op, channels, height, width, weight_size, stride, padding, groups, true);
  const auto fits = [&](int64_t out, int64_t in, int64_t rounded_up) {
    return out == rounded_up || (out > 0 && out == output_size(in, conv.kernel_size, stride, padding, false, false));
  };
  STD_TORCH_CHECK(grad.size(1) == conv.filters && fits(grad.size(2), height, conv.out_height) &&
                      fits(grad.size(3), width, conv.out_width),
                  op, ": grad of ", grad.size(1), "x", grad.size(2), "x", grad.size(3), " does not fit an input of ",
                  height, "x", width, " and ", conv.filters, " filters");
  conv.out_height = grad.size(2);
  conv.out_width = grad.size(3);
  return conv;
}

// Images of `size` with the dtype of `like`.
template <class Backend>
Images images_of(const char* op, const char* name, const Tensor& like, const std::vector<int64_t>& size,
                 MemoryFormat format) {
  Backend::check_size(op, name, size[1] * size[2] * size[3]);
  return {Backend::dtype_of(op, like), format == MemoryFormat::ChannelsLast, size[0], size[1], size[2], size[3]};
}

// Null for a tensor without elements, such as a code that is not wanted.
inline uint8_t* code_data(Tensor& code) {
  return code.numel() ? static_cast<uint8_t*>(code.mutable_data_ptr()) : nullptr;
}

// The inputs of one kernel: keeps their dense copies until it has been launched.
template <class Backend>
struct Inputs {
  std::vector<Tensor> dense;

  const void* data(const std::optional<Tensor>& x, MemoryFormat format = MemoryFormat::Contiguous) {
    return x ? dense.emplace_back(Backend::dense(*x, format)).const_data_ptr() : nullptr;
  }
};

// The result of a kernel that reads x, grad or both, a tensor of `size`. `args` holds all other arguments.
template <class Backend, class Kernel, class Arguments>
Tensor run(const char* op, Kernel kernel, Arguments args, const std::optional<Tensor>& x,
           const std::optional<Tensor>& grad, const std::vector<int64_t>& size, MemoryFormat format) {
  const Tensor& like = x ? *x : *grad;
  const typename Backend::Guard guard(like);
  Tensor out = Backend::allocate(like, size, format);
  if (out.numel() == 0) return out;
  Inputs<Backend> inputs;
  args.x = inputs.data(x, format);
  args.grad = inputs.data(grad, format);
  args.out = out.mutable_data_ptr();
  kernel(op, args, like);
  return out;
}

}  // namespace alexnet_cuda
