// The arithmetic of local response normalisation across channels, shared by the plain and the fused kernels.
//
//   y_c = x_c d_c^-beta,                 d_c = k + alpha sum of x_j^2 over j in [c - front, c + back]
//   dx_c = g_c d_c^-beta - 2 alpha beta x_c sum of t_j over j in [c - back, c + front],  t_j = g_j x_j d_j^(-beta - 1)
//
// (the second window is the set of j whose first window contains c). Every window is summed afresh, in a fixed order:
// a running sum that adds one end and subtracts the other loses digits. d is recomputed in the backward pass: two
// special-function instructions cost less than reading it.
#pragma once

#include "images.h"

namespace alexnet_cuda {

GPU_DEVICE float relu(float v) {
  return gpu::max_nan(v, 0.f);
}

struct LrnArgs {
  int front, back;
  float alpha, beta, k;

  explicit LrnArgs(const Lrn& lrn)
      : front(lrn.front),
        back(lrn.size - 1 - lrn.front),
        alpha(static_cast<float>(lrn.alpha)),
        beta(static_cast<float>(lrn.beta)),
        k(static_cast<float>(lrn.k)) {}
};

// AlexNet's own parameters have their own kernels, whose windows live in registers. Their d is never subnormal.
inline bool is_alexnet(const Lrn& lrn) {
  return lrn.size == 5 && lrn.front == 2 && lrn.beta == 0.75 && lrn.k > 1e-6;
}

// d^-beta; d^-3/4 = r sqrt(r) with r = d^-1/2.
template <bool kAlexNet>
GPU_DEVICE float inverse_power(float d, float beta) {
  if constexpr (kAlexNet) {
    const float r = gpu::rsqrt_normal(d);
    return r * gpu::sqrt_normal(r);
  }
  if (beta == 0.75f) {
    const float r = gpu::rsqrt(d);
    return r * gpu::sqrt(r);
  }
  if (beta == 0.5f) return gpu::rsqrt(d);
  if (beta == 1.f) return 1.f / d;
  return powf(d, -beta);
}

GPU_DEVICE float denominator(const float (&x)[16], int first, const LrnArgs& lrn) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 5; ++i) sum = fmaf(x[first + i], x[first + i], sum);
  return fmaf(lrn.alpha, sum, lrn.k);
}

// The eight normalised values of a run from channels c - 2 .. c + 9 (x[2] .. x[13]).
GPU_DEVICE void normalise_run(const float (&x)[16], const LrnArgs& lrn, float (&y)[kRun]) {
#pragma unroll
  for (int i = 0; i < kRun; ++i) y[i] = x[i + kHalo] * inverse_power<true>(denominator(x, i + 2, lrn), 0.75f);
}

// The eight gradients of a run from x of channels c - 4 .. c + 11 and g of c - 2 .. c + 9. Channels outside the
// group do not count, whatever g is there; and with k = 0 their d may be 0.
GPU_DEVICE void differentiate_run(const float (&x)[16], const float (&g)[16], const LrnArgs& lrn, int c, int low,
                                  int high, float (&dx)[kRun]) {
  float t[kRun + 4];
#pragma unroll
  for (int i = 0; i < kRun + 4; ++i) {  // channel c - 2 + i
    const float d = denominator(x, i, lrn), r = gpu::rsqrt_normal(d), gp = g[i + 2] * (r * gpu::sqrt_normal(r));
    const bool inside = c - 2 + i >= low && c - 2 + i < high;
    t[i] = inside ? gp * x[i + 2] * (r * r) : 0.f;
    if (i >= 2 && i < kRun + 2) dx[i - 2] = gp;
  }
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    float sum = 0;
#pragma unroll
    for (int j = 0; j < 5; ++j) sum += t[i + j];
    dx[i] = fmaf(-1.5f * lrn.alpha * x[i + kHalo], sum, dx[i]);  // 2 alpha beta = 1.5 alpha
  }
}

// d of channel c for any window; value(j) is x_j.
template <class Value>
GPU_DEVICE float denominator(const LrnArgs& lrn, int c, int low, int high, Value value) {
  float sum = 0;
  for (int j = max(low, c - lrn.front); j < min(high, c + lrn.back + 1); ++j) {
    const float v = value(j);
    sum = fmaf(v, v, sum);
  }
  return fmaf(lrn.alpha, sum, lrn.k);
}

// ---- backward kernels ----------------------------------------------------------------------------------------------
// A Problem says where x and the gradient of the normalised values come from, and where dx goes:
//   kChannelsLast, kQuads, and read_x, read_grad (runs), x_at, grad_at (single channels), finish (what becomes of dx)

template <class Problem>
__global__ void __launch_bounds__(kThreads, kBlocks) lrn_backward_kernel(Problem problem, Runs runs, LrnArgs lrn) {
  runs.template for_each<Problem::kChannelsLast>([&](int64_t n, int pixel, int c, int low, int high) {
    float x[16], g[16], dx[kRun];
    problem.read_x(n, pixel, c, low, high, x);
    problem.read_grad(n, pixel, c, low, high, x, g);
    differentiate_run(x, g, lrn, c, low, high, dx);
#pragma unroll
    for (int i = 0; i < kRun; ++i) dx[i] = problem.finish(x[i + kHalo], dx[i]);
    write_run<Problem::kQuads>(problem.dx, n, pixel, c, high, dx);
  });
}

