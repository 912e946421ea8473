// AlexNet's whole first block in one kernel: what its two kernels share, the one of mma.sync (..._pool2d.cu) and the
// one of wgmma (..._pool2d_wgmma.cu).
//
// slabs.h says how the convolution becomes a product of matrices, and conv2d_mma.cu in which order weights are packed.
// Here the weights stay in shared memory, one block per SM goes through its images (or bands of them), and what the
// pooling needs never reaches global memory:
//
//   1. sums = cells x weights; meanwhile the cells of the next step are loaded, a plane at a time
//   2. a = sums + bias, rounded (and saved); normalised; its maxima over three rows go to shared memory, as floats
//   3. maxima over three columns, written out
//
// with barriers between 1 and 2 (the maxima of the last step have been read) and between 2 and 3. The rows of an mma
// fragment are chosen such that a lane holds all rows of a column, so that it can pool vertically on its own. The four
// lanes of a column hold runs of 8 channels and pass each other what the normalisation needs of the next run.
#pragma once

#include "lrn.h"
#include "pool.h"
#include "slabs.h"

namespace alexnet_cuda {

constexpr int kColumns = 56;                           // outputs of a row
constexpr int kRowCells = 64, kCellRows = 6;           // cells of a row; rows in shared memory
constexpr int kStepPlane = 8 * kCellRows * kRowCells;  // 16-bit words

template <int kChannels_, int kTile_>
struct Layout {  // of shared memory, in 32-bit words: weights, twice cells, twice a row's maxima and where they were
  static constexpr int kChannels = kChannels_, kTile = kTile_;
  static constexpr int kBuffer = 2 * kChannels * kStepPlane / 2;
  static constexpr int kColumn = kTile + 4;  // floats from one column's maxima to the next's: no bank conflicts
  static constexpr int kCellsAt = kPlan<kChannels>.steps * kTile * 8, kMaximaAt = kCellsAt + 2 * kBuffer;
  static constexpr int kMaximumRowsAt = kMaximaAt + 2 * kColumns * kColumn;
  static constexpr int kBiasesAt = kMaximumRowsAt + kColumns * kTile / 2, kBytes = 4 * (kBiasesAt + kTile);

  static GPU_DEVICE gpu::shared<uint32_t> weights() { return gpu::dynamic_shared<uint32_t>(); }
  static GPU_DEVICE gpu::shared<uint32_t> cells(int which) { return weights() + (kCellsAt + which * kBuffer); }
  static GPU_DEVICE gpu::shared<float> maxima(int which) {
    return gpu::shared_cast<float>(weights() + kMaximaAt) + which * kColumns * kColumn;
  }
  static GPU_DEVICE gpu::shared<uint8_t> maximum_rows(int which) {
    return gpu::shared_cast<uint8_t>(weights() + kMaximumRowsAt) + which * kColumns * kTile;
  }
  static GPU_DEVICE gpu::shared<float> biases() { return gpu::shared_cast<float>(weights() + kBiasesAt); }
};

template <class L, class T>
GPU_DEVICE void load_biases(const T* bias) {
  if (threadIdx.x < L::kTile) L::biases()[threadIdx.x] = bias ? gpu::to_float(bias[threadIdx.x]) : 0.f;
}

struct Bands {
  int height, width, padding, out_height, out_width, pool_height, pool_width;
  int jobs, bands, rows, steps;  // a job is a band of an image: `rows` pooled rows (the last may have fewer)

  struct Cell {
    const uint16_t* image;
    int y, x;
  };
  // A cell by its place in a job's; behind the last job one that lies below the image.
  template <int kChannels>
  GPU_DEVICE Cell cell(const uint16_t* x, int job, int row, int column) const {
    const int y = 4 * (2 * rows * (job % bands) + row) - padding;
    return {x + int64_t{min(job, jobs - 1) / bands} * kChannels * height * width, job < jobs ? y : height,
            4 * column - padding};
  }
  template <int kChannels, bool kLast, int kPlaneIndex>
  GPU_DEVICE void load_plane(const Cell& cell, uint16_t (&v)[8]) const {
    load_cell<kChannels, kLast, kPlaneIndex>(cell.image, height, width, cell.y, cell.x, v);
  }
  template <int kChannels, bool kLast>
  GPU_DEVICE void stage(const Cell& cell, gpu::shared<uint32_t> to) const {
    unroll<2 * kChannels>([&](auto p) {
      uint16_t v[8];
      load_plane<kChannels, kLast, decltype(p)::value>(cell, v);
      store_cell(to + p * (kStepPlane / 2), v);
    });
  }

