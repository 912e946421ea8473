// Max pooling with 3x3 windows, stride 2 and no padding, forward and backward; pool3x3s2.h explains the method.
#include "pool3x3s2.h"

namespace alexnet_cuda {
namespace {

// How a batch is cut into strips. A unit is an image in NHWC; in NCHW a plane or, in the forward pass with 16-bit
// elements, two. blockIdx.y counts the strips of a column, blockIdx.x and threadIdx.x cover the rest.
struct Strips {
  int64_t first_unit;
  uint32_t items;      // threads at work: units x columns (backward: pairs of columns) x channel runs
  int per_unit, runs;  // items of a unit; runs of 16 bytes of a pixel's channels in NHWC, else 1
  int channels, height, width, out_height, out_width;
  int rows;  // output rows (backward: pairs of rows) of a strip
};

// Three neighbours in a row of x, from column 2 ox on, and the same of every second row after it. In NHWC 16 bytes of
// each pixel.
template <class T, bool kNhwc>
struct InputRow {
  static constexpr int kWords = 4;
  const T* at;
  int pixel, two_rows;  // strides

  GPU_DEVICE InputRow(const T* unit, const Strips& s, int y, int ox, int channel)
      : at(unit + ((y * s.width + 2 * ox) * s.channels + channel)),
        pixel(s.channels),
        two_rows(2 * s.width * s.channels) {}
  GPU_DEVICE void load(bool has_third, WindowRow<T, kWords>& to) const {
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      gpu::Vec4<uint32_t> words = {kMinusInfinity<T>, kMinusInfinity<T>, kMinusInfinity<T>, kMinusInfinity<T>};
      if (i < 2 || has_third) words = *reinterpret_cast<const gpu::Vec4<uint32_t>*>(at + i * pixel);
#pragma unroll
      for (int k = 0; k < kWords; ++k) to.column[i][k] = words.v[k];
    }
  }
  GPU_DEVICE void advance() { at += two_rows; }
};
template <>
struct InputRow<float, false> {
  static constexpr int kWords = 1;
  const float* at;
  int two_rows;

  GPU_DEVICE InputRow(const float* unit, const Strips& s, int y, int ox, int)
      : at(unit + (y * s.width + 2 * ox)), two_rows(2 * s.width) {}
  GPU_DEVICE void load(bool has_third, WindowRow<float, 1>& to) const {
#pragma unroll
    for (int i = 0; i < 3; ++i)
      to.column[i][0] = i < 2 || has_third ? *reinterpret_cast<const uint32_t*>(at + i) : kMinusInfinity<float>;
  }
  GPU_DEVICE void advance() { at += two_rows; }
};
// NCHW, 16-bit: a word has the same pixel of two planes. The three neighbours of a plane come with two loads of aligned
// words; selectors (of __byte_perm) undo what the alignment shifts.
template <class T>
struct InputRow<T, false> {
  static constexpr int kWords = 1;
  const uint32_t* at[2];
  uint32_t pair[2], third;  // selectors: the first two neighbours of a plane, the third one of both
  bool shifted[2];
  int two_rows;

