// AlexNet's whole first block in one kernel: what conv2d_relu_lrn_max_pool2d_mma.h (mma.sync) and
// conv2d_relu_lrn_max_pool2d_wgmma.cu share. k_schedule.h says how the convolution becomes a matrix product,
// conv2d_mma.cu in which order weights are packed.
//
// Memory: one persistent thread block per SM goes through its images, or bands of them, a few output rows per step. It
// keeps the weights in shared memory, or streams them through it. What the pooling needs never reaches global memory:
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

#include "conv2d_relu_lrn_max_pool2d_bands.h"
#include "lrn.h"
#include "pool.h"

namespace alexnet_cuda {

// Shared memory, in 32-bit words: weights, s2d blocks, the bias, rows of maxima (and in which of three rows each
// maximum was), and in NCHW rows of `a` on their way to memory. kStreams: there are two buffers for the weights of
// kSliceSteps k steps and one of all else, and while products are summed, s2d blocks of the next step lie where maxima
// begin; otherwise all weights and two of all else. For 96 filters, in bytes:
//
//                                     resident       streamed
//   weights                             73,728     2 x 12,288
//   s2d blocks                      2 x 36,864         36,864
//   bias                                   384            384
//   maxima, and their rows          2 x 27,776         27,776     streamed, during the products: 24,576 of s2d blocks
//   rows of `a` (NCHW)              2 x 11,136         11,136
//                                      225,664        100,736     of 227 and 99 KB
template <int kChannels_, int kTile_, bool kStreams_>
struct Layout {
  static constexpr int kChannels = kChannels_, kTile = kTile_, kBuffers = kStreams_ ? 1 : 2;
  static constexpr bool kStreams = kStreams_;
  static constexpr int kSteps = kSchedule<kChannels>.steps, kGroups = 2 * kChannels;
  static constexpr int kSliceSteps = (kSteps + kGroups - 1) / kGroups, kStepWords = kTile * 8;
  static constexpr int kBufferWords = 2 * kChannels * kBandStride / 2;
  // Floats from one column's maxima to the next's. Eight lanes store 16 bytes each, of two columns and four runs: the 4
  // floats more put the second column into the banks that the first leaves free.
  static constexpr int kColumn = kTile + 4;
  static constexpr int kBlocksAt = (kStreams ? 2 * kSliceSteps : kSteps) * kStepWords;
  static constexpr int kBiasAt = kBlocksAt + kBuffers * kBufferWords, kMaximaAt = kBiasAt + kTile;
  static constexpr int kMaximumRowsAt = kMaximaAt + kBuffers * kMaxColumns * kColumn;
  static constexpr int kSavedAt = kMaximumRowsAt + kBuffers * kMaxColumns * kTile / 4;
  // Pixels from one channel to the next: 29 words, so that channels 0, 8, 16 and 24, which the lanes of a column store
  // at the same time, are in different banks.
  static constexpr int kSavedPitch = kMaxColumns + 2;
  static constexpr int kWaitingWords = kStreams ? kGroups * kThreads * 4 : 0;
  template <bool kSavesNchw>
  static constexpr int kBytes =
      4 * std::max(kSavedAt + (kSavesNchw ? kBuffers * kTile * kSavedPitch / 2 : 0), kMaximaAt + kWaitingWords);

  static GPU_DEVICE gpu::shared<uint32_t> weights() { return gpu::dynamic_shared<uint32_t>(); }
  static GPU_DEVICE gpu::shared<uint32_t> slice(int i) { return weights() + i % 2 * kSliceSteps * kStepWords; }
  static GPU_DEVICE gpu::shared<uint32_t> blocks(int buffer) { return weights() + (kBlocksAt + buffer * kBufferWords); }
  static GPU_DEVICE gpu::shared<uint32_t> waiting() { return weights() + kMaximaAt; }
  static GPU_DEVICE gpu::shared<float> maxima(int buffer) {
    return gpu::shared_cast<float>(weights() + kMaximaAt) + buffer * kMaxColumns * kColumn;
  }
  static GPU_DEVICE gpu::shared<uint8_t> maximum_rows(int buffer) {
    return gpu::shared_cast<uint8_t>(weights() + kMaximumRowsAt) + buffer * kMaxColumns * kTile;
  }
  static GPU_DEVICE gpu::shared<float> bias() { return gpu::shared_cast<float>(weights() + kBiasAt); }
  static GPU_DEVICE gpu::shared<uint16_t> saved(int buffer) {
    return gpu::shared_cast<uint16_t>(weights() + kSavedAt) + buffer * kTile * kSavedPitch;
  }
};

template <class L, class T>
GPU_DEVICE void load_bias(const T* bias) {
  if (threadIdx.x < L::kTile) L::bias()[threadIdx.x] = bias ? gpu::to_float(bias[threadIdx.x]) : 0.f;
}

// How a band saves a row of the convolution's output `a`, if kSave. NHWC: from registers to memory, 16 bytes of a pixel
// at a time. NCHW: put() moves it to shared memory, as [channel][pixel], and after a barrier copy() to memory, so that
// a warp writes a row of pixels. Rows of an odd number of pixels are aligned to 2 bytes only: 4 bytes are moved at a
// time from the first aligned pixel of a channel on, which is pixel 0 or 1, and the pixels at the ends alone.
template <class L, bool kNhwc, bool kSave>
struct SavedRow {
  static constexpr bool kStages = kSave && !kNhwc;
  uint16_t* image;
  int plane, width, first;  // first: the row's first pixel
  bool wanted;

