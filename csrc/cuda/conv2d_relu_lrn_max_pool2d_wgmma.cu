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
constexpr int kRows = 2;  // outputs of a step; a thread stages one cell of as many new rows
static_assert(kThreads == 2 * kGroupThreads && kGroupThreads == kRows * kRowCells && kCellRows == 3 * kRows);

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
  const gpu::shared<uint32_t> shared = gpu::dynamic_shared<uint32_t>();
  const gpu::shared<uint32_t> cells = shared + (L::kCells + group * L::kBuffer);
  const gpu::shared<float> maxima = gpu::shared_cast<float>(shared + L::kMaxima) + group * kColumns * L::kColumn;
  const gpu::shared<uint8_t> maximum_rows =
      gpu::shared_cast<uint8_t>(shared + L::kMaximumRows) + group * kColumns * kTile;
  const gpu::shared<float> biases = gpu::shared_cast<float>(shared + L::kBias);

  // Weights as wgmma wants them: [step][slab][filter][8].
#pragma unroll
  for (int i = threadIdx.x; i < L::kCells / 4; i += kThreads) {
    const gpu::Quad<uint32_t> words = packed[i];
    const int pair = i / 32 % (kTile / 16), step = i / (2 * kTile);
#pragma unroll
    for (int k = 0; k < 4; ++k) shared[(2 * step + k % 2) * 4 * kTile + (2 * pair + k / 2) * 32 + lane] = words.v[k];
  }
  if (threadIdx.x < kTile) biases[threadIdx.x] = bias ? gpu::to_float(bias[threadIdx.x]) : 0.f;
  gpu::fence_proxy_async();
  __syncthreads();
  const uint64_t weights = gpu::wgmma_descriptor(gpu::shared_address(shared), 16 * kTile, 128);

  // This thread's cell of a pair of a job's rows, and where it goes.
  const auto cell_of = [&](int job, int pair) {
    return b.cell<kChannels>(x, job, kRows * pair + thread / kRowCells, thread % kRowCells);
  };
  const auto place_of = [&](int slot) { return cells + (slot % 3 * (kRows * kRowCells) + thread) * 4; };
  const auto stage = [&](int job, int pair, int slot) {
    const Bands::Cell cell = cell_of(job, pair);
    unroll<kPlanes>([&](auto p) {
      uint16_t v[8];
      load_cell<kChannels, kLast, decltype(p)::value>(cell.image, b.height, b.width, cell.y, cell.x, v);
      store_cell(place_of(slot) + p * (kStepPlane / 2), v);
    });
  };

  const bool live[2] = {warp * 8 < b.out_width, warp * 8 + 32 < b.out_width};
  const int offsets[2] = {live[0] ? warp * 8 * 8 : 0, live[1] ? (warp * 8 + 32) * 8 : 0};
  float carried[2][kTile / 4] = {};  // the maxima of these columns' last two rows
  uint32_t carried_rows[2] = {};     // a bit for each: it was the second row
  int slot = 0;                      // of the step's first pair
  const int workers = 2 * gridDim.x;
  int job = group * gridDim.x + blockIdx.x;
  stage(job, 0, slot);
  for (; job < b.jobs; job += workers) {
    const int64_t image = job / b.bands;
    const int band = job % b.bands, first = band * b.rows, end = min(first + b.rows, b.pool_height);
    stage(job, 1, slot + 1);
    gpu::warpgroup_barrier();
    for (int step = 0; step < b.steps; ++step) {
      const bool last_step = step + 1 == b.steps;
      const Bands::Cell cell = last_step ? cell_of(job + workers, 0) : cell_of(job, step + 2);
      const gpu::shared<uint32_t> next = place_of(slot + 2);
      const auto row_of = [&](int by) {
        const int row = by + lane / 8 % 2;
        return gpu::shared_cast<uint16_t>(cells) +
               (((slot + row / 2) % 3 * kRows + row % 2) * kRowCells + lane % 8) * 8;
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
        load_cell<kChannels, kLast, kPlaneIndex>(cell.image, b.height, b.width, cell.y, cell.x, loaded[p % 2]);
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
      slot = (slot + 1) % 3;

      gpu::warpgroup_barrier();
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (!live[i]) continue;
        const int column = 32 * i + warp * 8 + lane / 4;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const int row = 2 * first + step * kRows + r;  // the rows that two bands make belong to the second
          const bool saves = column < b.out_width && row < (band + 1 == b.bands ? b.out_height : 2 * end);
          const int pixel = row * b.out_width + column;
          uint16_t* const save = kSave && saves ? a + (image * kTile * plane + pixel * (kLast ? kTile : 1)) : nullptr;
          finish_row<T, kTile, kLast>(sums[i], r, biases, save, plane, lrn, [&](int j, const float* values) {
            Best<kSave> best[kRun];
#pragma unroll
            for (int k = 0; k < kRun; ++k) {
              float& two = carried[i][8 * j + k];
              const int which = 8 * j + k;
              if (r == 0) {
                best[k].begin(two, static_cast<int>(carried_rows[i] >> which & 1));
                best[k].offer(values[k], 2);
                two = values[k];
              } else {
                best[k].begin(two, 0);
                best[k].offer(values[k], 1);
                two = best[k].value;
                carried_rows[i] = (which == 0 ? 0 : carried_rows[i]) | static_cast<uint32_t>(best[k].code) << which;
              }
            }
            const int channel = 32 * j + 8 * quad;
            if (r == 0)
              store_maxima<kSave>(maxima + (column * L::kColumn + channel), maximum_rows + (column * kTile + channel),
                                  best);
          });
        }
      }
      gpu::warpgroup_barrier();

      const int row = first + step - 1;
      if (row >= first && row < end)
        pool_across<T, L, kLast, kSave, kGroupThreads>(maxima, maximum_rows, b, row, y + image * kTile * pooled_plane,
                                                       kSave ? code + image * kTile * pooled_plane : nullptr);
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
  const Bands bands = bands_of(images, conv, pool, 2 * processors, kRows);
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
