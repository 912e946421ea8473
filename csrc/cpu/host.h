// What the host side of every CPU op does: make tensors dense, describe them to the kernels, and share out the tasks.
#pragma once

#include <torch/csrc/stable/ops.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../check.h"
#include "kernels.h"
#include "memory.h"

namespace alexnet_cuda {

inline std::vector<int64_t> dense_strides(const std::vector<int64_t>& size, MemoryFormat format) {
  if (format == MemoryFormat::ChannelsLast) return {size[1] * size[2] * size[3], 1, size[3] * size[1], size[1]};
  std::vector<int64_t> strides(size.size(), 1);
  for (size_t d = size.size() - 1; d > 0; --d) strides[d - 1] = strides[d] * size[d];
  return strides;
}

// An uninitialised result, in memory that an earlier one may have left (memory.h).
inline Tensor result(const Tensor& like, const std::vector<int64_t>& size, MemoryFormat format,
                     std::optional<ScalarType> dtype = std::nullopt) {
  const ScalarType type = dtype.value_or(like.scalar_type());
  int64_t bytes = type == ScalarType::Byte ? 1 : like.element_size();
  for (int64_t n : size) bytes *= n;
  if (bytes < kLeastKept || kept_memory_limit() == 0) return empty(like, size, format, type);
  return torch::stable::from_blob(take_memory(bytes), size, dense_strides(size, format), like.device(), type,
                                  [bytes](void* data) { give_memory(data, bytes); });
}

// torch's `contiguous`, which is a call through its dispatcher, only where it is needed.
inline Tensor dense(const Tensor& x, MemoryFormat format) {
  std::vector<int64_t> size(x.dim());
  for (size_t d = 0; d < size.size(); ++d) size[d] = x.size(d);
  const std::vector<int64_t> strides = dense_strides(size, format);
  bool is_dense = true;
  for (size_t d = 0; d < size.size(); ++d) is_dense &= size[d] == 1 || x.stride(d) == strides[d];
  return is_dense ? x : torch::stable::contiguous(x, format);
}

inline DType dtype_of(const char* op, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat;
    case ScalarType::Double:
      return DType::kDouble;
    case ScalarType::Half:
      return DType::kHalf;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      STD_TORCH_CHECK(false, op, ": expected x to be float32, float64, float16 or bfloat16, got scalar type ",
                      static_cast<int>(x.scalar_type()));
  }
}

inline Images images_of(const char* op, const Tensor& x, MemoryFormat format) {
  return {dtype_of(op, x), format == MemoryFormat::ChannelsLast, x.size(0), x.size(1), x.size(2), x.size(3)};
}

// Shares `tasks` out among torch's threads; `work` is about how many numbers one task reads or writes.
template <class Args>
void run(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, int64_t tasks, int64_t work) {
  constexpr int64_t kGrain = 16384;  // less is not worth waking a thread for
  if (tasks == 0) return;
  torch::stable::parallel_for(0, tasks, kGrain / (work + 1) + 1, [&](int64_t begin, int64_t end) {
    kernel(args, begin, end);
#if defined(__x86_64__)
    _mm_sfence();  // what was written past the caches is there for the next thread
#endif
  });
}

// Tasks of the ops that cut a batch into blocks of planes, as kernels.h says.
inline int64_t plane_blocks(const Images& images, int64_t most) {
  return images.channels_last ? images.count * ((images.channels + most - 1) / most)
                              : (images.count * images.channels + most - 1) / most;
}

}  // namespace alexnet_cuda
