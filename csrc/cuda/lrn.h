// Local response normalisation (LRN) across channels: the arithmetic, and the backward kernels that the LRN operator
// and the fused ReLU-LRN-pool operator share.
//
//   y_c = x_c d_c^-beta,                 d_c = k + alpha sum of x_j^2 over j in [c - front, c + back]
//   dx_c = g_c d_c^-beta - 2 alpha beta x_c sum of t_j over j in [c - back, c + front],  t_j = g_j x_j d_j^(-beta - 1)
//
// (the second window is the set of j whose first window contains c).
//
// Numerics: float. Every window is summed afresh in a fixed order, because a running sum that adds one end and
// subtracts the other loses digits. The backward pass recomputes d: two special-function instructions cost less than
// reading it.
#pragma once

#include "channel_runs.h"

namespace alexnet_cuda {

GPU_DEVICE float relu(float v) {
  return gpu::max_nan(v, 0.f);
}

struct LrnConstants {
  int front, back;  // channels of the window before and after c
  float alpha, beta, k;

  explicit LrnConstants(const Lrn& lrn)
      : front(lrn.front),
        back(lrn.size - 1 - lrn.front),
        alpha(static_cast<float>(lrn.alpha)),
        beta(static_cast<float>(lrn.beta)),
        k(static_cast<float>(lrn.k)) {}
};

// AlexNet's window of 5 and beta of 3/4, for which windows fit in registers; kernels with kLrn5. d is never subnormal.
inline bool is_lrn5(const Lrn& lrn) {
  return lrn.size == 5 && lrn.front == 2 && lrn.beta == 0.75 && lrn.k > 1e-6;
}

// Whether the kLrn5 kernels serve: in NHWC they need channels and addresses that can be moved four at a time.
template <class T, class... Pointers>
bool uses_lrn5_kernel(const Images& images, const Lrn& lrn, const uint8_t* code, Pointers... pointers) {
  return is_lrn5(lrn) && (!images.channels_last || (images.channels / lrn.groups % 4 == 0 && are_aligned(4, code) &&
                                                    are_aligned(4 * sizeof(T), pointers...)));
}

// d^-beta. For beta = 3/4 it is r sqrt(r) with r = d^-1/2.
template <bool kLrn5>
GPU_DEVICE float inverse_power(float d, float beta) {
  if constexpr (kLrn5) {
    const float r = gpu::rsqrt_ftz(d);
    return r * gpu::sqrt_ftz(r);
  }
  if (beta == 0.75f) {
    const float r = gpu::rsqrt(d);
    return r * gpu::sqrt(r);
  }
  if (beta == 0.5f) return gpu::rsqrt(d);
  if (beta == 1.f) return 1.f / d;
  return powf(d, -beta);
}

// d of the window x[first] .. x[first + 4], in registers.
GPU_DEVICE float denominator(const float (&x)[16], int first, const LrnConstants& lrn) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 5; ++i) sum = fmaf(x[first + i], x[first + i], sum);
  return fmaf(lrn.alpha, sum, lrn.k);
}

// d of channel c for any window; value(j) is x_j.
template <class Value>
GPU_DEVICE float denominator(const LrnConstants& lrn, int c, int low, int high, Value value) {
  float sum = 0;
  for (int j = max(low, c - lrn.front); j < min(high, c + lrn.back + 1); ++j) {
    const float v = value(j);
    sum = fmaf(v, v, sum);
  }
  return fmaf(lrn.alpha, sum, lrn.k);
}

// The eight normalised values of a run, from channels c - 2 .. c + 9 (x[2] .. x[13]).
GPU_DEVICE void normalise_run(const float (&x)[16], const LrnConstants& lrn, float (&y)[kRun]) {
#pragma unroll
  for (int i = 0; i < kRun; ++i) y[i] = x[i + kHalo] * inverse_power<true>(denominator(x, i + 2, lrn), 0.75f);
}

