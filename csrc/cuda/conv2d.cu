// AlexNet's first convolution (11x11, stride 4, 1, 3 or 4 channels) in float32, and its two gradients. float16,
// bfloat16 and TF32 run on tensor cores: conv2d_mma.cu, conv2d_weight_grad_mma.cu and conv2d_input_grad_mma.cu.
//
// Forward and weight gradient are matrix products (conv2d_ffma.h) whose left operand, the unfolded image, is never
// stored:
//   forward        y[pixel, filter]   = bias + sum over taps   of  x[pixel, tap]  w[filter, tap]
//   weight grad    dw[tap, filter]    =        sum over pixels of  x[pixel, tap]  dy[pixel, filter]
// "pixel" counts the output pixels of all images, "tap" = (channel, ky, kx) the elements of a filter. One tap more,
// which meets 1 everywhere, gives the bias gradient.
//
// Memory: a K slice is a row of a filter or, in the weight gradient, 11 neighbours in a row of the output, so that what
// a thread fetches of the image lies in one of its rows. The tile is 128 pixels or taps times 32 or 96 filters; the
// wide one is for AlexNet's 96 filters: it fetches as much of the image for three times the products.
//
// Numerics: exact float products (FFMA); the order of every sum is fixed.
#include "conv2d_ffma.h"
#include "space_to_depth.h"

namespace alexnet_cuda {
namespace {

// ---- kernels -------------------------------------------------------------------------------------------------------

template <int kChannels, bool kNhwc, int kColumns>
__global__ void __launch_bounds__(kConvThreads, kColumns == 32 ? 4 : 3)
    forward_kernel(View<const float, kNhwc> x, const float* weight, const float* bias, View<float, kNhwc> y,
                   int64_t pixels, ConvGeometry conv, bool relu) {
  // The tile: output pixels from first_pixel on, counted over all images, and filters from first_filter on.
  const int64_t first_pixel = int64_t{blockIdx.x} * kTileRows, first_image = first_pixel / y.pixels;
  const unsigned first = static_cast<unsigned>(first_pixel % y.pixels);  // in its image
  const int rows = static_cast<int>(min(int64_t{kTileRows}, pixels - first_pixel));
  constexpr int kTaps = kChannels * kKernelArea;
  const int first_filter = blockIdx.y * kColumns, filters = conv.filters - first_filter;
  // Accumulators start as the bias.
  float acc[8][kColumns / 8];
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j) {
    const float start = bias && result_column(j) < filters ? bias[first_filter + result_column(j)] : 0.f;
#pragma unroll
    for (int i = 0; i < 8; ++i) acc[i][j] = start;
  }
  // This thread's row of the left matrix: the window of one output pixel, a row (c, ky) of it per slice.
  const unsigned mine = first + min(static_cast<int>(threadIdx.x), rows - 1), pixel = mine % y.pixels;
  const int y0 = static_cast<int>(pixel / conv.out_width) * kStride - conv.padding;
  const int x0 = static_cast<int>(pixel % conv.out_width) * kStride - conv.padding;
  const float* image = x.image(first_image + mine / y.pixels);
  const float* next_weights = weight + int64_t{first_filter} * kTaps;
  int c = 0, ky = 0;  // the same in all threads
  multiply<kColumns, true>(
      kChannels * kKernel, acc,
      [&](float (&v)[kSlice]) {
        fetch_left<1, kChannels>(x, image, conv, c, y0 + ky, x0, conv.width, 0.f, v);
        if (++ky == kKernel) ky = 0, ++c;
      },
      [&](float (&v)[kRightElements<kColumns>]) {
        fetch_right<true>(next_weights, kTaps, kSlice, filters, v);
        next_weights += kSlice;
      });
  if (relu) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j) acc[i][j] = gpu::max_nan(acc[i][j], 0.f);
  }
  // Registers to y: rows are pixels, columns filters.
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (result_row(i) >= rows) continue;
    const unsigned position = first + result_row(i);
    float* to =
        y.image(first_image + position / y.pixels) + y.offset(static_cast<int>(position % y.pixels), first_filter);
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j)
      if (result_column(j) < filters) to[y.offset(0, result_column(j))] = acc[i][j];
  }
}

