// Kernels with one mistake each. Most would pass their tests on a GPU; the emulator must reject every one of them.
#include "kernels.h"

namespace alexnet_cuda {
namespace {

__global__ void missing_barrier(const float* in, float* out) {
  GPU_SHARED_ARRAY(float, a, 64);
  a[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = a[63 - threadIdx.x];  // __syncthreads() is missing before this line
}

// The second round overwrites what slower threads still read from the first.
__global__ void missing_second_barrier(const float* in, float* out) {
  GPU_SHARED_ARRAY(float, a, 64);
  for (int round = 0; round < 2; ++round) {
    a[threadIdx.x] = in[64 * round + threadIdx.x];
    __syncthreads();
    out[64 * round + threadIdx.x] = a[63 - threadIdx.x];
  }
}

__global__ void two_writers(const float* in, float* out) {
  GPU_SHARED_ARRAY(float, a, 32);
  a[threadIdx.x / 2] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = a[threadIdx.x / 2];
}

// __syncwarp orders the lanes of one warp, not two warps.
__global__ void warp_barrier_for_block(const float* in, float* out) {
  GPU_SHARED_ARRAY(float, a, 64);
  a[threadIdx.x] = in[threadIdx.x];
  __syncwarp();
  out[threadIdx.x] = a[threadIdx.x ^ 32];
}

// Nor does warpgroup_barrier order two warpgroups: 256 threads.
__global__ void warpgroup_barrier_for_block(const float* in, float* out) {
  GPU_SHARED_ARRAY(float, a, 256);
  a[threadIdx.x] = in[threadIdx.x % 64];
  gpu::warpgroup_barrier();
  if (threadIdx.x < 64) out[threadIdx.x] = a[threadIdx.x + 128];
}

__global__ void read_out_of_bounds(const float* in, float* out) {
  GPU_SHARED_ARRAY(float, a, 64);
  GPU_SHARED_ARRAY(float, b, 64);
  a[threadIdx.x] = b[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = a[threadIdx.x + 1];  // thread 63 reads behind the end of a, which is memory of the block
}

__global__ void write_out_of_bounds(const float* in, float*) {
  const gpu::shared<float> a = gpu::dynamic_shared<float>();
  a[static_cast<int>(threadIdx.x) - 1] = in[threadIdx.x];
}

__global__ void uninitialised(const float* in, float* out) {
  GPU_SHARED_ARRAY(float, a, 64);
  if (threadIdx.x != 40) a[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = a[63 - threadIdx.x];
}

__global__ void misaligned(const float* in, float* out) {
  GPU_SHARED_ARRAY(float, a, 64);
  a[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = gpu::load4(a + threadIdx.x % 32).v[0];
}

__global__ void divergent_barrier(const float* in, float* out) {
  if (threadIdx.x < 40) __syncthreads();
  out[threadIdx.x] = in[threadIdx.x];
}

// Both halves reach a barrier, but not the same one.
__global__ void two_barriers(const float* in, float* out) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
  out[threadIdx.x] = in[threadIdx.x];
}

__global__ void divergent_shuffle(const float* in, float* out) {
  float v = in[threadIdx.x];
  if (threadIdx.x % 32 < 16) v = __shfl_sync(~0u, v, threadIdx.x ^ 1);
  out[threadIdx.x] = v;
}

__global__ void missing_wait(const float* in, float* out) {
  const gpu::shared<float> a = gpu::dynamic_shared<float>();
  if (threadIdx.x < 16) gpu::cp_async16(a + 4 * threadIdx.x, in + 4 * threadIdx.x, true);
  gpu::cp_async_commit();  // gpu::cp_async_wait<0>() is missing after this line
  __syncthreads();
  out[threadIdx.x] = a[threadIdx.x];
}

// The barrier is there, but before the wait: other threads' copies may still be under way.
__global__ void wait_after_barrier(const float* in, float* out) {
  const gpu::shared<float> a = gpu::dynamic_shared<float>();
  if (threadIdx.x < 16) gpu::cp_async16(a + 4 * threadIdx.x, in + 4 * threadIdx.x, true);
  gpu::cp_async_commit();
  __syncthreads();
  gpu::cp_async_wait<0>();
  out[threadIdx.x] = a[63 - threadIdx.x];
}

__global__ void global_write_out_of_bounds(const float* in, float* out) {
  out[threadIdx.x + 1000] = in[threadIdx.x];
}

__global__ void misaligned_global_read(const float* in, float* out) {
  out[threadIdx.x] = reinterpret_cast<const gpu::Vec4<float>*>(in + threadIdx.x)->v[0];
}

__global__ void misaligned_global_write(const float* in, float* out) {
  const gpu::Vec2<float> pair = {{in[threadIdx.x], 0.f}};
  *reinterpret_cast<gpu::Vec2<float>*>(out + threadIdx.x) = pair;
}

template <auto kKernel, int kBlock = 64>
gpu::error_t run(const void* in, void* out) {
  return gpu::launch(kKernel, dim3(1), dim3(kBlock), 256, nullptr, static_cast<const float*>(in),
                     static_cast<float*>(out));
}

}  // namespace

const std::map<std::string, TestKernel>& broken_kernels() {
  static const std::map<std::string, TestKernel> kernels = {
      {"missing_barrier", run<missing_barrier>},
      {"missing_second_barrier", run<missing_second_barrier>},
      {"two_writers", run<two_writers>},
      {"warp_barrier_for_block", run<warp_barrier_for_block>},
      {"warpgroup_barrier_for_block", run<warpgroup_barrier_for_block, 256>},
      {"read_out_of_bounds", run<read_out_of_bounds>},
      {"write_out_of_bounds", run<write_out_of_bounds>},
      {"uninitialised", run<uninitialised>},
      {"misaligned", run<misaligned>},
      {"divergent_barrier", run<divergent_barrier>},
      {"two_barriers", run<two_barriers>},
      {"divergent_shuffle", run<divergent_shuffle>},
      {"missing_wait", run<missing_wait>},
      {"wait_after_barrier", run<wait_after_barrier>},
      {"global_write_out_of_bounds", run<global_write_out_of_bounds>},
      {"misaligned_global_read", run<misaligned_global_read>},
      {"misaligned_global_write", run<misaligned_global_write>},
  };
  return kernels;
}

}  // namespace alexnet_cuda
