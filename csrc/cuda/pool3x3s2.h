// Max pooling as AlexNets have it: 3x3 windows, stride 2, no padding. Shared by the pooling operator's kernels and the
// fused ones for these settings; pool.h has the rules, and the kernels for all other settings.
//
// A thread computes a tile: of some channels, some output columns (backward: pairs of columns of dx) and rows. It goes
// down row by row: the last of a window's three rows is the first of the next window's and stays in registers, so that
// a thread loads two rows for each output, not three.
//
// The trick: elements stay packed, two of 16 bits in a word. A maximum costs one instruction for both. The position of
// a window's maximum follows from comparisons of the results: the first row whose maximum is the window's, and in it
// the first column that equals it. So the first of equal values wins. NaN equals nothing: a thread that met one finds
// its tile's positions again, comparing one element after the other.
#pragma once

#include "pool.h"

namespace alexnet_cuda {

// Output rows per tile: as many as leave a GPU busy, since each tile loads a row more. The number of tiles is a
// multiple of `per_warp`.
inline int tile_rows(int64_t threads_per_row, int rows, int per_warp = 1) {
  const int64_t tiles = std::clamp<int64_t>(kBusyThreads / threads_per_row, 1, std::min(divide_up(rows, 4), 32768));
  return divide_up(rows, divide_up(tiles, per_warp) * per_warp);
}

inline bool is_pool3x3s2(const Pool& pool) {
  return pool.kernel_size == 3 && pool.stride == 2 && pool.padding == 0;
}

// Whether the last window hangs over the edge (ceil_mode); it does so by one row or column.
inline bool overhangs(const Pool& pool) {
  return 2 * pool.out_height + 1 > pool.height || 2 * pool.out_width + 1 > pool.width;
}

// How a batch is cut into tiles. A slice is an image in NHWC; in NCHW a plane or, of 16-bit elements, two. blockIdx.y
// counts the tiles of a column, blockIdx.x and threadIdx.x cover the rest.
struct ThreadTiles {
  int64_t first_slice;
  uint32_t items;       // threads at work: slices x columns (backward: pairs; in NCHW two of either) x channel runs
  int per_slice, runs;  // items of a slice; runs of 16 bytes of a pixel's channels in NHWC, else 1
  int channels, height, width, out_height, out_width;
  int rows;  // output rows (backward: pairs of rows) of a tile
};

// Where the rows of a pair of planes begin in words that are aligned: plane 0 has an even number of elements before it,
// plane 1 an image's.
enum Parity { kEvenWidth, kOddWidth, kOddSize };  // width even; width odd, height even; both odd
constexpr int shift_of(Parity parity, int plane, int odd_row) {
  return parity == kEvenWidth ? 0 : parity == kOddWidth ? odd_row : plane ^ odd_row;
}

// Calls launch(tiles, grid) until all items of `columns` x `rows` (backward: of pairs of them) are done.
template <class Launch>
gpu::error_t launch_thread_tiles(const PoolArguments& args, int columns, int rows, Launch launch) {
  const Images& images = args.images;
  const Pool& p = args.pool;
  const int size = element_size(images.dtype);
  const int runs = images.channels_last ? static_cast<int>(images.channels) * size / 16 : 1;
  const int64_t slices = images.channels_last ? images.count : images.count * images.channels * size / 4;
  if (!images.channels_last) columns = divide_up(columns, 2);  // a thread has two
  return for_each_batch(slices, int64_t{columns} * runs, [&](int64_t first, int64_t count) {
    const int64_t items = count * columns * runs;
    const int per_tile = tile_rows(items, rows);
    const ThreadTiles tiles = {first,
                               static_cast<uint32_t>(items),
                               columns * runs,
                               runs,
                               static_cast<int>(images.channels),
                               static_cast<int>(p.height),
                               static_cast<int>(p.width),
                               static_cast<int>(p.out_height),
                               static_cast<int>(p.out_width),
                               per_tile};
    return launch(tiles, dim3(divide_up(items, kThreads), divide_up(rows, per_tile)));
  });
}

// body(integral constant of the planes' Parity), which matters to 16-bit elements in NCHW.
template <class T, bool kNhwc, class Body>
gpu::error_t dispatch_parity(const Pool& p, Body body) {
  if constexpr (!kNhwc && sizeof(T) == 2) {
    if (p.width % 2 && p.height % 2) return body(std::integral_constant<Parity, kOddSize>{});
    if (p.width % 2) return body(std::integral_constant<Parity, kOddWidth>{});
  }
  return body(std::integral_constant<Parity, kEvenWidth>{});
}

// The same 16 bits (or 32 of a float) for every element of a word.
template <class T>
constexpr uint32_t repeated(uint32_t bits) {
  return sizeof(T) == 4 ? bits : bits * 0x10001u;
}
template <class T>
constexpr uint32_t kMinusInfinity = sizeof(T) == 4                 ? 0xff800000
                                    : std::is_same_v<T, gpu::half> ? 0xfc00fc00
                                                                   : 0xff80ff80;

GPU_DEVICE uint32_t select(uint32_t mask, uint32_t a, uint32_t b) {
  return (a & mask) | (b & ~mask);
}

// Three columns of a window's row, n words of each, and their maximum.
template <class T, int n>
struct WindowRow {
  uint32_t column[3][n], maximum[n];

