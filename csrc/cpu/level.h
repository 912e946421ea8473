// Which instruction set the CPU kernels use: every *_kernel.cpp is compiled once per level, in the namespace of that
// level, and the host picks one at run time. No torch header here: c_interface.cpp includes it too.
#pragma once

#include <cstdint>

namespace alexnet_cuda {

enum class Level { kBaseline, kAvx2, kAvx512 };

#if defined(__x86_64__)
constexpr bool kHasLevels = true;
#else
constexpr bool kHasLevels = false;  // only kBaseline is compiled
#endif

// The best level of this CPU, or the one that ALEXNET_CUDA_CPU_LEVEL (baseline, avx2, avx512) names; decided once.
// Throws std::runtime_error when that variable has another value or names a level that this CPU lacks.
Level level();

const char* cpu_level();  // its name
int vector_bytes();       // the size of its vectors

// Whether the library has kernels for Intel's matrix unit (AMX) in bfloat16, level() is avx512, and this CPU and Linux
// let the process use the unit.
bool has_amx();

}  // namespace alexnet_cuda

// Declares the kernel `void name(const Arguments&, int64_t begin, int64_t end)`, which does the tasks [begin, end), in
// the namespace of every level, and name_kernel(), which returns that of level().
#define ALEXNET_CPU_KERNEL(name, Arguments)                \
  namespace baseline {                                     \
  void name(const Arguments&, int64_t, int64_t);           \
  }                                                        \
  namespace avx2 {                                         \
  void name(const Arguments&, int64_t, int64_t);           \
  }                                                        \
  namespace avx512 {                                       \
  void name(const Arguments&, int64_t, int64_t);           \
  }                                                        \
  inline auto name##_kernel() {                            \
    if constexpr (kHasLevels) {                            \
      if (level() == Level::kAvx512) return &avx512::name; \
      if (level() == Level::kAvx2) return &avx2::name;     \
    }                                                      \
    return &baseline::name;                                \
  }
