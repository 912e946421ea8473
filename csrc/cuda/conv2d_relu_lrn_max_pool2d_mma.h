// AlexNet's whole first block on tensor cores by mma.sync: the kernel of conv2d_relu_lrn_max_pool2d.cu and, in a form
// that needs less shared memory, of conv2d_relu_lrn_max_pool2d_streamed.cu. conv2d_relu_lrn_max_pool2d.h explains the
// method.
//
// A step makes 4 rows of up to 56 outputs: a warp has all filters of 4 x 8 pixels, the eighth warp has none. It finds
// the maxima over rows 0-2 of the step (pooled row 2 s) and over the last two rows of the previous step and row 0
// (pooled row 2 s - 1). The s2d blocks of a step are 6 rows.
//
// What overlaps with the products of a step, which the channel groups of the next step's s2d blocks cut into six parts:
//
//   mma.sync            | part 0   | part 1   | ..  | part 5   |
//   memory to registers | group 0  | group 1  | ..  | group 5  |
//   to shared memory    |          | group 0  | ..  | group 4  | group 5, then maxima
//   to memory           |          |          |     |          | `a`, y, code
//
//   resident weights: s2d blocks lie in two buffers, a step reads one and fills the other
//   streamed weights: there is one buffer of s2d blocks; those of the next step wait in the place of the maxima until
//                     the products are done. Weights come anew at every step, from L2, a slice while the slice before
//                     is multiplied. Pooled rows take turns with the one row of maxima.
#pragma once

#include "conv2d_relu_lrn_max_pool2d.h"

namespace alexnet_cuda {
namespace {

constexpr int kStepRows = 4;  // rows of outputs per step; every thread stages one s2d block of the new rows
static_assert(kThreads == kStepRows * kRowBlocks && kBlockRows == kStepRows + 2);
static_assert(kMaxColumns + 2 <= kRowBlocks && kMaxColumns / 8 < kThreads / 32);

// One k step for 4 x 8 pixels; both operands come from shared memory. `blocks`: where this lane's rows for ldmatrix
// are.
template <class T, int kChannels, int kTile, int kStep>
GPU_DEVICE void multiply(gpu::shared<uint16_t> blocks, gpu::shared<uint32_t> weights, float (&sums)[2][kTile / 8][4]) {
  constexpr KSlice low = kSchedule<kChannels>.slices[2 * kStep], high = kSchedule<kChannels>.slices[2 * kStep + 1];
  constexpr int kLow = low.group * kBandStride + (low.by * kRowBlocks + low.bx) * 8;
  constexpr int kHigh = high.group * kBandStride + (high.by * kRowBlocks + high.bx) * 8;
  const gpu::shared<uint16_t> slices = blocks + (threadIdx.x % 32 < 16 ? kLow : kHigh);
  uint32_t a[2][4];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    gpu::ldmatrix_x4(a[i], slices + i * 2 * kRowBlocks * 8);
    if constexpr (low.mask != 0xff) mask_fragment<T>(low.mask, a[i][0], a[i][1]);
    if constexpr (high.mask != 0xff) mask_fragment<T>(high.mask, a[i][2], a[i][3]);
  }
#pragma unroll
  for (int pair = 0; pair < kTile / 16; ++pair) {
    const gpu::Vec4<uint32_t> b = gpu::load4(weights + (kStep * (kTile / 16) + pair) * 128);
    const uint32_t even[2] = {b.v[0], b.v[1]}, odd[2] = {b.v[2], b.v[3]};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      gpu::mma_m16n8k16<T>(sums[i][2 * pair], a[i], even);
      gpu::mma_m16n8k16<T>(sums[i][2 * pair + 1], a[i], odd);
    }
  }
}

// Whether a GPU that can run machine code for `architecture` takes this layout: resident weights if they fit shared
// memory, else streamed ones. A thread block may have 163 KB on 8.0 and 8.7, 99 KB on 8.6, 8.9 and 12.x, 227 KB on 9.0
// and 10.x; code for 8.0 also runs on 8.6 and 8.9.
template <class L, bool kSavesNchw>
constexpr bool is_launched(int architecture) {
  const bool has_163 = architecture == 800 || architecture == 870, has_227 = architecture >= 900 && architecture < 1200;
  const int most = (has_227 ? 227 : has_163 ? 163 : 99) << 10, least = architecture == 800 ? 99 << 10 : most;
  constexpr int kBytes = Layout<L::kChannels, L::kTile, false>::template kBytes<kSavesNchw>;
  return L::kStreams ? kBytes > least : kBytes <= most;
}

