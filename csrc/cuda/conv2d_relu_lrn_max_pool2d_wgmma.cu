// AlexNet's whole first block on tensor cores by wgmma (sm_90a); conv2d_relu_lrn_max_pool2d.h explains the method.
//
// Each of a thread block's two warpgroups goes through bands of its own, so that one multiplies while the other
// normalises and pools. A step makes 2 rows of up to 56 outputs, in two products of 64 pixels per k step: of the first
// a warp has both rows of 8 columns, of the second those of the 8 columns 32 to their right. It finds the maxima over
// the two rows of the previous step and the first row of this one: pooled row s - 1.
//
// Memory: s2d blocks lie in a ring of three pairs of rows, two of this step and one of the next. They come to the
// tensor cores through registers, as for mma.sync, because channels that meet no weight have to be masked; weights come
// straight from shared memory. By slots of the ring, with the rows of s2d blocks that the products read, and -> those
// that are loaded meanwhile:
//
//             slot 0    slot 1    slot 2
//   step 0    0  1      2  3      -> 4, 5
//   step 1    -> 6, 7   2  3      4  5
//   step 2    6  7      -> 8, 9   4  5
#include "conv2d_relu_lrn_max_pool2d.h"

namespace alexnet_cuda {
namespace {

constexpr int kGroupThreads = 128;
constexpr int kStepRows = 2;  // rows of outputs per step; every thread stages one s2d block of the new rows
static_assert(kThreads == 2 * kGroupThreads && kGroupThreads == kStepRows * kRowBlocks && kBlockRows == 3 * kStepRows);

// Loads a fragment of 64 pixels for one k step from shared memory. `rows`: where this lane's rows for ldmatrix begin,
// by the shift's by.
template <class T, int kChannels, int kStep>
GPU_DEVICE void load_fragment(const gpu::shared<uint16_t> (&rows)[3], int offset, uint32_t (&a)[4]) {
  constexpr KSlice low = kSchedule<kChannels>.slices[2 * kStep], high = kSchedule<kChannels>.slices[2 * kStep + 1];
  constexpr int kLow = low.group * kBandStride + low.bx * 8, kHigh = high.group * kBandStride + high.bx * 8;
  gpu::ldmatrix_x4(a, (threadIdx.x % 32 < 16 ? rows[low.by] + kLow : rows[high.by] + kHigh) + offset);
  if constexpr (low.mask != 0xff) mask_fragment<T>(low.mask, a[0], a[1]);
  if constexpr (high.mask != 0xff) mask_fragment<T>(high.mask, a[2], a[3]);
}

// Warp w of a warpgroup has columns 8 w .. 8 w + 7 and those 32 further, both rows of each: 64 columns, of which
// AlexNet's 55 use 86 %. Within a warp, lane l holds column l / 4 and, of every 32 filters, 8 from 8 (l % 4) on: whole
// columns to pool, whole runs for LRN. Weights lie as wgmma reads them without a swizzle: 8 filters x 8 of K are 128
// consecutive bytes, every bank once.
//
// Registers, of at most 255: 96 of sums, 16 of fragments of two k steps, 50 of maxima. So an SM has one thread block,
// and each of its schedulers one warp of either warpgroup: products of one run beside the arithmetic of the other.
template <class T, class L, bool kNhwc, bool kSave>
__global__ void __launch_bounds__(kThreads, 1)
    block_wgmma_kernel(const uint16_t* __restrict__ x, const gpu::Vec4<uint32_t>* __restrict__ packed,
                       const T* __restrict__ bias, uint16_t* __restrict__ y, uint16_t* __restrict__ a,
                       uint8_t* __restrict__ code, Bands b, LrnConstants lrn) {
#if defined(ALEXNET_CUDA_EMULATOR) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kChannels = L::kChannels, kTile = L::kTile;
  constexpr int kSteps = L::kSteps, kGroups = L::kGroups;
  using Saved = SavedRow<L, kNhwc, kSave>;
  constexpr int kRowsAtOnce = Saved::kStages ? 1 : kStepRows;  // of a warpgroup, there is room for one row of `a`
  // The shuffles tell the compiler that they are the same in all lanes.
  const int group = __shfl_sync(~0u, static_cast<int>(threadIdx.x / kGroupThreads), 0);
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x % kGroupThreads / 32), 0);
  const int thread = threadIdx.x % kGroupThreads, lane = threadIdx.x % 32;
  const gpu::shared<uint32_t> shared = L::weights(), blocks = L::blocks(group);

  // Once per thread block: weights to shared memory in the order of wgmma, [k step][K slice][filter][8], and the bias.
#pragma unroll
  for (int i = threadIdx.x; i < L::kBlocksAt / 4; i += kThreads) {
    const gpu::Vec4<uint32_t> words = packed[i];
    const int pair = i / 32 % (kTile / 16), step = i / (2 * kTile);
#pragma unroll
    for (int k = 0; k < 4; ++k) shared[(2 * step + k % 2) * 4 * kTile + (2 * pair + k / 2) * 32 + lane] = words.v[k];
  }
  load_bias<L>(bias);
  gpu::fence_proxy_async();
  __syncthreads();
  const uint64_t weights = gpu::wgmma_descriptor(gpu::shared_address(shared), 16 * kTile, 128);