// The eight gradients of a run, from x of channels c - 4 .. c + 11 and g of c - 2 .. c + 9. Channels outside [low,
// high) contribute nothing, whatever g holds there (with k = 0 their d may be 0).
GPU_DEVICE void differentiate_run(const float (&x)[16], const float (&g)[16], const LrnConstants& lrn, int c, int low,
                                  int high, float (&dx)[kRun]) {
  // t of the run and of two channels on either side; dx starts as g d^-3/4.
  float t[kRun + 4];
#pragma unroll
  for (int i = 0; i < kRun + 4; ++i) {  // channel c - 2 + i
    const float d = denominator(x, i, lrn), r = gpu::rsqrt_ftz(d), gp = g[i + 2] * (r * gpu::sqrt_ftz(r));
    const bool inside = c - 2 + i >= low && c - 2 + i < high;
    t[i] = inside ? gp * x[i + 2] * (r * r) : 0.f;
    if (i >= 2 && i < kRun + 2) dx[i - 2] = gp;
  }
  // dx -= 2 alpha beta x (sum of t over the window), with 2 beta = 1.5.
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    float sum = 0;
#pragma unroll
    for (int j = 0; j < 5; ++j) sum += t[i + j];
    dx[i] = fmaf(-1.5f * lrn.alpha * x[i + kHalo], sum, dx[i]);
  }
}

// ---- backward kernels ----------------------------------------------------------------------------------------------
// The template parameter Policy says where x and the gradient of y come from and where dx goes:
//   kChannelsLast, kVec4       memory format of dx; whether runs are moved four channels at a time
//   read_x, read_grad          load the channels that a run needs
//   x_at, grad_at              load a single channel
//   finish_dx(x, dx)           the value that is stored
// This one reads both from memory.
template <class T, class Dx, bool kNhwc, bool kVec4_>
struct LrnBackward {
  static constexpr bool kChannelsLast = kNhwc, kVec4 = kVec4_;
  View<const T, kNhwc> x, grad;
  View<Dx, kNhwc> dx;

  GPU_DEVICE void read_x(int64_t n, int pixel, int c, int low, int high, float (&v)[16]) const {
    read_run<0, 16, kVec4>(x, n, pixel, c, low, high, v);
  }
  GPU_DEVICE void read_grad(int64_t n, int pixel, int c, int low, int high, const float (&)[16], float (&v)[16]) const {
    read_run<2, 14, kVec4>(grad, n, pixel, c, low, high, v);
  }
  GPU_DEVICE float x_at(int64_t n, int pixel, int c) const { return gpu::to_float(x.at(n, pixel, c)); }
  GPU_DEVICE float grad_at(int64_t n, int pixel, int c, float) const { return gpu::to_float(grad.at(n, pixel, c)); }
  GPU_DEVICE float finish_dx(float, float dx) const { return dx; }
};

// Window of 5: a thread computes runs of 8 channels with all windows in registers.
template <class Policy>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    lrn_backward_kernel(Runs runs, Policy policy, LrnConstants lrn) {
  runs.template for_each<Policy::kChannelsLast>([&](int64_t n, int pixel, int c, int low, int high) {
    float x[16], g[16], dx[kRun];
    policy.read_x(n, pixel, c, low, high, x);
    policy.read_grad(n, pixel, c, low, high, x, g);
    differentiate_run(x, g, lrn, c, low, high, dx);
#pragma unroll
    for (int i = 0; i < kRun; ++i) dx[i] = policy.finish_dx(x[i + kHalo], dx[i]);
    write_run<Policy::kVec4>(policy.dx, n, pixel, c, high, dx);
  });
}

// Any window: the part of the batch that a thread block computes, some channels of one group at some pixels. Shared
// memory holds one row of pixels per channel, for these channels and for those that their windows reach.
struct ChannelTile {
  int64_t first_image;
  int first_chunk, total_pixels, image_pixels, group_channels;
  int pixels, channels, chunks;  // of a thread block; thread blocks per group

  GPU_DEVICE uint32_t chunk() const { return first_chunk + blockIdx.y; }
  GPU_DEVICE int low() const { return chunk() / chunks * group_channels; }
  GPU_DEVICE int begin() const { return low() + chunk() % chunks * channels; }
  GPU_DEVICE int end() const { return min(low() + group_channels, begin() + channels); }

  // body(row, index in shared memory, image, pixel) for `rows` channels of the tile's pixels. Consecutive threads take
  // what is consecutive in global memory: channels in NHWC, pixels in NCHW.
  template <bool kNhwc, class Body>
  GPU_DEVICE void for_each(int rows, Body body) const {
    for (int i = threadIdx.x; i < rows * pixels; i += kThreads) {
      const int row = kNhwc ? i % rows : i / pixels, column = kNhwc ? i / rows : i % pixels;
      const int position = blockIdx.x * pixels + column;
      if (position >= total_pixels) continue;
      const int image = position / image_pixels;
      body(row, row * pixels + column, first_image + image, position - image * image_pixels);
    }
  }
};

