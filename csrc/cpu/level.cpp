#include "level.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace alexnet_cuda {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

bool supported(Level wanted) {
#if defined(__x86_64__)
  unsigned a, b, c = 0, d;
  const bool half = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  const bool avx2 = half && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return wanted == Level::kBaseline || (wanted == Level::kAvx2 ? avx2 : avx512);
#else
  return wanted == Level::kBaseline;
#endif
}

Level choose() {
  const char* name = std::getenv("ALEXNET_CUDA_CPU_LEVEL");
  if (name == nullptr || *name == '\0') {
    return supported(Level::kAvx512) ? Level::kAvx512 : supported(Level::kAvx2) ? Level::kAvx2 : Level::kBaseline;
  }
  for (Level wanted : {Level::kBaseline, Level::kAvx2, Level::kAvx512}) {
    if (std::strcmp(name, kNames[static_cast<int>(wanted)]) != 0) continue;
    if (supported(wanted)) return wanted;
    throw std::runtime_error(std::string("ALEXNET_CUDA_CPU_LEVEL: this CPU does not support ") + name);
  }
  throw std::runtime_error(std::string("ALEXNET_CUDA_CPU_LEVEL: expected baseline, avx2 or avx512, got ") + name);
}

}  // namespace

Level level() {
  static const Level chosen = choose();
  return chosen;
}

const char* cpu_level() {
  return kNames[static_cast<int>(level())];
}

int vector_bytes() {
  return 16 << static_cast<int>(level());
}

}  // namespace alexnet_cuda
