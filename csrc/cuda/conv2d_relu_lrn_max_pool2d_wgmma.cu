// AlexNet's whole first block on tensor cores by wgmma (sm_90a); conv2d_relu_lrn_max_pool2d.h says how.
//
// Each of a block's two warpgroups goes through bands of its own, so that one's products run while the other normalises
// and pools. A step makes 2 rows of up to 56 columns, in two products of 64 pixels for each step of the plan: of the
// first a warp has both rows of 8 columns, of the second those of the 8 columns 32 to their right. It finds the maxima
// over the first row and the two of the step before: pooled row s - 1.
//
// Cells come through registers, as for mma.sync, because elements that no filter element meets have to be cleared
// (slabs.h); they lie in a ring of three pairs of rows, a step's two and the next one's. Weights come straight from
// shared memory.
#include "conv2d_relu_lrn_max_pool2d.h"

namespace alexnet_cuda {
namespace {

constexpr int kGroupThreads = 128;
constexpr int kStepRows = 2;  // outputs of a step; a thread stages one cell of as many new rows
static_assert(kThreads == 2 * kGroupThreads && kGroupThreads == kStepRows * kRowCells && kCellRows == 3 * kStepRows);

// A fragment of 64 pixels for one of the plan's steps. `rows` is where this lane's rows for ldmatrix begin, by shift.
template <class T, int kChannels, int kStep>
GPU_DEVICE void load_fragment(const gpu::shared<uint16_t> (&rows)[3], int offset, uint32_t (&a)[4]) {
  constexpr Slab low = kPlan<kChannels>.slabs[2 * kStep], high = kPlan<kChannels>.slabs[2 * kStep + 1];
  constexpr int kLow = low.plane * kStepPlane + low.bx * 8, kHigh = high.plane * kStepPlane + high.bx * 8;
  gpu::ldmatrix_x4(a, (threadIdx.x % 32 < 16 ? rows[low.by] + kLow : rows[high.by] + kHigh) + offset);
  if constexpr (low.mask != 0xff) clear_unneeded<T>(low.mask, a[0], a[1]);
  if constexpr (high.mask != 0xff) clear_unneeded<T>(high.mask, a[2], a[3]);
}

template <class T, class L, bool kLast, bool kSave>
__global__ void __launch_bounds__(kThreads, 1)
    block_wgmma_kernel(const uint16_t* __restrict__ x, const gpu::Quad<uint32_t>* __restrict__ packed,
                       const T* __restrict__ bias, uint16_t* __restrict__ y, uint16_t* __restrict__ a,
                       uint8_t* __restrict__ code, Bands b, LrnArgs lrn) {
#if defined(ALEXNET_CUDA_EMULATOR) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kChannels = L::kChannels, kTile = L::kTile;
  constexpr int kSteps = kPlan<kChannels>.steps, kPlanes = 2 * kChannels;
  // Shuffled, so that the compiler knows them to be the same in all lanes.
  const int group = __shfl_sync(~0u, static_cast<int>(threadIdx.x / kGroupThreads), 0);
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x % kGroupThreads / 32), 0);
  const int thread = threadIdx.x % kGroupThreads, lane = threadIdx.x % 32, quad = lane % 4;
  const int plane = b.out_height * b.out_width, pooled_plane = b.pool_height * b.pool_width;
  const gpu::shared<uint32_t> shared = L::weights(), cells = L::cells(group);

  // Weights as wgmma wants them: [step][slab][filter][8].
#pragma unroll
  for (int i = threadIdx.x; i < L::kCellsAt / 4; i += kThreads) {
    const gpu::Quad<uint32_t> words = packed[i];
    const int pair = i / 32 % (kTile / 16), step = i / (2 * kTile);
#pragma unroll
    for (int k = 0; k < 4; ++k) shared[(2 * step + k % 2) * 4 * kTile + (2 * pair + k / 2) * 32 + lane] = words.v[k];
  }
  load_biases<L>(bias);
  gpu::fence_proxy_async();
  __syncthreads();
  const uint64_t weights = gpu::wgmma_descriptor(gpu::shared_address(shared), 16 * kTile, 128);

  // This thread's cell of a pair of a job's rows, and where it goes.
  const auto cell_of = [&](int job, int pair) {
    return b.cell<kChannels>(x, job, kStepRows * pair + thread / kRowCells, thread % kRowCells);
  };
  const auto place_of = [&](int slot) { return cells + (slot % 3 * (kStepRows * kRowCells) + thread) * 4; };
  const auto stage = [&](int job, int pair, int slot) {
    b.stage<kChannels, kLast>(cell_of(job, pair), place_of(slot));
  };

