// CUDA back end of gpu.h: launches, conversions, shared memory, asynchronous copies; matrix products on tensor cores by
// warps (mma.sync, sm_80) and warpgroups (wgmma, sm_90a).
#pragma once

#include <map>
#include <mutex>
#include <type_traits>
#include <utility>

#define GPU_DEVICE __device__ __forceinline__

namespace gpu {

// Lets a kernel have `smem` bytes of dynamic shared memory on the current device: above 48 KB it needs an attribute,
// which is set once per kernel and device, and again for a larger size.
inline error_t allow_shared_memory(const void* kernel, size_t smem) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, size_t> allowed;
  int device = 0;
  if (const error_t error = cudaGetDevice(&device)) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  size_t& bytes = allowed[{kernel, device}];
  if (smem <= bytes) return kSuccess;
  const error_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem));
  if (error == kSuccess) bytes = smem;
  return error;
}

// kernel<<<grid, block, smem, stream>>>(args...), with args converted to the kernel's parameters.
template <class... P, class... A>
error_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, stream_t stream, A... args) {
  if (smem > 48 * 1024) {
    if (const error_t error = allow_shared_memory(reinterpret_cast<const void*>(kernel), smem)) {
      cudaGetLastError();  // clears it: the next launch would report it as its own
      return error;
    }
  }
  // clang-format off: it takes a header for plain C++
  kernel<<<grid, block, smem, stream>>>(static_cast<P>(args)...);
  // clang-format on
  return cudaGetLastError();
}

// ---- conversions and arithmetic ------------------------------------------------------------------------------------

template <class T>
GPU_DEVICE float to_float(T v) {
  return static_cast<float>(v);
}
template <class T>
GPU_DEVICE T from_float(float v) {
  return static_cast<T>(v);  // to nearest, ties to even
}

// One 32-bit word of two rounded values: `low` in bits 0-15, `high` in bits 16-31. T is half or bfloat16.
template <class T>
GPU_DEVICE uint32_t pack(float low, float high) {
  uint32_t r;
  if constexpr (std::is_same_v<T, half>)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

// The opposite of pack: bits 0-15 for which = 0, bits 16-31 for which = 1.
template <class T>
GPU_DEVICE float unpack(uint32_t word, int which) {
  if constexpr (std::is_same_v<T, half>)
    return __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16 * which)));
  else
    return __uint_as_float(which ? word & 0xffff0000u : word << 16);
}

