// Max pooling, shared by the pooling operator and the fused ones: windows, the choice of the maximum, gradients.
//
// Memory: the forward pass saves one byte per output, the position of its maximum in the window (row-major, counted
// from the window's start in the padded image), called the code.
//
// The trick: the backward pass gathers. Each input element asks every window that covers it whether the window's code
// names that element. So one thread writes each element of dx once, with a fixed order of summation, without zero-fill
// and without atomics. Numerics: sums in float.
#pragma once

#include "view.h"

namespace alexnet_cuda {

struct PoolGeometry {
  int kernel_size, stride, padding, height, width, out_height, out_width;

  explicit PoolGeometry(const Pool& p)
      : kernel_size(p.kernel_size),
        stride(p.stride),
        padding(p.padding),
        height(p.height),
        width(p.width),
        out_height(p.out_height),
        out_width(p.out_width) {}
};

constexpr int kNoCode = 255;  // names no element: windows have at most 15x15

// The maximum of a window and its code. Of equal values the first wins, and a NaN wins over all before it, as in torch.
struct Maximum {
  float value = -INFINITY;
  int code = -1;

  GPU_DEVICE void set(float v, int c) {
    value = v;
    code = c;
  }
  // For values that come in scan order.
  GPU_DEVICE void update(float v, int c) {
    if (code < 0 || v > value || v != v) set(v, c);
  }
  // For values in any order, with the same result.
  GPU_DEVICE void update_unordered(float v, int c) {
    if (code < 0 || v > value || (v != v ? value == value || c > code : v == value && c < code)) set(v, c);
  }
  // After the last value. The gradient of ReLU is 0 where the maximum is not positive: no element gets one.
  GPU_DEVICE void relu() {
    if (value <= 0) set(0, kNoCode);
  }
};

// The maximum alone: one instruction per value.
struct MaximumValue {
  float value = -INFINITY;
  static constexpr int code = 0;

  GPU_DEVICE void set(float v, int) { value = v; }
  GPU_DEVICE void update(float v, int) { value = gpu::max_nan(value, v); }
  GPU_DEVICE void update_unordered(float v, int) { update(v, 0); }
};

// visit(code, y, x) for the elements in the window of output (oy, ox) that lie inside the image, in scan order.
template <class Visit>
GPU_DEVICE void for_each_in_window(const PoolGeometry& p, int oy, int ox, Visit visit) {
  // The window begins at (y0, x0); the loops leave out its part in the padding.
  const int y0 = oy * p.stride - p.padding, x0 = ox * p.stride - p.padding;
  for (int ky = max(0, -y0); ky < min(p.kernel_size, p.height - y0); ++ky)
    for (int kx = max(0, -x0); kx < min(p.kernel_size, p.width - x0); ++kx)
      visit(ky * p.kernel_size + kx, y0 + ky, x0 + kx);
}

// visit(output pixel, code) for the windows that cover an input pixel; `code` is the pixel's position in that window.
template <class Visit>
GPU_DEVICE void for_each_covering_window(const PoolGeometry& p, int pixel, Visit visit) {
  const int y = pixel / p.width + p.padding, x = pixel % p.width + p.padding;
  const int oy1 = min(y / p.stride, p.out_height - 1), ox1 = min(x / p.stride, p.out_width - 1);
  // The first window that still reaches y is ceil((y - kernel_size + 1) / stride).
  const int oy0 = max(0, (y - p.kernel_size + p.stride) / p.stride);
  const int ox0 = max(0, (x - p.kernel_size + p.stride) / p.stride);
  for (int oy = oy0; oy <= oy1; ++oy)
    for (int ox = ox0; ox <= ox1; ++ox)
      visit(oy * p.out_width + ox, (y - oy * p.stride) * p.kernel_size + x - ox * p.stride);
}

// sum[i] = the gradient with respect to channel c + i of an input pixel; of kStep channels that one load can move.
template <int kStep, class T, bool kNhwc>
GPU_DEVICE void gather(const View<const T, kNhwc>& grad, const uint8_t* code, const PoolGeometry& p, int64_t n,
                       int pixel, int c, float (&sum)[kStep]) {
#pragma unroll
  for (int i = 0; i < kStep; ++i) sum[i] = 0;
  // Per covering window: codes and gradients from memory or cache, added where the code names this pixel.
  for_each_covering_window(p, pixel, [&](int window, int wanted) {
    const int64_t offset = n * grad.channels * grad.pixels + grad.offset(window, c);
    const auto found = *reinterpret_cast<const gpu::Vec<uint8_t, kStep>*>(code + offset);
    const auto g = *reinterpret_cast<const gpu::Vec<T, kStep>*>(grad.data + offset);
#pragma unroll
    for (int i = 0; i < kStep; ++i) sum[i] += found.v[i] == wanted ? gpu::to_float(g.v[i]) : 0.f;
  });
}

}  // namespace alexnet_cuda