  const bool live[2] = {warp * 8 < b.out_width, warp * 8 + 32 < b.out_width};
  const int offsets[2] = {live[0] ? warp * 8 * 8 : 0, live[1] ? (warp * 8 + 32) * 8 : 0};
  Windows<L, kSave> windows[2];
  int slot = 0;  // of the step's first pair
  const int workers = 2 * gridDim.x;
  int job = group * gridDim.x + blockIdx.x;
  stage(job, 0, slot);
  for (; job < b.jobs; job += workers) {
    const Bands::Band band = b.band(job);
    stage(job, 1, slot + 1);
    gpu::warpgroup_barrier();
    for (int step = 0; step < b.steps; ++step) {
      const bool last_step = step + 1 == b.steps;
      const Bands::Cell cell = last_step ? cell_of(job + workers, 0) : cell_of(job, step + 2);
      const gpu::shared<uint32_t> next = place_of(slot + 2);
      const auto row_of = [&](int by) {
        const int row = by + lane / 8 % 2;
        return gpu::shared_cast<uint16_t>(cells) +
               (((slot + row / 2) % 3 * kStepRows + row % 2) * kRowCells + lane % 8) * 8;
      };
      const gpu::shared<uint16_t> rows[3] = {row_of(0), row_of(1), row_of(2)};

      float sums[2][kTile / 8][4];
      uint32_t fragments[2][2][4];  // one is loaded while the other is multiplied
      uint16_t loaded[2][8];
#pragma unroll
      for (int i = 0; i < 2; ++i) load_fragment<T, kChannels, 0>(rows, offsets[i], fragments[0][i]);
      unroll<kPlanes>([&](auto p) {
        constexpr int kPlaneIndex = decltype(p)::value;
        constexpr int kBegin = kPlaneIndex * kSteps / kPlanes, kEnd = (kPlaneIndex + 1) * kSteps / kPlanes;
        b.load_plane<kChannels, kLast, kPlaneIndex>(cell, loaded[p % 2]);
        unroll<kEnd - kBegin>([&](auto s) {
          constexpr int kStep = kBegin + decltype(s)::value;
          gpu::wgmma_fence(fragments[kStep % 2]);
#pragma unroll
          for (int i = 0; i < 2; ++i)
            gpu::wgmma_k16<T, (kStep > 0)>(sums[i], fragments[kStep % 2][i], weights + kStep * 2 * kTile);
          gpu::wgmma_commit();
          if constexpr (kStep + 1 < kSteps) {
            gpu::wgmma_wait<1>();
#pragma unroll
            for (int i = 0; i < 2; ++i)
              load_fragment<T, kChannels, kStep + 1>(rows, offsets[i], fragments[(kStep + 1) % 2][i]);
          }
        });
        if constexpr (kPlaneIndex > 0) store_cell(next + (kPlaneIndex - 1) * (kStepPlane / 2), loaded[(p + 1) % 2]);
      });
      store_cell(next + (kPlanes - 1) * (kStepPlane / 2), loaded[(kPlanes - 1) % 2]);
      gpu::wgmma_wait<0>();
#pragma unroll
      for (int i = 0; i < 2; ++i) gpu::wgmma_sums(sums[i]);
      slot = (slot + 1) % 3;

      gpu::warpgroup_barrier();
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (!live[i]) continue;
        const int column = 32 * i + warp * 8 + lane / 4;
#pragma unroll
        for (int r = 0; r < kStepRows; ++r) {
          const int row = 2 * band.first + step * kStepRows + r;
          uint16_t* const save = kSave ? b.saved<kTile, kLast>(a, band, row, column) : nullptr;
          finish_row<T, kTile, kLast>(sums[i], r, L::biases(), save, plane, lrn, [&](int j, const float* v) {
            const int channel = 32 * j + 8 * quad;
            if (r == 0)
              windows[i].end(j, v, L::maxima(group) + (column * L::kColumn + channel),
                             L::maximum_rows(group) + (column * kTile + channel));
            else
              windows[i].middle(j, v);
          });
        }
      }
      gpu::warpgroup_barrier();

      const int row = band.first + step - 1;
      if (row >= band.first && row < band.end)
        pool_across<T, L, kLast, kSave, kGroupThreads>(L::maxima(group), L::maximum_rows(group), b, row,
                                                       y + band.image * kTile * pooled_plane,
                                                       kSave ? code + band.image * kTile * pooled_plane : nullptr);
    }
    slot = (slot + 1) % 3;  // the next job's first pair follows this one's last
  }
#else
  __trap();  // it is never chosen there
#endif
}

}  // namespace

gpu::error_t launch_conv2d_relu_lrn_max_pool2d_wgmma(const Images& images, const void* x, const void* weight,
                                                     const void* bias, void* y, void* a, uint8_t* code,
                                                     const Conv& conv, const Lrn& lrn, const Pool& pool, int processors,
                                                     float* workspace, gpu::stream_t stream) {
  const gpu::error_t error = pack_conv2d_weight(images.dtype, weight, conv, workspace, stream);
  if (error != gpu::kSuccess) return error;
  const Bands bands = bands_of(images, conv, pool, 2 * processors, kStepRows);
  return dispatch_block(images, conv, code != nullptr, [&](auto type, auto layout, auto last, auto save) {
    using T = typename decltype(type)::type;
    return gpu::launch(block_wgmma_kernel<T, decltype(layout), decltype(last)::value, decltype(save)::value>,
                       dim3(std::min(bands.jobs, processors)), dim3(kThreads), decltype(layout)::kBytes, stream,
                       static_cast<const uint16_t*>(x), reinterpret_cast<const gpu::Quad<uint32_t>*>(workspace),
                       static_cast<const T*>(bias), static_cast<uint16_t*>(y), static_cast<uint16_t*>(a), code, bands,
                       LrnArgs(lrn));
  });
}

}  // namespace alexnet_cuda
