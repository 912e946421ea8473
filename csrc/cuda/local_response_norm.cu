// Local response normalisation, forward and backward (the maths is in lrn.h).
//
// Across channels, with AlexNet's parameters, each thread finishes runs of 8 channels of one pixel with all windows in
// registers: x is read once from memory (and its halo once more from cache), y written once; the backward pass reads x
// and grad and writes dx. Other parameters take simpler kernels, and so does the spatial form. Sums are in float.
#include "lrn.h"

namespace alexnet_cuda {
namespace {

template <class T, bool kChannelsLast, bool kAlexNet>
__global__ void __launch_bounds__(kThreads, kBlocks)
    forward_kernel(View<const T, kChannelsLast> x, View<T, kChannelsLast> y, Runs runs, LrnArgs lrn) {
  constexpr bool kQuads = kAlexNet && kChannelsLast;
  runs.for_each<kChannelsLast>([&](int64_t n, int pixel, int c, int low, int high) {
    if constexpr (kAlexNet) {
      float in[16], out[kRun];
      read_run<2, 14, kQuads>(x, n, pixel, c, low, high, in);
      normalise_run(in, lrn, out);
      write_run<kQuads>(y, n, pixel, c, high, out);
    } else {
      const auto value = [&](int j) { return gpu::to_float(x.at(n, pixel, j)); };
      for (int j = c; j < min(c + kRun, high); ++j) {
        const float d = denominator(lrn, j, low, high, value);
        y.at(n, pixel, j) = gpu::from_float<T>(value(j) * inverse_power<false>(d, lrn.beta));
      }
    }
  });
}

template <class T, bool kLast, bool kAlexNet>
struct Backward {
  static constexpr bool kChannelsLast = kLast, kQuads = kLast && kAlexNet;
  View<const T, kLast> x, grad;
  View<T, kLast> dx;

  GPU_DEVICE void read_x(int64_t n, int pixel, int c, int low, int high, float (&v)[16]) const {
    read_run<0, 16, kQuads>(x, n, pixel, c, low, high, v);
  }
  GPU_DEVICE void read_grad(int64_t n, int pixel, int c, int low, int high, const float (&)[16], float (&v)[16]) const {
    read_run<2, 14, kQuads>(grad, n, pixel, c, low, high, v);
  }
  GPU_DEVICE float x_at(int64_t n, int pixel, int c) const { return gpu::to_float(x.at(n, pixel, c)); }
  GPU_DEVICE float grad_at(int64_t n, int pixel, int c, float) const { return gpu::to_float(grad.at(n, pixel, c)); }
  GPU_DEVICE float finish(float, float dx) const { return dx; }
};

// ---- spatial: the window is a square in the plane, one thread per element ------------------------------------------

struct Spatial {
  int64_t elements;
  int channels, height, width;
  bool channels_last;
  LrnArgs lrn;

  // Sum of value(offset) over [y - before, y + after] x [x - before, x + after], cut at the borders of the plane.
  template <class Value>
  GPU_DEVICE float window_sum(int64_t i, int before, int after, Value value) const {
    const int64_t pixel_stride = channels_last ? channels : 1, pixel = i / pixel_stride;
    const int x = static_cast<int>(pixel % width), y = static_cast<int>(pixel / width % height);
    float sum = 0;
    for (int dy = max(-before, -y); dy <= min(after, height - 1 - y); ++dy)
      for (int dx = max(-before, -x); dx <= min(after, width - 1 - x); ++dx)
        sum += value(i + (int64_t{dy} * width + dx) * pixel_stride);
    return sum;
  }

  template <class T>
  GPU_DEVICE float denominator(const T* x, int64_t i) const {
    const float sum = window_sum(i, lrn.front, lrn.back, [&](int64_t j) {
      const float v = gpu::to_float(x[j]);
      return v * v;
    });
    return fmaf(lrn.alpha, sum, lrn.k);
  }
};

enum Pass { kForward, kTerms, kGradient };  // y; t into the workspace; dx from the workspace

template <class T, Pass kPass>
__global__ void __launch_bounds__(kThreads, kBlocks)
    spatial_kernel(const T* x, const T* grad, T* out, float* workspace, Spatial s) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= s.elements) return;
  const float d = s.denominator(x, i), p = inverse_power<false>(d, s.lrn.beta), v = gpu::to_float(x[i]);
  if constexpr (kPass == kForward) out[i] = gpu::from_float<T>(v * p);
  if constexpr (kPass == kTerms) workspace[i] = gpu::to_float(grad[i]) * v * p / d;
  if constexpr (kPass == kGradient) {
    const float sum = s.window_sum(i, s.lrn.back, s.lrn.front, [&](int64_t j) { return workspace[j]; });
    out[i] = gpu::from_float<T>(fmaf(-2.f * s.lrn.alpha * s.lrn.beta * v, sum, gpu::to_float(grad[i]) * p));
  }
}

