// The pixels of a convolution's output as one sequence, for sums over all of them.
//
// Pixels and s2d blocks (space_to_depth.h) are numbered alike: along the rows of s2d blocks of a strip, through all
// strips of all images. A pixel needs its own s2d block and those up to two rows and two columns further. So the last
// two rows and columns of a strip are pixels without an output, and no s2d block is numbered twice.
//
//    0  1  2  .  .      a strip of 3x2 outputs: 20 pixels and s2d blocks, of which those with a number have an output;
//    5  6  7  .  .      pixel 6 needs s2d blocks 6, 7, 8, 11, 12, 13, 16, 17 and 18
//    .  .  .  .  .
//    .  .  .  .  .      pixel 20 is the first of the next strip, or of the next image
#pragma once

#include "space_to_depth.h"

namespace alexnet_cuda {

struct Pixels : StripGeometry {
  int images, rows;               // rows of s2d blocks in a strip
  int stage_rows, stage_columns;  // rows and columns from a pixel to that of the next stage
};

// A pixel, or the s2d block there.
struct Place {
  int image, strip, row, column;

  GPU_DEVICE Place(const Pixels& g, int64_t i) {
    const int64_t rows = i / g.pitch(), strips = rows / g.rows;
    column = static_cast<int>(i - rows * g.pitch());
    row = static_cast<int>(rows - strips * g.rows);
    image = static_cast<int>(strips / g.strips);
    strip = static_cast<int>(strips % g.strips);
  }
  GPU_DEVICE void advance(const Pixels& g) {  // to the next stage
    row += g.stage_rows;
    column += g.stage_columns;
    if (column >= g.pitch()) column -= g.pitch(), ++row;
    for (; row >= g.rows; row -= g.rows)
      if (++strip == g.strips) strip = 0, ++image;
  }
  // Index of the pixel in its image's output, or -1.
  GPU_DEVICE int output_index(const Pixels& g) const {
    const int x = strip * g.strip_width + column;
    const bool exists = image < g.images && row < g.out_height && column < g.strip_width && x < g.out_width;
    return exists ? row * g.out_width + x : -1;
  }
};

// A thread's channel groups of an s2d block: every kParts-th from `part` on; 0 outside the images.
template <int kChannels, bool kNhwc, int kParts, class E, int n>
GPU_DEVICE void load_blocks(const E* x, const Pixels& g, const Place& at, int part, E (&v)[n][16 / sizeof(E)]) {
  const E* image = x + int64_t{at.image} * kChannels * g.height * g.width;
  const int row = at.image < g.images ? 4 * at.row - g.padding : g.height;
  const int column = 4 * (at.column + at.strip * g.strip_width) - g.padding;
  unroll<kParts>([&](auto p) {
    if (part == p)
      unroll<kGroups<E, kChannels> / kParts>([&](auto i) {
        constexpr int kIndex = decltype(p)::value + decltype(i)::value * kParts;
        load_group<kChannels, kNhwc, kIndex>(g, image, row, column, v[i]);
      });
  });
}

// 16 bytes of a pixel's filters in the output's gradient, from `filter` on; 0 if there is no such output or filter.
template <class E>
GPU_DEVICE void load_filters(const E* image, const Pixels& g, int output, int filter, E (&v)[16 / sizeof(E)]) {
  constexpr int kSize = 16 / sizeof(E);
  const int pixels = g.out_height * g.out_width, pitch = g.channels_last ? 1 : pixels;
  const E* from = image + (g.channels_last ? output * g.filters + filter : filter * pixels + output);
  if (sizeof(E) == 4 && g.vectors && g.channels_last) {  // of 16 bits: copied by cp.async
    gpu::Vec<E, kSize> run = {};
    if (output >= 0 && filter < g.filters) run = *reinterpret_cast<const gpu::Vec<E, kSize>*>(from);
#pragma unroll
    for (int k = 0; k < kSize; ++k) v[k] = run.v[k];
  } else {
#pragma unroll
    for (int k = 0; k < kSize; ++k) v[k] = output >= 0 && filter + k < g.filters ? from[k * pitch] : E{0};
  }
}

}  // namespace alexnet_cuda
