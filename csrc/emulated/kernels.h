// The kernels that are there to test the emulator itself: of test_kernels.cu, one per primitive, and of
// broken_kernels.cu, which it must reject.
#pragma once

#include <map>
#include <string>

#include "../cuda/gpu.h"

namespace alexnet_cuda {

// in and out are arrays of floats (or of 16-bit words); what is in them is said beside each kernel.
using TestKernel = gpu::error_t (*)(const void* in, void* out);

extern const std::map<std::string, TestKernel> test_kernels;
extern std::map<std::string, TestKernel> broken_kernels;

// Launches one block of kThreads threads with kBytes bytes of dynamic shared memory.
template <auto kKernel, int kThreads, int kBytes>
gpu::error_t run(const void* in, void* out) {
  return gpu::launch(kKernel, dim3(1), kThreads, kBytes, nullptr, in, out);
}

}  // namespace alexnet_cuda
