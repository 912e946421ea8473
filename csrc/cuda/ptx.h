// CUDA back end of gpu.h: launches, conversions, shared memory, asynchronous copies.
#pragma once

#include <type_traits>

#define GPU_DEVICE __device__ __forceinline__

namespace gpu {

// kernel<<<grid, block, smem, stream>>>(args...). Dynamic shared memory above 48 KB needs a kernel attribute.
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

// ---- conversions and arithmetic ------------------------------------------------------------------------------------

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
GPU_DEVICE T from_float(float v) {
  if constexpr (std::is_same_v<T, half>)
    return __float2half_rn(v);
  else if constexpr (std::is_same_v<T, bfloat16>)
    return __float2bfloat16_rn(v);
  else
    return v;
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
  uint32_t r;
  if constexpr (std::is_same_v<T, half>)
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  else
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

// Approximate roots, relative error about 1e-7: four instructions (the IEEE-exact forms need a dozen).
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
// The same in one instruction; subnormal v counts as 0 (flush to zero).
GPU_DEVICE float rsqrt_ftz(float v) {
  float r;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
GPU_DEVICE float sqrt_ftz(float v) {
  float r;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}

// The bits of v rounded to TF32: a float with 10 bits of mantissa.
GPU_DEVICE uint32_t to_tf32(float v) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(v));
  return r;
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

}  // namespace gpu
