// How the kernels walk over a batch of images in either memory format.
//
// Work is cut into runs: 8 consecutive channels of one pixel. In NCHW the lanes of a warp take neighbouring pixels and
// each thread goes from run to run; in NHWC they take neighbouring runs of a pixel. Either way the lanes of a warp
// touch consecutive memory, and the channels that two runs share (a normalisation window reaches 2 to each side, its
// gradient 4) are found in cache.
#pragma once

#include <algorithm>
#include <type_traits>

#include "kernels.h"

namespace alexnet_cuda {

constexpr int kThreads = 256;
constexpr int kBlocks = 2;  // per SM at least: up to 128 registers. Left to itself ptxas now and then spills two of 48
constexpr int kRun = 8;     // channels that one thread finishes at a time
constexpr int kHalo = 4;    // channels read on either side of them

// A tensor (n, channels, plane) as a kernel sees it. Offsets within one image fit 32 bits, offsets of images do not.
template <class T, bool kChannelsLast>
struct View {
  T* data;
  int channels, plane;

  GPU_DEVICE T* image(int64_t n) const { return data + n * channels * plane; }
  GPU_DEVICE int offset(int pixel, int c) const { return kChannelsLast ? pixel * channels + c : c * plane + pixel; }
  GPU_DEVICE T& at(int64_t n, int pixel, int c) const { return image(n)[offset(pixel, c)]; }
};

// v[i] = channel c - 4 + i of one pixel for kFirst <= i < kEnd, or 0 where that is outside [low, high). With kQuads
// (NHWC, everything a multiple of 4) four channels come with one load.
template <int kFirst, int kEnd, bool kQuads, class T, bool kChannelsLast>
GPU_DEVICE void read_run(const View<const T, kChannelsLast>& x, int64_t n, int pixel, int c, int low, int high,
                         float (&v)[16]) {
  const T* image = x.image(n);
  if constexpr (kQuads) {
#pragma unroll
    for (int i = kFirst / 4 * 4; i < kEnd; i += 4) {
      const int channel = c - kHalo + i;
      const bool inside = channel >= low && channel < high;
      gpu::Quad<T> quad = {};
      if (inside) quad = *reinterpret_cast<const gpu::Quad<T>*>(image + x.offset(pixel, channel));
#pragma unroll
      for (int j = 0; j < 4; ++j) v[i + j] = inside ? gpu::to_float(quad.v[j]) : 0.f;
    }
  } else {
#pragma unroll
    for (int i = kFirst; i < kEnd; ++i) {
      const int channel = c - kHalo + i;
      v[i] = channel >= low && channel < high ? gpu::to_float(image[x.offset(pixel, channel)]) : 0.f;
    }
  }
}

// Channels c .. c + 7, as far as they are below `high`.
template <bool kQuads, class T, bool kChannelsLast>
GPU_DEVICE void write_run(const View<T, kChannelsLast>& y, int64_t n, int pixel, int c, int high,
                          const float (&v)[kRun]) {
  T* image = y.image(n);
  if constexpr (kQuads) {
#pragma unroll
    for (int i = 0; i < kRun; i += 4) {
      gpu::Quad<T> quad;
#pragma unroll
      for (int j = 0; j < 4; ++j) quad.v[j] = gpu::from_float<T>(v[i + j]);
      if (c + i < high) *reinterpret_cast<gpu::Quad<T>*>(image + y.offset(pixel, c + i)) = quad;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kRun; ++i)
      if (c + i < high) image[y.offset(pixel, c + i)] = gpu::from_float<T>(v[i]);
  }
}

// All runs of a range of images, and which of them a thread does.
struct Runs {
  int64_t first_image;
  uint32_t pixels;  // of all images together
  int plane, groups, group_channels, runs_per_group, runs_per_thread;

