// What Python asks this library with ctypes (alexnet_cuda/_library.py), beside the operators: facts about the build,
// the instruction set in use, the limit of the CPU cache. The library itself needs no Python, so one serves all
// versions.
#include <exception>
#include <string>

#include "build_info.h"
#include "cpu/level.h"
#include "cpu/memory.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

// One "name: value" a line.
EXPORT const char* alexnet_cuda_build_info() {
  return "built against torch: " BUILD_TORCH_VERSION
         "\n"
         "runs on torch: >= " BUILD_TORCH_TARGET
         "\n"
         "compiler: " BUILD_COMPILER
         "\n"
         "CUDA toolkit: " BUILD_CUDA_VERSION
         "\n"
         "CUDA architectures: " BUILD_CUDA_ARCHITECTURES;
}

// baseline, avx2, avx512 or "avx512 with AMX"; or, beginning with its name, what is wrong with the variable
// ALEXNET_CUDA_CPU_LEVEL.
EXPORT const char* alexnet_cuda_cpu_level() {
  static const std::string answer = [] {
    try {
      return std::string(alexnet_cuda::cpu_level()) + (alexnet_cuda::has_amx() ? " with AMX" : "");
    } catch (const std::exception& error) {
      return std::string(error.what());
    }
  }();
  return answer.c_str();
}

EXPORT int64_t alexnet_cuda_cache_limit() {
  return alexnet_cuda::cache_limit();
}

// Returns the limit before.
EXPORT int64_t alexnet_cuda_set_cache_limit(int64_t bytes) {
  return alexnet_cuda::set_cache_limit(bytes);
}
