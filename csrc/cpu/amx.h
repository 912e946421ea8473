// The tiles of Intel's matrix unit (AMX), for the files that are compiled for it.
#pragma once

#include <immintrin.h>

#include "kernels.h"

namespace alexnet_cuda::amx {

// Tiles of 16 rows of 64 bytes, on this thread; what was configured before comes back at the end, since oneDNN does
// not configure a thread anew for each of its kernels.
//
// GCC before 12.4 and 13.3 believes that the two instructions move 8 bytes instead of 64, and might leave out what
// writes the others: `used` tells it that all of an array is read and written.
class TileConfiguration {
 public:
  TileConfiguration() {
    _tile_storeconfig(before_);
    used(before_);
    alignas(64) uint8_t config[64] = {1};  // the palette
    for (int tile = 0; tile < 8; ++tile) {
      config[16 + 2 * tile] = 64;  // bytes of a row
      config[48 + tile] = 16;      // rows
    }
    used(config);
    _tile_loadconfig(config);
  }
  ~TileConfiguration() { _tile_loadconfig(before_); }

 private:
  static void used(const uint8_t* array) { asm volatile("" : : "r"(array) : "memory"); }

  alignas(64) uint8_t before_[64];
};

}  // namespace alexnet_cuda::amx
