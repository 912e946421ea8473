// Max pooling as AlexNets have it: 3x3 windows, stride 2, no padding. Shared by the pooling operator's kernels and the
// fused ones for these settings; pool.h has the rules, and the kernels for all other settings.
//
// A thread goes down a strip: some output columns (backward: pairs of columns of dx) of some channels, row by row. What
// two windows share of a column is loaded once and kept in registers.
//
// The trick: elements stay packed, two of 16 bits in a word. A maximum costs one instruction for both. The position of
// a window's maximum follows from comparisons of the results: the first row whose maximum is the window's, and in it
// the first column that equals it. So the first of equal values wins. NaN equals nothing and takes a path of its own.
#pragma once

#include "pool.h"

namespace alexnet_cuda {

// Output rows per strip: as many as leave a GPU of about 2^18 threads busy, since each strip loads a row more. The
// number of strips is a multiple of `per_warp`.
inline int strip_rows(int64_t threads_per_row, int rows, int per_warp = 1) {
  const int64_t strips = std::clamp<int64_t>((1 << 18) / threads_per_row, 1, std::min(divide_up(rows, 4), 32768));
  return divide_up(rows, divide_up(strips, per_warp) * per_warp);
}

inline bool is_pool3x3s2(const Pool& pool) {
  return pool.kernel_size == 3 && pool.stride == 2 && pool.padding == 0;
}

// Whether the last window hangs over the edge (ceil_mode); it does so by one row or column.
inline bool overhangs(const Pool& pool) {
  return 2 * pool.out_height + 1 > pool.height || 2 * pool.out_width + 1 > pool.width;
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

// The positions of these maxima in their windows, one per element of a word.
template <class T, int n>
GPU_DEVICE void find_codes(const WindowRow<T, n> (&row)[3], const uint32_t (&value)[n], uint32_t (&code)[n]) {
  uint32_t largest = value[0];  // NaN if any of them is
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const uint32_t first = gpu::equal_mask<T>(row[0].maximum[i], value[i]);
    const uint32_t second = gpu::equal_mask<T>(row[1].maximum[i], value[i]);
    const auto of_row = [&](int x) {
      return select(first, row[0].column[x][i], select(second, row[1].column[x][i], row[2].column[x][i]));
    };
    const uint32_t left = gpu::equal_mask<T>(of_row(0), value[i]), middle = gpu::equal_mask<T>(of_row(1), value[i]);
    // 0, 3 or 6 for the row; 0, 1 or 2 for the column.
    code[i] = (((second & repeated<T>(5)) ^ repeated<T>(6)) & ~first) +
              (((middle & repeated<T>(3)) ^ repeated<T>(2)) & ~left);
    if (i > 0) largest = gpu::max_nan<T>(largest, value[i]);
  }
  if (__builtin_expect(gpu::equal_mask<T>(largest, largest) != ~0u, 0)) {  // the last NaN of a window is its maximum
    gpu::rare_branch();
#pragma unroll
    for (int i = 0; i < n; ++i)
#pragma unroll
      for (int k = 0; k < 9; ++k) {
        const uint32_t v = row[k / 3].column[k % 3][i];
        code[i] = select(gpu::equal_mask<T>(v, v), code[i], repeated<T>(k));
      }
  }
}

// ---- backward ------------------------------------------------------------------------------------------------------

// n channels of a window: the gradient, and the position of the maximum, of each. A window outside the image has no
// gradient.
template <class T, int n>
struct Window {
  gpu::Vec<T, n> grad = {};
  gpu::Vec<uint8_t, n> code = {};

  GPU_DEVICE void load(const T* grads, const uint8_t* codes) {
    grad = *reinterpret_cast<const gpu::Vec<T, n>*>(grads);
    code = *reinterpret_cast<const gpu::Vec<uint8_t, n>*>(codes);
  }
  // The gradient of channel i if its maximum was at this position.
  GPU_DEVICE float at(int position, int i) const { return code.v[i] == position ? gpu::to_float(grad.v[i]) : 0.f; }
};
template <class T>
struct Window<T, 1> {  // in whole registers
  float grad = 0;
  int code = 0;

  GPU_DEVICE void load(const T* grads, const uint8_t* codes) {
    grad = gpu::to_float(*grads);
    code = *codes;
  }
  GPU_DEVICE float at(int position, int) const { return code == position ? grad : 0.f; }
};

// The four windows that cover a quad (rows 2 quad and 2 quad + 1, columns 2 pair and 2 pair + 1 of dx): those in pooled
// rows quad - 1 and quad, columns pair - 1 and pair.
template <class T, int n>
struct CoveringWindows {
  const T* grad;  // row `next`, column `pair`
  const uint8_t* code;
  int row, channels, next;
  unsigned left_rows, right_rows;  // of columns pair - 1 and pair: the pooled height, or 0 outside the image
  Window<T, n> window[2][2];

