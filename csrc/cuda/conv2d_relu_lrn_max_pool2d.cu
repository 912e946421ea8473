// AlexNet's whole first block on tensor cores by mma.sync; conv2d_relu_lrn_max_pool2d.h says how.
//
// A step makes 4 rows of up to 56 columns: a warp has all filters of 4 x 8 pixels, the eighth warp has none. It finds
// the maxima over rows 0-2 (pooled row 2 s) and over row 0 and the last two rows of the step before (pooled row
// 2 s - 1).
#include "conv2d_relu_lrn_max_pool2d.h"

namespace alexnet_cuda {
namespace {

constexpr int kStepRows = 4;  // outputs of a step; a thread stages one cell of as many new rows
static_assert(kThreads == kStepRows * kRowCells && kCellRows == kStepRows + 2);
static_assert(kColumns + 2 <= kRowCells && kColumns / 8 < kThreads / 32);

// One of the plan's steps for 4 x 8 pixels: `cells` is where this lane's rows for ldmatrix begin.
template <class T, int kChannels, int kTile, int kStep>
GPU_DEVICE void multiply(gpu::shared<uint16_t> cells, gpu::shared<uint32_t> weights, float (&sums)[2][kTile / 8][4]) {
  constexpr Slab low = kPlan<kChannels>.slabs[2 * kStep], high = kPlan<kChannels>.slabs[2 * kStep + 1];
  constexpr int kLow = low.plane * kStepPlane + (low.by * kRowCells + low.bx) * 8;
  constexpr int kHigh = high.plane * kStepPlane + (high.by * kRowCells + high.bx) * 8;
  const gpu::shared<uint16_t> slabs = cells + (threadIdx.x % 32 < 16 ? kLow : kHigh);
  uint32_t a[2][4];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    gpu::ldmatrix_x4(a[i], slabs + i * 2 * kRowCells * 8);
    if constexpr (low.mask != 0xff) clear_unneeded<T>(low.mask, a[i][0], a[i][1]);
    if constexpr (high.mask != 0xff) clear_unneeded<T>(high.mask, a[i][2], a[i][3]);
  }
#pragma unroll
  for (int pair = 0; pair < kTile / 16; ++pair) {
    const gpu::Quad<uint32_t> b = gpu::load4(weights + (kStep * (kTile / 16) + pair) * 128);
    const uint32_t even[2] = {b.v[0], b.v[1]}, odd[2] = {b.v[2], b.v[3]};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      gpu::mma_m16n8k16<T>(sums[i][2 * pair], a[i], even);
      gpu::mma_m16n8k16<T>(sums[i][2 * pair + 1], a[i], odd);
    }
  }
}

