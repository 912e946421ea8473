// Max pooling with 3x3 windows, stride 2 and no padding, forward; pool3x3s2.h explains the method.
//
// Memory, NHWC: a thread has 16 bytes of the channels of one output column. Neighbouring lanes have the channels that
// follow, then the next column, so a warp's loads and stores touch consecutive addresses. A column that two windows
// share is loaded by both threads, the second time from cache.
//
// Memory, NCHW: a thread has two output columns, five of x, which it loads as aligned words. Of 16-bit elements it has
// two planes. Their rows may begin in either half of a word; __byte_perm takes a column of both planes from two words
// into one, so that everything after it handles two outputs with one instruction. With an odd width and height:
//
//   plane 0, even row     | x0 x1 | x2 x3 | x4    |
//   plane 1, even row     |    x0 | x1 x2 | x3 x4 |
//   column 1                 (plane 0's x1, plane 1's x1)
#include "pool3x3s2.h"

namespace alexnet_cuda {
namespace {

// Three neighbours in a row of x, from column 2 ox on, and the same of every second row after it, `offset` words on. In
// NHWC 16 bytes of each pixel.
template <class T>
struct PixelRow {
  static constexpr int kWords = 4;
  const uint32_t* at;
  int pixel, two_rows;  // strides in words
  bool has_third;

  GPU_DEVICE PixelRow(const T* slice, const ThreadTiles& s, int y, int ox, int channel)
      : at(reinterpret_cast<const uint32_t*>(slice + ((y * s.width + 2 * ox) * s.channels + channel))),
        pixel(s.channels * sizeof(T) / 4),
        two_rows(2 * s.width * pixel),
        has_third(2 * ox + 2 < s.width) {}
  template <bool kOverhang>
  GPU_DEVICE void load(int offset, WindowRow<T, kWords>& to) const {
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      gpu::Vec4<uint32_t> words = {kMinusInfinity<T>, kMinusInfinity<T>, kMinusInfinity<T>, kMinusInfinity<T>};
      if (!kOverhang || i < 2 || has_third)
        words = *reinterpret_cast<const gpu::Vec4<uint32_t>*>(at + (offset + i * pixel));
#pragma unroll
      for (int k = 0; k < kWords; ++k) to.column[i][k] = words.v[k];
    }
  }
};
// NCHW: the same of two outputs side by side, of one plane or, of 16-bit elements, of two, one in either half of a
// word. kShift[plane]: whether the row of a plane begins in the second half of an aligned word. These words are loaded,
// three for the five columns.
template <class T, int... kShift>
struct PlaneRow {
  static constexpr int kPlanes = 4 / sizeof(T), kPerPlane = sizeof(T) == 4 ? 5 : 3;
  const uint32_t* at[kPlanes];
  int two_rows, columns;  // words; columns up to the edge

  GPU_DEVICE PlaneRow(const T* slice, const ThreadTiles& s, int y, int ox, int)
      : two_rows(2 * s.width / kPlanes), columns(s.width - 2 * ox) {
    constexpr int shift[] = {kShift...};
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) {
      at[p] = reinterpret_cast<const uint32_t*>(slice + int64_t{p} * s.height * s.width +
                                                (y * s.width + 2 * ox - shift[p]));
      gpu::hide_origin(at[p]);
    }
  }
  template <bool kOverhang>
  GPU_DEVICE void load(int offset, WindowRow<T, 2>& to) const {
    constexpr int shift[] = {kShift...};
    uint32_t words[kPlanes][kPerPlane];
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) {
      const uint32_t* from = at[p] + static_cast<uint32_t>(offset);  // has no sign to extend
#pragma unroll
      for (int k = 0; k < kPerPlane; ++k) {
        const int first = k * kPlanes - shift[p];  // the column in the word's first half
        const bool exists = first < (kOverhang ? 2 : 3) || first < columns;
        words[p][k] = exists ? from[k] : 0;
      }
    }
#pragma unroll
    for (int c = 0; c < 5; ++c) {
      uint32_t column;
      if constexpr (kPlanes == 1) {
        column = words[0][c];
      } else {
        const int a = c + shift[0], b = c + shift[1];
        column = __byte_perm(words[0][a / 2], words[1][b / 2], (a % 2 ? 0x32 : 0x10) | (b % 2 ? 0x7600 : 0x5400));
      }
      if (kOverhang && c >= 2 && c >= columns) column = kMinusInfinity<T>;
      if (c < 3) to.column[c][0] = column;
      if (c >= 2) to.column[c - 2][1] = column;
    }
  }
};