  // This thread's s2d block in a pair of a job's rows, and its address in a slot of the ring.
  const auto source_of = [&](int job, int pair) {
    return b.source<kChannels>(x, job, kStepRows * pair + thread / kRowBlocks, thread % kRowBlocks);
  };
  const auto address_of = [&](int slot) { return blocks + (slot % 3 * (kStepRows * kRowBlocks) + thread) * 4; };
  const auto stage = [&](int job, int pair, int slot) {
    b.stage<kChannels, kNhwc>(source_of(job, pair), address_of(slot));
  };

  // A warp without output columns multiplies column 0 (wgmma needs all warps) and drops the results.
  const bool active[2] = {warp * 8 < b.out_width, warp * 8 + 32 < b.out_width};
  const int offsets[2] = {active[0] ? warp * 8 * 8 : 0, active[1] ? (warp * 8 + 32) * 8 : 0};
  Windows<L, kSave> windows[2];
  int slot = 0;  // of the step's first pair
  // Each warpgroup takes every workers-th job.
  const int workers = 2 * gridDim.x;
  int job = group * gridDim.x + blockIdx.x;
  stage(job, 0, slot);
  for (; job < b.jobs; job += workers) {
    const Bands::Band band = b.band(job);
    stage(job, 1, slot + 1);
    gpu::warpgroup_barrier();
    for (int step = 0; step < b.steps; ++step) {
      const bool last_step = step + 1 == b.steps;
      const Bands::Source source = last_step ? source_of(job + workers, 0) : source_of(job, step + 2);
      const gpu::shared<uint32_t> next = address_of(slot + 2);
      // Lane l addresses row l / 8 % 2 and column l % 8 of the fragment, shifted by `by` rows of s2d blocks.
      const auto row_of = [&](int by) {
        const int row = by + lane / 8 % 2;
        return gpu::shared_cast<uint16_t>(blocks) +
               (((slot + row / 2) % 3 * kStepRows + row % 2) * kRowBlocks + lane % 8) * 8;
      };
      const gpu::shared<uint16_t> rows[3] = {row_of(0), row_of(1), row_of(2)};

      // Multiply. While the tensor cores work on one k step, the fragments of the next are loaded from shared memory,
      // and every thread moves one s2d block of the next step, group by group: global memory to registers before a part
      // of the k steps, to shared memory after it.
      float sums[2][kTile / 8][4];
      uint32_t fragments[2][2][4];
      uint16_t loaded[2][8];
#pragma unroll
      for (int i = 0; i < 2; ++i) load_fragment<T, kChannels, 0>(rows, offsets[i], fragments[0][i]);
      unroll<kGroups>([&](auto p) {
        constexpr int kGroup = decltype(p)::value;
        constexpr int kBegin = kGroup * kSteps / kGroups, kEnd = (kGroup + 1) * kSteps / kGroups;
        load_group<kChannels, kNhwc, kGroup>(b, source.image, source.y, source.x, loaded[p % 2]);
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
        if constexpr (kGroup > 0) store_group(next + (kGroup - 1) * (kBandStride / 2), loaded[(p + 1) % 2]);
      });
      store_group(next + (kGroups - 1) * (kBandStride / 2), loaded[(kGroups - 1) % 2]);
      gpu::wgmma_wait<0>();
#pragma unroll
      for (int i = 0; i < 2; ++i) gpu::wgmma_fence_accumulators(sums[i]);
      slot = (slot + 1) % 3;

      // Normalise rows in registers and pool them vertically; maxima go to shared memory.
#pragma unroll
      for (int first = 0; first < kStepRows; first += kRowsAtOnce) {
        const int row = 2 * band.first + step * kStepRows + first;
        gpu::warpgroup_barrier();
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (!active[i]) continue;
          const int column = 32 * i + warp * 8 + lane / 4;
#pragma unroll
          for (int r = first; r < first + kRowsAtOnce; ++r) {
            const Saved saved(a, b, band, row + r - first);
            normalise_row<T, kTile>(
                sums[i], r, L::bias(), lrn,
                [&](int j, const uint32_t (&words)[4]) { saved.put(group, j, column, words); },
                [&](int j, const float* v) { windows[i].add_row(r, j, v, group, column); });
          }
        }
        gpu::warpgroup_barrier();
        Saved(a, b, band, row).template copy<kGroupThreads>(group);
      }

      // Pool horizontally: a row of maxima from shared memory to y.
      const int row = band.first + step - 1;
      if (row >= band.first && row < band.end)
        pool_columns<T, L, kNhwc, kSave, kGroupThreads>(group, b, band, row, y, code);
    }
    slot = (slot + 1) % 3;  // the next job's first pair follows this one's last
  }
#else
  __trap();  // never launched on other architectures
#endif
}

}  // namespace

gpu::error_t launch_conv2d_relu_lrn_max_pool2d_wgmma(const BlockArguments& args, int multiprocessors,
                                                     gpu::stream_t stream) {
  const Bands bands = bands_of(args, 2 * multiprocessors, kStepRows);
  return launch_block<false>(args, multiprocessors, bands, stream, [](auto type, auto layout, auto nhwc, auto save) {
    return block_wgmma_kernel<typename decltype(type)::type, decltype(layout), decltype(nhwc)::value,
                              decltype(save)::value>;
  });
}

}  // namespace alexnet_cuda