// Split-K: split s of the output's rows is summed into workspace[s][filter][tap, then the bias]. (For 96 columns of
// NCHW the compiler needs more than a third of an SM's registers.)
template <int kChannels, bool kNhwc, int kColumns>
__global__ void __launch_bounds__(kConvThreads, kColumns == 32 ? 4 : 2 + kNhwc)
    weight_grad_kernel(View<const float, kNhwc> grad, View<const float, kNhwc> x, float* workspace, int64_t rows,
                       int64_t splits, ConvGeometry conv) {
  const int64_t split = blockIdx.z, begin = rows * split / splits, end = rows * (split + 1) / splits;
  const int first_filter = blockIdx.y * kColumns, filters = conv.filters - first_filter;
  constexpr int kTaps = kChannels * kKernelArea;
  // This thread's row of the left matrix: the pixels that one tap meets, from row y0 and column x0 on, up to x_end. The
  // bias' tap meets no pixels and `outside` everywhere.
  const int first_tap = blockIdx.x * kTileRows;
  const int tap = min(first_tap + static_cast<int>(threadIdx.x), kTaps), c = tap / kKernelArea;
  const int y0 = tap / kKernel % kKernel - conv.padding, x0 = tap % kKernel - conv.padding;
  const int x_end = tap == kTaps ? 0 : max(0, min(conv.width, x0 + (conv.out_width - 1) * kStride + 1));
  const float outside = tap == kTaps ? 1.f : 0.f;
  // Image, row and column of the next slice, the same in all threads.
  int n = static_cast<int>(begin / conv.out_height);
  int oy = static_cast<int>(begin % conv.out_height), ox = 0;
  float acc[8][kColumns / 8] = {};
  multiply<kColumns, !kNhwc>(
      static_cast<int>(end - begin) * divide_up(conv.out_width, kSlice), acc,
      [&](float (&v)[kSlice]) {
        fetch_left<kStride, kChannels>(x, x.image(n), conv, c, y0 + oy * kStride, x0 + ox * kStride, x_end, outside, v);
      },
      [&](float (&v)[kRightElements<kColumns>]) {
        const float* from = grad.image(n) + grad.offset(oy * conv.out_width + ox, first_filter);
        fetch_right<!kNhwc>(from, kNhwc ? grad.channels : grad.pixels, conv.out_width - ox, filters, v);
        if ((ox += kSlice) < conv.out_width) return;
        ox = 0;
        if (++oy < conv.out_height) return;
        oy = 0;
        ++n;
      });
  // Registers to the workspace.
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int to = first_tap + result_row(i);
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j)
      if (to <= kTaps && result_column(j) < filters)
        workspace[(split * conv.filters + first_filter + result_column(j)) * (kTaps + 1) + to] = acc[i][j];
  }
}

// Adds the splits in order, one element of the gradients per thread.
__global__ void __launch_bounds__(kThreads) sum_splits_kernel(const float* workspace, float* dweight, float* dbias,
                                                              int taps, int64_t elements, int64_t splits) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= elements) return;
  float sum = 0;
  for (int64_t s = 0; s < splits; ++s) sum += workspace[s * elements + i];
  const int64_t filter = i / (taps + 1), tap = i % (taps + 1);
  *(tap < taps ? dweight + filter * taps + tap : dbias + filter) = sum;
}

// dx of one input pixel per thread: a sum over the output pixels whose windows cover it and over filters. Gradients and
// weights come from cache.
template <int kChannels, bool kNhwc>
__global__ void __launch_bounds__(kThreads)
    input_grad_kernel(View<const float, kNhwc> grad, const float* weight, View<float, kNhwc> dx, int64_t pixels,
                      ConvGeometry conv) {
  const int64_t position = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (position >= pixels) return;
  const int64_t n = position / dx.pixels;
  const int pixel = static_cast<int>(position % dx.pixels);
  const int y = pixel / conv.width + conv.padding, x = pixel % conv.width + conv.padding;
  // Rows oy0 .. oy1 and columns ox0 .. ox1 of outputs have windows that cover the pixel.
  const int oy0 = max(0, (y - kKernel + kStride) / kStride), oy1 = min(y / kStride, conv.out_height - 1);
  const int ox0 = max(0, (x - kKernel + kStride) / kStride), ox1 = min(x / kStride, conv.out_width - 1);
  // For every window that covers the pixel: one weight per filter and channel, at the pixel's position in the window.
  float sum[kChannels] = {};
  for (int oy = oy0; oy <= oy1; ++oy)
    for (int ox = ox0; ox <= ox1; ++ox) {
      const float* w = weight + ((y - oy * kStride) * kKernel + x - ox * kStride);
      const float* g = grad.image(n) + grad.offset(oy * conv.out_width + ox, 0);
#pragma unroll 4
      for (int filter = 0; filter < conv.filters; ++filter, w += kChannels * kKernelArea, g += grad.offset(0, 1))
#pragma unroll
        for (int c = 0; c < kChannels; ++c) sum[c] = fmaf(*g, w[c * kKernelArea], sum[c]);
    }
#pragma unroll
  for (int c = 0; c < kChannels; ++c) dx.at(n, pixel, c) = sum[c];
}

