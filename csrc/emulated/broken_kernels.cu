// Kernels with one mistake each. Most would pass their tests on a GPU; the emulator must reject every one of them.
#include "kernels.h"

namespace alexnet_cuda {

std::map<std::string, TestKernel> broken_kernels;

namespace {

// Launches from here, so that messages name this file.
template <auto kKernel, int kThreads>
gpu::error_t launch(const void* in, void* out) {
  return gpu::launch(kKernel, dim3(1), kThreads, 256, nullptr, in, out);
}

// Declares a kernel that is launched with one block of so many threads, and adds it to the map.
#define BROKEN_KERNEL(name, threads)                                                   \
  __global__ void name(const float* in, float* out);                                   \
  const bool has_##name = broken_kernels.emplace(#name, launch<name, threads>).second; \
  __global__ void name([[maybe_unused]] const float* in, [[maybe_unused]] float* out)

BROKEN_KERNEL(missing_barrier, 64) {
  GPU_SHARED_ARRAY(float, a, 64);
  a[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = a[63 - threadIdx.x];  // __syncthreads() is missing before this line
}

// The second round overwrites what slower threads still read from the first.
BROKEN_KERNEL(missing_second_barrier, 64) {
  GPU_SHARED_ARRAY(float, a, 64);
  for (int round = 0; round < 2; ++round) {
    a[threadIdx.x] = in[64 * round + threadIdx.x];
    __syncthreads();
    out[64 * round + threadIdx.x] = a[63 - threadIdx.x];
  }
}

BROKEN_KERNEL(two_writers, 64) {
  GPU_SHARED_ARRAY(float, a, 32);
  a[threadIdx.x / 2] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = a[threadIdx.x / 2];
}

// __syncwarp orders the lanes of one warp, not two warps.
BROKEN_KERNEL(warp_barrier_for_block, 64) {
  GPU_SHARED_ARRAY(float, a, 64);
  a[threadIdx.x] = in[threadIdx.x];
  __syncwarp();
  out[threadIdx.x] = a[threadIdx.x ^ 32];
}

// Nor does warpgroup_barrier order two warpgroups: 256 threads.
BROKEN_KERNEL(warpgroup_barrier_for_block, 256) {
  GPU_SHARED_ARRAY(float, a, 256);
  a[threadIdx.x] = in[threadIdx.x % 64];
  gpu::warpgroup_barrier();
  if (threadIdx.x < 64) out[threadIdx.x] = a[threadIdx.x + 128];
}

BROKEN_KERNEL(read_out_of_bounds, 64) {
  GPU_SHARED_ARRAY(float, a, 64);
  GPU_SHARED_ARRAY(float, b, 64);
  a[threadIdx.x] = b[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = a[threadIdx.x + 1];  // thread 63 reads behind the end of a, which is memory of the block
}

BROKEN_KERNEL(write_out_of_bounds, 64) {
  const gpu::shared<float> a = gpu::dynamic_shared<float>();
  a[static_cast<int>(threadIdx.x) - 1] = in[threadIdx.x];
}

BROKEN_KERNEL(uninitialised, 64) {
  GPU_SHARED_ARRAY(float, a, 64);
  if (threadIdx.x != 40) a[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = a[63 - threadIdx.x];
}

BROKEN_KERNEL(misaligned, 64) {
  GPU_SHARED_ARRAY(float, a, 64);
  a[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = gpu::load4(a + threadIdx.x % 32).v[0];
}

BROKEN_KERNEL(divergent_barrier, 64) {
  if (threadIdx.x < 40) __syncthreads();
  out[threadIdx.x] = in[threadIdx.x];
}

// Both halves reach a barrier, but not the same one.
BROKEN_KERNEL(two_barriers, 64) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
  out[threadIdx.x] = in[threadIdx.x];
}

BROKEN_KERNEL(divergent_shuffle, 64) {
  float v = in[threadIdx.x];
  if (threadIdx.x % 32 < 16) v = __shfl_sync(~0u, v, threadIdx.x ^ 1);
  out[threadIdx.x] = v;
}

BROKEN_KERNEL(missing_wait, 64) {
  const gpu::shared<float> a = gpu::dynamic_shared<float>();
  if (threadIdx.x < 16) gpu::cp_async16(a + 4 * threadIdx.x, in + 4 * threadIdx.x, true);
  gpu::cp_async_commit();  // gpu::cp_async_wait<0>() is missing after this line
  __syncthreads();
  out[threadIdx.x] = a[threadIdx.x];
}

// The barrier is there, but before the wait: other threads' copies may still be under way.
BROKEN_KERNEL(wait_after_barrier, 64) {
  const gpu::shared<float> a = gpu::dynamic_shared<float>();
  if (threadIdx.x < 16) gpu::cp_async16(a + 4 * threadIdx.x, in + 4 * threadIdx.x, true);
  gpu::cp_async_commit();
  __syncthreads();
  gpu::cp_async_wait<0>();
  out[threadIdx.x] = a[63 - threadIdx.x];
}

BROKEN_KERNEL(copy_at_the_end, 64) {
  if (threadIdx.x < 16) gpu::cp_async16(gpu::dynamic_shared<float>() + 4 * threadIdx.x, in + 4 * threadIdx.x, true);
  gpu::cp_async_commit();  // nobody needs what was copied, but nobody waits either
  out[threadIdx.x] = in[threadIdx.x];
}

BROKEN_KERNEL(global_write_out_of_bounds, 64) {
  out[threadIdx.x + 1000] = in[threadIdx.x];
}

BROKEN_KERNEL(misaligned_global_read, 64) {
  out[threadIdx.x] = reinterpret_cast<const gpu::Vec4<float>*>(in + threadIdx.x)->v[0];
}

BROKEN_KERNEL(misaligned_global_write, 64) {
  const gpu::Vec2<float> pair = {{in[threadIdx.x], 0.f}};
  *reinterpret_cast<gpu::Vec2<float>*>(out + threadIdx.x) = pair;
}

}  // namespace
}  // namespace alexnet_cuda
