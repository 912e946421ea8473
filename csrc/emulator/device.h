// Emulator back end of ../cuda/gpu.h: CUDA's own names, launches, conversions, shared memory, asynchronous copies. With
// it a kernel is a C++ function that g++ compiles; ../cuda/ptx.h documents what each primitive does.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define GPU_DEVICE inline

#define threadIdx (::emulator::self->index)
#define blockIdx (::emulator::block.index)
#define blockDim (::emulator::block.size)
#define gridDim (::emulator::block.grid)

inline void __syncthreads(const emulator::Location& at = emulator::Location::current()) {
  emulator::barrier(at);
}
inline void __syncwarp(unsigned mask = ~0u, const emulator::Location& at = emulator::Location::current()) {
  emulator::warp_barrier(mask, at);
}

// Each lane offers its value and names the lane whose value it wants.
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32,
              const emulator::Location& at = emulator::Location::current()) {
  struct Lane {
    T value, result;
    int source;
  };
  const int self = emulator::self->number % 32;
  Lane mine{value, value, (self & ~(width - 1)) | (lane & (width - 1))};
  emulator::warp_operation(mask, mine, at, [](auto lane) {
    for (int l = 0; l < 32; ++l)
      if (lane(l) && lane(lane(l)->source)) lane(l)->result = lane(lane(l)->source)->value;
  });
  return mine.result;
}

// Byte i of the result is byte (selector >> 4 i) & 7 of the eight bytes of a and b.
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = a | uint64_t{b} << 32;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}

inline uint32_t __float_as_uint(float v) {
  return std::bit_cast<uint32_t>(v);
}
inline float __uint_as_float(uint32_t v) {
  return std::bit_cast<float>(v);
}

using std::max;
using std::min;

namespace gpu {

using stream_t = void*;
enum error_t { kSuccess = 0 };

// A grid with the source line of its launch, for messages: dim3 converts to it.
struct Grid {
  dim3 size;
  emulator::Location at;
  Grid(dim3 size, const emulator::Location& at = emulator::Location::current()) : size(size), at(at) {}
};

template <class... P, class... A>
error_t launch(void (*kernel)(P...), Grid grid, dim3 block, size_t smem, stream_t, A... args) {
  emulator::run(grid.at, grid.size, block, smem, [&] { kernel(static_cast<P>(args)...); });
  return kSuccess;
}

// ---- conversions and arithmetic ------------------------------------------------------------------------------------

using half = _Float16;
struct bfloat16 {
  uint16_t bits;

