#include "level.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#ifdef ALEXNET_CUDA_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace alexnet_cuda {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

bool supported(Level wanted) {
  if (wanted == Level::kBaseline) return true;
#if defined(__x86_64__)
  unsigned a, b, c = 0, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) && __builtin_cpu_supports("avx2") &&
         __builtin_cpu_supports("fma") &&
         (wanted == Level::kAvx2 || (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                     __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")));
#else
  return false;
#endif
}

Level choose() {
  const char* name = std::getenv("ALEXNET_CUDA_CPU_LEVEL");
  const bool best = name == nullptr || *name == '\0';
  for (Level wanted : {Level::kAvx512, Level::kAvx2, Level::kBaseline}) {
    if (!best && std::strcmp(name, kNames[static_cast<int>(wanted)]) != 0) continue;
    if (supported(wanted)) return wanted;
    if (!best) throw std::runtime_error(std::string("ALEXNET_CUDA_CPU_LEVEL: this CPU does not support ") + name);
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

bool has_amx() {
#ifdef ALEXNET_CUDA_AMX
  static const bool usable = [] {
    constexpr unsigned kBFloat16 = 1 << 22, kTiles = 1 << 24;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl, for the whole process
    unsigned a, b, c, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kBFloat16) && (d & kTiles) &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return usable && level() == Level::kAvx512;
#else
  return false;
#endif
}

int vector_bytes() {
  return 16 << static_cast<int>(level());
}

}  // namespace alexnet_cuda
