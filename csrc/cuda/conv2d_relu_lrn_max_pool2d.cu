// AlexNet's whole first block in one kernel: convolution on tensor cores, ReLU, normalisation and max pooling.
//
// slabs.h says how the convolution becomes a product of matrices, and conv2d_mma.cu in which order weights are packed.
// Here the weights stay in shared memory, one block per SM goes through its images (or bands of them), and what the
// pooling needs never reaches global memory.
//
// A step makes 4 rows of up to 56 columns: a warp has all filters of 4 x 8 pixels, the eighth warp has none. The rows
// of an mma fragment are chosen such that a lane holds one column's 4 rows, so that it can pool vertically on its own.
// The four lanes of a column hold runs of 8 channels and pass each other what the normalisation needs of the next run.
//
//   1. sums = cells x weights; meanwhile the cells of the next step are loaded, a plane at a time
//   2. a = sums + bias, rounded (and saved); normalised; its maxima over rows 0-2 (pooled row 2 s) and over row 0 and
//      the last two rows of the step before (pooled row 2 s - 1) go to shared memory, as floats
//   3. maxima over three columns, written out
//
// with barriers between 1 and 2 (the maxima of the last step have been read) and between 2 and 3.
#include "lrn.h"
#include "pool.h"
#include "slabs.h"

