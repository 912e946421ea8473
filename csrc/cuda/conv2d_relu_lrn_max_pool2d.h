// AlexNet's whole first block in one kernel: what its two kernels share, conv2d_relu_lrn_max_pool2d.cu (mma.sync) and
// conv2d_relu_lrn_max_pool2d_wgmma.cu. k_schedule.h says how the convolution becomes a matrix product, conv2d_mma.cu in
// which order weights are packed.
//
// Memory: one persistent thread block per SM keeps the weights in shared memory and goes through its images, or bands
// of them, a few output rows per step. What the pooling needs never reaches global memory:
//
//   1. sums = s2d blocks x weights; meanwhile the s2d blocks of the next step are loaded, one channel group at a time
//   2. a = sums + bias, rounded (and saved); ReLU; LRN; maxima over three rows go to shared memory as floats
//   3. maxima over three columns are written out
//
// with barriers between 1 and 2 (the last step's maxima have been read) and between 2 and 3.
//
// The trick: rows of an mma fragment are assigned to pixels such that a lane holds all rows of a column and can pool
// vertically in registers. The four lanes of a column hold runs of 8 channels and shuffle what LRN needs of the next
// run.
//
// Numerics: bit for bit the results of the convolution followed by relu_lrn_max_pool2d, whose ReLU it is: the kernels
// do not read ConvArguments::relu.
#pragma once

#include <limits>

#include "lrn.h"
#include "pool.h"
#include "space_to_depth.h"

namespace alexnet_cuda {

constexpr int kMaxColumns = 56;                           // outputs of a row
constexpr int kRowBlocks = 64, kBlockRows = 6;            // s2d blocks of a row; rows in shared memory
constexpr int kBandStride = 8 * kBlockRows * kRowBlocks;  // 16-bit words from one channel group to the next

// Shared memory, in 32-bit words: weights, two buffers of s2d blocks, two rows of maxima (and in which of three rows
// each maximum was), the bias.
template <int kChannels_, int kTile_>
struct Layout {
  static constexpr int kChannels = kChannels_, kTile = kTile_;
  static constexpr int kBufferWords = 2 * kChannels * kBandStride / 2;
  static constexpr int kColumn = kTile + 4;  // floats from one column's maxima to the next's: no bank conflicts
  static constexpr int kBlocksAt = kSchedule<kChannels>.steps * kTile * 8, kMaximaAt = kBlocksAt + 2 * kBufferWords;
  static constexpr int kMaximumRowsAt = kMaximaAt + 2 * kMaxColumns * kColumn;
  static constexpr int kBiasAt = kMaximumRowsAt + kMaxColumns * kTile / 2, kBytes = 4 * (kBiasAt + kTile);

  static GPU_DEVICE gpu::shared<uint32_t> weights() { return gpu::dynamic_shared<uint32_t>(); }
  static GPU_DEVICE gpu::shared<uint32_t> blocks(int buffer) { return weights() + (kBlocksAt + buffer * kBufferWords); }
  static GPU_DEVICE gpu::shared<float> maxima(int buffer) {
    return gpu::shared_cast<float>(weights() + kMaximaAt) + buffer * kMaxColumns * kColumn;
  }
  static GPU_DEVICE gpu::shared<uint8_t> maximum_rows(int buffer) {
    return gpu::shared_cast<uint8_t>(weights() + kMaximumRowsAt) + buffer * kMaxColumns * kTile;
  }
  static GPU_DEVICE gpu::shared<float> bias() { return gpu::shared_cast<float>(weights() + kBiasAt); }
};

template <class L, class T>
GPU_DEVICE void load_bias(const T* bias) {
  if (threadIdx.x < L::kTile) L::bias()[threadIdx.x] = bias ? gpu::to_float(bias[threadIdx.x]) : 0.f;
}

// How the work is cut. A job is a band of an image: `rows` pooled rows (the last band may have fewer).
struct Bands : ConvGeometry {
  int pool_height, pool_width;
  int jobs, bands, rows, steps;  // jobs; bands per image; steps per band