template <class Policy>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    lrn_backward_tile_kernel(ChannelTile tile, LrnConstants lrn, Policy policy) {
  static_assert(!Policy::kVec4);
  const gpu::shared<float> t = gpu::dynamic_shared<float>();
  // Channels [begin, end) of this thread block, in the group [low, high).
  const int begin = tile.begin(), end = tile.end(), low = tile.low(), high = low + tile.group_channels;
  const int halo = lrn.front + lrn.back;

  // t of the tile's channels and of the halo goes to shared memory, where each is read front + back + 1 times.
  tile.for_each<Policy::kChannelsLast>(tile.channels + halo, [&](int row, int slot, int64_t n, int pixel) {
    const int c = begin - lrn.back + row;
    float value = 0;
    if (c >= low && c < high) {
      const auto x_at = [&](int j) { return policy.x_at(n, pixel, j); };
      const float d = denominator(lrn, c, low, high, x_at), x = x_at(c);
      value = policy.grad_at(n, pixel, c, x) * x * inverse_power<false>(d, lrn.beta) / d;
    }
    t[slot] = value;
  });
  __syncthreads();
  // Each thread sums the window of t of its elements and writes their dx.
  tile.for_each<Policy::kChannelsLast>(end - begin, [&](int row, int slot, int64_t n, int pixel) {
    const int c = begin + row;
    const auto x_at = [&](int j) { return policy.x_at(n, pixel, j); };
    const float x = x_at(c), p = inverse_power<false>(denominator(lrn, c, low, high, x_at), lrn.beta);
    float sum = 0;
    for (int j = 0; j <= halo; ++j) sum += t[slot + j * tile.pixels];
    const float dx = fmaf(-2.f * lrn.alpha * lrn.beta * x, sum, policy.grad_at(n, pixel, c, x) * p);
    using T = std::remove_reference_t<decltype(policy.dx.at(n, pixel, c))>;
    policy.dx.at(n, pixel, c) = gpu::from_float<T>(policy.finish_dx(x, dx));
  });
}

// kernel(tile, constants, args...) until all tiles of a batch are done.
template <class... Parameters, class... Args>
gpu::error_t launch_tiles(void (*kernel)(ChannelTile, LrnConstants, Parameters...), int64_t images, int channels,
                          int pixels, const Lrn& lrn, gpu::stream_t stream, const Args&... args) {
  // Up to 32 channels and 32 pixels per thread block, fewer pixels if the halo would exceed 48 KB of shared memory.
  const int group_channels = channels / lrn.groups;
  LrnConstants constants(lrn);  // with the window cut to the channels of a group
  constants.front = std::min(constants.front, group_channels - 1);
  constants.back = std::min(constants.back, group_channels - 1);
  const int chunk = std::min(group_channels, 32), rows = chunk + constants.front + constants.back;
  const auto bytes = [&](int tile_pixels) { return tile_pixels * rows * sizeof(float); };
  int tile_pixels = 32;
  while (tile_pixels > 1 && bytes(tile_pixels) > 48 * 1024) tile_pixels /= 2;
  const int chunks = divide_up(group_channels, chunk);
  return for_each_batch(images, int64_t{pixels} * channels, [&](int64_t first, int64_t count) {
    return for_each_part(lrn.groups * chunks, kMaxGridRows, [&](int first_chunk, int grid_rows) {
      const int total = count * pixels;
      const ChannelTile tile = {first, first_chunk, total, pixels, group_channels, tile_pixels, chunk, chunks};
      return gpu::launch(kernel, dim3(divide_up(total, tile_pixels), grid_rows), kThreads, bytes(tile_pixels), stream,
                         tile, constants, args...);
    });
  });
}

// kLrn5: the kernel for the window of 5.
template <bool kLrn5, class Policy>
gpu::error_t launch_lrn_backward(const Policy& policy, int64_t images, const Lrn& lrn, gpu::stream_t stream) {
  const int channels = policy.dx.channels, pixels = policy.dx.pixels;
  if constexpr (kLrn5)
    return launch_runs(lrn_backward_kernel<Policy>, Policy::kChannelsLast, images, pixels, channels, lrn.groups, stream,
                       policy, LrnConstants(lrn));
  else
    return launch_tiles(lrn_backward_tile_kernel<Policy>, images, channels, pixels, lrn, stream, policy);
}

}  // namespace alexnet_cuda
