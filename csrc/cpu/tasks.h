// Runs a kernel's tasks on torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace alexnet_cuda {

// `work`: about how many numbers one task reads or writes.
template <class Arguments>
void run_tasks(void (*kernel)(const Arguments&, int64_t, int64_t), const Arguments& args, int64_t tasks, int64_t work) {
  constexpr int64_t kMinWork = 16384;  // less is not worth waking a thread for
  if (tasks == 0) return;
  torch::stable::parallel_for(0, tasks, kMinWork / (work + 1) + 1, [&](int64_t begin, int64_t end) {
    kernel(args, begin, end);
#if defined(__x86_64__)
    _mm_sfence();  // makes non-temporal stores visible to the other threads
#endif
  });
}

inline int64_t ceil_div(int64_t n, int64_t divisor) {
  return (n + divisor - 1) / divisor;
}

}  // namespace alexnet_cuda
