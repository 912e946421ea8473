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

#include "view.h"

namespace alexnet_cuda {

GPU_DEVICE float relu(float v) {
  return gpu::max_nan(v, 0.f);
}

GPU_DEVICE float relu_gradient(float v, float g) {
  return v <= 0 ? 0.f : g;
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

// AlexNet's window of 5 and beta of 3/4, for which windows fit in registers. d is never subnormal.
inline bool is_lrn5(const Lrn& lrn) {
  return lrn.size == 5 && lrn.front == 2 && lrn.beta == 0.75 && lrn.k > 1e-6;
}

// Whether the channels of a group are whole runs of 8, which NHWC moves at once, and a grid can have a row for each.
inline bool has_whole_runs(const Images& images, const Lrn& lrn) {
  return images.channels / lrn.groups % kRun == 0 && images.channels / kRun <= 65535;
}

// Whether kernels for these settings serve.
template <class T, class... Pointers>
bool has_lrn5_kernel(const Images& images, const Lrn& lrn, Pointers... pointers) {
  return is_lrn5(lrn) && has_whole_runs(images, lrn) &&
         (!images.channels_last || are_aligned(kRun * sizeof(T), pointers...));
}

// In NCHW a thread goes through the channels of a group, or of a share of one if so few threads would leave a large
// part of a GPU idle. `threads`: with one share per group.
struct Shares {
  int count, channels;

  Shares(int64_t threads, int group_channels) {
    const int runs = group_channels / kRun;
    const int share = divide_up(runs, std::clamp<int64_t>(kBusyThreads / threads, 1, runs));
    count = divide_up(runs, share);
    channels = share * kRun;
  }
};

// NHWC: v = channels c - kSide .. c + 7 + kSide of a pixel, where x is at its channel c; zeros outside the group.
template <int kSide, class T>
GPU_DEVICE void load_run(const T* x, bool has_left, bool has_right, float (&v)[kRun + 2 * kSide]) {
  gpu::Vec<T, kSide> left = {}, right = {};
  if (has_left) left = *reinterpret_cast<const gpu::Vec<T, kSide>*>(x - kSide);
  const auto middle = *reinterpret_cast<const gpu::Vec<T, kRun>*>(x);
  if (has_right) right = *reinterpret_cast<const gpu::Vec<T, kSide>*>(x + kRun);
#pragma unroll
  for (int i = 0; i < kSide; ++i) {
    v[i] = gpu::to_float(left.v[i]);
    v[kSide + kRun + i] = gpu::to_float(right.v[i]);
  }
#pragma unroll
  for (int i = 0; i < kRun; ++i) v[kSide + i] = gpu::to_float(middle.v[i]);
}
template <class T>
GPU_DEVICE void store_run(T* to, const float (&v)[kRun]) {
  gpu::Vec<T, kRun> out;
#pragma unroll
  for (int i = 0; i < kRun; ++i) out.v[i] = gpu::from_float<T>(v[i]);
  *reinterpret_cast<gpu::Vec<T, kRun>*>(to) = out;
}

// d^-beta. For beta = 3/4 it is r sqrt(r) with r = d^-1/2: two special functions, of which an SM makes 16 per cycle,
// and a product; a general power takes the logarithm, the exponential and about 20 instructions more.
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

// sum[i] = terms i .. i + 4. first(i) is a term, add(i, sum) adds one. Terms are cut into blocks of five, so that a
// window is the end of a block and the beginning of the next:
//
//   terms      0  1  2  3  4 | 5  6  7  8  9 | 10 ..
//   sum[2]           2  3  4 + 5  6
//   sum[3]              3  4 + 5  6  7
//
// Each end and each beginning is the one before and one term more: 2.75 additions a window instead of 4, none undone.
template <int n, class First, class Add>
GPU_DEVICE void window_sums(float (&sum)[n], First first, Add add) {
#pragma unroll
  for (int b = 0; b < n; b += 5) {
    float end = first(b + 4);  // of this block: its last 1 .. 5 terms
#pragma unroll
    for (int i = b + 4; i > b; --i) {
      if (i < n) sum[i] = end;
      end = add(i - 1, end);
    }
    sum[b] = end;
    float beginning = 0;  // of the next block: its first 1 .. 4 terms
#pragma unroll
    for (int i = b + 1; i < b + 5 && i < n; ++i) {
      beginning = i == b + 1 ? first(i + 4) : add(i + 4, beginning);
      sum[i] += beginning;
    }
  }
}

// d[i] of the window x[i] .. x[i + 4].
template <int n>
GPU_DEVICE void denominators(const float* x, const LrnConstants& lrn, float (&d)[n]) {
  window_sums(d, [&](int i) { return x[i] * x[i]; }, [&](int i, float sum) { return fmaf(x[i], x[i], sum); });
#pragma unroll
  for (int i = 0; i < n; ++i) d[i] = fmaf(lrn.alpha, d[i], lrn.k);
}

// The eight normalised values of a run, from channels c - 2 .. c + 9.
GPU_DEVICE void normalise_run(const float (&x)[kRun + 4], const LrnConstants& lrn, float (&y)[kRun]) {
  float d[kRun];
  denominators(&x[0], lrn, d);
#pragma unroll
  for (int i = 0; i < kRun; ++i) y[i] = x[i + 2] * inverse_power<true>(d[i], 0.75f);
}

// For n channels, the gradient's two terms: g d^-3/4, and t. x begins two channels before them. Where x and g are 0 so
// is t.
template <int n>
GPU_DEVICE void gradient_terms(const float* x, const float* g, const LrnConstants& lrn, float* direct, float* t) {
  float d[n];
  denominators(x, lrn, d);
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const float r = gpu::rsqrt_ftz(d[i]);
    direct[i] = g[i] * (r * gpu::sqrt_ftz(r));
    t[i] = direct[i] * (x[i + 2] * (r * r));
  }
}

// dx of n channels from their x and direct terms, and from t, which begins two channels before them and ends two after.
template <int n>
GPU_DEVICE void finish_gradients(const float* x, const float* direct, const float* t, const LrnConstants& lrn,
                                 float (&dx)[n]) {
  float sum[n];
  window_sums(sum, [&](int i) { return t[i]; }, [&](int i, float s) { return s + t[i]; });
#pragma unroll
  for (int i = 0; i < n; ++i) dx[i] = fmaf(-1.5f * lrn.alpha * x[i], sum[i], direct[i]);  // 2 beta = 1.5
}

// The eight gradients of a run, from x of channels c - 4 .. c + 11 and g of c - 2 .. c + 9, both 0 outside the group.
GPU_DEVICE void differentiate_run(const float* x, const float* g, const LrnConstants& lrn, float (&dx)[kRun]) {
  float direct[kRun + 4], t[kRun + 4];
  gradient_terms<kRun + 4>(x, g, lrn, direct, t);
  finish_gradients(x + 4, direct + 2, t, lrn, dx);
}

// ---- backward kernels ----------------------------------------------------------------------------------------------
// The template parameter Policy says where x and the gradient of y come from and where dx goes:
//   kChannelsLast              memory format of dx
//   x_at, grad_at              load a single channel
//   dx                         where the gradient of x goes
//   finish_dx(x, dx)           the value that is stored
// This one reads both from memory.
template <class T, bool kNhwc>
struct LrnBackward {
  static constexpr bool kChannelsLast = kNhwc;
  View<const T, kNhwc> x, grad;
  View<T, kNhwc> dx;