  GPU_DEVICE SavedRow(uint16_t* a, const Bands& b, const Bands::Band& band, int row)
      : plane(b.out_height * b.out_width), width(b.out_width), first(row * width), wanted(row < band.saved_end) {
    image = a + band.image * L::kTile * plane;
  }
  // The first aligned pixel of a channel; in shared memory the channel begins with as many unused pixels.
  GPU_DEVICE int skip(int channel) const { return (channel * plane + first) & 1; }

  // Channels 32 j + 8 (lane % 4) .. + 7 of a pixel.
  GPU_DEVICE void put(int buffer, int j, int column, const uint32_t (&words)[4]) const {
    const int channel = 32 * j + 8 * (threadIdx.x % 4);
    if constexpr (kStages) {
      const gpu::shared<uint16_t> to = L::saved(buffer) + (channel * L::kSavedPitch + column);
#pragma unroll
      for (int k = 0; k < 8; ++k)
        to[k * L::kSavedPitch + skip(k)] = static_cast<uint16_t>(words[k / 2] >> 16 * (k % 2));
    } else if constexpr (kSave) {
      if (wanted && column < width)
        *reinterpret_cast<gpu::Vec4<uint32_t>*>(image + ((first + column) * L::kTile + channel)) = {words[0], words[1],
                                                                                                    words[2], words[3]};
    }
  }
  // By kCopyThreads threads: a warp takes a channel at a time.
  template <int kCopyThreads>
  GPU_DEVICE void copy(int buffer) const {
    if (!kStages || !wanted) return;
    const gpu::shared<uint16_t> from = L::saved(buffer);
    const int thread = threadIdx.x % kCopyThreads, lane = threadIdx.x % 32;
#pragma unroll 4
    for (int c = thread / 32; c < L::kTile; c += kCopyThreads / 32) {
      const int pixel = skip(c) + 2 * lane, to = c * plane + first + pixel;
      if (pixel + 1 < width)
        *reinterpret_cast<uint32_t*>(image + to) =
            gpu::shared_cast<uint32_t>(from + (c * L::kSavedPitch + skip(c) + pixel))[0];
    }
    for (int i = thread; i < 2 * L::kTile; i += kCopyThreads) {
      const int c = i / 2, pixel = i % 2 ? width - 1 : 0;
      if (i % 2 ? (width - skip(c)) % 2 : skip(c))
        image[c * plane + first + pixel] = from[c * L::kSavedPitch + skip(c) + pixel];
    }
  }
};

// One row (`half` 0 or 1) of a lane's column in a fragment of sums: save(j, words) gets a = sums + bias, rounded, then
// body(j, values) that after ReLU and LRN, both channels 32 j + 8 (lane % 4) .. + 7.
template <class T, int kTile, class Save, class Body>
GPU_DEVICE void normalise_row(const float (&sums)[kTile / 8][4], int half, gpu::shared<float> bias,
                              const LrnConstants& lrn, Save save, Body body) {
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
#pragma unroll
  for (int j = 0; j < kRuns; ++j) save(j, words[j]);
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
    float in[kRun + 4], out[kRun];
#pragma unroll
    for (int k = 0; k < 12; ++k) {
      const uint32_t word = k < 2 ? left : k < 10 ? words[j][min(max(k / 2 - 1, 0), 3)] : right;
      in[k] = gpu::unpack<T>(word, k % 2);
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

// body(Layout) for the numbers of filters that have kernels.
template <bool kStreams, class Body>
auto dispatch_layout(const Conv& conv, Body body) {
  return conv.filters == 96 ? body(Layout<3, 96, kStreams>{}) : body(Layout<3, 64, kStreams>{});
}

// Packs the weights, then launches kernel_of(Type<T>, Layout, channels_last, save).
template <bool kStreams, class KernelOf>
gpu::error_t launch_block(const BlockArguments& args, int multiprocessors, const Bands& bands, gpu::stream_t stream,
                          KernelOf kernel_of) {
  const ConvArguments& conv = args.conv;
  const void* packed = conv.workspace;
  const gpu::error_t error = pack_conv2d_weight(conv.images.dtype, conv.weight, conv.conv, conv.workspace, stream);
  if (error != gpu::kSuccess) return error;
  return dispatch_flag(conv.images.channels_last, [&](auto nhwc) {
    return dispatch_flag(args.tail.code != nullptr, [&](auto save) {
      return dispatch_layout<kStreams>(conv.conv, [&](auto layout) {
        constexpr int kBytes = decltype(layout)::template kBytes < decltype(save)::value && !decltype(nhwc)::value > ;
        const auto launch = [&](auto type) {
          return gpu::launch(kernel_of(type, layout, nhwc, save), dim3(std::min(bands.jobs, multiprocessors)), kThreads,
                             kBytes, stream, conv.x, packed, conv.bias, args.tail.out, conv.out, args.tail.code, bands,
                             LrnConstants(args.tail.lrn));
        };
        return conv.images.dtype == DType::kHalf ? launch(Type<gpu::half>{}) : launch(Type<gpu::bfloat16>{});
      });
    });
  });
}

}  // namespace alexnet_cuda
