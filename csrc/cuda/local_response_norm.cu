// Local response normalisation, forward and backward; the formulas are in lrn.h.
//
// Across channels, a thread computes runs of 8 channels of one pixel (channel_runs.h). With AlexNet's window of 5 and
// beta of 3/4 all windows are in registers: the forward pass reads x once from memory (and the channels around a run
// once more from cache) and writes y once; the backward pass reads x and grad and writes dx. Other constants, and the
// spatial form, take simpler kernels. Numerics: sums in float, in a fixed order.
#include "lrn.h"

namespace alexnet_cuda {
namespace {

template <class T, bool kNhwc, bool kLrn5>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    forward_kernel(Runs runs, View<const T, kNhwc> x, View<T, kNhwc> y, LrnConstants lrn) {
  constexpr bool kVec4 = kLrn5 && kNhwc;
  runs.for_each<kNhwc>([&](int64_t n, int pixel, int c, int low, int high) {
    if constexpr (kLrn5) {
      // 12 channels into registers, 8 results out.
      float in[16], out[kRun];
      read_run<2, 14, kVec4>(x, n, pixel, c, low, high, in);
      normalise_run(in, lrn, out);
      write_run<kVec4>(y, n, pixel, c, high, out);
    } else {
      // One channel at a time; its window is read from cache.
      const auto value = [&](int j) { return gpu::to_float(x.at(n, pixel, j)); };
      for (int j = c; j < min(c + kRun, high); ++j) {
        const float d = denominator(lrn, j, low, high, value);
        y.at(n, pixel, j) = gpu::from_float<T>(value(j) * inverse_power<false>(d, lrn.beta));
      }
    }
  });
}

// ---- spatial form: the window is a square of the channel's own plane; one thread per element -----------------------

struct Spatial {
  int64_t elements;
  int channels, height, width;
  bool channels_last;
  LrnConstants lrn;

  // Sum of value(offset) over rows [y - before, y + after] and columns [x - before, x + after] around element i.
  template <class Value>
  GPU_DEVICE float window_sum(int64_t i, int before, int after, Value value) const {
    // Offsets are those of the whole batch, of which i is an element: neighbours are pixel_stride apart.
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

// The backward takes two passes: t of every element into the workspace, then dx from windows of t.
enum Pass { kForward, kTerms, kGradient };

template <class T, Pass kPass>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    spatial_kernel(const T* x, const T* grad, T* out, float* workspace, Spatial s) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= s.elements) return;
  // d from a window of x (and dx from a window of the workspace), read through the cache.
  const float d = s.denominator(x, i), p = inverse_power<false>(d, s.lrn.beta), v = gpu::to_float(x[i]);
  if constexpr (kPass == kForward) out[i] = gpu::from_float<T>(v * p);
  if constexpr (kPass == kTerms) workspace[i] = gpu::to_float(grad[i]) * v * p / d;
  if constexpr (kPass == kGradient) {
    const float sum = s.window_sum(i, s.lrn.back, s.lrn.front, [&](int64_t j) { return workspace[j]; });
    out[i] = gpu::from_float<T>(fmaf(-2.f * s.lrn.alpha * s.lrn.beta * v, sum, gpu::to_float(grad[i]) * p));
  }
}

template <Pass kPass>
gpu::error_t launch_spatial(const LrnArguments& args, gpu::stream_t stream) {
  const Images& images = args.images;
  const Spatial s = {images.count * images.channels * images.pixels(),
                     static_cast<int>(images.channels),
                     static_cast<int>(images.height),
                     static_cast<int>(images.width),
                     images.channels_last,
                     LrnConstants(args.lrn)};
  return dispatch_dtype(images.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return gpu::launch(spatial_kernel<T, kPass>, dim3(divide_up(s.elements, kThreads)), kThreads, 0, stream, args.x,
                       args.grad, args.out, args.workspace, s);
  });
}

}  // namespace

gpu::error_t launch_local_response_norm(const LrnArguments& args, gpu::stream_t stream) {
  if (args.spatial) return launch_spatial<kForward>(args, stream);
  const Images& images = args.images;
  return dispatch_images(images, [&](auto type, auto nhwc) {
    using T = typename decltype(type)::type;
    constexpr bool kNhwc = decltype(nhwc)::value;
    const auto x = view_of<const T, kNhwc>(args.x, images.channels, images.pixels());
    const auto y = view_of<T, kNhwc>(args.out, images.channels, images.pixels());
    return dispatch_flag(uses_lrn5_kernel<T>(images, args.lrn, nullptr, args.x, args.out), [&](auto lrn5) {
      return launch_runs(forward_kernel<T, kNhwc, decltype(lrn5)::value>, kNhwc, images.count, x.pixels, x.channels,
                         args.lrn.groups, stream, x, y, LrnConstants(args.lrn));
    });
  });
}

gpu::error_t launch_local_response_norm_backward(const LrnArguments& args, gpu::stream_t stream) {
  if (args.spatial) {
    const gpu::error_t error = launch_spatial<kTerms>(args, stream);
    return error != gpu::kSuccess ? error : launch_spatial<kGradient>(args, stream);
  }
  const Images& images = args.images;
  return dispatch_images(images, [&](auto type, auto nhwc) {
    using T = typename decltype(type)::type;
    constexpr bool kNhwc = decltype(nhwc)::value;
    return dispatch_flag(uses_lrn5_kernel<T>(images, args.lrn, nullptr, args.grad, args.x, args.out), [&](auto lrn5) {
      constexpr bool kLrn5 = decltype(lrn5)::value;
      const LrnBackward<T, T, kNhwc, kNhwc && kLrn5> policy = {
          view_of<const T, kNhwc>(args.x, images.channels, images.pixels()),
          view_of<const T, kNhwc>(args.grad, images.channels, images.pixels()),
          view_of<T, kNhwc>(args.out, images.channels, images.pixels())};
      return launch_lrn_backward<kLrn5>(policy, images.count, args.lrn, stream);
    });
  });
}

}  // namespace alexnet_cuda
