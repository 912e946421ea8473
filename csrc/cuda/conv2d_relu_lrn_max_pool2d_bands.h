// How the kernels of AlexNet's whole first block cut images into bands, and load the s2d blocks of a band's rows.
#pragma once

#include <limits>

#include "space_to_depth.h"

namespace alexnet_cuda {

constexpr int kMaxColumns = 56;                           // outputs of a row
constexpr int kRowBlocks = 64, kBlockRows = 6;            // s2d blocks of a row; rows in shared memory
constexpr int kBandStride = 8 * kBlockRows * kRowBlocks;  // 16-bit words from one channel group to the next

// How the work is cut. With two pooled rows to a band, rows of outputs that two bands need are computed by both:
//
//   outputs       0  1  2  3  4  5  6  7  8
//   pooled row 0  -------
//              1        -------                band 0: outputs 0 to 4
//              2              -------
//              3                    -------    band 1: outputs 4 to 8
//
// A job is a band of an image: `rows` pooled rows (the last band may have fewer).
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
};

// ---- host ----------------------------------------------------------------------------------------------------------

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

}  // namespace alexnet_cuda
