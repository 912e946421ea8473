// Access to a batch in either memory format.
//
// Memory: consecutive threads take what is consecutive in memory, channels in NHWC and pixels in NCHW.
#pragma once

#include "launch.h"

namespace alexnet_cuda {

// Thread blocks per SM, which allows 128 registers. Without it ptxas sometimes limits itself to 48 and spills.
constexpr int kMinBlocks = 2;
constexpr int kRun = 8;  // neighbouring channels that one thread of a kernel for AlexNet's LRN finishes at a time

// A tensor (images, channels, pixels). Offsets within an image fit 32 bits, offsets of images need 64.
template <class T, bool kNhwc>
struct View {
  T* data;
  int channels, pixels;

  GPU_DEVICE T* image(int64_t n) const { return data + n * channels * pixels; }
  GPU_DEVICE int offset(int pixel, int c) const { return kNhwc ? pixel * channels + c : c * pixels + pixel; }
  GPU_DEVICE T& at(int64_t n, int pixel, int c) const { return image(n)[offset(pixel, c)]; }
};

template <class T, bool kNhwc>
View<T, kNhwc> view_of(std::conditional_t<std::is_const_v<T>, const void, void>* data, int64_t channels,
                       int64_t pixels) {
  return {static_cast<T*>(data), static_cast<int>(channels), static_cast<int>(pixels)};
}

// body(image, pixel, first channel): blockIdx.x and threadIdx.x cover the pixels and channels (kStep at a time) of one
// image, blockIdx.y strides over images.
template <int kStep, bool kNhwc, class Body>
GPU_DEVICE void for_each_element(int64_t images, int channels, int pixels, Body body) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int steps = channels / kStep, item = static_cast<int>(i);
  if (i >= int64_t{steps} * pixels) return;
  const int c = kNhwc ? item % steps : item / pixels, pixel = kNhwc ? item / steps : item % pixels;
  for (int64_t image = blockIdx.y; image < images; image += gridDim.y) body(image, pixel, c * kStep);
}
inline dim3 element_grid(int64_t images, int64_t items_per_image) {
  return dim3(divide_up(items_per_image, kThreads), std::min<int64_t>(images, kMaxGridRows));
}

}  // namespace alexnet_cuda