  // body(image, pixel, first channel of the run, group's first channel, channel behind the group's last)
  template <bool kChannelsLast, class Body>
  GPU_DEVICE void for_each(Body body) const {
    const uint32_t thread = blockIdx.x * kThreads + threadIdx.x, runs = groups * runs_per_group;
    const uint32_t position = kChannelsLast ? thread / runs : thread;
    if (position >= pixels) return;
    const uint32_t begin = kChannelsLast ? thread % runs : blockIdx.y * runs_per_thread;
    const uint32_t end = kChannelsLast ? begin + 1 : min(begin + runs_per_thread, runs);
    const uint32_t image = position / plane;
    for (uint32_t run = begin; run < end; ++run) {
      const int group = run / runs_per_group, low = group * group_channels;
      body(first_image + image, static_cast<int>(position - image * plane), low + (run - group * runs_per_group) * kRun,
           low, low + group_channels);
    }
  }
};

__host__ __device__ inline int divide_up(int64_t a, int64_t b) {
  return static_cast<int>((a + b - 1) / b);
}

#if defined(ALEXNET_CUDA_EMULATOR)  // so small that tests cut launches too
constexpr int64_t kMostItems = int64_t{1} << 8, kMostRows = 3;
#else
constexpr int64_t kMostItems = int64_t{1} << 30, kMostRows = 65535;  // rows: the blocks of a grid in y
#endif

// Calls launch(first, count) for parts of n that have at most `most`.
template <class Launch>
gpu::error_t for_each_part(int64_t n, int64_t most, Launch launch) {
  for (int64_t first = 0; first < n; first += most) {
    const gpu::error_t error = launch(first, std::min(most, n - first));
    if (error != gpu::kSuccess) return error;
  }
  return gpu::kSuccess;
}

// Calls launch(first image, number of images) so that each launch has at most kMostItems, or else one image.
template <class Launch>
gpu::error_t for_each_batch(int64_t n, int64_t items_per_image, Launch launch) {
  return for_each_part(n, std::max(int64_t{1}, kMostItems / items_per_image), launch);
}

// launch(runs, grid) for all runs of n images.
template <class Launch>
gpu::error_t launch_runs(bool channels_last, int64_t n, int plane, int groups, int group_channels, Launch launch) {
  const int per_group = divide_up(group_channels, kRun), all = groups * per_group;
  return for_each_batch(n, int64_t{plane} * all, [&](int64_t first, int64_t count) {
    const int64_t pixels = count * plane;
    // In NCHW a thread does a whole pixel, unless that leaves most of a large GPU (about 2^18 threads) idle.
    const int64_t most = std::min<int64_t>(all, kMostRows);
    const int shares = channels_last ? 1 : static_cast<int>(std::clamp<int64_t>((1 << 18) / pixels, 1, most));
    const int runs_per_thread = channels_last ? 1 : divide_up(all, shares);
    const Runs runs = {first, static_cast<uint32_t>(pixels), plane, groups, group_channels, per_group, runs_per_thread};
    const dim3 grid = channels_last ? dim3(divide_up(pixels * all, kThreads))
                                    : dim3(divide_up(pixels, kThreads), divide_up(all, runs_per_thread));
    return launch(runs, grid);
  });
}

inline bool is_aligned(const void* p, int bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

template <class T>
struct Type {
  using type = T;
};

// body(Type<T>) with the C++ type of a dtype.
template <class Body>
gpu::error_t dispatch(DType dtype, Body body) {
  switch (dtype) {
    case kFloat:
    case kTF32:
      return body(Type<float>{});
    case kHalf:
      return body(Type<gpu::half>{});
    case kBFloat16:
      return body(Type<gpu::bfloat16>{});
  }
  return gpu::kInvalidValue;
}

// body(std::true_type or std::false_type), to make a template argument of a flag.
template <class Body>
gpu::error_t dispatch_flag(bool flag, Body body) {
  return flag ? body(std::true_type{}) : body(std::false_type{});
}

}  // namespace alexnet_cuda
