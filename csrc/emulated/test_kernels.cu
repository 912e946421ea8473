// One small kernel per primitive of gpu.h, to test the emulator. nvcc compiles them too, but no library contains them.
#include "kernels.h"

namespace alexnet_cuda {
namespace {

using gpu::bfloat16;
using gpu::half;

// out[0 .. 31] = sum over the lane's group of 8, [32 .. 63] = value of the lane before, [64 .. 95] = of the lane after
// within groups of 4 (the first and last keep theirs), [96 .. 127] = of lane 3.
__global__ void shuffles(const float* in, float* out) {
  const int lane = threadIdx.x;
  const float mine = in[lane];
  float sum = mine;
  for (int bit = 1; bit < 8; bit *= 2) sum += __shfl_sync(~0u, sum, lane ^ bit);
  out[lane] = sum;
  out[32 + lane] = __shfl_sync(~0u, mine, max(lane - 1, 0));
  out[64 + lane] = __shfl_sync(~0u, mine, min(lane % 4 + 1, 3), 4);
  out[96 + lane] = __shfl_sync(~0u, mine, 3);
}

// out = in in reverse order, through static and dynamic shared memory: 128 threads.
__global__ void reverse(const float* in, float* out) {
  GPU_SHARED_ARRAY(float, a, 128);
  const gpu::shared<float> b = gpu::dynamic_shared<float>();
  const int t = threadIdx.x;
  a[t] = in[t];
  __syncthreads();
  b[127 - t] = a[t];
  __syncthreads();
  const gpu::Vec4<float> four = gpu::load4(b + t / 4 * 4);
  out[t] = four.v[t % 4];
}

// Lanes of a warp exchange values through shared memory with only __syncwarp between: out[t] = in[t ^ 1].
__global__ void warp_exchange(const float* in, float* out) {
  GPU_SHARED_ARRAY(float, a, 64);
  a[threadIdx.x] = in[threadIdx.x];
  __syncwarp();
  out[threadIdx.x] = a[threadIdx.x ^ 1];
}

// out = in with zeros in place of every fourth 16 bytes, by cp.async in two groups: 64 threads, 512 floats.
__global__ void copies(const float* in, float* out) {
  const gpu::shared<float> s = gpu::dynamic_shared<float>();
  const int t = threadIdx.x;
  for (int group = 0; group < 2; ++group) {
    const int at = 256 * group + 4 * t;
    gpu::cp_async16(s + at, in + at, t % 4 != 3);
    gpu::cp_async_commit();
  }
  gpu::cp_async_wait<1>();
  __syncthreads();
  for (int i = t; i < 256; i += 64) out[i] = s[i];
  gpu::cp_async_wait<0>();
  __syncthreads();
  for (int i = t; i < 256; i += 64) out[256 + i] = s[256 + i];
}

// d (16 x 8) = a (16 x k) b^T with b (8 x k), or b (k x 8) transposed by ldmatrix; `in` is a, then b. k is 16, or 8 for
// float, which is rounded to TF32.
template <class T, bool kTransposed>
__global__ void matrix_product(const T* in, float* out) {
  constexpr bool kIsTF32 = sizeof(T) == 4;
  constexpr int kDepth = kIsTF32 ? 8 : 16;
  using Element = std::conditional_t<kIsTF32, uint32_t, T>;
  const gpu::shared<Element> s = gpu::dynamic_shared<Element>();
  const int lane = threadIdx.x;
  for (int i = lane; i < 24 * kDepth; i += 32) {
    if constexpr (kIsTF32)
      s[i] = gpu::to_tf32(in[i]);
    else
      s[i] = in[i];
  }
  __syncwarp();
  uint32_t a[4], b4[4];
  // Matrices of a: rows 0-7 and 8-15 of the first half of k, then of the second; of b the two halves of k, twice.
  gpu::ldmatrix_x4(a, s + (lane % 16 * kDepth + lane / 16 * (kDepth / 2)));
  if constexpr (kTransposed)
    gpu::ldmatrix_x4_trans(b4, s + (256 + lane % 16 * 8));
  else
    gpu::ldmatrix_x4(b4, s + (16 * kDepth + lane % 8 * kDepth + lane / 8 % 2 * (kDepth / 2)));
  const uint32_t b[2] = {b4[0], b4[1]};
  float d[4] = {};
  if constexpr (kIsTF32)
    gpu::mma_m16n8k8_tf32(d, a, b);
  else
    gpu::mma_m16n8k16<T>(d, a, b);
  for (int i = 0; i < 4; ++i) out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

// 32 pairs: out = their maxima, those of the values rounded to T (both elements of a word), and roots of the maxima.
template <class T>
__global__ void maxima(const float* in, float* out) {
  const int t = threadIdx.x;
  const float a = in[t], b = in[32 + t], maximum = gpu::max_nan(a, b);
  const uint32_t pair = gpu::max_nan<T>(gpu::pack<T>(a, b), gpu::pack<T>(b, a));
  out[t] = maximum;
  out[32 + t] = gpu::unpack<T>(pair, 0);
  out[64 + t] = gpu::unpack<T>(pair, 1);
  out[96 + t] = gpu::rsqrt_ftz(maximum);
  out[128 + t] = gpu::sqrt_ftz(maximum);
}

// d (64 x kColumns) = 2 a (64 x 16) b^T, b (kColumns x 16), by one warpgroup; `in` is a, then b.
template <class T, int kColumns>
__global__ void warpgroup_product(const T* in, float* out) {
#if defined(ALEXNET_CUDA_EMULATOR) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const gpu::shared<T> s = gpu::dynamic_shared<T>();
  const int t = threadIdx.x, lane = t % 32;
  for (int i = t; i < 64 * 16; i += 128) s[i] = in[i];
  // Row r, column k of b lie at: rows in groups of 8, the two halves of k of one group side by side.
  const gpu::shared<T> b = s + 64 * 16;
  for (int i = t; i < kColumns * 16; i += 128) {
    const int r = i / 16, k = i % 16;
    b[r / 8 * 128 + k / 8 * 64 + r % 8 * 8 + k % 8] = in[64 * 16 + i];
  }
  gpu::fence_proxy_async();
  gpu::warpgroup_barrier();
  uint32_t a[1][4];
  gpu::ldmatrix_x4(a[0], s + ((t / 32 * 16 + lane % 16) * 16 + lane / 16 * 8));
  const uint64_t descriptor = gpu::wgmma_descriptor(gpu::shared_address(b), 128, 256);
  float d[kColumns / 8][4];
  gpu::wgmma_fence(a);
  gpu::wgmma_k16<T, false>(d, a[0], descriptor);
  gpu::wgmma_k16<T, true>(d, a[0], descriptor);
  gpu::wgmma_commit();
  gpu::wgmma_wait<0>();
  gpu::wgmma_fence_accumulators(d);
  for (int j = 0; j < kColumns / 8; ++j)
    for (int i = 0; i < 4; ++i)
      out[(t / 32 * 16 + lane / 4 + i / 2 * 8) * kColumns + j * 8 + lane % 4 * 2 + i % 2] = d[j][i];
#endif
}

}  // namespace

const std::map<std::string, TestKernel> test_kernels = {
    {"shuffles", run<shuffles, 32, 0>},
    {"reverse", run<reverse, 128, 512>},
    {"warp_exchange", run<warp_exchange, 64, 0>},
    {"copies", run<copies, 64, 2048>},
    {"matrix_product_half", run<matrix_product<half, false>, 32, 768>},
    {"matrix_product_bfloat16", run<matrix_product<bfloat16, false>, 32, 768>},
    {"matrix_product_tf32", run<matrix_product<float, false>, 32, 768>},
    {"transposed_product_half", run<matrix_product<half, true>, 32, 768>},
    {"transposed_product_bfloat16", run<matrix_product<bfloat16, true>, 32, 768>},
    {"maxima_half", run<maxima<half>, 32, 0>},
    {"maxima_bfloat16", run<maxima<bfloat16>, 32, 0>},
    {"warpgroup_product_96_half", run<warpgroup_product<half, 96>, 128, 5120>},
    {"warpgroup_product_96_bfloat16", run<warpgroup_product<bfloat16, 96>, 128, 5120>},
    {"warpgroup_product_64_half", run<warpgroup_product<half, 64>, 128, 4096>},
    {"warpgroup_product_64_bfloat16", run<warpgroup_product<bfloat16, 64>, 128, 4096>},
};

}  // namespace alexnet_cuda
