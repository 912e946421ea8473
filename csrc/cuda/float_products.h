// Results of TF32x3 (space_to_depth.h) that are not finite are made again by float products, one by one: the low part
// of an infinity is NaN, and so is 0 * NaN. All of them read global memory, through the caches: they are rare, so their
// code is short, with no loop unrolled and nothing staged in shared memory, and takes few registers from the products.
#pragma once

#include "space_to_depth.h"

namespace alexnet_cuda {

// 0, or NaN if one of a lane's sums is infinite or NaN.
template <int n>
GPU_DEVICE float nan_unless_finite(const float (&sums)[2][n][4]) {
  float found = 0;
#pragma unroll
  for (int i = 0; i < 8 * n; ++i) found = fmaf(sums[i % 2][i / 8][i / 2 % 4], 0.f, found);
  return found;
}

// One output of an image, added to `sum` in the order of conv2d.cu.
template <int kChannels>
GPU_DEVICE float float_output(const TF32x3* image, const TF32x3* weight, const StripGeometry& g, int output,
                              float sum) {
  const int pixel_step = g.channels_last ? kChannels : 1, channel_step = g.channels_last ? 1 : g.height * g.width;
  const int y0 = output / g.out_width * kStride - g.padding, x0 = output % g.out_width * kStride - g.padding;
  int tap = 0;
#pragma unroll 1
  for (int c = 0; c < kChannels; ++c)
#pragma unroll 1
    for (int y = y0; y < y0 + kKernel; ++y)
#pragma unroll 1
      for (int x = x0; x < x0 + kKernel; ++x) {
        const bool inside = is_inside(y, g.height) && is_inside(x, g.width);
        const float v = inside ? image[(y * g.width + x) * pixel_step + c * channel_step].value : 0.f;
        sum = fmaf(v, weight[tap++].value, sum);
      }
  return sum;
}

// dx of one channel of a pixel, in the order of conv2d.cu.
template <int kChannels>
GPU_DEVICE float float_input_grad(const TF32x3* grad, const TF32x3* weight, const StripGeometry& g, int y, int x,
                                  int c) {
  const int filter_step = g.channels_last ? 1 : g.out_height * g.out_width;
  const int pixel_step = g.channels_last ? g.filters : 1;
  float sum = 0;
  for_each_covering_output(g, y, x, [&](int output, int position) {
    const TF32x3 *from = grad + output * pixel_step, *w = weight + (c * kKernelArea + position);
#pragma unroll 1
    for (int filter = 0; filter < g.filters; ++filter)
      sum = fmaf(from[filter * filter_step].value, w[filter * (kChannels * kKernelArea)].value, sum);
  });
  return sum;
}

// The gradient of a filter's element `tap` (kTaps: of its bias), all images' output pixels in order.
template <int kChannels>
GPU_DEVICE float float_weight_grad(const TF32x3* x, const TF32x3* grad, const StripGeometry& g, int images, int filter,
                                   int tap) {
  constexpr int kTaps = kChannels * kKernelArea;
  const int pixels = g.height * g.width, outputs = g.out_height * g.out_width, c = tap / kKernelArea;
  const int y0 = tap / kKernel % kKernel - g.padding, x0 = tap % kKernel - g.padding;
  float sum = 0;
#pragma unroll 1
  for (int n = 0; n < images; ++n, x += kChannels * pixels, grad += g.filters * outputs)
#pragma unroll 1
    for (int output = 0; output < outputs; ++output) {
      const int row = y0 + output / g.out_width * kStride, column = x0 + output % g.out_width * kStride;
      const bool inside = is_inside(row, g.height) && is_inside(column, g.width);
      const int pixel = row * g.width + column;
      const float v = tap == kTaps ? 1.f
                      : inside     ? x[g.channels_last ? pixel * kChannels + c : c * pixels + pixel].value
                                   : 0.f;
      sum = fmaf(v, grad[g.channels_last ? output * g.filters + filter : filter * outputs + output].value, sum);
      if (sum != sum) return sum;  // NaN stays: where the loss is NaN, every gradient ends here
    }
  return sum;
}

// Makes weight gradients that are not finite again. An element of a filter per thread, after the last one the bias.
template <int kChannels>
__global__ void __launch_bounds__(kThreads) remake_kernel(const TF32x3* __restrict__ x, const TF32x3* __restrict__ grad,
                                                          TF32x3* dweight, TF32x3* dbias, StripGeometry g, int images) {
  constexpr int kTaps = kChannels * kKernelArea;
  const int i = blockIdx.x * kThreads + threadIdx.x, filter = i / (kTaps + 1), tap = i % (kTaps + 1);
  if (filter >= g.filters) return;
  TF32x3& to = tap == kTaps ? dbias[filter] : dweight[filter * kTaps + tap];
  if (to.value - to.value != 0) to.value = float_weight_grad<kChannels>(x, grad, g, images, filter, tap);
}

}  // namespace alexnet_cuda
