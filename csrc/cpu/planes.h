// Blocks of planes, for operators that treat every channel by itself (max pooling, LRN in the plane). In NHWC a block
// is some channels of one image. In NCHW it is some of the batch's planes, across images, so that images of few
// channels fill vectors, too.
#pragma once

#include "rows.h"

namespace alexnet_cuda::ALEXNET_CPU_LEVEL {

struct Planes {
  bool channels_last;
  int64_t channels;              // of the tensor
  int64_t image, first_channel;  // NHWC: where the block starts
  int64_t plane;                 // NCHW: its first plane
  int64_t count, padded;         // planes, without and with padding to whole vectors

  // The block's first element and its layout in a tensor whose planes have `pixels` pixels.
  int64_t offset(int64_t pixels) const {
    return channels_last ? image * pixels * channels + first_channel : plane * pixels;
  }
  Channels layout(int64_t pixels) const {
    return {channels_last ? channels : 1, channels_last ? 1 : pixels, 1, count, padded};
  }
};

// Block t of at most `size` planes.
template <class A>
ALEXNET_INLINE Planes planes_of(const Images& images, int64_t t, int64_t size) {
  Planes planes = {images.channels_last, images.channels, 0, 0, 0, 0, 0};
  int64_t left;
  if (images.channels_last) {
    const int64_t blocks = (images.channels + size - 1) / size;
    planes.image = t / blocks;
    planes.first_channel = t % blocks * size;
    left = images.channels - planes.first_channel;
  } else {
    planes.plane = t * size;
    left = images.count * images.channels - planes.plane;
  }
  planes.count = min64(size, left);
  planes.padded = round_up(planes.count, kLanes<A>);
  return planes;
}

}  // namespace alexnet_cuda::ALEXNET_CPU_LEVEL
