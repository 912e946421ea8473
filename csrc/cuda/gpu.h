// What a kernel may use, in one spelling for two compilers.
//
// nvcc:                                the names below are CUDA itself, thin wrappers around it, and inline PTX.
// g++ with -DALEXNET_CUDA_EMULATOR:    the same names run on the CPU, one fiber per CUDA thread (../emulator).
//
// Rules that keep a kernel portable between the two: launch with gpu::launch, not <<<>>>; shared memory through
// gpu::shared<T> (a checked pointer in the emulator) and never `auto v = s[i]`; no inline PTX outside this file;
// plain structs, pointers and scalars as kernel arguments.
#pragma once

#include <cstdint>

#if defined(ALEXNET_CUDA_EMULATOR)
#include "../emulator/device.h"
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
constexpr error_t kInvalidValue = cudaErrorInvalidValue;

}  // namespace gpu

#if defined(__CUDACC__)  // what follows is for .cu files; the host code that includes kernels.h needs only the types

#define GPU_DEVICE __device__ __forceinline__

namespace gpu {

// Beyond 48 KB a kernel has to ask for its dynamic shared memory.
template <class... P, class... A>
error_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, stream_t stream, A... args) {
  if (smem > 48 * 1024) {
    const error_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                               cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem));
    if (error != cudaSuccess) return cudaGetLastError();  // clears it: the next launch would report it as its own
  }
  // clang-format off: it takes a header for plain C++
  kernel<<<grid, block, smem, stream>>>(static_cast<P>(args)...);
  // clang-format on
  return cudaGetLastError();
}

// ---- numbers -------------------------------------------------------------------------------------------------------

GPU_DEVICE float to_float(float v) {
  return v;
}
GPU_DEVICE float to_float(half v) {
  return __half2float(v);
}
GPU_DEVICE float to_float(bfloat16 v) {
  return __bfloat162float(v);
}

template <class T>
GPU_DEVICE T from_float(float v);
template <>
GPU_DEVICE float from_float<float>(float v) {
  return v;
}
template <>
GPU_DEVICE half from_float<half>(float v) {
  return __float2half_rn(v);
}
template <>
GPU_DEVICE bfloat16 from_float<bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// Both rounded into one word, `low` into its lower half, by one instruction.
template <class T>
GPU_DEVICE uint32_t pack(float low, float high);
template <>
GPU_DEVICE uint32_t pack<half>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
template <>
GPU_DEVICE uint32_t pack<bfloat16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

// The opposite: of which = 0 the lower half.
template <class T>
GPU_DEVICE float half_of(uint32_t word, int which);
template <>
GPU_DEVICE float half_of<half>(uint32_t word, int which) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16 * which)));
}
template <>
GPU_DEVICE float half_of<bfloat16>(uint32_t word, int which) {
  return __uint_as_float(which ? word & 0xffff0000u : word << 16);
}

// The greater one, +0 rather than -0; NaN if one is NaN. Of two pairs of T in words as well.
GPU_DEVICE float max_nan(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}
template <class T>
GPU_DEVICE uint32_t max_nan(uint32_t a, uint32_t b);
template <>
GPU_DEVICE uint32_t max_nan<half>(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
template <>
GPU_DEVICE uint32_t max_nan<bfloat16>(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

// A relative error of about 1e-7; IEEE-exact forms cost a dozen instructions, these four, the ones behind them one.
GPU_DEVICE float rsqrt(float v) {
  float r;
  asm("rsqrt.approx.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
GPU_DEVICE float sqrt(float v) {
  float r;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
// The same where v is not subnormal (which would count as 0).
GPU_DEVICE float rsqrt_normal(float v) {
  float r;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
GPU_DEVICE float sqrt_normal(float v) {
  float r;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}

// The nearest number with TF32's 10 bits of mantissa, as the bits of a float.
GPU_DEVICE uint32_t to_tf32(float v) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(v));
  return r;
}

// Four neighbours, moved by one load or store; the address must be a multiple of 4 * sizeof(T).
template <class T>
struct alignas(4 * sizeof(T)) Quad {
  T v[4];
};

template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T v[2];
};

// ---- shared memory -------------------------------------------------------------------------------------------------

template <class T>
using shared = T*;

template <class T>
GPU_DEVICE shared<T> dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char gpu_dynamic_shared[];
  return reinterpret_cast<T*>(gpu_dynamic_shared);
}
#define GPU_SHARED_ARRAY(T, name, n) __shared__ __align__(16) T name[n]

// The same bytes as another type.
template <class U, class T>
GPU_DEVICE shared<U> shared_cast(shared<T> p) {
  return reinterpret_cast<U*>(p);
}

template <class T>
GPU_DEVICE Pair<T> load2(shared<T> p) {
  return *reinterpret_cast<const Pair<T>*>(p);
}
template <class T>
GPU_DEVICE Quad<T> load4(shared<T> p) {
  return *reinterpret_cast<const Quad<T>*>(p);
}
template <class T>
GPU_DEVICE void store4(shared<T> p, const Quad<T>& v) {
  *reinterpret_cast<Quad<T>*>(p) = v;
}

template <class T>
GPU_DEVICE uint32_t shared_address(shared<T> p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- asynchronous copies (sm_80) -----------------------------------------------------------------------------------

// 16 bytes from global to shared memory, or 16 zero bytes; visible to this thread after cp_async_wait, to others
// after a barrier behind it. `source` must be a valid address even when nothing is read.
template <class T>
GPU_DEVICE void cp_async16(shared<T> destination, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(destination)), "l"(source),
               "r"(valid ? 16 : 0)
               : "memory");
}
GPU_DEVICE void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most N of the committed groups are still under way.
template <int N>
GPU_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- tensor cores: ldmatrix and mma.sync (sm_80) -------------------------------------------------------------------

// Four 8x8 matrices of 16-bit elements. Lane l passes the address of row l % 8 of matrix l / 8; it receives of each
// matrix the elements (l / 4, 2 (l % 4)) and its right neighbour, or of the transposed matrix.
template <class T>
GPU_DEVICE void ldmatrix_x4(uint32_t (&r)[4], shared<T> row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
template <class T>
GPU_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], shared<T> row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d (16x8) += a (16x16) * b (16x8), float sums. With g = lane / 4 and q = lane % 4: a holds rows g and g + 8 of columns
// 2q and 2q + 8, b rows 2q and 2q + 8 of column g, d rows g and g + 8 of columns 2q and 2q + 1.
template <class T>
GPU_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
#define GPU_MMA(TYPE, NAME)                                                                           \
  template <>                                                                                         \
  GPU_DEVICE void mma_m16n8k16<TYPE>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                               \
                 ".f32 "                                                                              \
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                    \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                 \
  }
