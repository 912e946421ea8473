// Local response normalisation, forward and backward; the formulas are in lrn.h.
//
// AlexNet's window of 5 and beta of 3/4: a thread computes runs of 8 channels of one pixel with all windows in
// registers. In NHWC it has one run, which it moves with one load of 16 bytes (float32: two), and two channels
// (backward of x: four) on either side. In NCHW it goes from run to run and keeps what two runs share. So x, grad and
// the result cross the memory bus once. Other settings, and the spatial form, take simpler kernels. Numerics: sums in
// float, in a fixed order.
#include "lrn.h"

namespace alexnet_cuda {
namespace {

// ---- window of 5, beta of 3/4: NHWC --------------------------------------------------------------------------------

// The runs of a launch: threads and runs count the same way through memory, so that no division by the image's size is
// needed; that of the group alone says whether a run has neighbours in its group.
struct DenseRuns {
  int64_t first;
  uint32_t count;
  int per_group;
};

// Lanes have consecutive runs, so a warp loads 512 consecutive bytes at once (float32: 1,024 in two loads). The two
// channels on either side are the neighbouring lanes' own: these loads are of 4 or 8 bytes and served by L1.
template <class T>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    forward_nhwc_kernel(const T* __restrict__ x, T* __restrict__ y, DenseRuns runs, LrnConstants lrn) {
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= runs.count) return;
  const int64_t at = (runs.first + i) * kRun;
  const int run = i % runs.per_group;
  float in[kRun + 4], out[kRun];
  load_run<2>(x + at, run > 0, run + 1 < runs.per_group, in);
  normalise_run(in, lrn, out);
  store_run(y + at, out);
}

// The same lanes. dx of a run needs t of two channels more on either side, and these need x of another two: the thread
// computes t of 12 channels for the 8 that it writes, and needs neither shared memory nor a barrier.
template <class T>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    backward_nhwc_kernel(const T* __restrict__ x, const T* __restrict__ grad, T* __restrict__ dx, DenseRuns runs,
                         LrnConstants lrn) {
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= runs.count) return;
  const int64_t at = (runs.first + i) * kRun;
  const int run = i % runs.per_group;
  const bool has_left = run > 0, has_right = run + 1 < runs.per_group;
  float in[kRun + 8], g[kRun + 4], out[kRun];
  load_run<4>(x + at, has_left, has_right, in);
  load_run<2>(grad + at, has_left, has_right, g);
  differentiate_run(in, g, lrn, out);
  store_run(dx + at, out);
}

// launch(runs, grid) until all runs of a batch are done. A launch begins with the first run of a group.
template <class Launch>
gpu::error_t launch_dense_runs(const LrnArguments& args, Launch launch) {
  const Images& images = args.images;
  const int per_group = static_cast<int>(images.channels / args.lrn.groups) / kRun;
  return for_each_batch(images.count * images.pixels() * args.lrn.groups, per_group, [&](int64_t first, int64_t count) {
    const DenseRuns runs = {first * per_group, static_cast<uint32_t>(count * per_group), per_group};
    return launch(runs, dim3(divide_up(runs.count, kThreads)));
  });
}

// ---- window of 5, beta of 3/4: NCHW --------------------------------------------------------------------------------

// A thread has one pixel and some runs of a group, its share. Shares read the channels around their ends twice; a small
// batch needs them to keep a GPU busy. blockIdx.x and the lanes run over the pixels of all images, blockIdx.y over
// groups and shares. A thread cannot load two 16-bit pixels at once: planes of an odd size begin within a word.
struct PixelRuns {
  int64_t first_image;
  uint32_t total_pixels;  // of all images
  int pixels, channels, group_channels, shares, share_channels;

