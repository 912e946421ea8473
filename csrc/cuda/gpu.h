// The device primitives that kernels use: one set of names with two back ends.
//
//   nvcc                                ptx.h: CUDA itself, thin wrappers and inline PTX
//   g++ with -DALEXNET_CUDA_EMULATOR    ../emulator/device.h and tensor_cores.h: each CUDA thread is a fiber on the CPU
//
// Rules that keep a kernel portable between the two: launch with gpu::launch, not <<<>>>; reach shared memory through
// gpu::shared<T> (a checked pointer in the emulator) and write the element type out (never `auto v = s[i]`); inline PTX
// only in the back end; kernel arguments are plain structs, pointers and scalars.
#pragma once

#include <cstdint>

namespace gpu {

// n elements moved by one load or store. The address must be a multiple of the struct's size.
template <class T, int n>
struct alignas(n * sizeof(T)) Vec {
  T v[n];
};
template <class T>
using Vec2 = Vec<T, 2>;
template <class T>
using Vec4 = Vec<T, 4>;

// Matrix descriptor of wgmma's operand b in shared memory: K-major, no swizzle. 8 rows (of N) of 16 bytes lie together,
// `k_stride` bytes separate the two halves of k, `row_stride` bytes the groups of 8 rows. All are multiples of 16.
constexpr uint64_t wgmma_descriptor(uint32_t address, uint32_t k_stride, uint32_t row_stride) {
  return uint64_t{(address & 0x3ffff) >> 4} | uint64_t{k_stride >> 4} << 16 | uint64_t{row_stride >> 4} << 32;
}

}  // namespace gpu

#if defined(ALEXNET_CUDA_EMULATOR)
#include "../emulator/device.h"
#include "../emulator/tensor_cores.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace gpu {

using half = __half;
using bfloat16 = __nv_bfloat16;
using stream_t = cudaStream_t;
using error_t = cudaError_t;
constexpr error_t kSuccess = cudaSuccess;

}  // namespace gpu

#if defined(__CUDACC__)  // host code that includes kernels.h needs only the types
#include "ptx.h"
#endif

#endif  // ALEXNET_CUDA_EMULATOR
