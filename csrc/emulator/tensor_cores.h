// Emulator back end of ../cuda/gpu.h: matrix products. ../cuda/ptx.h documents the fragments.
#pragma once

#include <array>

#include "device.h"

namespace gpu {

// Each lane reads its row of 16 bytes; the last one to arrive distributes the elements of the four matrices.
inline void load_matrices(uint32_t (&r)[4], const emulator::SharedRange& row, bool transposed,
                          const emulator::Location& at) {
  struct Lane {
    uint32_t* r;
    uint16_t row[8];
    bool transposed;
  } mine{r, {}, transposed};
  std::memcpy(mine.row, emulator::read_shared(row, 16), 16);
  emulator::warp_operation(~0u, mine, at, [](auto lane) {
    for (int l = 0; l < 32; ++l)
      for (int m = 0; m < 4; ++m) {
        const int i = l / 4, j = 2 * (l % 4);
        const auto element = [&](int i, int j) -> uint32_t { return lane(8 * m + i)->row[j]; };
        lane(l)->r[m] =
            lane(l)->transposed ? element(j, i) | element(j + 1, i) << 16 : element(i, j) | element(i, j + 1) << 16;
      }
  });
}
template <class T>
void ldmatrix_x4(uint32_t (&r)[4], shared<T> row, const emulator::Location& at = emulator::Location::current()) {
  load_matrices(r, row.range, false, at);
}
template <class T>
void ldmatrix_x4_trans(uint32_t (&r)[4], shared<T> row, const emulator::Location& at = emulator::Location::current()) {
  load_matrices(r, row.range, true, at);
}

// d (16x8) += a (16 x kDepth) * b (kDepth x 8). PlaceElements writes the elements that a lane holds into a and b.
template <int kDepth, class PlaceElements>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], PlaceElements, const emulator::Location& at) {
  struct Lane {
    float* d;
    const uint32_t *a, *b;
  } mine{d, a, b};
  emulator::warp_operation(~0u, mine, at, [](auto lane) {
    // The lanes' fragments into whole matrices; then one dot product per element that a lane holds of d.
    float a[16][kDepth], b[kDepth][8];
    for (int l = 0; l < 32; ++l) PlaceElements{}(l / 4, l % 4, lane(l)->a, lane(l)->b, a, b);
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < 4; ++i)
        for (int k = 0; k < kDepth; ++k) lane(l)->d[i] += a[l / 4 + 8 * (i / 2)][k] * b[k][2 * (l % 4) + i % 2];
  });
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  const emulator::Location& at = emulator::Location::current()) {
  const auto place = [](int g, int q, const uint32_t* from_a, const uint32_t* from_b, auto& a, auto& b) {
    for (int e = 0; e < 2; ++e) {
      for (int i = 0; i < 4; ++i) a[g + 8 * (i % 2)][2 * q + 8 * (i / 2) + e] = unpack<T>(from_a[i], e);
      for (int i = 0; i < 2; ++i) b[2 * q + 8 * i + e][g] = unpack<T>(from_b[i], e);
    }
  };
  mma<16>(d, a, b, place, at);
}

inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             const emulator::Location& at = emulator::Location::current()) {
  const auto place = [](int g, int q, const uint32_t* from_a, const uint32_t* from_b, auto& a, auto& b) {
    const auto truncate = [](uint32_t bits) { return std::bit_cast<float>(bits & ~0x1fffu); };
    for (int i = 0; i < 4; ++i) a[g + 8 * (i % 2)][q + 4 * (i / 2)] = truncate(from_a[i]);
    for (int i = 0; i < 2; ++i) b[q + 4 * i][g] = truncate(from_b[i]);
  };
  mma<8>(d, a, b, place, at);
}

// ---- warpgroups ----------------------------------------------------------------------------------------------------

inline void warpgroup_barrier(const emulator::Location& at = emulator::Location::current()) {
  emulator::warpgroup_barrier(at);
}
inline void fence_proxy_async() {}

template <int n>
void wgmma_fence(uint32_t (&)[n][4], const emulator::Location& at = emulator::Location::current()) {
  emulator::warpgroup_operation(nullptr, nullptr, at);
}
inline void wgmma_commit(const emulator::Location& at = emulator::Location::current()) {
  emulator::warpgroup_operation(nullptr, [](void**) { emulator::wgmma_groups().emplace_back(); }, at);
}
template <int N>
void wgmma_wait(const emulator::Location& at = emulator::Location::current()) {
  emulator::warpgroup_operation(nullptr, [](void**) { emulator::finish_wgmma(N); }, at);
}
template <int n>
void wgmma_fence_accumulators(float (&)[n][4]) {}

// Element of the matrix b that a descriptor stands for, read from shared memory.
template <class T>
float descriptor_element(uint64_t descriptor, int row, int k) {
  const auto field = [&](int shift) { return static_cast<int64_t>(descriptor >> shift & 0x3fff) << 4; };
  const int64_t address = field(0) + row / 8 * field(32) + row % 8 * 16 + k / 8 * field(16) + k % 8 * 2;
  T v;
  std::memcpy(&v, emulator::read_shared(emulator::shared_at(static_cast<uint32_t>(address)), 2, false), 2);
  return to_float(v);
}

template <class T, bool kAdd, int kGroups>
void wgmma_k16(float (&d)[kGroups][4], const uint32_t (&a)[4], uint64_t b,
               const emulator::Location& at = emulator::Location::current()) {
  struct Lane {
    float* d;
    const uint32_t* a;
    uint64_t b;
  } mine{d[0], a, b};
  // The last thread queues the product; it is computed when it is waited for.
  emulator::warpgroup_operation(
      &mine,
      [](void** arguments) {
        std::array<Lane, 128> lanes;
        for (int t = 0; t < 128; ++t) {
          lanes[t] = *static_cast<Lane*>(arguments[t]);
          if (lanes[t].b != lanes[0].b) emulator::fail("wgmma descriptors differ within a warpgroup");
        }
        emulator::wgmma_groups().back().push_back([lanes] {
          // Fragments of 128 threads and the matrix in shared memory into a and b; then one dot product per sum.
          static float a[64][16], b[8 * kGroups][16];
          const auto row_of = [](int t, int i) { return t / 32 * 16 + t % 32 / 4 + 8 * (i / 2 % 2); };
          for (int t = 0; t < 128; ++t)
            for (int i = 0; i < 8; ++i)
              a[row_of(t, i)][2 * (t % 4) + 8 * (i / 4) + i % 2] = unpack<T>(lanes[t].a[i / 2], i % 2);
          for (int row = 0; row < 8 * kGroups; ++row)
            for (int k = 0; k < 16; ++k) b[row][k] = descriptor_element<T>(lanes[0].b, row, k);
          for (int t = 0; t < 128; ++t)
            for (int i = 0; i < 4 * kGroups; ++i) {
              float sum = kAdd ? lanes[t].d[i] : 0.f;
              for (int k = 0; k < 16; ++k) sum += a[row_of(t, i)][k] * b[i / 4 * 8 + 2 * (t % 4) + i % 2][k];
              lanes[t].d[i] = sum;
            }
        });
      },
      at);
}

}  // namespace gpu