namespace alexnet_cuda {
namespace {

constexpr int kRows = 4, kColumns = 56;                    // outputs of a step
constexpr int kRowCells = 64, kStepCells = 6 * kRowCells;  // a thread stages one cell of 4 new rows
constexpr int kStepPlane = 8 * kStepCells;                 // 16-bit words
static_assert(kThreads == kRows * kRowCells && kColumns + 2 <= kRowCells && kColumns / 8 < kThreads / 32);

struct Bands {
  int height, width, padding, out_height, out_width, pool_height, pool_width;
  int jobs, bands, rows, steps;  // a job is a band of an image: `rows` pooled rows (the last may have fewer)
};

template <int kChannels_, int kTile_>
struct Layout {  // of shared memory, in 32-bit words
  static constexpr int kChannels = kChannels_, kTile = kTile_;
  static constexpr int kBuffer = 2 * kChannels * kStepPlane / 2;
  static constexpr int kColumn = kTile + 4;  // floats from one column's maxima to the next's: no bank conflicts
  static constexpr int kCells = kPlan<kChannels>.steps * kTile * 8, kMaxima = kCells + 2 * kBuffer;
  static constexpr int kMaximumRows = kMaxima + 2 * kColumns * kColumn, kBias = kMaximumRows + kColumns * kTile / 2;
  static constexpr int kBytes = 4 * (kBias + kTile);
};

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

// Maxima over three rows of 8 channels of a column, and with kSave in which row each is.
template <bool kSave>
using Best = std::conditional_t<kSave, Maximum, Greatest>;
template <bool kSave>
GPU_DEVICE void store_maxima(gpu::shared<float> to, gpu::shared<uint8_t> rows, const Best<kSave>* best) {
#pragma unroll
  for (int k = 0; k < 8; k += 4) {
    gpu::store4(to + k, gpu::Quad<float>{best[k].value, best[k + 1].value, best[k + 2].value, best[k + 3].value});
    if constexpr (kSave) {
      gpu::Quad<uint8_t> quad;
#pragma unroll
      for (int i = 0; i < 4; ++i) quad.v[i] = static_cast<uint8_t>(best[k + i].code);
      gpu::store4(rows + k, quad);
    }
  }
}

// Maxima over three columns of two rows of maxima: pooled rows py and py + 1, as far as they lie in [first, end).
template <class T, class L, bool kLast, bool kSave>
GPU_DEVICE void pool_across(gpu::shared<float> maxima, gpu::shared<uint8_t> maximum_rows, const Bands& b, int py,
                            int first, int end, uint16_t* y, uint8_t* code) {
  // Four channels of a pooled pixel at a time: lanes take neighbours in memory.
  constexpr int kTile = L::kTile, kAcross = kLast ? kTile / 4 : 2, kAlong = kLast ? 1 : 16;
  constexpr int kGroups = kTile / 4 / kAcross;
  const int blocks = divide_up(b.pool_width, kAlong), plane = b.pool_height * b.pool_width;
  for (int i = threadIdx.x; i < 2 * blocks * kGroups * kAlong * kAcross; i += kThreads) {
    const int rest = i / (kAcross * kAlong), block = rest / kGroups, which = block >= blocks, row = py + which;
    const int column = (block - which * blocks) * kAlong + i / kAcross % kAlong;
    const int channel = (rest % kGroups * kAcross + i % kAcross) * 4;
    if (column >= b.pool_width || row < first || row >= end) continue;
    Best<kSave> best[4];
#pragma unroll
    for (int dx = 0; dx < 3; ++dx) {
      const int from = which * kColumns + 2 * column + dx;
      const gpu::Quad<float> v = gpu::load4(maxima + (from * L::kColumn + channel));
      gpu::Quad<uint8_t> rows = {};
      if constexpr (kSave) rows = gpu::load4(maximum_rows + (from * kTile + channel));
#pragma unroll
      for (int k = 0; k < 4; ++k) best[k].offer_unordered(v.v[k], rows.v[k] * 3 + dx);
    }
    const uint32_t words[2] = {gpu::pack<T>(best[0].value, best[1].value), gpu::pack<T>(best[2].value, best[3].value)};
    gpu::Quad<uint16_t> values;
    memcpy(&values, words, 8);
    gpu::Quad<uint8_t> codes;
#pragma unroll
    for (int k = 0; k < 4; ++k) codes.v[k] = static_cast<uint8_t>(best[k].code);
    const int pixel = row * b.pool_width + column, to = kLast ? pixel * kTile + channel : channel * plane + pixel;
    if constexpr (kLast) {
      *reinterpret_cast<gpu::Quad<uint16_t>*>(y + to) = values;
      if constexpr (kSave) *reinterpret_cast<gpu::Quad<uint8_t>*>(code + to) = codes;
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        y[to + k * plane] = values.v[k];
        if constexpr (kSave) code[to + k * plane] = codes.v[k];
      }
    }
  }
}

template <class T, class L, bool kLast, bool kSave>
__global__ void __launch_bounds__(kThreads, 1)
    block_kernel(const uint16_t* __restrict__ x, const uint32_t* __restrict__ packed, const T* __restrict__ bias,
                 uint16_t* __restrict__ y, uint16_t* __restrict__ a, uint8_t* __restrict__ code, Bands b, LrnArgs lrn) {
  constexpr int kChannels = L::kChannels, kTile = L::kTile;
  constexpr int kSteps = kPlan<kChannels>.steps, kPlanes = 2 * kChannels, kRuns = kTile / 32;
  const gpu::shared<uint32_t> shared = gpu::dynamic_shared<uint32_t>();
  const gpu::shared<float> maxima = gpu::shared_cast<float>(shared + L::kMaxima);
  const gpu::shared<uint8_t> maximum_rows = gpu::shared_cast<uint8_t>(shared + L::kMaximumRows);
  const gpu::shared<float> biases = gpu::shared_cast<float>(shared + L::kBias);
  // Shuffled, so that the compiler knows it to be the same in all lanes.
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x / 32), 0), lane = threadIdx.x % 32, quad = lane % 4;
  const int plane = b.out_height * b.out_width, pooled_plane = b.pool_height * b.pool_width;
  const int column = warp * 8 + lane / 4;
  const bool live = warp * 8 < b.out_width;

  struct Cell {
    const uint16_t* image;
    int y, x;
  };
  const auto cell_of = [&](int job, int row, int cell_column) {
    const int band = job % b.bands, y = 4 * (2 * b.rows * band + row) - b.padding;
    return Cell{x + int64_t{min(job, b.jobs - 1) / b.bands} * kChannels * b.height * b.width,
                job < b.jobs ? y : b.height, 4 * cell_column - b.padding};
  };
  // Rows of a job's cells, beginning with the first, by `threads` threads.
  const auto stage_rows = [&](gpu::shared<uint32_t> to, int job, int rows, int thread, int threads) {
    for (int i = thread; i < rows * kRowCells; i += threads) {
      const Cell cell = cell_of(job, i / kRowCells, i % kRowCells);
      unroll<kPlanes>([&](auto p) {
        uint16_t v[8];
        load_cell<kChannels, kLast, decltype(p)::value>(cell.image, b.height, b.width, cell.y, cell.x, v);
        store_cell(to + (p * (kStepPlane / 2) + i * 4), v);
      });
    }
  };

  for (int i = threadIdx.x; i < L::kCells / 4; i += kThreads) gpu::cp_async16(shared + 4 * i, packed + 4 * i, true);
  gpu::cp_async_commit();
  if (threadIdx.x < kTile) biases[threadIdx.x] = bias ? gpu::to_float(bias[threadIdx.x]) : 0.f;
  stage_rows(shared + L::kCells, blockIdx.x, 6, threadIdx.x, kThreads);
  gpu::cp_async_wait<0>();
  __syncthreads();

  int buffer = 0;
  float carried[kTile / 4] = {};  // the maxima of this column's last two rows
  uint32_t carried_rows = 0;      // a bit for each: it was the second row
  for (int job = blockIdx.x; job < b.jobs; job += gridDim.x) {
    const int64_t image = job / b.bands;
    const int band = job % b.bands, first = band * b.rows, end = min(first + b.rows, b.pool_height);
    for (int step = 0; step < b.steps; ++step) {
      // The next step's cells: its first two rows are this step's last two, unless another band begins. Then the
      // warp without pixels, which has time, loads them. All warps load the other four while they multiply.
      const bool last_step = step + 1 == b.steps;
      const int next_job = last_step ? job + gridDim.x : job, next_row = last_step ? 2 : step * kRows + 6;
      const gpu::shared<uint32_t> cells = shared + (L::kCells + buffer * L::kBuffer);
      const gpu::shared<uint32_t> next = shared + (L::kCells + (buffer ^ 1) * L::kBuffer);
      if (last_step) {
        if (warp == kColumns / 8) stage_rows(next, next_job, 2, lane, 32);
      } else if (threadIdx.x < 2 * kRowCells) {
#pragma unroll
        for (int p = 0; p < kPlanes; ++p) {
          const int at = p * (kStepPlane / 2) + threadIdx.x * 4;
          gpu::store4(next + at, gpu::load4(cells + (at + kRows * kRowCells * 4)));
        }
      }
      const Cell cell = cell_of(next_job, next_row + threadIdx.x / kRowCells, threadIdx.x % kRowCells);

      float sums[2][kTile / 8][4] = {};
      const gpu::shared<uint16_t> mine =
          gpu::shared_cast<uint16_t>(cells) + (lane / 8 % 2 * kRowCells + warp * 8 + lane % 8) * 8;
      unroll<kPlanes>([&](auto p) {
        constexpr int kPlaneIndex = decltype(p)::value;
        constexpr int kBegin = kPlaneIndex * kSteps / kPlanes, kEnd = (kPlaneIndex + 1) * kSteps / kPlanes;
        uint16_t v[8];
        load_cell<kChannels, kLast, kPlaneIndex>(cell.image, b.height, b.width, cell.y, cell.x, v);
        if (live)
          unroll<kEnd - kBegin>([&](auto s) {
            multiply<T, kChannels, kTile, kBegin + decltype(s)::value>(mine, shared + lane * 4, sums);
          });
        store_cell(next + (kPlaneIndex * (kStepPlane / 2) + (2 * kRowCells + threadIdx.x) * 4), v);
      });
      buffer ^= 1;

      __syncthreads();
      if (live) {
        Best<kSave> even[kTile / 4];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          uint32_t words[kRuns][4];
#pragma unroll
          for (int j = 0; j < kRuns; ++j) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const gpu::Quad<float> add = gpu::load4(biases + (32 * j + 8 * quad + 4 * half));
#pragma unroll
              for (int k = 0; k < 2; ++k) {
                const float (&sum)[4] = sums[r / 2][4 * j + 2 * half + k];
                words[j][2 * half + k] =
                    gpu::pack<T>(sum[r % 2 * 2] + add.v[2 * k], sum[r % 2 * 2 + 1] + add.v[2 * k + 1]);
              }
            }
          }
          if constexpr (kSave) {
            const int row = 2 * first + step * kRows + r;  // the rows that two bands make belong to the second
            if (column < b.out_width && row < (band + 1 == b.bands ? b.out_height : 2 * end)) {
              const int pixel = row * b.out_width + column;
              uint16_t* to = a + image * kTile * plane + (kLast ? pixel * kTile + 8 * quad : 8 * quad * plane + pixel);
#pragma unroll
              for (int j = 0; j < kRuns; ++j) {
                if constexpr (kLast) {
                  *reinterpret_cast<gpu::Quad<uint32_t>*>(to + 32 * j) = {words[j][0], words[j][1], words[j][2],
                                                                          words[j][3]};
                } else {
#pragma unroll
                  for (int k = 0; k < 8; ++k)
                    to[(32 * j + k) * plane] = static_cast<uint16_t>(words[j][k / 2] >> 16 * (k % 2));
                }
              }
            }
          }
#pragma unroll
          for (int i = 0; i < 4 * kRuns; ++i) words[i / 4][i % 4] = gpu::max_nan<T>(words[i / 4][i % 4], 0);  // ReLU
#pragma unroll
          for (int j = 0; j < kRuns; ++j) {
            // The first lane's left neighbour has the run before, the last lane's right neighbour the run after.
            const uint32_t to_right = quad < 3 ? words[j][3] : j > 0 ? words[max(j - 1, 0)][3] : 0;
            const uint32_t to_left = quad > 0 ? words[j][0] : j + 1 < kRuns ? words[min(j + 1, kRuns - 1)][0] : 0;
            const uint32_t left = __shfl_sync(~0u, to_right, (quad + 3) % 4, 4);
            const uint32_t right = __shfl_sync(~0u, to_left, (quad + 1) % 4, 4);
            float in[16], out[kRun];
#pragma unroll
            for (int k = 0; k < 12; ++k) {
              const uint32_t word = k < 2 ? left : k < 10 ? words[j][min(max(k / 2 - 1, 0), 3)] : right;
              in[2 + k] = gpu::half_of<T>(word, k % 2);
            }
            normalise_run(in, lrn, out);
            const int at = column * L::kColumn + 32 * j + 8 * quad;
            const gpu::shared<uint8_t> rows = maximum_rows + (column * kTile + 32 * j + 8 * quad);
            Best<kSave> best[kRun];
#pragma unroll
            for (int k = 0; k < kRun; ++k) {
              const int c = 8 * j + k;
              if (r == 0) {
                best[k].begin(carried[c], static_cast<int>(carried_rows >> c & 1));
                best[k].offer(out[k], 2);
              }
              if (r == 0) even[c].begin(out[k], r);
              if (r == 1 || r == 2) even[c].offer(out[k], r);
              if (r == 2) carried[c] = out[k];
              if (r == 3) {
                Best<kSave> two;
                two.begin(carried[c], 0);
                two.offer(out[k], 1);
                carried[c] = two.value;
                carried_rows = (c == 0 ? 0 : carried_rows) | static_cast<uint32_t>(two.code) << c;
              }
            }
            if (r == 0) store_maxima<kSave>(maxima + at, rows, best);
            if (r == 2)
              store_maxima<kSave>(maxima + (kColumns * L::kColumn + at), rows + kColumns * kTile, even + 8 * j);
          }
        }
      }
      __syncthreads();

      pool_across<T, L, kLast, kSave>(maxima, maximum_rows, b, 2 * step - 1 + first, first, end,
                                      y + image * kTile * pooled_plane,
                                      kSave ? code + image * kTile * pooled_plane : nullptr);
    }
  }
}

