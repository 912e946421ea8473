// Ops that treat every channel by itself cut a tensor into blocks of planes: in NHWC a block is some channels of an
// image; in NCHW it is some of the batch's planes, across images, so that few channels still fill a vector.
#pragma once

#include "rows.h"

namespace alexnet_cuda::ALEXNET_CPU_LEVEL {

struct Planes {
  bool channels_last;
  int64_t channels;              // of the tensor
  int64_t image, first_channel;  // NHWC
  int64_t plane;                 // NCHW: the first
  int64_t each, padded;

  // Where the block starts, and how it lies, in a tensor whose planes have this many pixels.
  int64_t offset(int64_t pixels) const {
    return channels_last ? image * pixels * channels + first_channel : plane * pixels;
  }
  Channels layout(int64_t pixels) const {
    return {channels_last ? channels : 1, channels_last ? 1 : pixels, 1, each, padded};
  }
};

// Block t of at most `most` planes.
template <class A>
ALEXNET_INLINE Planes planes_of(const Images& images, int64_t t, int64_t most) {
  Planes planes = {images.channels_last, images.channels, 0, 0, 0, 0, 0};
  int64_t left;
  if (images.channels_last) {
    const int64_t blocks = (images.channels + most - 1) / most;
    planes.image = t / blocks;
    planes.first_channel = t % blocks * most;
    left = images.channels - planes.first_channel;
  } else {
    planes.plane = t * most;
    left = images.count * images.channels - planes.plane;
  }
  planes.each = lesser(most, left);
  planes.padded = round_up(planes.each, kLanes<A>);
  return planes;
}

}  // namespace alexnet_cuda::ALEXNET_CPU_LEVEL
