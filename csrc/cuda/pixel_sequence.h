// The pixels of a convolution's output as one sequence, for sums over all of them.
//
// Pixels and s2d blocks (space_to_depth.h) are numbered alike: along the rows of s2d blocks of a strip, through all
// strips of all images. A pixel needs its own s2d block and those up to two rows and two columns further. So the last
// two rows and columns of a strip are pixels without an output, and no s2d block is numbered twice.
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

}  // namespace alexnet_cuda