  GPU_DEVICE float x_at(int64_t n, int pixel, int c) const { return gpu::to_float(x.at(n, pixel, c)); }
  GPU_DEVICE float grad_at(int64_t n, int pixel, int c, float) const { return gpu::to_float(grad.at(n, pixel, c)); }
  GPU_DEVICE float finish_dx(float, float dx) const { return dx; }
};

// Any window: the part of the batch that a thread block computes, some channels of one group at some pixels. Shared
// memory holds one row of pixels per channel, for these channels and for those that their windows reach. Rows are an
// odd number of words apart, against bank conflicts: in NHWC a warp's lanes have the same pixel of consecutive rows.
struct ChannelTile {
  int64_t first_image;
  int first_chunk, total_pixels, image_pixels, group_channels;
  int pixels, channels, chunks;  // of a thread block; thread blocks per group

  __host__ __device__ static int pitch(int pixels) { return pixels | 1; }

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
      body(row, row * pitch(pixels) + column, first_image + image, position - image * image_pixels);
    }
  }
};

// Two passes over the tile with a barrier between. d is computed in both, from x in L1: to keep it would take as much
// shared memory again. 32 channels x 32 pixels: with a window of 5, t of an eighth of the channels is computed twice.
template <class Policy>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    lrn_backward_tile_kernel(ChannelTile tile, LrnConstants lrn, Policy policy) {
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
    for (int j = 0; j <= halo; ++j) sum += t[slot + j * ChannelTile::pitch(tile.pixels)];
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
  const auto bytes = [&](int tile_pixels) { return ChannelTile::pitch(tile_pixels) * rows * sizeof(float); };
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

}  // namespace alexnet_cuda