  // Where an s2d block comes from: its upper left pixel.
  struct Source {
    const uint16_t* image;
    int y, x;
  };
  // The s2d block in a row and column of a job; below the image, so all zeros, after the last job.
  template <int kChannels>
  GPU_DEVICE Source source(const uint16_t* x, int job, int row, int column) const {
    const int y = 4 * (2 * rows * (job % bands) + row) - padding;
    return {x + int64_t{min(job, jobs - 1) / bands} * kChannels * height * width, job < jobs ? y : height,
            4 * column - padding};
  }
  // Moves one s2d block from global to shared memory.
  template <int kChannels, bool kNhwc>
  GPU_DEVICE void stage(const Source& source, gpu::shared<uint32_t> to) const {
    unroll<2 * kChannels>([&](auto p) {
      uint16_t v[8];
      load_group<kChannels, kNhwc, decltype(p)::value>(*this, source.image, source.y, source.x, v);
      store_group(to + p * (kBandStride / 2), v);
    });
  }

  struct Band {
    int64_t image;
    int first, end, saved_end;  // pooled rows; end of the rows of `a` to save (a row of two bands: by the second)
  };
  // Pooled rows [first, end) need outputs 2 first .. 2 end; the last band also saves rows that no window covers.
  GPU_DEVICE Band band(int job) const {
    const int which = job % bands, first = which * rows, end = min(first + rows, pool_height);
    return {job / bands, first, end, which + 1 == bands ? out_height : 2 * end};
  }
  // Where a band saves a pixel of the convolution's output `a`, which has kTile channels; null if it does not.
  template <int kTile, bool kNhwc>
  GPU_DEVICE uint16_t* saved(uint16_t* a, const Band& band, int row, int column) const {
    if (column >= out_width || row >= band.saved_end) return nullptr;
    const int plane = out_height * out_width, pixel = row * out_width + column;
    return a + (band.image * kTile * plane + pixel * (kNhwc ? kTile : 1));
  }
};

// One row (`half` 0 or 1) of a lane's column in a fragment of sums: a = sums + bias, rounded, goes to `save` unless
// that is null. Then body(j, values) gets channels 32 j + 8 (lane % 4) .. + 7 after ReLU and LRN.
template <class T, int kTile, bool kNhwc, class Body>
GPU_DEVICE void normalise_row(const float (&sums)[kTile / 8][4], int half, gpu::shared<float> bias, uint16_t* save,
                              int plane, const LrnConstants& lrn, Body body) {
  constexpr int kRuns = kTile / 32;
  const int quad_lane = threadIdx.x % 4;
  // Bias from shared memory; values in packed pairs from here on.
  uint32_t words[kRuns][4];
#pragma unroll
  for (int j = 0; j < kRuns; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const gpu::Vec4<float> add = gpu::load4(bias + (32 * j + 8 * quad_lane + 4 * i));
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const float (&sum)[4] = sums[4 * j + 2 * i + k];
        words[j][2 * i + k] = gpu::pack<T>(sum[2 * half] + add.v[2 * k], sum[2 * half + 1] + add.v[2 * k + 1]);
      }
    }
  }
  // Registers to `a`: 16 bytes of a pixel in NHWC; in NCHW eight lanes write neighbouring pixels of a channel.
  if (save) {
#pragma unroll
    for (int j = 0; j < kRuns; ++j) {
      if constexpr (kNhwc) {
        *reinterpret_cast<gpu::Vec4<uint32_t>*>(save + (32 * j + 8 * quad_lane)) = {words[j][0], words[j][1],
                                                                                    words[j][2], words[j][3]};
      } else {
#pragma unroll
        for (int k = 0; k < 8; ++k)
          save[(32 * j + 8 * quad_lane + k) * plane] = static_cast<uint16_t>(words[j][k / 2] >> 16 * (k % 2));
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4 * kRuns; ++i) words[i / 4][i % 4] = gpu::max_nan<T>(words[i / 4][i % 4], 0);  // ReLU
  // LRN needs two channels of the runs before and after, which the neighbouring lanes hold: for the first lane the last
  // one with its run before, for the last lane the first one with its run after.
#pragma unroll
  for (int j = 0; j < kRuns; ++j) {
    const uint32_t to_right = quad_lane < 3 ? words[j][3] : j > 0 ? words[max(j - 1, 0)][3] : 0;
    const uint32_t to_left = quad_lane > 0 ? words[j][0] : j + 1 < kRuns ? words[min(j + 1, kRuns - 1)][0] : 0;
    const uint32_t left = __shfl_sync(~0u, to_right, (quad_lane + 3) % 4, 4);
    const uint32_t right = __shfl_sync(~0u, to_left, (quad_lane + 1) % 4, 4);
    // 12 channels unpacked, 8 normalised.
    float in[16], out[kRun];
#pragma unroll
    for (int k = 0; k < 12; ++k) {
      const uint32_t word = k < 2 ? left : k < 10 ? words[j][min(max(k / 2 - 1, 0), 3)] : right;
      in[2 + k] = gpu::unpack<T>(word, k % 2);
    }
    normalise_run(in, lrn, out);
    body(j, out);
  }
}

// Maxima with, if kSave, their positions.
template <bool kSave>
using Best = std::conditional_t<kSave, Maximum, MaximumValue>;
template <bool kSave>
GPU_DEVICE gpu::Vec4<uint8_t> codes_of(const Best<kSave>* best) {
  gpu::Vec4<uint8_t> codes;
#pragma unroll
  for (int i = 0; i < 4; ++i) codes.v[i] = static_cast<uint8_t>(best[i].code);
  return codes;
}

// A lane's part of its column's windows. A window has three rows; its last one is the first of the next window.
template <class L, bool kSave>
struct Windows {
  float value[L::kTile / 4] = {};  // maxima of the rows so far
  uint32_t second = 0;             // a bit for each: the maximum is in the second row

  // Run j of row r of a step: even rows end a window, odd ones are in the middle.
  GPU_DEVICE void add_row(int r, int j, const float* v, int buffer, int column) {
    const int channel = 32 * j + 8 * (threadIdx.x % 4);
    if (r % 2 == 0)
      add_last_row(j, v, L::maxima(buffer) + (column * L::kColumn + channel),
                   L::maximum_rows(buffer) + (column * L::kTile + channel));
    else
      add_middle_row(j, v);
  }
  // Run j of a row that ends a window, whose maxima go to shared memory, and begins the next.
  GPU_DEVICE void add_last_row(int j, const float* v, gpu::shared<float> maxima, gpu::shared<uint8_t> rows) {
    Best<kSave> best[kRun];
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
      const int c = j * kRun + k;
      best[k].set(value[c], static_cast<int>(second >> c & 1));
      best[k].update(v[k], 2);
      value[c] = v[k];
    }
#pragma unroll
    for (int k = 0; k < kRun; k += 4) {
      gpu::store4(maxima + k, gpu::Vec4<float>{best[k].value, best[k + 1].value, best[k + 2].value, best[k + 3].value});
      if constexpr (kSave) gpu::store4(rows + k, codes_of<kSave>(best + k));
    }
  }
  // Run j of a row in the middle of a window: updates the maxima in registers.
  GPU_DEVICE void add_middle_row(int j, const float* v) {
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
      const int c = j * kRun + k;
      Best<kSave> best;
      best.set(value[c], 0);
      best.update(v[k], 1);
      value[c] = best.value;
      second = (c == 0 ? 0 : second) | static_cast<uint32_t>(best.code) << c;
    }
  }
};