// ---- launchers -----------------------------------------------------------------------------------------------------

// body(channels, channels_last)
template <class Body>
gpu::error_t dispatch_conv(const ConvArguments& args, Body body) {
  return dispatch_channels(args.conv, [&](auto channels) {
    return dispatch_flag(args.images.channels_last, [&](auto nhwc) { return body(channels, nhwc); });
  });
}

// body(channels, channels_last, columns), with the tile that leaves less of the last one empty.
template <class Body>
gpu::error_t dispatch_tile(const ConvArguments& args, Body body) {
  return dispatch_conv(args, [&](auto channels, auto nhwc) {
    if (divide_up(args.conv.filters, 96) * 96 <= divide_up(args.conv.filters, 32) * 32)
      return body(channels, nhwc, std::integral_constant<int, 96>{});
    return body(channels, nhwc, std::integral_constant<int, 32>{});
  });
}

}  // namespace

gpu::error_t launch_conv2d(const ConvArguments& args, gpu::stream_t stream) {
  if (uses_tensor_cores(args.images.dtype)) return launch_conv2d_mma(args, stream);
  const Conv& conv = args.conv;
  const int64_t outputs = conv.out_height * conv.out_width, pixels = args.images.count * outputs;
  return dispatch_tile(args, [&](auto channels, auto nhwc, auto columns) {
    constexpr bool kNhwc = decltype(nhwc)::value;
    constexpr int kColumns = decltype(columns)::value;
    return gpu::launch(forward_kernel<decltype(channels)::value, kNhwc, kColumns>,
                       dim3(divide_up(pixels, kTileRows), divide_up(conv.filters, kColumns)), dim3(kConvThreads), 0,
                       stream, view_of<const float, kNhwc>(args.x, conv.channels, args.images.pixels()),
                       static_cast<const float*>(args.weight), static_cast<const float*>(args.bias),
                       view_of<float, kNhwc>(args.out, conv.filters, outputs), pixels, ConvGeometry(conv), args.relu);
  });
}

gpu::error_t launch_conv2d_weight_grad(const ConvArguments& args, gpu::stream_t stream) {
  if (uses_tensor_cores(args.images.dtype)) return launch_conv2d_weight_grad_mma(args, stream);
  const Conv& conv = args.conv;
  const int64_t taps = conv.channels * kKernelArea, elements = conv.filters * (taps + 1);
  const int64_t splits = conv2d_weight_grad_slices(args.images.count);
  const gpu::error_t error = dispatch_tile(args, [&](auto channels, auto nhwc, auto columns) {
    constexpr bool kNhwc = decltype(nhwc)::value;
    constexpr int kColumns = decltype(columns)::value;
    const dim3 grid(divide_up(taps + 1, kTileRows), divide_up(conv.filters, kColumns), static_cast<unsigned>(splits));
    return gpu::launch(weight_grad_kernel<decltype(channels)::value, kNhwc, kColumns>, grid, dim3(kConvThreads), 0,
                       stream, view_of<const float, kNhwc>(args.grad, conv.filters, conv.out_height * conv.out_width),
                       view_of<const float, kNhwc>(args.x, conv.channels, args.images.pixels()), args.workspace,
                       args.images.count * conv.out_height, splits, ConvGeometry(conv));
  });
  if (error != gpu::kSuccess) return error;
  return gpu::launch(sum_splits_kernel, dim3(divide_up(elements, kThreads)), dim3(kThreads), 0, stream, args.workspace,
                     static_cast<float*>(args.grad_weight), static_cast<float*>(args.grad_bias), static_cast<int>(taps),
                     elements, splits);
}

gpu::error_t launch_conv2d_input_grad(const ConvArguments& args, gpu::stream_t stream) {
  if (uses_tensor_cores(args.images.dtype)) return launch_conv2d_input_grad_mma(args, stream);
  const Conv& conv = args.conv;
  const int64_t pixels = args.images.count * args.images.pixels();
  return dispatch_conv(args, [&](auto channels, auto nhwc) {
    constexpr bool kNhwc = decltype(nhwc)::value;
    return gpu::launch(
        input_grad_kernel<decltype(channels)::value, kNhwc>, dim3(divide_up(pixels, kThreads)), dim3(kThreads), 0,
        stream, view_of<const float, kNhwc>(args.grad, conv.filters, conv.out_height * conv.out_width),
        static_cast<const float*>(args.weight), view_of<float, kNhwc>(args.out, conv.channels, args.images.pixels()),
        pixels, ConvGeometry(conv));
  });
}

}  // namespace alexnet_cuda