template <class T, class L, bool kLast, bool kSave>
__global__ void __launch_bounds__(kThreads, 1)
    block_kernel(const uint16_t* __restrict__ x, const uint32_t* __restrict__ packed, const T* __restrict__ bias,
                 uint16_t* __restrict__ y, uint16_t* __restrict__ a, uint8_t* __restrict__ code, Bands b, LrnArgs lrn) {
  constexpr int kChannels = L::kChannels, kTile = L::kTile;
  constexpr int kSteps = kPlan<kChannels>.steps, kPlanes = 2 * kChannels;
  // Shuffled, so that the compiler knows it to be the same in all lanes.
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x / 32), 0), lane = threadIdx.x % 32, quad = lane % 4;
  const int plane = b.out_height * b.out_width, pooled_plane = b.pool_height * b.pool_width;
  const int column = warp * 8 + lane / 4;
  const bool live = warp * 8 < b.out_width;

  // Rows of a job's cells, beginning with the first, by `threads` threads.
  const auto stage_rows = [&](gpu::shared<uint32_t> to, int job, int rows, int thread, int threads) {
    for (int i = thread; i < rows * kRowCells; i += threads)
      b.stage<kChannels, kLast>(b.cell<kChannels>(x, job, i / kRowCells, i % kRowCells), to + i * 4);
  };

  for (int i = threadIdx.x; i < L::kCellsAt / 4; i += kThreads)
    gpu::cp_async16(L::weights() + 4 * i, packed + 4 * i, true);
  gpu::cp_async_commit();
  load_biases<L>(bias);
  stage_rows(L::cells(0), blockIdx.x, kCellRows, threadIdx.x, kThreads);
  gpu::cp_async_wait<0>();
  __syncthreads();

  int buffer = 0;
  Windows<L, kSave> windows;
  for (int job = blockIdx.x; job < b.jobs; job += gridDim.x) {
    const Bands::Band band = b.band(job);
    for (int step = 0; step < b.steps; ++step) {
      // The next step's cells: its first two rows are this step's last two, unless another band begins. Then the
      // warp without pixels, which has time, loads them. All warps load the other four while they multiply.
      const bool last_step = step + 1 == b.steps;
      const int next_job = last_step ? job + gridDim.x : job, next_row = last_step ? 2 : step * kStepRows + kCellRows;
      const gpu::shared<uint32_t> cells = L::cells(buffer), next = L::cells(buffer ^ 1);
      if (last_step) {
        if (warp == kColumns / 8) stage_rows(next, next_job, 2, lane, 32);
      } else if (threadIdx.x < 2 * kRowCells) {
#pragma unroll
        for (int p = 0; p < kPlanes; ++p) {
          const int at = p * (kStepPlane / 2) + threadIdx.x * 4;
          gpu::store4(next + at, gpu::load4(cells + (at + kStepRows * kRowCells * 4)));
        }
      }
      const Bands::Cell cell =
          b.cell<kChannels>(x, next_job, next_row + threadIdx.x / kRowCells, threadIdx.x % kRowCells);

      float sums[2][kTile / 8][4] = {};
      const gpu::shared<uint16_t> mine =
          gpu::shared_cast<uint16_t>(cells) + (lane / 8 % 2 * kRowCells + warp * 8 + lane % 8) * 8;
      unroll<kPlanes>([&](auto p) {
        constexpr int kPlaneIndex = decltype(p)::value;
        constexpr int kBegin = kPlaneIndex * kSteps / kPlanes, kEnd = (kPlaneIndex + 1) * kSteps / kPlanes;
        uint16_t v[8];
        b.load_plane<kChannels, kLast, kPlaneIndex>(cell, v);
        if (live)
          unroll<kEnd - kBegin>([&](auto s) {
            multiply<T, kChannels, kTile, kBegin + decltype(s)::value>(mine, L::weights() + lane * 4, sums);
          });
        store_cell(next + (kPlaneIndex * (kStepPlane / 2) + (2 * kRowCells + threadIdx.x) * 4), v);
      });
      buffer ^= 1;

      __syncthreads();
      if (live) {
#pragma unroll
        for (int r = 0; r < kStepRows; ++r) {
          const int row = 2 * band.first + step * kStepRows + r;
          uint16_t* const save = kSave ? b.saved<kTile, kLast>(a, band, row, column) : nullptr;
          finish_row<T, kTile, kLast>(sums[r / 2], r % 2, L::biases(), save, plane, lrn, [&](int j, const float* v) {
            const int channel = 32 * j + 8 * quad;
            if (r % 2 == 0)
              windows.end(j, v, L::maxima(r / 2) + (column * L::kColumn + channel),
                          L::maximum_rows(r / 2) + (column * kTile + channel));
            else
              windows.middle(j, v);
          });
        }
      }
      __syncthreads();

#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = 2 * step - 1 + band.first + i;
        if (row >= band.first && row < band.end)
          pool_across<T, L, kLast, kSave, kThreads>(L::maxima(i), L::maximum_rows(i), b, row,
                                                    y + band.image * kTile * pooled_plane,
                                                    kSave ? code + band.image * kTile * pooled_plane : nullptr);
      }
    }
  }
}

}  // namespace

// ---- host ----------------------------------------------------------------------------------------------------------

int conv2d_relu_lrn_max_pool2d_bytes(const Conv& conv) {
  return dispatch_layout(conv, [](auto layout) { return decltype(layout)::kBytes; });
}

bool fuses_conv2d_relu_lrn_max_pool2d(DType dtype, const Conv& conv, const Lrn& lrn, const Pool& pool, Order order,
                                      int shared_memory_optin) {
  const auto inside = [](int64_t out, int64_t size) { return out > 0 && 2 * out + 1 <= size; };
  // 96 filters of 4 channels would need 247 KB of shared memory, more than any GPU has.
  return on_tensor_cores(dtype) && is_alexnet(conv) &&
         (conv.filters == 64 || (conv.filters == 96 && conv.channels < 4)) && conv.out_width <= kColumns &&
         order == kReluLrnPool && is_alexnet(lrn) && lrn.groups == 1 && pool.kernel_size == 3 && pool.stride == 2 &&
         pool.padding == 0 && inside(pool.out_height, pool.height) && inside(pool.out_width, pool.width) &&
         conv2d_relu_lrn_max_pool2d_bytes(conv) <= shared_memory_optin;
}

gpu::error_t launch_conv2d_relu_lrn_max_pool2d(const Images& images, const void* x, const void* weight,
                                               const void* bias, void* y, void* a, uint8_t* code, const Conv& conv,
                                               const Lrn& lrn, const Pool& pool, int processors, float* workspace,
                                               gpu::stream_t stream) {
  const gpu::error_t error = pack_conv2d_weight(images.dtype, weight, conv, workspace, stream);
  if (error != gpu::kSuccess) return error;
  const Bands bands = bands_of(images, conv, pool, processors, kStepRows);
  return dispatch_block(images, conv, code != nullptr, [&](auto type, auto layout, auto last, auto save) {
    using T = typename decltype(type)::type;
    return gpu::launch(block_kernel<T, decltype(layout), decltype(last)::value, decltype(save)::value>,
                       dim3(std::min(bands.jobs, processors)), dim3(kThreads), decltype(layout)::kBytes, stream,
                       static_cast<const uint16_t*>(x), reinterpret_cast<const uint32_t*>(workspace),
                       static_cast<const T*>(bias), static_cast<uint16_t*>(y), static_cast<uint16_t*>(a), code, bands,
                       LrnArgs(lrn));
  });
}

}  // namespace alexnet_cuda