  GPU_DEVICE void find_maximum() {
#pragma unroll
    for (int i = 0; i < n; ++i) maximum[i] = gpu::max_nan<T>(gpu::max_nan<T>(column[0][i], column[1][i]), column[2][i]);
  }
};

// The maxima of n words of windows.
template <class T, int n>
GPU_DEVICE void pool_rows(const WindowRow<T, n> (&row)[3], uint32_t (&value)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i)
    value[i] = gpu::max_nan<T>(gpu::max_nan<T>(row[0].maximum[i], row[1].maximum[i]), row[2].maximum[i]);
}

// The positions of these maxima in their windows, one per element of a word; of a window with NaN it has no meaning.
template <class T, int n>
GPU_DEVICE void find_codes(const WindowRow<T, n> (&row)[3], const uint32_t (&value)[n], uint32_t (&code)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const uint32_t first = gpu::equal_mask<T>(row[0].maximum[i], value[i]);
    const uint32_t second = gpu::equal_mask<T>(row[1].maximum[i], value[i]);
    const auto of_row = [&](int x) {
      return select(first, row[0].column[x][i], select(second, row[1].column[x][i], row[2].column[x][i]));
    };
    const uint32_t left = gpu::equal_mask<T>(of_row(0), value[i]), middle = gpu::equal_mask<T>(of_row(1), value[i]);
    // 0, 3 or 6 for the row, 0, 1 or 2 for the column, without a branch: 5 ^ 6 = 3 in the second row, 0 ^ 6 in the
    // third; 3 ^ 2 = 1 in the middle column, 0 ^ 2 in the right one; & ~first and & ~left make 0 of them.
    code[i] = (((second & repeated<T>(5)) ^ repeated<T>(6)) & ~first) +
              (((middle & repeated<T>(3)) ^ repeated<T>(2)) & ~left);
  }
}

// ---- backward ------------------------------------------------------------------------------------------------------

// n words of a window: gradients, and the positions of the maxima, as wide as these. One without values has no
// gradient.
template <class T, int n>
struct Window {
  uint32_t grad[n] = {}, code[n] = {};

  // Word i of the gradients, without those whose maximum was not at this position. (16-bit positions are compared as
  // subnormal halfs.)
  GPU_DEVICE uint32_t at(int position, int i) const {
    if constexpr (sizeof(T) == 4) return static_cast<int>(code[i]) == position ? grad[i] : 0;
    return grad[i] & gpu::equal_mask<gpu::half>(code[i], repeated<T>(position));
  }
};

// A quad is 2x2 pixels of x, 0 1 above 2 3. Four windows cover some of it, those in two pooled rows and columns. Their
// positions, 0 to 8, of these pixels:
//
//   window (0, 0)   window (0, 1)   window (1, 0)   window (1, 1)
//        8 .             6 7             2 .             0 1
//        . .             . .             5 .             3 4
//
// Pixel k: sum(at(window's row, column, position)...), in that order.
template <class At, class Sum>
GPU_DEVICE auto gather_quad(int k, At at, Sum sum) {
  return k == 0   ? sum(at(0, 0, 8), at(0, 1, 6), at(1, 0, 2), at(1, 1, 0))
         : k == 1 ? sum(at(0, 1, 7), at(1, 1, 1))
         : k == 2 ? sum(at(1, 0, 5), at(1, 1, 3))
                  : sum(at(1, 1, 4));
}

// The windows that cover quads side by side: quad q lies in the pooled columns q and q + 1 of these, in the last pooled
// row and in this one.
template <class T, int n, int kQuads = 1>
struct CoveringWindows {
  Window<T, n> window[2][kQuads + 1];

  // Moves one pooled row down. load(column, window) reads a window of it, if exists(column).
  template <class Exists, class Load>
  GPU_DEVICE void advance(Exists exists, Load load) {
#pragma unroll
    for (int k = 0; k <= kQuads; ++k) {
      window[0][k] = window[1][k];
      window[1][k] = {};
      if (exists(k)) load(k, window[1][k]);
    }
  }
  // Word i of pixel k of quad q.
  template <class Sum>
  GPU_DEVICE auto gather(int q, int k, int i, Sum sum) const {
    return gather_quad(k, [&](int y, int x, int position) { return window[y][q + x].at(position, i); }, sum);
  }
};

// Element `which` of a word as a float.
template <class T>
GPU_DEVICE float element(uint32_t word, int which) {
  if constexpr (sizeof(T) == 4)
    return __uint_as_float(word);
  else
    return gpu::unpack<T>(word, which);
}

// Sums of words, element by element, rounded once.
template <class T>
struct SumWords {
  GPU_DEVICE uint32_t operator()(uint32_t a) const { return a; }
  GPU_DEVICE uint32_t operator()(uint32_t a, uint32_t b) const { return gpu::add<T>(a, b); }
  GPU_DEVICE uint32_t operator()(uint32_t a, uint32_t b, uint32_t c, uint32_t d) const {
    const auto sum = [&](int i) { return element<T>(a, i) + element<T>(b, i) + element<T>(c, i) + element<T>(d, i); };
    if constexpr (sizeof(T) == 4)
      return __float_as_uint(sum(0));
    else
      return gpu::pack<T>(sum(0), sum(1));
  }
};

}  // namespace alexnet_cuda