template <class T, Pass kPass>
gpu::error_t launch_spatial(const Images& images, const void* x, const void* grad, void* out, float* workspace,
                            const Lrn& lrn, gpu::stream_t stream) {
  const Spatial s = {images.n * images.c * images.h * images.w,
                     static_cast<int>(images.c),
                     static_cast<int>(images.h),
                     static_cast<int>(images.w),
                     images.channels_last,
                     LrnArgs(lrn)};
  return gpu::launch(spatial_kernel<T, kPass>, dim3(static_cast<unsigned>((s.elements + kThreads - 1) / kThreads)),
                     dim3(kThreads), 0, stream, static_cast<const T*>(x), static_cast<const T*>(grad),
                     static_cast<T*>(out), workspace, s);
}

// The register kernels; in NHWC they move four channels at a time.
template <class T>
bool use_runs(const Images& images, const Lrn& lrn, const void* a, const void* b, const void* c) {
  const int64_t group_channels = images.c / lrn.groups;
  const int bytes = 4 * sizeof(T);
  return is_alexnet(lrn) && (!images.channels_last || (group_channels % 4 == 0 && is_aligned(a, bytes) &&
                                                       is_aligned(b, bytes) && is_aligned(c, bytes)));
}

}  // namespace

gpu::error_t launch_local_response_norm(const Images& images, const void* x, void* y, const Lrn& lrn, bool spatial,
                                        gpu::stream_t stream) {
  const int channels = static_cast<int>(images.c), plane = static_cast<int>(images.h * images.w);
  return dispatch(images.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (spatial) return launch_spatial<T, kForward>(images, x, nullptr, y, nullptr, lrn, stream);
    return dispatch_flag(images.channels_last, [&](auto last) {
      return dispatch_flag(use_runs<T>(images, lrn, x, y, y), [&](auto fast) {
        constexpr bool kLast = decltype(last)::value, kFast = decltype(fast)::value;
        const View<const T, kLast> in = {static_cast<const T*>(x), channels, plane};
        const View<T, kLast> out = {static_cast<T*>(y), channels, plane};
        return launch_runs(kLast, images.n, plane, lrn.groups, channels / lrn.groups, [&](const Runs& runs, dim3 grid) {
          return gpu::launch(forward_kernel<T, kLast, kFast>, grid, dim3(kThreads), 0, stream, in, out, runs,
                             LrnArgs(lrn));
        });
      });
    });
  });
}

gpu::error_t launch_local_response_norm_backward(const Images& images, const void* grad, const void* x, void* dx,
                                                 const Lrn& lrn, bool spatial, float* workspace, gpu::stream_t stream) {
  const int channels = static_cast<int>(images.c), plane = static_cast<int>(images.h * images.w);
  return dispatch(images.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (spatial) {
      const gpu::error_t error = launch_spatial<T, kTerms>(images, x, grad, nullptr, workspace, lrn, stream);
      if (error != gpu::kSuccess) return error;
      return launch_spatial<T, kGradient>(images, x, grad, dx, workspace, lrn, stream);
    }
    return dispatch_flag(images.channels_last, [&](auto last) {
      return dispatch_flag(use_runs<T>(images, lrn, grad, x, dx), [&](auto fast) {
        constexpr bool kLast = decltype(last)::value, kFast = decltype(fast)::value;
        const Backward<T, kLast, kFast> problem = {{static_cast<const T*>(x), channels, plane},
                                                   {static_cast<const T*>(grad), channels, plane},
                                                   {static_cast<T*>(dx), channels, plane}};
        if constexpr (kFast)
          return launch_lrn_backward_runs(problem, images.n, lrn, stream);
        else
          return launch_lrn_backward_tiles(problem, images.n, lrn, stream);
      });
    });
  });
}

}  // namespace alexnet_cuda
