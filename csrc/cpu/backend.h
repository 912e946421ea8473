// The CPU back end: what host/ needs to run the operators on CPU tensors.
#pragma once

#include <optional>
#include <vector>

#include "../arguments.h"
#include "../host/checks.h"

namespace alexnet_cuda {

struct Cpu {
  struct Guard {
    explicit Guard(const Tensor&) {}
  };

  static DType dtype_of(const char* op, const Tensor& x);
  static Tensor allocate(const Tensor& like, const std::vector<int64_t>& size, MemoryFormat format,
                         std::optional<ScalarType> dtype = std::nullopt);
  static Tensor dense(const Tensor& x, MemoryFormat format);
  static void check_size(const char*, const char*, int64_t) {}

  static void local_response_norm(const char* op, const LrnArguments& args, const Tensor& like);
  static void local_response_norm_backward(const char* op, const LrnArguments& args, const Tensor& like);
  static void max_pool2d(const char* op, const PoolArguments& args, const Tensor& like);
  static void max_pool2d_backward(const char* op, const PoolArguments& args, const Tensor& like);
  static void relu_lrn_max_pool2d(const char* op, const TailArguments& args, const Tensor& like);
  static void relu_lrn_max_pool2d_backward(const char* op, const TailArguments& args, const Tensor& like);

  static std::optional<MemoryFormat> conv2d_format(const Images& images, const Conv& conv, MemoryFormat of_x);
  static bool conv2d(const char* op, const ConvArguments& args, const Tensor& like);
  static bool conv2d_weight_grad(const char* op, const ConvArguments& args, const Tensor& like);
  static bool conv2d_input_grad(const char* op, const ConvArguments& args, const Tensor& like);
  static bool fuses_first_block(const BlockArguments& args, const Tensor& like);
  static void conv2d_relu_lrn_max_pool2d(const char* op, const BlockArguments& args, const Tensor& like);
};

}  // namespace alexnet_cuda
