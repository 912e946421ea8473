// Where every CPU op puts its result.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "../check.h"
#include "memory.h"

namespace alexnet_cuda {

// An uninitialised result, in memory that an earlier one may have left (memory.h).
inline Tensor result(const Tensor& like, const std::vector<int64_t>& size, MemoryFormat format,
                     std::optional<ScalarType> dtype = std::nullopt) {
  const ScalarType type = dtype.value_or(like.scalar_type());
  int64_t bytes = type == ScalarType::Byte ? 1 : like.element_size();
  for (int64_t n : size) bytes *= n;
  if (bytes < kLeastKept || kept_memory_limit() == 0) return empty(like, size, format, type);
  std::vector<int64_t> strides(size.size(), 1);
  if (format == MemoryFormat::ChannelsLast) {
    const int64_t c = size[1], w = size[3];
    strides = {c * size[2] * w, 1, w * c, c};
  } else {
    for (size_t d = size.size() - 1; d > 0; --d) strides[d - 1] = strides[d] * size[d];
  }
  return torch::stable::from_blob(take_memory(bytes), size, strides, like.device(), type,
                                  [bytes](void* data) { give_memory(data, bytes); });
}

}  // namespace alexnet_cuda