// ---- host ----------------------------------------------------------------------------------------------------------

// body(Layout) of the convolution's channels and filters: the pairs that have kernels.
template <class Body>
auto dispatch_layout(const Conv& conv, Body body) {
  return dispatch_channels(conv, [&](auto channels) {
    constexpr int kChannels = decltype(channels)::value;
    if constexpr (kChannels < 4)
      if (conv.filters == 96) return body(Layout<kChannels, 96>{});
    return body(Layout<kChannels, 64>{});
  });
}

}  // namespace

bool fuses_conv2d_relu_lrn_max_pool2d(DType dtype, const Conv& conv, const Lrn& lrn, const Pool& pool, Order order,
                                      int shared_memory_optin) {
  const auto inside = [](int64_t out, int64_t size) { return out > 0 && 2 * out + 1 <= size; };
  // 96 filters of 4 channels would need 247 KB of shared memory, more than any GPU has.
  return on_tensor_cores(dtype, conv) && (conv.filters == 64 || (conv.filters == 96 && conv.channels < 4)) &&
         conv.out_width <= kColumns && order == kReluLrnPool && is_alexnet(lrn) && lrn.groups == 1 &&
         pool.kernel_size == 3 && pool.stride == 2 && pool.padding == 0 && inside(pool.out_height, pool.height) &&
         inside(pool.out_width, pool.width) &&
         dispatch_layout(conv, [](auto layout) { return decltype(layout)::kBytes; }) <= shared_memory_optin;
}