GPU_MMA(half, "f16")
GPU_MMA(bfloat16, "bf16")
#undef GPU_MMA

// d (16x8) += a (16x8) * b (8x8) of TF32 numbers (to_tf32; other bits of a float would be cut off): a holds rows g and
// g + 8 of column q, then of q + 4, b rows q and q + 4 of column g, d as above.
GPU_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- warpgroups of 128 threads: their barrier, and their matrix multiply (sm_90a only) -----------------------------

GPU_DEVICE void warpgroup_barrier() {
  asm volatile("bar.sync %0, 128;" ::"r"(threadIdx.x / 128 + 1) : "memory");
}

// Makes this thread's writes to shared memory visible to wgmma, which reads through another path.
GPU_DEVICE void fence_proxy_async() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// b in shared memory, K-major, no swizzle: 8 rows (of N) of 16 bytes lie together, `k_stride` bytes lie between the two
// halves of k, `row_stride` bytes between groups of 8 rows. All are multiples of 16.
GPU_DEVICE uint64_t wgmma_descriptor(uint32_t address, uint32_t k_stride, uint32_t row_stride) {
  return uint64_t((address & 0x3ffff) >> 4) | uint64_t(k_stride >> 4) << 16 | uint64_t(row_stride >> 4) << 32;
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// What was done to the sums and to these fragments comes before the products that follow.
template <int n>
GPU_DEVICE void wgmma_fence(uint32_t (&a)[n][4]) {
#pragma unroll
  for (int i = 0; i < n; ++i)  // or the compiler might still have to compute them behind the fence
    asm volatile("" : "+r"(a[i][0]), "+r"(a[i][1]), "+r"(a[i][2]), "+r"(a[i][3])::"memory");
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
GPU_DEVICE void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int N>
GPU_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// To be called behind the wait for the last products. To the compiler they are done before it, and it could move what
// uses their sums to where they are not.
template <int n>
GPU_DEVICE void wgmma_sums(float (&d)[n][4]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])::"memory");
}

// d (64xN) = a (64x16) * b (16xN), with kAdd + d; N is 96 or 64. Warp w of the warpgroup has rows 16 w .. 16 w + 15 of
// a and d, as in mma_m16n8k16; d[j] are columns 8 j .. 8 j + 7. b lies in shared memory. Do not touch a and d between
// wgmma_fence and wgmma_wait.
template <class T, bool kAdd>
GPU_DEVICE void wgmma_k16(float (&d)[12][4], const uint32_t (&a)[4], uint64_t b);
template <class T, bool kAdd>
GPU_DEVICE void wgmma_k16(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b);
#define GPU_4(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define GPU_WGMMA(TYPE, NAME, ADD)                                                                                     \
  template <>                                                                                                          \
  GPU_DEVICE void wgmma_k16<TYPE, ADD>(float (&d)[12][4], const uint32_t (&a)[4], uint64_t b) {                        \
    asm volatile("wgmma.mma_async.sync.aligned.m64n96k16.f32." NAME "." NAME                                           \
                 " "                                                                                                   \
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                             \
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                    \
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47}, "                   \
                 "{%48, %49, %50, %51}, %52, %53, 1, 1, 0;"                                                            \
                 : GPU_4(0), GPU_4(1), GPU_4(2), GPU_4(3), GPU_4(4), GPU_4(5), GPU_4(6), GPU_4(7), GPU_4(8), GPU_4(9), \
                   GPU_4(10), GPU_4(11)                                                                                \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(ADD));                                      \
  }                                                                                                                    \
  template <>                                                                                                          \
  GPU_DEVICE void wgmma_k16<TYPE, ADD>(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b) {                         \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." NAME "." NAME                                           \
                 " "                                                                                                   \
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                             \
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "                   \
                 "{%32, %33, %34, %35}, %36, %37, 1, 1, 0;"                                                            \
                 : GPU_4(0), GPU_4(1), GPU_4(2), GPU_4(3), GPU_4(4), GPU_4(5), GPU_4(6), GPU_4(7)                      \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(ADD));                                      \
  }
GPU_WGMMA(half, "f16", false)
GPU_WGMMA(half, "f16", true)
GPU_WGMMA(bfloat16, "bf16", false)
GPU_WGMMA(bfloat16, "bf16", true)
#undef GPU_WGMMA
#undef GPU_4
#endif

}  // namespace gpu

#endif  // __CUDACC__
#endif  // ALEXNET_CUDA_EMULATOR