  GPU_DEVICE InputRow(const T* unit, const Strips& s, int y, int ox, int) : third(0), two_rows(s.width) {
#pragma unroll
    for (int plane = 0; plane < 2; ++plane) {
      const T* from = unit + (plane * s.height * s.width + y * s.width + 2 * ox);
      shifted[plane] = reinterpret_cast<uintptr_t>(from) % 4 != 0;
      at[plane] = reinterpret_cast<const uint32_t*>(from - shifted[plane]);
      pair[plane] = shifted[plane] ? 0x5432 : 0x3210;
      third |= ((shifted[plane] ? 0x32 : 0x10) + 0x44 * plane) << 8 * plane;
    }
  }
  GPU_DEVICE void load(bool has_third, WindowRow<T, 1>& to) const {
    uint32_t two[2], last[2];
#pragma unroll
    for (int plane = 0; plane < 2; ++plane) {
      // The second word is read only if it has a neighbour: it may lie beyond the end of x.
      last[plane] = has_third || shifted[plane] ? at[plane][1] : 0;
      two[plane] = __byte_perm(at[plane][0], last[plane], pair[plane]);
    }
    to.column[0][0] = __byte_perm(two[0], two[1], 0x5410);
    to.column[1][0] = __byte_perm(two[0], two[1], 0x7632);
    to.column[2][0] = has_third ? __byte_perm(last[0], last[1], third) : kMinusInfinity<T>;
  }
  GPU_DEVICE void advance() {
    at[0] += two_rows;
    at[1] += two_rows;
  }
};

// kOverhang: the last window may lack its third row or column.
template <class T, bool kNhwc, bool kSave, bool kOverhang>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    forward_3x3s2_kernel(const T* __restrict__ x, uint8_t* __restrict__ code, T* __restrict__ y, Strips s) {
  using Row = InputRow<T, kNhwc>;
  constexpr int kWords = Row::kWords, kElements = 4 / sizeof(T);
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= s.items) return;
  // This thread's unit, output column and first channel, and output rows oy to end - 1.
  const uint32_t unit = i / s.per_unit, item = i - unit * s.per_unit;
  const int ox = item / s.runs, channel = (item - ox * s.runs) * (16 / sizeof(T));
  int oy = blockIdx.y * s.rows;
  const int end = min(oy + s.rows, s.out_height);
  const int64_t planes = kNhwc ? s.channels : kElements, first_plane = (s.first_unit + unit) * planes;
  const T* image = x + first_plane * (s.height * s.width);
  const bool has_third = !kOverhang || 2 * ox + 2 < s.width;

  Row even(image, s, 2 * oy, ox, channel), odd(image, s, 2 * oy + 1, ox, channel);
  int64_t to = first_plane * (s.out_height * s.out_width) +
               (kNhwc ? (oy * s.out_width + ox) * s.channels + channel : oy * s.out_width + ox);
  WindowRow<T, kWords> row[3];
  even.load(has_third, row[2]);
  row[2].find_maximum();
#pragma unroll 1
  for (; oy < end; ++oy) {
    // Two more rows into registers; the window's first row is the last one's third.
    row[0] = row[2];
    odd.load(has_third, row[1]);
    odd.advance();
    even.advance();
    if (!kOverhang || 2 * oy + 2 < s.height) {
      even.load(has_third, row[2]);
    } else {
#pragma unroll
      for (int k = 0; k < 3 * kWords; ++k) row[2].column[k / kWords][k % kWords] = kMinusInfinity<T>;
    }
    row[1].find_maximum();
    row[2].find_maximum();
    uint32_t value[kWords], position[kWords];
    pool_rows(row, value);
    if constexpr (kSave) find_codes(row, value, position);
    // Values and positions to memory: 16 bytes of a pixel, or an element of each plane.
    if constexpr (kNhwc) {
      *reinterpret_cast<gpu::Vec4<uint32_t>*>(y + to) = {value[0], value[1], value[2], value[3]};
      if constexpr (kSave) {
        constexpr uint32_t kPack = sizeof(T) == 4 ? 0x40 : 0x6420;
        const uint32_t low = __byte_perm(position[0], position[1], kPack);
        const uint32_t high = __byte_perm(position[2], position[3], kPack);
        if constexpr (sizeof(T) == 4)
          *reinterpret_cast<uint32_t*>(code + to) = __byte_perm(low, high, 0x5410);
        else
          *reinterpret_cast<gpu::Vec2<uint32_t>*>(code + to) = {low, high};
      }
    } else {
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        const int64_t at = to + e * (s.out_height * s.out_width);
        if constexpr (sizeof(T) == 4)
          *reinterpret_cast<uint32_t*>(y + at) = value[0];
        else
          *reinterpret_cast<uint16_t*>(y + at) = static_cast<uint16_t>(value[0] >> 16 * e);
        if constexpr (kSave) code[at] = static_cast<uint8_t>(position[0] >> 16 * e);
      }
    }
    to += kNhwc ? s.out_width * s.channels : s.out_width;
  }
}