template <class T, Parity kParity, int kOdd>
struct PlaneRowOf {
  using type = PlaneRow<T, shift_of(kParity, 0, kOdd), shift_of(kParity, 1, kOdd)>;
};
template <Parity kParity, int kOdd>
struct PlaneRowOf<float, kParity, kOdd> {
  using type = PlaneRow<float, 0>;
};
template <class T, bool kNhwc, Parity kParity, int kOdd>
using InputRow = std::conditional_t<kNhwc, PixelRow<T>, typename PlaneRowOf<T, kParity, kOdd>::type>;

// The code of one output, by the rules of pool.h.
template <class T, bool kNhwc>
GPU_DEVICE void find_code(const View<const T, kNhwc>& x, const View<uint8_t, kNhwc>& code, const ThreadTiles& s, int oy,
                          int ox, int channel, bool relu) {
  Maximum maximum;
  for (int k = 0; k < 9; ++k) {
    const int row = 2 * oy + k / 3, column = 2 * ox + k % 3;
    if (row < s.height && column < s.width) maximum.update(gpu::to_float(x.at(0, row * s.width + column, channel)), k);
  }
  if (relu) maximum.relu();
  code.at(0, oy * s.out_width + ox, channel) = static_cast<uint8_t>(maximum.code);
}

// kOverhang: the last window may lack its third row or column.
//
// blockIdx.x and the lanes run along memory (launch_thread_tiles), blockIdx.y over tiles of output rows. For an output
// a thread loads six elements and has the other three, the row above's, in registers. The two in the window's third
// column are another lane's, too, and one of the two reads them from L1: x crosses the memory bus once. Shared memory
// would spare no load of these and add a store, a load and a barrier.
//
//   rows of x        2 oy      2 oy + 1   2 oy + 2   2 oy + 3   2 oy + 4
//   output oy        row[0]    row[1]     row[2]
//   output oy + 1                         row[0]     row[1]     row[2]
template <class T, bool kNhwc, bool kSave, bool kOverhang, Parity kParity>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    forward_3x3s2_kernel(const T* __restrict__ x, uint8_t* __restrict__ code, T* __restrict__ y, ThreadTiles s,
                         bool relu) {
  using Even = InputRow<T, kNhwc, kParity, 0>;
  constexpr int kWords = kNhwc ? 4 : 2, kOutputs = kNhwc ? 1 : 2, kElements = 4 / sizeof(T);  // outputs side by side
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= s.items) return;
  // This thread's slice, (first) output column and first channel, and output rows oy to end - 1.
  const uint32_t slice = i / s.per_slice, item = i - slice * s.per_slice;
  const int column = item / s.runs, ox = column * kOutputs, channel = (item - column * s.runs) * (16 / sizeof(T));
  int oy = blockIdx.y * s.rows;
  const int end = min(oy + s.rows, s.out_height);
  const int64_t planes = kNhwc ? s.channels : kElements, first_plane = (s.first_slice + slice) * planes;
  const T* image = x + first_plane * (s.height * s.width);
  const bool has_second = ox + 1 < s.out_width;

  // Rows of an odd number of elements begin differently in every second row: one object for each kind.
  Even even(image, s, 2 * oy, ox, channel);
  InputRow<T, kNhwc, kParity, 1> odd(image, s, 2 * oy + 1, ox, channel);
  // Where this thread's outputs go, of one plane or of two.
  constexpr int kOutPlanes = kNhwc ? 1 : kElements;
  const int out_plane = s.out_height * s.out_width, out_row = kNhwc ? s.out_width * s.channels : s.out_width;
  T* values[kOutPlanes];
  uint8_t* codes[kOutPlanes];
#pragma unroll
  for (int e = 0; e < kOutPlanes; ++e) {
    const int64_t first = (first_plane + e) * out_plane +
                          (kNhwc ? (oy * s.out_width + ox) * s.channels + channel : oy * s.out_width + ox);
    values[e] = y + first;
    codes[e] = code + first;
    gpu::hide_origin(values[e]);
    gpu::hide_origin(codes[e]);
  }
  // One check at the end instead of one per window: the maximum of all values is NaN if any of them is.
  uint32_t largest = 0;
  WindowRow<T, kWords> row[3];
  even.template load<kOverhang>(0, row[2]);
  row[2].find_maximum();
  // Offsets grow, the pointers stay: a 64-bit address is then one instruction where it is used.
  int from = 0, to = 0;
