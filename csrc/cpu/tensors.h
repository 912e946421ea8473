// Tensors of the CPU back end, and how its kernels' tasks (kernels.h) run on torch's threads.
#pragma once

#include "../host/checks.h"
#include "kernels.h"
#include "memory.h"

namespace alexnet_cuda {

// Runs a kernel's tasks on torch's threads. `work`: about how many numbers one task reads or writes.
template <class Arguments>
void run_tasks(void (*kernel)(const Arguments&, int64_t, int64_t), const Arguments& args, int64_t tasks, int64_t work) {
  constexpr int64_t kMinWork = 16384;  // less is not worth waking a thread for
  if (tasks == 0) return;
  torch::stable::parallel_for(0, tasks, kMinWork / (work + 1) + 1, [&](int64_t begin, int64_t end) {
    kernel(args, begin, end);
#if defined(__x86_64__)
    __builtin_ia32_sfence();  // makes non-temporal stores visible to the other threads
#endif
  });
}

inline int64_t ceil_div(int64_t n, int64_t divisor) {
  return (n + divisor - 1) / divisor;
}
inline int64_t round_up(int64_t n, int64_t multiple) {
  return ceil_div(n, multiple) * multiple;
}

inline std::vector<int64_t> dense_strides(const std::vector<int64_t>& size, MemoryFormat format) {
  if (format == MemoryFormat::ChannelsLast) return {size[1] * size[2] * size[3], 1, size[3] * size[1], size[1]};
  std::vector<int64_t> strides(size.size(), 1);
  for (size_t d = size.size() - 1; d > 0; --d) strides[d - 1] = strides[d] * size[d];
  return strides;
}

struct CpuTensors {
  struct Guard {
    explicit Guard(const Tensor&) {}
  };
  static void check_size(const char*, const char*, int64_t) {}

  static DType dtype_of(const char* op, const Tensor& x) {
    const ScalarType type = x.scalar_type();
    if (type == ScalarType::Float) return DType::kFloat;
    if (type == ScalarType::Double) return DType::kDouble;
    if (type == ScalarType::Half) return DType::kHalf;
    if (type == ScalarType::BFloat16) return DType::kBFloat16;
    STD_TORCH_CHECK(false, op, ": expected x to be float32, float64, float16 or bfloat16, got scalar type ",
                    static_cast<int>(type));
  }

  static Tensor allocate(const Tensor& like, const std::vector<int64_t>& size, MemoryFormat format,
                         std::optional<ScalarType> dtype = std::nullopt) {
    const ScalarType type = dtype.value_or(like.scalar_type());
    int64_t bytes = type == ScalarType::Byte ? 1 : type == ScalarType::Float ? 4 : like.element_size();
    for (int64_t n : size) bytes *= n;
    if (bytes < kMinCachedBytes || cache_limit() == 0) return empty(like, size, format, type);
    return torch::stable::from_blob(allocate_memory(bytes), size, dense_strides(size, format), like.device(), type,
                                    [bytes](void* data) { release_memory(data, bytes); });
  }

  // torch's `contiguous` is a call through its dispatcher, so only where it is needed.
  static Tensor dense(const Tensor& x, MemoryFormat format) {
    const std::vector<int64_t> size = size_of(x), strides = dense_strides(size, format);
    bool is_dense = true;
    for (size_t d = 0; d < size.size(); ++d) is_dense &= size[d] == 1 || x.stride(d) == strides[d];
    return is_dense ? x : torch::stable::contiguous(x, format);
  }
};

}  // namespace alexnet_cuda
