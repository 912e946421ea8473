// From tensors to the structs that kernels take.
#pragma once

#include "checks.h"

namespace alexnet_cuda {

template <class Backend>
Images images_of(const char* op, const char* name, const Tensor& x, MemoryFormat format) {
  Backend::check_size(op, name, x.size(1) * x.size(2) * x.size(3));
  return {.dtype = Backend::dtype_of(op, x),
          .channels_last = format == MemoryFormat::ChannelsLast,
          .count = x.size(0),
          .channels = x.size(1),
          .height = x.size(2),
          .width = x.size(3)};
}

// Null for a tensor without elements, such as a code that is not wanted.
inline uint8_t* code_data(Tensor& code) {
  return code.numel() ? static_cast<uint8_t*>(code.mutable_data_ptr()) : nullptr;
}

// A backward reads its code; the argument struct is shared with the forward, which writes it.
inline uint8_t* code_data(const Tensor& code) {
  return const_cast<uint8_t*>(static_cast<const uint8_t*>(code.const_data_ptr()));
}

}  // namespace alexnet_cuda