gpu::error_t launch_conv2d_relu_lrn_max_pool2d(const Images& images, const void* x, const void* weight,
                                               const void* bias, void* y, void* a, uint8_t* code, const Conv& conv,
                                               const Lrn& lrn, const Pool& pool, int processors, float* workspace,
                                               gpu::stream_t stream) {
  const gpu::error_t error = pack_conv2d_weight(images.dtype, weight, conv, workspace, stream);
  if (error != gpu::kSuccess) return error;
  // Few images are cut into bands of rows, which costs the rows that two bands share.
  const int pool_height = static_cast<int>(pool.out_height), n = static_cast<int>(images.n);
  const int rows = divide_up(pool_height, std::clamp(processors / n, 1, pool_height));
  const int bands = divide_up(pool_height, rows), out_height = static_cast<int>(conv.out_height);
  const Bands all = {static_cast<int>(conv.height),
                     static_cast<int>(conv.width),
                     conv.padding,
                     out_height,
                     static_cast<int>(conv.out_width),
                     pool_height,
                     static_cast<int>(pool.out_width),
                     n * bands,
                     bands,
                     rows,
                     divide_up(2 * rows + out_height - 2 * pool_height, kRows)};
  const auto run = [&](auto type, auto last, auto save) {
    using T = typename decltype(type)::type;
    return dispatch_layout(conv, [&](auto layout) {
      return gpu::launch(block_kernel<T, decltype(layout), decltype(last)::value, decltype(save)::value>,
                         dim3(std::min(all.jobs, processors)), dim3(kThreads), decltype(layout)::kBytes, stream,
                         static_cast<const uint16_t*>(x), reinterpret_cast<const uint32_t*>(workspace),
                         static_cast<const T*>(bias), static_cast<uint16_t*>(y), static_cast<uint16_t*>(a), code, all,
                         LrnArgs(lrn));
    });
  };
  return dispatch_flag(images.channels_last, [&](auto last) {
    return dispatch_flag(code != nullptr, [&](auto save) {
      return images.dtype == kHalf ? run(Type<gpu::half>{}, last, save) : run(Type<gpu::bfloat16>{}, last, save);
    });
  });
}

}  // namespace alexnet_cuda