// Any window: a block owns some pixels and some channels of one group. It first puts t of these and of the channels
// around them into shared memory, where each is used front + back + 1 times.
struct Tile {
  int64_t first_image;
  int first_chunk, all_pixels, plane, group_channels, pixels, channels, chunks;

  GPU_DEVICE uint32_t chunk() const { return first_chunk + blockIdx.y; }
  GPU_DEVICE int low() const { return chunk() / chunks * group_channels; }
  GPU_DEVICE int begin() const { return low() + chunk() % chunks * channels; }
  GPU_DEVICE int end() const { return min(low() + group_channels, begin() + channels); }

  // body(row, slot in shared memory, image, pixel) for `rows` channels of the block's pixels. Lanes run along whatever
  // is contiguous in global memory; shared memory holds the pixels of row 0, then those of row 1, ...
  template <bool kChannelsLast, class Body>
  GPU_DEVICE void for_each(int rows, Body body) const {
    for (int i = threadIdx.x; i < rows * pixels; i += kThreads) {
      const int row = kChannelsLast ? i % rows : i / pixels, column = kChannelsLast ? i / rows : i % pixels;
      const int position = blockIdx.x * pixels + column;
      if (position >= all_pixels) continue;
      const int image = position / plane;
      body(row, row * pixels + column, first_image + image, position - image * plane);
    }
  }
};

template <class Problem>
__global__ void __launch_bounds__(kThreads, kBlocks) lrn_backward_tile_kernel(Problem problem, Tile tile, LrnArgs lrn) {
  static_assert(!Problem::kQuads);
  const gpu::shared<float> t = gpu::dynamic_shared<float>();
  const int begin = tile.begin(), end = tile.end(), low = tile.low(), high = low + tile.group_channels;
  const int halo = lrn.front + lrn.back;

  tile.for_each<Problem::kChannelsLast>(tile.channels + halo, [&](int row, int slot, int64_t n, int pixel) {
    const int c = begin - lrn.back + row;
    float value = 0;
    if (c >= low && c < high) {
      const auto x_at = [&](int j) { return problem.x_at(n, pixel, j); };
      const float d = denominator(lrn, c, low, high, x_at), x = x_at(c);
      value = problem.grad_at(n, pixel, c, x) * x * inverse_power<false>(d, lrn.beta) / d;
    }
    t[slot] = value;
  });
  __syncthreads();
  tile.for_each<Problem::kChannelsLast>(end - begin, [&](int row, int slot, int64_t n, int pixel) {
    const int c = begin + row;
    const auto x_at = [&](int j) { return problem.x_at(n, pixel, j); };
    const float x = x_at(c), p = inverse_power<false>(denominator(lrn, c, low, high, x_at), lrn.beta);
    float sum = 0;
    for (int j = 0; j <= halo; ++j) sum += t[slot + j * tile.pixels];
    const float dx = fmaf(-2.f * lrn.alpha * lrn.beta * x, sum, problem.grad_at(n, pixel, c, x) * p);
    using T = std::remove_reference_t<decltype(problem.dx.at(n, pixel, c))>;
    problem.dx.at(n, pixel, c) = gpu::from_float<T>(problem.finish(x, dx));
  });
}

// launch(tile, grid, bytes of shared memory, window) for all tiles of n images.
template <class Launch>
gpu::error_t launch_tiles(int64_t n, int channels, int plane, const Lrn& lrn, Launch launch) {
  const int group_channels = channels / lrn.groups, most = group_channels - 1;
  LrnArgs args(lrn);  // a window that reaches farther than the group has channels is cut to these
  args.front = std::min(args.front, most);
  args.back = std::min(args.back, most);
  const int chunk = std::min(group_channels, 32), rows = chunk + args.front + args.back;
  const auto bytes = [&](int pixels) { return pixels * rows * sizeof(float); };
  int pixels = 32;
  while (pixels > 1 && bytes(pixels) > 48 * 1024) pixels /= 2;
  const int chunks = divide_up(group_channels, chunk);
  return for_each_batch(n, int64_t{plane} * channels, [&](int64_t first, int64_t count) {
    return for_each_part(lrn.groups * chunks, kMostRows, [&](int64_t first_chunk, int64_t grid_rows) {
      const Tile tile = {
          first, static_cast<int>(first_chunk), static_cast<int>(count * plane), plane, group_channels, pixels, chunk,
          chunks};
      return launch(tile, dim3(divide_up(count * plane, pixels), static_cast<unsigned>(grid_rows)), bytes(pixels),
                    args);
    });
  });
}

template <class Problem>
gpu::error_t launch_lrn_backward_runs(const Problem& problem, int64_t n, const Lrn& lrn, gpu::stream_t stream) {
  return launch_runs(Problem::kChannelsLast, n, problem.dx.plane, lrn.groups, problem.dx.channels / lrn.groups,
                     [&](const Runs& runs, dim3 grid) {
                       return gpu::launch(lrn_backward_kernel<Problem>, grid, dim3(kThreads), 0, stream, problem, runs,
                                          LrnArgs(lrn));
                     });
}

template <class Problem>
gpu::error_t launch_lrn_backward_tiles(const Problem& problem, int64_t n, const Lrn& lrn, gpu::stream_t stream) {
  return launch_tiles(n, problem.dx.channels, problem.dx.plane, lrn,
                      [&](const Tile& tile, dim3 grid, size_t bytes, const LrnArgs& args) {
                        return gpu::launch(lrn_backward_tile_kernel<Problem>, grid, dim3(kThreads), bytes, stream,
                                           problem, tile, args);
                      });
}

}  // namespace alexnet_cuda