  struct Band {
    int64_t image;
    int first, end, saved_end;  // pooled rows; the outputs that two bands make are saved by the second
  };
  GPU_DEVICE Band band(int job) const {
    const int which = job % bands, first = which * rows, end = min(first + rows, pool_height);
    return {job / bands, first, end, which + 1 == bands ? out_height : 2 * end};
  }
  // Where a band saves an output, with kTile channels; null where it does not.
  template <int kTile, bool kLast>
  GPU_DEVICE uint16_t* saved(uint16_t* a, const Band& band, int row, int column) const {
    if (column >= out_width || row >= band.saved_end) return nullptr;
    const int plane = out_height * out_width, pixel = row * out_width + column;
    return a + (band.image * kTile * plane + pixel * (kLast ? kTile : 1));
  }
};

// One row of a lane's column, of a fragment of sums: a = sums + bias, rounded, goes to `save` unless that is null; then
// body(j, values) gets channels 32 j + 8 (lane % 4) .. + 7 of it, normalised.
template <class T, int kTile, bool kLast, class Body>
GPU_DEVICE void finish_row(const float (&sums)[kTile / 8][4], int half, gpu::shared<float> biases, uint16_t* save,
                           int plane, const LrnArgs& lrn, Body body) {
  constexpr int kRuns = kTile / 32;
  const int quad = threadIdx.x % 4;
  uint32_t words[kRuns][4];
#pragma unroll
  for (int j = 0; j < kRuns; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const gpu::Quad<float> add = gpu::load4(biases + (32 * j + 8 * quad + 4 * i));
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const float (&sum)[4] = sums[4 * j + 2 * i + k];
        words[j][2 * i + k] = gpu::pack<T>(sum[2 * half] + add.v[2 * k], sum[2 * half + 1] + add.v[2 * k + 1]);
      }
    }
  }
  if (save) {
#pragma unroll
    for (int j = 0; j < kRuns; ++j) {
      if constexpr (kLast) {
        *reinterpret_cast<gpu::Quad<uint32_t>*>(save + (32 * j + 8 * quad)) = {words[j][0], words[j][1], words[j][2],
                                                                               words[j][3]};
      } else {
#pragma unroll
        for (int k = 0; k < 8; ++k)
          save[(32 * j + 8 * quad + k) * plane] = static_cast<uint16_t>(words[j][k / 2] >> 16 * (k % 2));
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
    body(j, out);
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

// What a lane has of its column's windows of three rows, the last of which is the first of the next one.
template <class L, bool kSave>
struct Windows {
  float value[L::kTile / 4] = {};  // the maxima of the two rows so far
  uint32_t second = 0;             // a bit for each: it is in the second row

  // Run j of the row that ends a window, whose maxima go to shared memory, and begins the next.
  GPU_DEVICE void end(int j, const float* v, gpu::shared<float> maxima, gpu::shared<uint8_t> rows) {
    Best<kSave> best[kRun];
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
      const int c = j * kRun + k;
      best[k].begin(value[c], static_cast<int>(second >> c & 1));
      best[k].offer(v[k], 2);
      value[c] = v[k];
    }
    store_maxima<kSave>(maxima, rows, best);
  }
  GPU_DEVICE void middle(int j, const float* v) {
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
      const int c = j * kRun + k;
      Best<kSave> best;
      best.begin(value[c], 0);
      best.offer(v[k], 1);
      value[c] = best.value;
      second = (c == 0 ? 0 : second) | static_cast<uint32_t>(best.code) << c;
    }
  }
};

// A pooled row of an image: maxima over three columns of a row of maxima, by kPoolThreads threads.
template <class T, class L, bool kLast, bool kSave, int kPoolThreads>
GPU_DEVICE void pool_across(gpu::shared<float> maxima, gpu::shared<uint8_t> maximum_rows, const Bands& b, int row,
                            uint16_t* y, uint8_t* code) {
  // Four channels of a pooled pixel at a time: lanes take neighbours in memory.
  constexpr int kTile = L::kTile, kAcross = kLast ? kTile / 4 : 2, kAlong = kLast ? 1 : 16;
  constexpr int kGroups = kTile / 4 / kAcross;
  const int plane = b.pool_height * b.pool_width, items = divide_up(b.pool_width, kAlong) * kAlong * kTile / 4;
  for (int i = threadIdx.x % kPoolThreads; i < items; i += kPoolThreads) {
    const int rest = i / (kAcross * kAlong), column = rest / kGroups * kAlong + i / kAcross % kAlong;
    const int channel = (rest % kGroups * kAcross + i % kAcross) * 4;
    if (column >= b.pool_width) continue;
    Best<kSave> best[4];
#pragma unroll
    for (int dx = 0; dx < 3; ++dx) {
      const int from = 2 * column + dx;
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

// body(Type<T>, Layout, channels_last, save) with types for what a launch is given.
template <class Body>
gpu::error_t dispatch_block(const Images& images, const Conv& conv, bool save, Body body) {
  return dispatch_flag(images.channels_last, [&](auto last) {
    return dispatch_flag(save, [&](auto saves) {
      return dispatch_layout(conv, [&](auto layout) {
        return images.dtype == kHalf ? body(Type<gpu::half>{}, layout, last, saves)
                                     : body(Type<gpu::bfloat16>{}, layout, last, saves);
      });
    });
  });
}

// Few images are cut into bands of rows, as many as there are `workers`, which costs the rows that two bands share.
inline Bands bands_of(const Images& images, const Conv& conv, const Pool& pool, int workers, int step_rows) {
  const int pool_height = static_cast<int>(pool.out_height), n = static_cast<int>(images.n);
  const int rows = divide_up(pool_height, std::clamp(workers / n, 1, pool_height));
  const int bands = divide_up(pool_height, rows), out_height = static_cast<int>(conv.out_height);
  return {static_cast<int>(conv.height),
          static_cast<int>(conv.width),
          conv.padding,
          out_height,
          static_cast<int>(conv.out_width),
          pool_height,
          static_cast<int>(pool.out_width),
          n * bands,
          bands,
          rows,
          divide_up(2 * rows + out_height - 2 * pool_height, step_rows)};
}

}  // namespace alexnet_cuda
