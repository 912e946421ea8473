// From tensors to the structs that kernels take.
#pragma once

#include "checks.h"

namespace alexnet_cuda {

// Images of `size` with the dtype of `like`.
template <class Backend>
Images images_of(const char* op, const char* name, const Tensor& like, const std::vector<int64_t>& size,
                 MemoryFormat format) {
  Backend::check_size(op, name, size[1] * size[2] * size[3]);
  return {.dtype = Backend::dtype_of(op, like),
          .channels_last = format == MemoryFormat::ChannelsLast,
          .count = size[0],
          .channels = size[1],
          .height = size[2],
          .width = size[3]};
}

// Null for a tensor without elements, such as a code that is not wanted.
inline uint8_t* code_data(Tensor& code) {
  return code.numel() ? static_cast<uint8_t*>(code.mutable_data_ptr()) : nullptr;
}

// A backward reads its code; the argument struct is shared with the forward, which writes it.
inline uint8_t* code_data(const Tensor& code) {
  return const_cast<uint8_t*>(static_cast<const uint8_t*>(code.const_data_ptr()));
}

// The inputs of one kernel: keeps their dense copies until it has been launched.
template <class Backend>
class Inputs {
 public:
  const void* data(const std::optional<Tensor>& x, MemoryFormat format = MemoryFormat::Contiguous) {
    return x ? dense_.emplace_back(Backend::dense(*x, format)).const_data_ptr() : nullptr;
  }

 private:
  std::vector<Tensor> dense_;
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
