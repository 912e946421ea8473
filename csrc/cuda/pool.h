// Max pooling, shared by the plain and the fused kernels: windows, the choice of the maximum, and the gather of
// gradients.
//
// A code is the position of the maximum in its window, row-major from the unpadded window start, in one byte. The
// backward pass turns the question round: an input element asks each window that covers it whether its code names the
// element. So every element of dx is written exactly once, by one thread, in a fixed order: no zero-fill and no
// atomics.
#pragma once

#include "images.h"

namespace alexnet_cuda {

struct PoolArgs {
  int kernel_size, stride, padding, height, width, out_height, out_width;

  explicit PoolArgs(const Pool& p)
      : kernel_size(p.kernel_size),
        stride(p.stride),
        padding(p.padding),
        height(static_cast<int>(p.height)),
        width(static_cast<int>(p.width)),
        out_height(static_cast<int>(p.out_height)),
        out_width(static_cast<int>(p.out_width)) {}
};

// The greatest of the values offered so far; the first of equal ones; a NaN wins over everything before it.
struct Maximum {
  float value = -INFINITY;
  int code = -1;

  GPU_DEVICE void begin(float v, int c) {
    value = v;
    code = c;
  }
  GPU_DEVICE void offer(float v, int c) {
    if (code < 0 || v > value || v != v) {
      value = v;
      code = c;
    }
  }
  // The same choice whatever the order in which they come.
  GPU_DEVICE void offer_unordered(float v, int c) {
    if (code < 0 || v > value || (v != v ? value == value || c > code : v == value && c < code)) {
      value = v;
      code = c;
    }
  }
};

// The same value for those who need no code: one instruction each.
struct Greatest {
  float value = -INFINITY;
  static constexpr int code = 0;

  GPU_DEVICE void begin(float v, int) { value = v; }
  GPU_DEVICE void offer(float v, int) { value = gpu::max_nan(value, v); }
  GPU_DEVICE void offer_unordered(float v, int) { offer(v, 0); }
};

// visit(code, y, x) for the elements of output (oy, ox)'s window that lie inside the image, in scan order.
template <class Visit>
GPU_DEVICE void for_each_in_window(const PoolArgs& p, int oy, int ox, Visit visit) {
  const int y0 = oy * p.stride - p.padding, x0 = ox * p.stride - p.padding;
  for (int ky = max(0, -y0); ky < min(p.kernel_size, p.height - y0); ++ky)
    for (int kx = max(0, -x0); kx < min(p.kernel_size, p.width - x0); ++kx)
      visit(ky * p.kernel_size + kx, y0 + ky, x0 + kx);
}

// visit(pooled pixel, code) for the windows that cover an input pixel; `code` is what names the pixel there.
template <class Visit>
GPU_DEVICE void for_each_window(const PoolArgs& p, int pixel, Visit visit) {
  const int y = pixel / p.width + p.padding, x = pixel % p.width + p.padding;
  const int oy1 = min(y / p.stride, p.out_height - 1), ox1 = min(x / p.stride, p.out_width - 1);
  // the first window that still reaches y: (y - kernel_size + 1) / stride, rounded up
  const int oy0 = max(0, (y - p.kernel_size + p.stride) / p.stride);
  const int ox0 = max(0, (x - p.kernel_size + p.stride) / p.stride);
  for (int oy = oy0; oy <= oy1; ++oy)
    for (int ox = ox0; ox <= ox1; ++ox)
      visit(oy * p.out_width + ox, (y - oy * p.stride) * p.kernel_size + x - ox * p.stride);
}

// v[i] = gradient that reaches channel c - 4 + i of input pixel `pixel`; arguments as for read_run, but outside
// [low, high) it is some value of a channel inside.
template <int kFirst, int kEnd, bool kQuads, class T, bool kChannelsLast>
GPU_DEVICE void gather_run(const View<const T, kChannelsLast>& grad, const uint8_t* code, const PoolArgs& p, int64_t n,
                           int pixel, int c, int low, int high, float (&v)[16]) {
  const View<const uint8_t, kChannelsLast> codes = {code, grad.channels, grad.plane};
  const T* grad_image = grad.image(n);
  const uint8_t* code_image = codes.image(n);
  constexpr int kStep = kQuads ? 4 : 1, kBegin = kFirst / kStep * kStep;
#pragma unroll
  for (int i = kBegin; i < kEnd; ++i) v[i] = 0;
  for_each_window(p, pixel, [&](int window, int wanted) {
#pragma unroll
    for (int i = kBegin; i < kEnd; i += kStep) {
      // Loads without a branch before them can all be under way at once.
      const int offset = grad.offset(window, min(max(c - kHalo + i, low), high - kStep));
      if constexpr (kQuads) {
        const auto where = *reinterpret_cast<const gpu::Quad<uint8_t>*>(code_image + offset);
        const auto quad = *reinterpret_cast<const gpu::Quad<T>*>(grad_image + offset);
#pragma unroll
        for (int j = 0; j < 4; ++j) v[i + j] += where.v[j] == wanted ? gpu::to_float(quad.v[j]) : 0.f;
      } else {
        const float g = gpu::to_float(grad_image[offset]);
        v[i] += code_image[offset] == wanted ? g : 0.f;
      }
    }
  });
}

template <class T, bool kChannelsLast>
GPU_DEVICE float gather(const View<const T, kChannelsLast>& grad, const uint8_t* code, const PoolArgs& p, int64_t n,
                        int pixel, int c) {
  float sum = 0;
  for_each_window(p, pixel, [&](int window, int wanted) {
    const int64_t offset = n * grad.channels * grad.plane + grad.offset(window, c);
    if (code[offset] == wanted) sum += gpu::to_float(grad.data[offset]);
  });
  return sum;
}

}  // namespace alexnet_cuda