  bfloat16() = default;
  explicit bfloat16(float v) {
    const uint32_t u = std::bit_cast<uint32_t>(v);
    bits = v != v ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16;  // to nearest, ties to even
  }
  explicit operator float() const { return std::bit_cast<float>(uint32_t{bits} << 16); }
};

template <class T>
float to_float(T v) {
  return static_cast<float>(v);
}
template <class T>
T from_float(float v) {
  return static_cast<T>(v);
}

inline uint32_t to_tf32(float v) {  // ties go away from zero
  return v != v ? 0x7fffffff : (std::bit_cast<uint32_t>(v) + 0x1000) & ~0x1fffu;
}

template <class T>
uint32_t pack(float low, float high) {
  return std::bit_cast<uint16_t>(from_float<T>(low)) | uint32_t{std::bit_cast<uint16_t>(from_float<T>(high))} << 16;
}

template <class T>
float unpack(uint32_t pair, int which) {
  return to_float(std::bit_cast<T>(static_cast<uint16_t>(pair >> 16 * which)));
}

inline float max_nan(float a, float b) {
  return a != a || a > b || (a == b && !std::signbit(a)) ? a : b;
}
template <class T>
uint32_t max_nan(uint32_t a, uint32_t b) {
  if constexpr (sizeof(T) == 4)
    return std::bit_cast<uint32_t>(max_nan(std::bit_cast<float>(a), std::bit_cast<float>(b)));
  else
    return pack<T>(max_nan(unpack<T>(a, 0), unpack<T>(b, 0)), max_nan(unpack<T>(a, 1), unpack<T>(b, 1)));
}
template <class T>
uint32_t add(uint32_t a, uint32_t b) {
  if constexpr (sizeof(T) == 4)
    return std::bit_cast<uint32_t>(std::bit_cast<float>(a) + std::bit_cast<float>(b));
  else
    return pack<T>(unpack<T>(a, 0) + unpack<T>(b, 0), unpack<T>(a, 1) + unpack<T>(b, 1));
}
template <class T>
uint32_t equal_mask(uint32_t a, uint32_t b) {
  if constexpr (sizeof(T) == 4)
    return std::bit_cast<float>(a) == std::bit_cast<float>(b) ? ~0u : 0;
  else
    return (unpack<T>(a, 0) == unpack<T>(b, 0) ? 0xffffu : 0) | (unpack<T>(a, 1) == unpack<T>(b, 1) ? 0xffff0000u : 0);
}

inline float rsqrt(float v) {
  return 1.f / std::sqrt(v);
}
inline float sqrt(float v) {
  return std::sqrt(v);
}
inline float rsqrt_ftz(float v) {
  return rsqrt(std::fpclassify(v) == FP_SUBNORMAL ? 0.f : v);
}
inline float sqrt_ftz(float v) {
  return sqrt(std::fpclassify(v) == FP_SUBNORMAL ? 0.f : v);
}

inline void rare_branch() {}
template <class T>
void hide_origin(T*&) {}

// ---- shared memory: a pointer whose every access is checked --------------------------------------------------------

template <class T>
class shared {
 public:
  struct Element {  // what s[i] is: reads and writes go through the checks
    emulator::SharedRange at;
    operator T() const {
      T v;
      std::memcpy(&v, emulator::read_shared(at, sizeof(T)), sizeof(T));
      return v;
    }
    const Element& operator=(T v) const {
      std::memcpy(emulator::write_shared(at, sizeof(T)), &v, sizeof(T));
      return *this;
    }
    const Element& operator=(const Element& other) const { return *this = static_cast<T>(other); }
    const Element& operator+=(T v) const { return *this = static_cast<T>(*this) + v; }
  };

  explicit shared(const emulator::SharedRange& range) : range(range) {}
  shared operator+(int64_t n) const { return shared({range.offset + n * int64_t{sizeof(T)}, range.begin, range.end}); }
  Element operator[](int64_t n) const { return {(*this + n).range}; }

  emulator::SharedRange range;
};

template <class T>
shared<T> dynamic_shared() {
  return shared<T>({0, 0, emulator::block.dynamic_bytes});
}
#define GPU_SHARED_ARRAY(T, name, n)     \
  static const char name##_identity = 0; \
  const gpu::shared<T> name(emulator::static_shared(&name##_identity, (n) * sizeof(T)))

template <class U, class T>
shared<U> shared_cast(shared<T> p) {
  return shared<U>(p.range);
}

template <class T>
Vec2<T> load2(shared<T> p) {
  return shared_cast<Vec2<T>>(p)[0];
}
template <class T>
Vec4<T> load4(shared<T> p) {
  return shared_cast<Vec4<T>>(p)[0];
}
template <class T>
void store4(shared<T> p, const Vec4<T>& v) {
  shared_cast<Vec4<T>>(p)[0] = v;
}

template <class T>
uint32_t shared_address(shared<T> p) {
  return static_cast<uint32_t>(p.range.offset);
}

// ---- asynchronous copies -------------------------------------------------------------------------------------------

template <class T>
void cp_async16(shared<T> destination, const void* source, bool valid) {
  emulator::start_copy(destination.range, valid ? source : nullptr);
}
inline void cp_async_commit() {
  ++emulator::self->copy_groups;
}
template <int N>
void cp_async_wait() {
  emulator::finish_copies(N);
}

}  // namespace gpu