// Writes a pooled row of a band: kPoolThreads threads take the maxima over three columns of a row of maxima in shared
// memory, four channels of a pooled pixel at a time. Consecutive threads write consecutive addresses.
template <class T, class L, bool kNhwc, bool kSave, int kPoolThreads>
GPU_DEVICE void pool_columns(int buffer, const Bands& b, const Bands::Band& band, int row, uint16_t* y, uint8_t* code) {
  // Threads run over all channels of a column in NHWC; over 2 x 4 channels of 16 columns in NCHW.
  constexpr int kTile = L::kTile, kAcross = kNhwc ? kTile / 4 : 2, kAlong = kNhwc ? 1 : 16;
  constexpr int kQuarters = kTile / 4 / kAcross;
  const int plane = b.pool_height * b.pool_width, items = divide_up(b.pool_width, kAlong) * kAlong * kTile / 4;
  const gpu::shared<float> maxima = L::maxima(buffer);
  const gpu::shared<uint8_t> maximum_rows = L::maximum_rows(buffer);
  y += band.image * kTile * plane;
  if constexpr (kSave) code += band.image * kTile * plane;
  for (int i = threadIdx.x % kPoolThreads; i < items; i += kPoolThreads) {
    const int rest = i / (kAcross * kAlong), column = rest / kQuarters * kAlong + i / kAcross % kAlong;
    const int channel = (rest % kQuarters * kAcross + i % kAcross) * 4;
    if (column >= b.pool_width) continue;
    // Three columns of maxima, and of the rows they were in, from shared memory. The code is 3 row + column.
    Best<kSave> best[4];
#pragma unroll
    for (int dx = 0; dx < 3; ++dx) {
      const int from = 2 * column + dx;
      const gpu::Vec4<float> v = gpu::load4(maxima + (from * L::kColumn + channel));
      gpu::Vec4<uint8_t> rows = {};
      if constexpr (kSave) rows = gpu::load4(maximum_rows + (from * kTile + channel));
#pragma unroll
      for (int k = 0; k < 4; ++k) best[k].update_unordered(v.v[k], rows.v[k] * 3 + dx);
    }
    // Values and codes to memory.
    const uint32_t words[2] = {gpu::pack<T>(best[0].value, best[1].value), gpu::pack<T>(best[2].value, best[3].value)};
    gpu::Vec4<uint16_t> values;
    memcpy(&values, words, 8);
    const gpu::Vec4<uint8_t> codes = codes_of<kSave>(best);
    const int pixel = row * b.pool_width + column, to = kNhwc ? pixel * kTile + channel : channel * plane + pixel;
    if constexpr (kNhwc) {
      *reinterpret_cast<gpu::Vec4<uint16_t>*>(y + to) = values;
      if constexpr (kSave) *reinterpret_cast<gpu::Vec4<uint8_t>*>(code + to) = codes;
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

// body(Layout) for the pairs of channels and filters that have kernels.
template <class Body>
auto dispatch_layout(const Conv& conv, Body body) {
  return dispatch_tile(conv, conv.filters, [&](auto channels, auto tile) {
    return body(Layout<decltype(channels)::value, decltype(tile)::value>{});
  });
}

// Cuts images into bands so that the slowest of `workers` makes the fewest steps. More bands balance better, but two
// neighbours share rows, which both compute. A worker does at most 16 bands, unless it has more images.
inline Bands bands_of(const BlockArguments& args, int workers, int step_rows) {
  const Conv& conv = args.conv.conv;
  const Pool& pool = args.tail.pool;
  const int pool_height = static_cast<int>(pool.out_height), images = static_cast<int>(args.conv.images.count);
  Bands best = {ConvGeometry(conv), pool_height, static_cast<int>(pool.out_width), 0, 0, 0, 0};
  int64_t fewest = std::numeric_limits<int64_t>::max();
  for (int count = 1; count <= std::clamp(16 * workers / images, 1, pool_height); ++count) {
    const int rows = divide_up(pool_height, count), bands = divide_up(pool_height, rows), jobs = images * bands;
    const int steps = divide_up(2 * rows + conv.out_height - 2 * pool_height, step_rows);
    const int64_t total = int64_t{divide_up(jobs, workers)} * steps;
    if (total >= fewest) continue;
    fewest = total;
    best.jobs = jobs, best.bands = bands, best.rows = rows, best.steps = steps;
  }
  return best;
}

// Packs the weights, then launches kernel_of(Type<T>, Layout, channels_last, save).
template <class KernelOf>
gpu::error_t launch_block(const BlockArguments& args, int multiprocessors, const Bands& bands, gpu::stream_t stream,
                          KernelOf kernel_of) {
  const ConvArguments& conv = args.conv;
  const void* packed = conv.workspace;
  const gpu::error_t error = pack_conv2d_weight(conv.images.dtype, conv.weight, conv.conv, conv.workspace, stream);
  if (error != gpu::kSuccess) return error;
  return dispatch_flag(conv.images.channels_last, [&](auto nhwc) {
    return dispatch_flag(args.tail.code != nullptr, [&](auto save) {
      return dispatch_layout(conv.conv, [&](auto layout) {
        const auto launch = [&](auto type) {
          return gpu::launch(kernel_of(type, layout, nhwc, save), dim3(std::min(bands.jobs, multiprocessors)), kThreads,
                             decltype(layout)::kBytes, stream, conv.x, packed, conv.bias, args.tail.out, conv.out,
                             args.tail.code, bands, LrnConstants(args.tail.lrn));
        };
        return conv.images.dtype == DType::kHalf ? launch(Type<gpu::half>{}) : launch(Type<gpu::bfloat16>{});
      });
    });
  });
}

}  // namespace alexnet_cuda