// A thread writes 2x2 quads of dx, which four windows cover, one below the other; two of these windows cover the next
// quad, too.
template <class T, bool kNhwc>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    backward_3x3s2_kernel(const T* __restrict__ grad, const uint8_t* __restrict__ code, T* __restrict__ dx, Strips s) {
  constexpr int kChannels = kNhwc ? 16 / sizeof(T) : 1;
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x, clamped = min(i, s.items - 1);
  const bool active = i < s.items;  // the others stay for the shuffles
  const uint32_t unit = clamped / s.per_unit, item = clamped - unit * s.per_unit;
  const int pair = item / s.runs, channel = (item - pair * s.runs) * kChannels, channels = kNhwc ? s.channels : 1;
  const int64_t first_plane = (s.first_unit + unit) * channels;
  const int64_t outputs = first_plane * (s.out_height * s.out_width) + channel;
  int quad = blockIdx.y * s.rows;
  const int end = min(quad + s.rows, divide_up(s.height, 2));
  CoveringWindows<T, kChannels> windows(grad + outputs, code + outputs, s.out_height, s.out_width, channels, quad,
                                        pair);
  QuadStore<T, kChannels> store(dx + (first_plane * (s.height * s.width) + channel), s.height, s.width, channels, quad,
                                pair, active);
  windows.load_next();
#pragma unroll(kNhwc ? 1 : 2)  // two: the windows that quads share change no registers
  for (; quad < end; ++quad) {
    windows.load_next();
    float values[2][2][kChannels];
    windows.gather(values);
    store(values);
  }
}

// Launches kernel(.., strips) over `columns` x `rows` items, `elements` planes of NCHW per thread.
template <class Launch>
gpu::error_t launch_strips(const PoolArguments& args, int columns, int rows, int elements, Launch launch) {
  const Images& images = args.images;
  const Pool& p = args.pool;
  const int size = images.dtype == DType::kFloat ? 4 : 2;
  const int runs = images.channels_last ? static_cast<int>(images.channels) * size / 16 : 1;
  const int64_t units = images.channels_last ? images.count : images.count * images.channels / elements;
  return for_each_batch(units, int64_t{columns} * runs, [&](int64_t first, int64_t count) {
    const int64_t items = count * columns * runs;
    const int strip = strip_rows(items, rows);
    const Strips strips = {first,
                           static_cast<uint32_t>(items),
                           columns * runs,
                           runs,
                           static_cast<int>(images.channels),
                           static_cast<int>(p.height),
                           static_cast<int>(p.width),
                           static_cast<int>(p.out_height),
                           static_cast<int>(p.out_width),
                           strip};
    return launch(strips, dim3(divide_up(items, kThreads), divide_up(rows, strip)));
  });
}

}  // namespace

bool has_max_pool2d_3x3s2(const PoolArguments& args) {
  const Images& images = args.images;
  const int size = images.dtype == DType::kFloat ? 4 : 2;
  if (!is_pool3x3s2(args.pool)) return false;
  if (images.channels_last)  // moved 16 bytes at a time
    return images.channels * size % 16 == 0 && are_aligned(16, args.x, args.grad, args.out) &&
           are_aligned(16 / size, args.code);
  // Words are moved, and of 16-bit elements two planes at a time.
  return are_aligned(2 * size, args.x, args.out) && (size == 4 || images.count * images.channels % 2 == 0);
}

gpu::error_t launch_max_pool2d_3x3s2(const PoolArguments& args, gpu::stream_t stream) {
  const Pool& p = args.pool;
  return dispatch_images(args.images, [&](auto type, auto nhwc) {
    using T = typename decltype(type)::type;
    return dispatch_flag(args.code != nullptr, [&](auto save) {
      return dispatch_flag(overhangs(p), [&](auto overhang) {
        return launch_strips(args, p.out_width, p.out_height, 4 / sizeof(T), [&](const Strips& strips, dim3 grid) {
          return gpu::launch(
              forward_3x3s2_kernel<T, decltype(nhwc)::value, decltype(save)::value, decltype(overhang)::value>, grid,
              kThreads, 0, stream, args.x, args.code, args.out, strips);
        });
      });
    });
  });
}

gpu::error_t launch_max_pool2d_3x3s2_backward(const PoolArguments& args, gpu::stream_t stream) {
  const Pool& p = args.pool;
  return dispatch_images(args.images, [&](auto type, auto nhwc) {
    return launch_strips(args, divide_up(p.width, 2), divide_up(p.height, 2), 1, [&](const Strips& strips, dim3 grid) {
      return gpu::launch(backward_3x3s2_kernel<typename decltype(type)::type, decltype(nhwc)::value>, grid, kThreads, 0,
                         stream, args.grad, args.code, args.out, strips);
    });
  });
}

}  // namespace alexnet_cuda
