// Access to a batch in either memory format by runs of 8 consecutive channels of one pixel.
//
// Memory: in NCHW the lanes of a warp take neighbouring pixels and each thread goes from run to run; in NHWC they take
// neighbouring runs of a pixel. Either way a warp touches consecutive addresses. Channels that two runs share (an LRN
// window of 5 reaches 2 to each side, its gradient 4) are read again, from cache.
#pragma once

#include "launch.h"

namespace alexnet_cuda {

// Thread blocks per SM, which allows 128 registers. Without it ptxas sometimes limits itself to 48 and spills.
constexpr int kMinBlocks = 2;
constexpr int kRun = 8;   // channels that one thread finishes at a time
constexpr int kHalo = 4;  // channels read on either side of them

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

// v[i] = channel c - 4 + i of a pixel for kFirst <= i < kEnd; 0 outside the group's channels [low, high).
template <int kFirst, int kEnd, class T, bool kNhwc>
GPU_DEVICE void read_run(const View<const T, kNhwc>& x, int64_t n, int pixel, int c, int low, int high,
                         float (&v)[16]) {
  const T* image = x.image(n);
#pragma unroll
  for (int i = kFirst; i < kEnd; ++i) {
    const int channel = c - kHalo + i;
    v[i] = channel >= low && channel < high ? gpu::to_float(image[x.offset(pixel, channel)]) : 0.f;
  }
}

// Stores channels c .. c + 7 of a pixel, as far as they are below `high`.
template <class T, bool kNhwc>
GPU_DEVICE void write_run(const View<T, kNhwc>& y, int64_t n, int pixel, int c, int high, const float (&v)[kRun]) {
#pragma unroll
  for (int i = 0; i < kRun; ++i)
    if (c + i < high) y.at(n, pixel, c + i) = gpu::from_float<T>(v[i]);
}

// All runs of a range of images, and the share of them that each thread does.
struct Runs {
  int64_t first_image;
  uint32_t total_pixels;  // of all images
  int pixels, groups, group_channels, runs_per_group, runs_per_thread;

  // body(image, pixel, first channel of the run, first channel of its group, end of the group's channels)
  template <bool kNhwc, class Body>
  GPU_DEVICE void for_each(Body body) const {
    // NHWC: one run per thread, the runs of a pixel side by side. NCHW: one pixel per thread, a share of its runs.
    const uint32_t thread = blockIdx.x * kThreads + threadIdx.x, runs = groups * runs_per_group;
    const uint32_t position = kNhwc ? thread / runs : thread;
    if (position >= total_pixels) return;
    const uint32_t begin = kNhwc ? thread % runs : blockIdx.y * runs_per_thread;
    const uint32_t end = kNhwc ? begin + 1 : min(begin + runs_per_thread, runs);
    const uint32_t image = position / pixels;
    for (uint32_t run = begin; run < end; ++run) {
      const int group = run / runs_per_group, low = group * group_channels;
      body(first_image + image, static_cast<int>(position - image * pixels),
           low + (run - group * runs_per_group) * kRun, low, low + group_channels);
    }
  }
};

// kernel(runs, args...) until all runs of a batch are done.
template <class... Parameters, class... Args>
gpu::error_t launch_runs(void (*kernel)(Runs, Parameters...), bool channels_last, int64_t images, int pixels,
                         int channels, int groups, gpu::stream_t stream, const Args&... args) {
  const int group_channels = channels / groups, per_group = divide_up(group_channels, kRun);
  const int per_pixel = groups * per_group;
  return for_each_batch(images, int64_t{pixels} * per_pixel, [&](int64_t first, int64_t count) {
    const int64_t total = count * pixels;
    // In NCHW a thread does a whole pixel unless that leaves a large part of a GPU of about 2^18 threads idle.
    const int64_t max_shares = std::min<int64_t>(per_pixel, kMaxGridRows);
    const int shares = channels_last ? 1 : static_cast<int>(std::clamp<int64_t>((1 << 18) / total, 1, max_shares));
    const int per_thread = channels_last ? 1 : divide_up(per_pixel, shares);
    const dim3 grid = channels_last ? dim3(divide_up(total * per_pixel, kThreads))
                                    : dim3(divide_up(total, kThreads), divide_up(per_pixel, per_thread));
    const Runs runs = {first, static_cast<uint32_t>(total), pixels, groups, group_channels, per_group, per_thread};
    return gpu::launch(kernel, grid, kThreads, 0, stream, runs, args...);
  });
}

}  // namespace alexnet_cuda