// The maximum, with +0 > -0; NaN if an operand is NaN. Of floats, or element by element of two packed pairs.
GPU_DEVICE float max_nan(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}
template <class T>
GPU_DEVICE uint32_t max_nan(uint32_t a, uint32_t b) {
  if constexpr (sizeof(T) == 4) return __float_as_uint(max_nan(__uint_as_float(a), __uint_as_float(b)));
  uint32_t r;
  if constexpr (std::is_same_v<T, half>)
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  else
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

// The sum, rounded once, of floats or element by element of two packed pairs.
template <class T>
GPU_DEVICE uint32_t add(uint32_t a, uint32_t b) {
  if constexpr (std::is_same_v<T, half>) {
    const __half2 sum = __hadd2(reinterpret_cast<const __half2&>(a), reinterpret_cast<const __half2&>(b));
    return reinterpret_cast<const uint32_t&>(sum);
  } else if constexpr (std::is_same_v<T, bfloat16>) {
    const __nv_bfloat162 sum =
        __hadd2(reinterpret_cast<const __nv_bfloat162&>(a), reinterpret_cast<const __nv_bfloat162&>(b));
    return reinterpret_cast<const uint32_t&>(sum);
  } else {
    return __float_as_uint(__uint_as_float(a) + __uint_as_float(b));
  }
}

// All ones for an element that equals its counterpart (+0 equals -0, NaN nothing), else zeros. Of floats, or element by
// element of two packed pairs.
template <class T>
GPU_DEVICE uint32_t equal_mask(uint32_t a, uint32_t b) {
  if constexpr (std::is_same_v<T, half>)
    return __heq2_mask(reinterpret_cast<const __half2&>(a), reinterpret_cast<const __half2&>(b));
  else if constexpr (std::is_same_v<T, bfloat16>)
    return __heq2_mask(reinterpret_cast<const __nv_bfloat162&>(a), reinterpret_cast<const __nv_bfloat162&>(b));
  else
    return __uint_as_float(a) == __uint_as_float(b) ? ~0u : 0;
}

// Approximate roots, relative error about 1e-7: four instructions (the IEEE-exact forms need a dozen). With _ftz (flush
// to zero) one instruction; subnormal v counts as 0.
#define GPU_ROOT(NAME, INSTRUCTION)                     \
  GPU_DEVICE float NAME(float v) {                      \
    float r;                                            \
    asm(INSTRUCTION ".f32 %0, %1;" : "=f"(r) : "f"(v)); \
    return r;                                           \
  }
GPU_ROOT(rsqrt, "rsqrt.approx")
GPU_ROOT(sqrt, "sqrt.approx")
GPU_ROOT(rsqrt_ftz, "rsqrt.approx.ftz")
GPU_ROOT(sqrt_ftz, "sqrt.approx.ftz")
#undef GPU_ROOT

// The bits of v rounded to TF32: a float with 10 bits of mantissa.
GPU_DEVICE uint32_t to_tf32(float v) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(v));
  return r;
}

// Marks a branch that only unusual data take; benchmarks/instruction_counts.py leaves it out.
GPU_DEVICE void rare_branch() {
  asm volatile("pmevent 0;");
}

// Keeps the compiler from looking behind a pointer to global memory: it then adds an offset in one instruction, instead
// of beginning again from what the pointer was made of.
template <class T>
GPU_DEVICE void hide_origin(T*& pointer) {
  size_t address = __cvta_generic_to_global(pointer);
  asm("" : "+l"(address));
  pointer = static_cast<T*>(__cvta_global_to_generic(address));
}

// ---- shared memory -------------------------------------------------------------------------------------------------

template <class T>
using shared = T*;

// The dynamic shared memory of the launch, as an array of T.
template <class T>
GPU_DEVICE shared<T> dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char gpu_dynamic_shared[];
  return reinterpret_cast<T*>(gpu_dynamic_shared);
}
#define GPU_SHARED_ARRAY(T, name, n) __shared__ __align__(16) T name[n]

// The same shared memory as elements of another type.
template <class U, class T>
GPU_DEVICE shared<U> shared_cast(shared<T> p) {
  return reinterpret_cast<U*>(p);
}

template <class T>
GPU_DEVICE Vec2<T> load2(shared<T> p) {
  return *reinterpret_cast<const Vec2<T>*>(p);
}
template <class T>
GPU_DEVICE Vec4<T> load4(shared<T> p) {
  return *reinterpret_cast<const Vec4<T>*>(p);
}
template <class T>
GPU_DEVICE void store4(shared<T> p, const Vec4<T>& v) {
  *reinterpret_cast<Vec4<T>*>(p) = v;
}

template <class T>
GPU_DEVICE uint32_t shared_address(shared<T> p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- asynchronous copies (sm_80) -----------------------------------------------------------------------------------

// Starts a copy of 16 bytes from global to shared memory, or of 16 zero bytes if not `valid` (`source` must be a valid
// address even so). This thread sees them after cp_async_wait, others after a barrier that follows it.
template <class T>
GPU_DEVICE void cp_async16(shared<T> destination, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(destination)), "l"(source),
               "r"(valid ? 16 : 0)
               : "memory");
}
GPU_DEVICE void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most N committed groups are in flight.
template <int N>
GPU_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- warps: ldmatrix and mma.sync (sm_80) --------------------------------------------------------------------------