  GPU_DEVICE CoveringWindows(const T* image, const uint8_t* codes, int out_height, int out_width, int channels,
                             int quad, int pair)
      : row(out_width * channels),
        channels(channels),
        next(quad - 1),
        left_rows(pair > 0 && pair <= out_width ? out_height : 0),
        right_rows(pair < out_width ? out_height : 0) {
    grad = image + (next * row + pair * channels);
    code = codes + (next * row + pair * channels);
  }
  // Moves one row down.
  GPU_DEVICE void load_next() {
    window[0][0] = window[1][0];
    window[0][1] = window[1][1];
    window[1][0] = window[1][1] = {};
    if (static_cast<unsigned>(next) < left_rows) window[1][0].load(grad - channels, code - channels);
    if (static_cast<unsigned>(next) < right_rows) window[1][1].load(grad, code);
    grad += row;
    code += row;
    ++next;
  }
  // quad[y][x][i]: sums in the order of the windows.
  GPU_DEVICE void gather(float (&quad)[2][2][n]) const {
    const auto& w = window;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      quad[0][0][i] = w[0][0].at(8, i) + w[0][1].at(6, i) + w[1][0].at(2, i) + w[1][1].at(0, i);
      quad[0][1][i] = w[0][1].at(7, i) + w[1][1].at(1, i);
      quad[1][0][i] = w[1][0].at(5, i) + w[1][1].at(3, i);
      quad[1][1][i] = w[1][1].at(4, i);
    }
  }
};

// Stores n channels of columns 2 pair and 2 pair + 1 of two rows of dx, again and again two rows further down. In NCHW
// (n = 1) two elements go with one store: where these are not aligned, each lane stores its left element together with
// the right one of the lane before. All lanes of a warp must call it, neighbouring lanes with neighbouring pairs.
template <class T, int n>
struct QuadStore {
  T* at;
  int row, channels, lines_left;
  bool active, has_right;

  GPU_DEVICE QuadStore(T* image, int height, int width, int channels, int quad, int pair, bool active)
      : at(image + (2 * quad * width + 2 * pair) * channels),
        row(width * channels),
        channels(channels),
        lines_left(height - 2 * quad),
        active(active),
        has_right(2 * pair + 1 < width) {}

  GPU_DEVICE void operator()(const float (&quad)[2][2][n]) {
    using Pixel = gpu::Vec<T, n>;
#pragma unroll
    for (int y = 0; y < 2; ++y) {
      Pixel left, right;
#pragma unroll
      for (int i = 0; i < n; ++i) {
        left.v[i] = gpu::from_float<T>(quad[y][0][i]);
        right.v[i] = gpu::from_float<T>(quad[y][1][i]);
      }
      if (!active || y >= lines_left) continue;
      *reinterpret_cast<Pixel*>(at + y * row) = left;
      if (has_right) *reinterpret_cast<Pixel*>(at + (y * row + channels)) = right;
    }
    at += 2 * row;
    lines_left -= 2;
  }
};
template <class T>
struct QuadStore<T, 1> {
  T* at[2];                                     // the aligned pair of either row
  bool shifted[2], both[2], left[2], right[2];  // what this lane stores of a row: a pair, or a single element
  int two_rows, lines_left;

  GPU_DEVICE QuadStore(T* image, int height, int width, int, int quad, int pair, bool active)
      : two_rows(2 * width), lines_left(height - 2 * quad) {
    const bool has_right = 2 * pair + 1 < width, is_first = pair == 0 || threadIdx.x % 32 == 0;
    const bool is_last = 2 * pair + 2 >= width || threadIdx.x % 32 == 31;
#pragma unroll
    for (int y = 0; y < 2; ++y) {
      T* const own = image + ((2 * quad + y) * width + 2 * pair);
      shifted[y] = reinterpret_cast<uintptr_t>(own) % (2 * sizeof(T)) != 0;
      at[y] = own - shifted[y];
      both[y] = active && (shifted[y] ? !is_first : has_right);
      left[y] = active && !both[y];
      right[y] = active && shifted[y] && is_last && has_right;
    }
  }
  GPU_DEVICE void operator()(const float (&quad)[2][2][1]) {
#pragma unroll
    for (int y = 0; y < 2; ++y) {
      const float before = __shfl_sync(~0u, quad[y][1][0], (threadIdx.x + 31) % 32);
      const float low = shifted[y] ? before : quad[y][0][0], high = shifted[y] ? quad[y][0][0] : quad[y][1][0];
      if (y < lines_left) {
        if (both[y]) *reinterpret_cast<gpu::Vec2<T>*>(at[y]) = {gpu::from_float<T>(low), gpu::from_float<T>(high)};
        if (left[y]) at[y][shifted[y]] = gpu::from_float<T>(quad[y][0][0]);
        if (right[y]) at[y][2] = gpu::from_float<T>(quad[y][1][0]);
      }
      at[y] += two_rows;
    }
    lines_left -= 2;
  }
};

}  // namespace alexnet_cuda