  // body(offset of the pixel's channel `begin`, begin, end, group_channels), all counted from the group's first channel
  template <class Body>
  GPU_DEVICE void operator()(Body body) const {
    const uint32_t position = blockIdx.x * kThreads + threadIdx.x;
    if (position >= total_pixels) return;
    const uint32_t image = position / pixels;
    const int group = blockIdx.y / shares, begin = (blockIdx.y - group * shares) * share_channels;
    const int64_t plane = (first_image + image) * channels + group * group_channels + begin;
    body(plane * pixels + (position - image * pixels), begin, min(begin + share_channels, group_channels));
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    forward_nchw_kernel(const T* __restrict__ x, T* __restrict__ y, PixelRuns runs, LrnConstants lrn) {
  runs([&](int64_t at, int c, int end) {
    const T* from = x + at;
    T* to = y + at;
    const int64_t plane = runs.pixels;
    // A thread loads each channel once; lanes have neighbouring pixels, so that a warp's load of a channel is one of 64
    // or 128 consecutive bytes. For the run of channel c:
    //
    //          from the run before    new
    //   in     c - 2 .. c + 1         c + 2 .. c + 9
    //   out                           c .. c + 7
    float in[kRun + 4], out[kRun];
#pragma unroll
    for (int i = 0; i < 4; ++i) in[i] = i >= 2 || c > 0 ? gpu::to_float(from[(i - 2) * plane]) : 0.f;
#pragma unroll 1
    for (; c < end; c += kRun) {
      const bool has_right = c + kRun < runs.group_channels;
      from += 2 * plane;
#pragma unroll
      for (int i = 0; i < kRun; ++i, from += plane) in[4 + i] = i < 6 || has_right ? gpu::to_float(*from) : 0.f;
      from -= 2 * plane;
      normalise_run(in, lrn, out);
#pragma unroll
      for (int i = 0; i < kRun; ++i, to += plane) *to = gpu::from_float<T>(out[i]);
#pragma unroll
      for (int i = 0; i < 4; ++i) in[i] = in[kRun + i];
    }
  });
}

// Lanes have neighbouring pixels here, too. A thread computes every t once: what two runs share stays in registers.
template <class T>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    backward_nchw_kernel(const T* __restrict__ x, const T* __restrict__ grad, T* __restrict__ dx, PixelRuns runs,
                         LrnConstants lrn) {
  runs([&](int64_t at, int c, int end) {
    const T *from_x = x + at, *from_grad = grad + at;
    T* to = dx + at;
    const int64_t plane = runs.pixels;
    // dx needs t of two channels more, and these x of another two. So loads are ahead of dx. For the run of channel c:
    //
    //            from the run before    new
    //   x        c .. c + 3             c + 4 .. c + 11
    //   grad                            c + 2 .. c + 9
    //   direct   c, c + 1               c + 2 .. c + 9
    //   t        c - 2 .. c + 1         c + 2 .. c + 9
    //   dx                              c .. c + 7
    //
    // What comes from the run before is made, at first, from x of c - 4 .. c + 3 and grad of c - 2 .. c + 1.
    float in[kRun + 8], g[kRun], direct[kRun + 4], t[kRun + 4], out[kRun];
#pragma unroll
    for (int i = 0; i < 8; ++i) in[i] = i >= 4 || c > 0 ? gpu::to_float(from_x[(i - 4) * plane]) : 0.f;
#pragma unroll
    for (int i = 0; i < 4; ++i) g[i] = i >= 2 || c > 0 ? gpu::to_float(from_grad[(i - 2) * plane]) : 0.f;
    gradient_terms<4>(in, g, lrn, direct, t);
#pragma unroll
    for (int i = 0; i < 4; ++i) in[i] = in[i + 4];
    direct[0] = direct[2];
    direct[1] = direct[3];
#pragma unroll 1
    for (; c < end; c += kRun) {
      const bool has_right = c + kRun < runs.group_channels;
      from_x += 4 * plane;
      from_grad += 2 * plane;
#pragma unroll
      for (int i = 0; i < kRun; ++i, from_x += plane) in[4 + i] = i < 4 || has_right ? gpu::to_float(*from_x) : 0.f;
#pragma unroll
      for (int i = 0; i < kRun; ++i, from_grad += plane) g[i] = i < 6 || has_right ? gpu::to_float(*from_grad) : 0.f;
      from_x -= 4 * plane;
      from_grad -= 2 * plane;
      gradient_terms<kRun>(in, g, lrn, direct + 2, t + 4);
      finish_gradients(in, direct, t, lrn, out);
#pragma unroll
      for (int i = 0; i < kRun; ++i, to += plane) *to = gpu::from_float<T>(out[i]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        in[i] = in[kRun + i];
        t[i] = t[kRun + i];
      }
      direct[0] = direct[kRun];
      direct[1] = direct[kRun + 1];
    }
  });
}

// launch(runs, grid) until all pixels are done.
template <class Launch>
gpu::error_t launch_pixel_runs(const LrnArguments& args, Launch launch) {
  const Images& images = args.images;
  const int pixels = static_cast<int>(images.pixels()), channels = static_cast<int>(images.channels);
  const int group_channels = channels / args.lrn.groups;
  return for_each_batch(images.count, pixels, [&](int64_t first, int64_t count) {
    const int64_t total = count * pixels;
    const Shares shares(total * args.lrn.groups, group_channels);
    const PixelRuns runs = {
        first, static_cast<uint32_t>(total), pixels, channels, group_channels, shares.count, shares.channels};
    return launch(runs, dim3(divide_up(total, kThreads), args.lrn.groups * shares.count));
  });
}

// ---- any window ----------------------------------------------------------------------------------------------------

// One element per thread; its window is read from cache. In NHWC the window's other channels are those of neighbouring
// lanes, in NCHW every load of a warp takes 32 neighbouring pixels of one of them.
template <class T, bool kNhwc>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    forward_kernel(View<const T, kNhwc> x, View<T, kNhwc> y, int64_t images, int group_channels, LrnConstants lrn) {
  for_each_element<1, kNhwc>(images, x.channels, x.pixels, [&](int64_t n, int pixel, int c) {
    const int low = c / group_channels * group_channels;
    const auto value = [&](int j) { return gpu::to_float(x.at(n, pixel, j)); };
    const float d = denominator(lrn, c, low, low + group_channels, value);
    y.at(n, pixel, c) = gpu::from_float<T>(value(c) * inverse_power<false>(d, lrn.beta));
  });
}

// ---- spatial form: the window is a square of the channel's own plane; one thread per element -----------------------
// Lanes have neighbouring pixels in NCHW, whose windows overlap, and neighbouring channels in NHWC, whose windows lie
// side by side. Most of a window's size^2 loads come from L1.

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
  const LrnConstants lrn(args.lrn);
  return dispatch_images(images, [&](auto type, auto nhwc) {
    using T = typename decltype(type)::type;
    constexpr bool kNhwc = decltype(nhwc)::value;
    if (!has_lrn5_kernel<T>(images, args.lrn, args.x, args.out))
      return gpu::launch(forward_kernel<T, kNhwc>, element_grid(images.count, images.channels * images.pixels()),
                         kThreads, 0, stream, view_of<const T, kNhwc>(args.x, images.channels, images.pixels()),
                         view_of<T, kNhwc>(args.out, images.channels, images.pixels()), images.count,
                         images.channels / args.lrn.groups, lrn);
    if constexpr (kNhwc)
      return launch_dense_runs(args, [&](const DenseRuns& runs, dim3 grid) {
        return gpu::launch(forward_nhwc_kernel<T>, grid, kThreads, 0, stream, args.x, args.out, runs, lrn);
      });
    else
      return launch_pixel_runs(args, [&](const PixelRuns& runs, dim3 grid) {
        return gpu::launch(forward_nchw_kernel<T>, grid, kThreads, 0, stream, args.x, args.out, runs, lrn);
      });
  });
}

gpu::error_t launch_local_response_norm_backward(const LrnArguments& args, gpu::stream_t stream) {
  if (args.spatial) {
    const gpu::error_t error = launch_spatial<kTerms>(args, stream);
    return error != gpu::kSuccess ? error : launch_spatial<kGradient>(args, stream);
  }
  const Images& images = args.images;
  const LrnConstants lrn(args.lrn);
  return dispatch_images(images, [&](auto type, auto nhwc) {
    using T = typename decltype(type)::type;
    constexpr bool kNhwc = decltype(nhwc)::value;
    if (!has_lrn5_kernel<T>(images, args.lrn, args.x, args.grad, args.out)) {
      const LrnBackward<T, kNhwc> policy = {view_of<const T, kNhwc>(args.x, images.channels, images.pixels()),
                                            view_of<const T, kNhwc>(args.grad, images.channels, images.pixels()),
                                            view_of<T, kNhwc>(args.out, images.channels, images.pixels())};
      return launch_tiles(lrn_backward_tile_kernel<decltype(policy)>, images.count, images.channels, images.pixels(),
                          args.lrn, stream, policy);
    }
    if constexpr (kNhwc)
      return launch_dense_runs(args, [&](const DenseRuns& runs, dim3 grid) {
        return gpu::launch(backward_nhwc_kernel<T>, grid, kThreads, 0, stream, args.x, args.grad, args.out, runs, lrn);
      });
    else
      return launch_pixel_runs(args, [&](const PixelRuns& runs, dim3 grid) {
        return gpu::launch(backward_nchw_kernel<T>, grid, kThreads, 0, stream, args.x, args.grad, args.out, runs, lrn);
      });
  });
}

}  // namespace alexnet_cuda
