// Blocks of planes, for operators that treat every channel by itself (max pooling, LRN in the plane). In NHWC a block
// is some channels of one image. In NCHW it is some of the batch's planes, across images, so that images of few
// channels fill vectors, too.
#pragma once

#include "rows.h"

namespace alexnet_cuda::ALEXNET_CPU_LEVEL {

struct Planes {
  bool channels_last;
  int64_t channels, first;  // channels of the tensor; the block's first plane, counted through the batch
  int64_t count, padded;    // planes of the block, without and with padding to whole vectors

  // The block's first element and its layout in a tensor whose planes have `pixels` pixels.
  int64_t offset(int64_t pixels) const {
    return channels_last ? first / channels * channels * pixels + first % channels : first * pixels;
  }
  Channels layout(int64_t pixels) const {
    return {channels_last ? channels : 1, channels_last ? 1 : pixels, 1, count, padded};
  }
};

// Block t of at most `size` planes.
template <class A>
ALEXNET_INLINE Planes planes_of(const Images& images, int64_t t, int64_t size) {
  const int64_t channels = images.channels, blocks = (channels + size - 1) / size;  // blocks of an image, in NHWC
  const int64_t first = images.channels_last ? t / blocks * channels + t % blocks * size : t * size;
  const int64_t end = images.channels_last ? (t / blocks + 1) * channels : images.count * channels;
  const int64_t count = min64(size, end - first);
  return {images.channels_last, channels, first, count, round_up(count, kLanes<A>)};
}

}  // namespace alexnet_cuda::ALEXNET_CPU_LEVEL