// Warp w has columns 8 w .. 8 w + 7 of the step's 4 rows as two fragments of 16 pixels, two rows each; lane l holds
// column l / 4 of all of them and, of every 32 filters, 8 from 8 (l % 4) on. A k step takes a warp two ldmatrix and
// kTile / 16 loads of weights, each of 512 bytes without bank conflicts, for kTile / 4 products. For 96 filters, seven
// warps read 28 KB, 224 cycles at 128 bytes each; their 168 products take an A100 336 cycles.
template <class T, class L, bool kNhwc, bool kSave>
__global__ void __launch_bounds__(kThreads, 1)
    block_kernel(const uint16_t* __restrict__ x, const uint32_t* __restrict__ packed, const T* __restrict__ bias,
                 uint16_t* __restrict__ y, uint16_t* __restrict__ a, uint8_t* __restrict__ code, Bands b,
                 LrnConstants lrn) {
#if defined(ALEXNET_CUDA_WITHOUT_PTX) && defined(__CUDA_ARCH__)  // PTX may run on any GPU
  constexpr bool kSavesNchw = kSave && !kNhwc;
  if constexpr (!is_launched<L, kSavesNchw>(__CUDA_ARCH__)) {
    __trap();
    return;  // no machine code for the rest
  }
#endif
  constexpr int kChannels = L::kChannels, kTile = L::kTile, kSteps = L::kSteps, kGroups = L::kGroups;
  using Saved = SavedRow<L, kNhwc, kSave>;
  // Rows that are normalised before they are pooled and `a` is copied: as many as there is room for.
  constexpr int kRowsAtOnce = L::kBuffers * (Saved::kStages ? 1 : 2);
  // The shuffle tells the compiler that it is the same in all lanes.
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x / 32), 0);
  const int lane = threadIdx.x % 32, column = warp * 8 + lane / 4;
  const bool active = warp * 8 < b.out_width;

  // Moves the first rows of a job's s2d blocks to shared memory, by `threads` threads.
  const auto stage_rows = [&](gpu::shared<uint32_t> to, int job, int rows, int thread, int threads) {
    for (int i = thread; i < rows * kRowBlocks; i += threads)
      b.stage<kChannels, kNhwc>(b.source<kChannels>(x, job, i / kRowBlocks, i % kRowBlocks), to + i * 4);
  };

  // Starts to move the weights of k steps to shared memory.
  const auto load_weights = [&](gpu::shared<uint32_t> to, int begin, int end) {
    for (int i = threadIdx.x; i < (end - begin) * L::kStepWords / 4; i += kThreads)
      gpu::cp_async16(to + 4 * i, packed + (begin * L::kStepWords + 4 * i), true);
    gpu::cp_async_commit();
  };

  // Once per thread block: weights (or their first slice), bias and the first s2d blocks to shared memory.
  load_weights(L::weights(), 0, L::kStreams ? kSteps / kGroups : kSteps);
  load_bias<L>(bias);
  stage_rows(L::blocks(0), blockIdx.x, kBlockRows, threadIdx.x, kThreads);
  gpu::cp_async_wait<0>();
  __syncthreads();

  int buffer = 0;
  Windows<L, kSave> windows;
  for (int job = blockIdx.x; job < b.jobs; job += gridDim.x) {
    const Bands::Band band = b.band(job);
    for (int step = 0; step < b.steps; ++step) {
      // The first two of the next step's six rows of s2d blocks are this step's last two: they are copied within
      // shared memory, unless another band begins; then they are loaded, by the warp without pixels if that overlaps
      // with products.
      const bool last_step = step + 1 == b.steps;
      const int next_job = last_step ? job + gridDim.x : job, next_row = last_step ? 2 : step * kStepRows + kBlockRows;
      const gpu::shared<uint32_t> blocks = L::blocks(buffer);
      const gpu::shared<uint32_t> next = L::blocks(L::kStreams ? 0 : buffer ^ 1);
      const auto copy_rows = [&](unsigned thread) {
        if (last_step || thread >= 2 * kRowBlocks) return;
#pragma unroll
        for (int p = 0; p < kGroups; ++p) {
          const int at = p * (kBandStride / 2) + thread * 4;
          gpu::store4(next + at, gpu::load4(blocks + (at + kStepRows * kRowBlocks * 4)));
        }
      };
      if constexpr (!L::kStreams) {
        copy_rows(threadIdx.x);
        if (last_step && warp == kMaxColumns / 8) stage_rows(next, next_job, 2, lane, 32);
      }

      // Multiply. In between, every thread loads one s2d block of the other four rows: a channel group from global
      // memory before a part of the k steps, to shared memory after it.
      const Bands::Source source =
          b.source<kChannels>(x, next_job, next_row + threadIdx.x / kRowBlocks, threadIdx.x % kRowBlocks);
      const gpu::shared<uint32_t> mine_of_next = next + (2 * kRowBlocks + threadIdx.x) * 4;
      const gpu::shared<uint32_t> waiting = L::waiting() + threadIdx.x * 4;
      float sums[2][kTile / 8][4] = {};
      // Rows of ldmatrix: lane l addresses row l / 8 % 2 and column l % 8 of the warp's pixels.
      const gpu::shared<uint16_t> mine =
          gpu::shared_cast<uint16_t>(blocks) + (lane / 8 % 2 * kRowBlocks + warp * 8 + lane % 8) * 8;
      unroll<kGroups>([&](auto p) {
        constexpr int kGroup = decltype(p)::value;
        constexpr int kBegin = kGroup * kSteps / kGroups, kEnd = (kGroup + 1) * kSteps / kGroups;
        uint16_t v[8];
        load_group<kChannels, kNhwc, kGroup>(b, source.image, source.y, source.x, v);
        gpu::shared<uint32_t> weights = L::weights();
        if constexpr (L::kStreams) {
          // The weights of this part of the k steps are there, those of the part before are not needed any more.
          constexpr int kNext = (kGroup + 1) % kGroups;
          gpu::cp_async_wait<0>();
          __syncthreads();
          load_weights(L::slice(kNext), kNext * kSteps / kGroups, (kNext + 1) * kSteps / kGroups);
          weights = L::slice(kGroup) + -kBegin * L::kStepWords;
        }
        if (active)
          unroll<kEnd - kBegin>([&](auto s) {
            multiply<T, kChannels, kTile, kBegin + decltype(s)::value>(mine, weights + lane * 4, sums);
          });
        store_group(L::kStreams ? waiting + kGroup * kThreads * 4 : mine_of_next + kGroup * (kBandStride / 2), v);
      });
      __syncthreads();
      if constexpr (L::kStreams) {
        copy_rows(threadIdx.x - 2 * kRowBlocks);  // of the blocks that this thread overwrites
#pragma unroll
        for (int p = 0; p < kGroups; ++p)
          gpu::store4(mine_of_next + p * (kBandStride / 2), gpu::load4(waiting + p * kThreads * 4));
        if (last_step) stage_rows(next, next_job, 2, threadIdx.x, kThreads);
        __syncthreads();
      } else {
        buffer ^= 1;
      }

      // Normalise rows in registers and pool them vertically; maxima go to shared memory. After a barrier pool
      // horizontally: a row of maxima from shared memory to y.
#pragma unroll
      for (int first = 0; first < kStepRows; first += kRowsAtOnce) {
        const int first_row = 2 * band.first + step * kStepRows;
        if (first > 0) __syncthreads();
        if (active) {
#pragma unroll
          for (int r = first; r < first + kRowsAtOnce; ++r) {
            const Saved saved(a, b, band, first_row + r);
            normalise_row<T, kTile>(
                sums[r / 2], r % 2, L::bias(), lrn,
                [&](int j, const uint32_t (&words)[4]) { saved.put(r % L::kBuffers, j, column, words); },
                [&](int j, const float* v) { windows.add_row(r, j, v, r / 2 % L::kBuffers, column); });
          }
        }
        __syncthreads();
#pragma unroll
        for (int r = first; r < first + kRowsAtOnce; ++r) {
          const int row = 2 * step - 1 + band.first + r / 2;
          Saved(a, b, band, first_row + r).template copy<kThreads>(r % L::kBuffers);
          if (r % 2 == 0 && row >= band.first && row < band.end)
            pool_columns<T, L, kNhwc, kSave, kThreads>(r / 2 % L::kBuffers, b, band, row, y, code);
        }
      }
    }
  }
  if constexpr (L::kStreams) gpu::cp_async_wait<0>();  // of the slice that the last step asked for
}

template <bool kStreams>
gpu::error_t launch_block_mma(const BlockArguments& args, int multiprocessors, gpu::stream_t stream) {
  const Bands bands = bands_of(args, multiprocessors, kStepRows);
  return launch_block<kStreams>(args, multiprocessors, bands, stream, [](auto type, auto layout, auto nhwc, auto save) {
    return block_kernel<typename decltype(type)::type, decltype(layout), decltype(nhwc)::value, decltype(save)::value>;
  });
}

}  // namespace
}  // namespace alexnet_cuda
