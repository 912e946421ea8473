// The names of ../cuda/gpu.h (and of CUDA itself) for g++: a kernel that includes gpu.h becomes a plain C++ function.
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

inline void __syncthreads(const emulator::Place& place = emulator::Place::current()) {
  emulator::barrier(place);
}
inline void __syncwarp(unsigned mask = ~0u, const emulator::Place& place = emulator::Place::current()) {
  emulator::warp_barrier(mask, place);
}

// All shuffles are one exchange: every lane shows its value and says whose it wants.
template <class T>
T emulated_shuffle(unsigned mask, T value, int source, const emulator::Place& place) {
  struct Lane {
    T value, result;
    int source;
  } mine{value, value, source};
  emulator::warp_operation(
      mask, &mine,
      [](void** lanes) {
        for (int l = 0; l < 32; ++l) {
          Lane* lane = static_cast<Lane*>(lanes[l]);
          if (lane && lanes[lane->source]) lane->result = static_cast<Lane*>(lanes[lane->source])->value;
        }
      },
      place);
  return mine.result;
}
template <class T>
T __shfl_sync(unsigned mask, T v, int lane, int width = 32, const emulator::Place& p = emulator::Place::current()) {
  const int me = emulator::self->number % 32;
  return emulated_shuffle(mask, v, (me & ~(width - 1)) | (lane & (width - 1)), p);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32, const emulator::Place& p = emulator::Place::current()) {
  const int me = emulator::self->number % 32, from = me ^ bits;
  return emulated_shuffle(mask, v, from < (me | (width - 1)) + 1 ? from : me, p);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, int by, int width = 32, const emulator::Place& p = emulator::Place::current()) {
  const int me = emulator::self->number % 32;
  return emulated_shuffle(mask, v, (me & (width - 1)) >= by ? me - by : me, p);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, int by, int width = 32, const emulator::Place& p = emulator::Place::current()) {
  const int me = emulator::self->number % 32;
  return emulated_shuffle(mask, v, (me & (width - 1)) + by < width ? me + by : me, p);
}

using std::max;
using std::min;

namespace gpu {

using stream_t = void*;
enum error_t { kSuccess = 0, kInvalidValue = 1 };

// Where a launch was written, for messages: dim3 converts to it and takes the place along.
struct Grid {
  dim3 size;
  emulator::Place place;
  Grid(dim3 size, const emulator::Place& place = emulator::Place::current()) : size(size), place(place) {}
};

template <class... P, class... A>
error_t launch(void (*kernel)(P...), Grid grid, dim3 block, size_t smem, stream_t, A... args) {
  emulator::run(grid.place, grid.size, block, smem, [&] { kernel(static_cast<P>(args)...); });
  return kSuccess;
}

// ---- numbers -------------------------------------------------------------------------------------------------------

using half = _Float16;
struct bfloat16 {
  uint16_t bits;
};

inline float to_float(float v) {
  return v;
}
inline float to_float(half v) {
  return static_cast<float>(v);
}
inline float to_float(bfloat16 v) {
  return std::bit_cast<float>(uint32_t{v.bits} << 16);
}

template <class T>
T from_float(float v) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    if (v != v) return {0x7fff};
    const uint32_t u = std::bit_cast<uint32_t>(v);
    return {static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16)};  // to nearest, ties to even
  } else {
    return static_cast<T>(v);
  }
}

inline uint32_t to_tf32(float v) {  // ties go away from zero
  return v != v ? 0x7fffffff : (std::bit_cast<uint32_t>(v) + 0x1000) & ~0x1fffu;
}

template <class T>
uint32_t pack(float low, float high) {
  return std::bit_cast<uint16_t>(from_float<T>(low)) | uint32_t{std::bit_cast<uint16_t>(from_float<T>(high))} << 16;
}

template <class T>
float half_of(uint32_t pair, int which) {
  return to_float(std::bit_cast<T>(static_cast<uint16_t>(pair >> 16 * which)));
}

inline float max_nan(float a, float b) {
  return a != a || a > b || (a == b && !std::signbit(a)) ? a : b;
}
template <class T>
uint32_t max_nan(uint32_t a, uint32_t b) {
  return pack<T>(max_nan(half_of<T>(a, 0), half_of<T>(b, 0)), max_nan(half_of<T>(a, 1), half_of<T>(b, 1)));
}