// Loads four 8x8 matrices of 16-bit elements. Lane l passes the address of row l % 8 of matrix l / 8 and receives, of
// each matrix (or of its transpose), the elements in row l / 4, columns 2 (l % 4) and 2 (l % 4) + 1.
#define GPU_LDMATRIX(NAME, MATRIX)                                                          \
  template <class T>                                                                        \
  GPU_DEVICE void NAME(uint32_t (&r)[4], shared<T> row) {                                   \
    asm volatile("ldmatrix.sync.aligned.m8n8." MATRIX ".shared.b16 {%0, %1, %2, %3}, [%4];" \
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                           \
                 : "r"(shared_address(row))                                                 \
                 : "memory");                                                               \
  }
GPU_LDMATRIX(ldmatrix_x4, "x4")
GPU_LDMATRIX(ldmatrix_x4_trans, "x4.trans")
#undef GPU_LDMATRIX

// d (16x8) += a (16x16) * b (16x8) in float. With g = lane / 4 and q = lane % 4, a lane holds
//   a: rows g, g + 8 x columns 2q, 2q + 1 (words 0, 1), then x columns 2q + 8, 2q + 9 (words 2, 3)
//   b: rows 2q, 2q + 1 (word 0) and 2q + 8, 2q + 9 (word 1) of column g
//   d: row g (elements 0, 1) and row g + 8 (elements 2, 3) of columns 2q, 2q + 1
//
//   a        columns 0, 1    2, 3       4, 5       6, 7       8, 9           ..  14, 15
//   row 0    lane 0 word 0   1 word 0   2 word 0   3 word 0   lane 0 word 2  ..  3 word 2
//   row 1    lane 4 word 0   5 word 0   6 word 0   7 word 0   lane 4 word 2  ..  7 word 2
//   row 8    lane 0 word 1   1 word 1   2 word 1   3 word 1   lane 0 word 3  ..  3 word 3
//
// This is what ldmatrix_x4 loads, if matrices 0 to 3 are rows 0-7 and 8-15 of columns 0-7, then of columns 8-15.
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

// d (16x8) += a (16x8) * b (8x8) of TF32 numbers (from to_tf32: the tensor core truncates the other bits). A lane holds
// rows g, g + 8 of columns q, then q + 4 of a; rows q and q + 4 of column g of b; d as above.
GPU_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- warpgroups of 128 threads: barrier, and matrix product (sm_90a only) ------------------------------------------

GPU_DEVICE void warpgroup_barrier() {
  asm volatile("bar.sync %0, 128;" ::"r"(threadIdx.x / 128 + 1) : "memory");
}

// Makes this thread's writes to shared memory visible to wgmma, which reads through the asynchronous proxy.
GPU_DEVICE void fence_proxy_async() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// Orders earlier accesses to the accumulators and to the fragments `a` before the products that follow. The empty asm
// keeps the compiler from computing fragments after the fence.
template <int n>
GPU_DEVICE void wgmma_fence(uint32_t (&a)[n][4]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+r"(a[i][0]), "+r"(a[i][1]), "+r"(a[i][2]), "+r"(a[i][3])::"memory");
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
GPU_DEVICE void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int N>
GPU_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Call it after the wait for the last products: it keeps the compiler from moving uses of the accumulators before the
// wait (it does not know that the products are asynchronous).
template <int n>
GPU_DEVICE void wgmma_fence_accumulators(float (&d)[n][4]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])::"memory");
}

// Starts d (64xN) = a (64x16) * b (16xN), or += if kAdd; N is 96 or 64. Warp w of the warpgroup holds rows 16 w ..
// 16 w + 15 of a and d, laid out as in mma_m16n8k16; d[j] is columns 8 j .. 8 j + 7; b is the wgmma_descriptor of a
// matrix in shared memory. a and d must not be accessed between wgmma_fence and wgmma_wait.
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