#pragma unroll 1
  for (; oy < end; ++oy) {
    // Two more rows into registers; the window's first row is the last one's third.
    row[0] = row[2];
    odd.template load<kOverhang>(from, row[1]);
    from += even.two_rows;
    if (!kOverhang || 2 * oy + 2 < s.height) {
      even.template load<kOverhang>(from, row[2]);
    } else {
#pragma unroll
      for (int k = 0; k < 3 * kWords; ++k) row[2].column[k / kWords][k % kWords] = kMinusInfinity<T>;
    }
    row[1].find_maximum();
    row[2].find_maximum();
    uint32_t value[kWords], position[kWords];
    pool_rows(row, value);
    if constexpr (kSave) find_codes(row, value, position);
    if (relu) {  // as Maximum::relu
#pragma unroll
      for (int k = 0; k < kWords; ++k) {
        value[k] = gpu::max_nan<T>(value[k], 0);
        if constexpr (kSave) position[k] |= gpu::equal_mask<T>(value[k], 0) & repeated<T>(kNoCode);
      }
    }
    // Values and positions to memory: 16 bytes of a pixel, or one element after the other. A position has the width of
    // its value in registers and one byte in memory.
    if constexpr (kNhwc) {
      *reinterpret_cast<gpu::Vec4<uint32_t>*>(values[0] + to) = {value[0], value[1], value[2], value[3]};
      if constexpr (kSave) {
        constexpr uint32_t kPack = sizeof(T) == 4 ? 0x40 : 0x6420;
        const uint32_t low = __byte_perm(position[0], position[1], kPack);
        const uint32_t high = __byte_perm(position[2], position[3], kPack);
        if constexpr (sizeof(T) == 4)
          *reinterpret_cast<uint32_t*>(codes[0] + to) = __byte_perm(low, high, 0x5410);
        else
          *reinterpret_cast<gpu::Vec2<uint32_t>*>(codes[0] + to) = {low, high};
      }
    } else {
#pragma unroll
      for (int k = 0; k < kWords * kElements; ++k) {
        const int w = k / kElements, e = k % kElements;
        if (w == 1 && !has_second) continue;
        const uint32_t offset = to;  // has no sign to extend
        if constexpr (sizeof(T) == 4)
          reinterpret_cast<uint32_t*>(values[e] + offset)[w] = value[w];
        else
          reinterpret_cast<uint16_t*>(values[e] + offset)[w] = static_cast<uint16_t>(value[w] >> 16 * e);
        if constexpr (kSave) (codes[e] + offset)[w] = static_cast<uint8_t>(position[w] >> 16 * e);
      }
    }
    to += out_row;
    if constexpr (kSave) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) largest = gpu::max_nan<T>(largest, value[w]);
    }
  }
  if (kSave && gpu::equal_mask<T>(largest, largest) != ~0u) {
    gpu::rare_branch();
    const View<const T, kNhwc> in = {image, static_cast<int>(planes), s.height * s.width};
    const View<uint8_t, kNhwc> out = {code + first_plane * out_plane, static_cast<int>(planes), out_plane};
    for (int row = blockIdx.y * s.rows; row < end; ++row)
      for (int k = 0; k < kWords * kElements; ++k)
        if (kNhwc || k < kElements || has_second)
          find_code(in, out, s, row, kNhwc ? ox : ox + k / kElements, kNhwc ? channel + k : k % kElements, relu);
  }
}

}  // namespace

bool has_max_pool2d_3x3s2(const PoolArguments& args) {
  const Images& images = args.images;
  const int size = element_size(images.dtype);
  if (!is_pool3x3s2(args.pool)) return false;
  if (images.channels_last)  // moved 16 bytes at a time
    return images.channels * size % 16 == 0 && are_aligned(16, args.x, args.grad, args.out) &&
           are_aligned(16 / size, args.code);
  // Words are moved, and of 16-bit elements two planes at a time.
  return are_aligned(4, args.x, args.out) && (size == 4 || images.count * images.channels % 2 == 0);
}

gpu::error_t launch_max_pool2d_3x3s2(const PoolArguments& args, gpu::stream_t stream, bool relu) {
  const Pool& p = args.pool;
  return dispatch_images(args.images, [&](auto type, auto nhwc) {
    using T = typename decltype(type)::type;
    constexpr bool kNhwc = decltype(nhwc)::value;
    return dispatch_flag(args.code != nullptr, [&](auto save) {
      return dispatch_flag(overhangs(p), [&](auto overhang) {
        return dispatch_parity<T, kNhwc>(p, [&](auto parity) {
          return launch_thread_tiles(args, p.out_width, p.out_height, [&](const ThreadTiles& tiles, dim3 grid) {
            return gpu::launch(forward_3x3s2_kernel<T, kNhwc, decltype(save)::value, decltype(overhang)::value,
                                                    decltype(parity)::value>,
                               grid, kThreads, 0, stream, args.x, args.code, args.out, tiles, relu);
          });
        });
      });
    });
  });
}

}  // namespace alexnet_cuda