inline float rsqrt(float v) {
  return 1.f / std::sqrt(v);
}
inline float sqrt(float v) {
  return std::sqrt(v);
}
inline float rsqrt_normal(float v) {
  return rsqrt(std::fpclassify(v) == FP_SUBNORMAL ? 0.f : v);
}
inline float sqrt_normal(float v) {
  return sqrt(std::fpclassify(v) == FP_SUBNORMAL ? 0.f : v);
}

template <class T>
struct alignas(4 * sizeof(T)) Quad {
  T v[4];
};

template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T v[2];
};

// ---- shared memory: a pointer whose every access is checked --------------------------------------------------------

template <class T>
class shared {
 public:
  struct Element {
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
  shared operator+(int64_t n) const {
    emulator::SharedRange r = range;
    r.offset += n * static_cast<int64_t>(sizeof(T));
    return shared(r);
  }
  Element operator[](int64_t n) const { return {(*this + n).range}; }

  emulator::SharedRange range;
};

template <class T>
shared<T> dynamic_shared() {
  return shared<T>(emulator::dynamic_shared());
}
#define GPU_SHARED_ARRAY(T, name, n)     \
  static const char name##_identity = 0; \
  const gpu::shared<T> name(emulator::static_shared(&name##_identity, (n) * sizeof(T)))

template <class U, class T>
shared<U> shared_cast(shared<T> p) {
  return shared<U>(p.range);
}

template <class T>
Pair<T> load2(shared<T> p) {
  return shared_cast<Pair<T>>(p)[0];
}
template <class T>
Quad<T> load4(shared<T> p) {
  return shared_cast<Quad<T>>(p)[0];
}
template <class T>
void store4(shared<T> p, const Quad<T>& v) {
  shared_cast<Quad<T>>(p)[0] = v;
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

// ---- tensor cores --------------------------------------------------------------------------------------------------

inline void load_matrices(uint32_t (&r)[4], const emulator::SharedRange& row, bool transposed,
                          const emulator::Place& place) {
  struct Lane {
    uint32_t* r;
    uint16_t row[8];
    bool transposed;
  } mine{r, {}, transposed};
  std::memcpy(mine.row, emulator::read_shared(row, 16), 16);
  emulator::warp_operation(
      ~0u, &mine,
      [](void** lanes) {
        const auto lane = [&](int l) { return static_cast<Lane*>(lanes[l]); };
        for (int l = 0; l < 32; ++l)
          for (int m = 0; m < 4; ++m) {
            const int i = l / 4, j = 2 * (l % 4);
            const auto element = [&](int i, int j) -> uint32_t { return lane(8 * m + i)->row[j]; };
            lane(l)->r[m] =
                lane(l)->transposed ? element(j, i) | element(j + 1, i) << 16 : element(i, j) | element(i, j + 1) << 16;
          }
      },
      place);
}
template <class T>
void ldmatrix_x4(uint32_t (&r)[4], shared<T> row, const emulator::Place& place = emulator::Place::current()) {
  load_matrices(r, row.range, false, place);
}
template <class T>
void ldmatrix_x4_trans(uint32_t (&r)[4], shared<T> row, const emulator::Place& place = emulator::Place::current()) {
  load_matrices(r, row.range, true, place);
}

// d (16x8) += a (16 x kDepth) * b (kDepth x 8); Unpack puts what a lane holds of a and b into the matrices.
template <int kDepth, class Unpack>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Unpack, const emulator::Place& place) {
  struct Lane {
    float* d;
    const uint32_t *a, *b;
  } mine{d, a, b};
  emulator::warp_operation(
      ~0u, &mine,
      [](void** lanes) {
        float a[16][kDepth], b[kDepth][8];
        for (int l = 0; l < 32; ++l) {
          const Lane& lane = *static_cast<Lane*>(lanes[l]);
          Unpack{}(l / 4, l % 4, lane.a, lane.b, a, b);
        }
        for (int l = 0; l < 32; ++l)
          for (int i = 0; i < 4; ++i)
            for (int k = 0; k < kDepth; ++k)
              static_cast<Lane*>(lanes[l])->d[i] += a[l / 4 + 8 * (i / 2)][k] * b[k][2 * (l % 4) + i % 2];
      },
      place);
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  const emulator::Place& place = emulator::Place::current()) {
  const auto unpack = [](int g, int q, const uint32_t* from_a, const uint32_t* from_b, auto& a, auto& b) {
    for (int e = 0; e < 2; ++e) {
      for (int i = 0; i < 4; ++i) a[g + 8 * (i % 2)][2 * q + 8 * (i / 2) + e] = half_of<T>(from_a[i], e);
      for (int i = 0; i < 2; ++i) b[2 * q + 8 * i + e][g] = half_of<T>(from_b[i], e);
    }
  };
  mma<16>(d, a, b, unpack, place);
}

inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             const emulator::Place& place = emulator::Place::current()) {
  const auto unpack = [](int g, int q, const uint32_t* from_a, const uint32_t* from_b, auto& a, auto& b) {
    const auto cut = [](uint32_t bits) { return std::bit_cast<float>(bits & ~0x1fffu); };
    for (int i = 0; i < 4; ++i) a[g + 8 * (i % 2)][q + 4 * (i / 2)] = cut(from_a[i]);
    for (int i = 0; i < 2; ++i) b[q + 4 * i][g] = cut(from_b[i]);
  };
  mma<8>(d, a, b, unpack, place);
}

// ---- warpgroups ----------------------------------------------------------------------------------------------------

inline void warpgroup_barrier(const emulator::Place& place = emulator::Place::current()) {
  emulator::warpgroup_barrier(place);
}
inline void fence_proxy_async() {}

inline uint64_t wgmma_descriptor(uint32_t address, uint32_t k_stride, uint32_t row_stride) {
  return uint64_t{(address & 0x3ffff) >> 4} | uint64_t{k_stride >> 4} << 16 | uint64_t{row_stride >> 4} << 32;
}
template <int n>
void wgmma_fence(uint32_t (&)[n][4], const emulator::Place& place = emulator::Place::current()) {
  emulator::warpgroup_operation(nullptr, nullptr, place);
}
inline void wgmma_commit(const emulator::Place& place = emulator::Place::current()) {
  emulator::warpgroup_operation(nullptr, [](void**) { emulator::commit_multiplications(); }, place);
}
template <int N>
void wgmma_wait(const emulator::Place& place = emulator::Place::current()) {
  emulator::warpgroup_operation(nullptr, [](void**) { emulator::finish_multiplications(N); }, place);
}
template <int n>
void wgmma_sums(float (&)[n][4]) {}

template <class T>
float operand(uint64_t descriptor, int row, int k) {
  const auto field = [&](int shift) { return static_cast<int64_t>(descriptor >> shift & 0x3fff) << 4; };
  const int64_t address = field(0) + row / 8 * field(32) + row % 8 * 16 + k / 8 * field(16) + k % 8 * 2;
  T v;
  std::memcpy(&v, emulator::read_shared(emulator::shared_at(static_cast<uint32_t>(address)), 2, false), 2);
  return to_float(v);
}

template <class T, bool kAdd, int kGroups>
void wgmma_k16(float (&d)[kGroups][4], const uint32_t (&a)[4], uint64_t b,
               const emulator::Place& place = emulator::Place::current()) {
  struct Lane {
    float* d;
    const uint32_t* a;
    uint64_t b;
  } mine{d[0], a, b};
  emulator::warpgroup_operation(
      &mine,
      [](void** lanes) {
        emulator::Multiplication m;
        m.b = static_cast<Lane*>(lanes[0])->b;
        for (int t = 0; t < 128; ++t) {
          const Lane& lane = *static_cast<Lane*>(lanes[t]);
          if (lane.b != m.b) emulator::fail("wgmma descriptors differ within a warpgroup");
          m.sums[t] = lane.d;
          m.a[t] = lane.a;
        }
        m.work = [](const emulator::Multiplication& m) {
          static float a[64][16], b[8 * kGroups][16];
          for (int t = 0; t < 128; ++t)
            for (int i = 0; i < 8; ++i)
              a[t / 32 * 16 + t % 32 / 4 + 8 * (i / 2 % 2)][2 * (t % 4) + 8 * (i / 4) + i % 2] =
                  half_of<T>(m.a[t][i / 2], i % 2);
          for (int row = 0; row < 8 * kGroups; ++row)
            for (int k = 0; k < 16; ++k) b[row][k] = operand<T>(m.b, row, k);
          for (int t = 0; t < 128; ++t)
            for (int i = 0; i < 4 * kGroups; ++i) {
              float sum = kAdd ? m.sums[t][i] : 0.f;
              for (int k = 0; k < 16; ++k)
                sum += a[t / 32 * 16 + t % 32 / 4 + 8 * (i / 2 % 2)][k] * b[i / 4 * 8 + 2 * (t % 4) + i % 2][k];
              m.sums[t][i] = sum;
            }
        };
        emulator::start_multiplication(m);
      },
      place);
}

}  // namespace gpu
