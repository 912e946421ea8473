// AlexNet's first convolution (11x11, stride 4, 1, 3 or 4 channels) in float32, and its two gradients.
//
// Forward and weight gradient are matrix products whose left operand, the unfolded image, is never stored:
//   forward        y[pixel, filter]   = bias + sum over taps   of  x[pixel, tap]  w[filter, tap]
//   weight grad    dw[tap, filter]    =        sum over pixels of  x[pixel, tap]  dy[pixel, filter]
// where "pixel" counts the output pixels of all images and "tap" = (channel, ky, kx) the elements of a filter; one tap
// more, which meets 1 everywhere, makes the bias gradient. A block of 128 threads makes a 128 x 32 or 128 x 96 tile of
// the result, an 8 x 4 or 8 x 12 part per thread in registers; slabs of 11 of the summed index come through shared
// memory, the next one being fetched while the present one is multiplied. A slab is a row of the filter or, in the
// weight gradient, 11 neighbours in a row of the output (which has five times as many), so that what a thread fetches
// of the image lies in one of its rows. The wide tile is AlexNet's 96 filters: it fetches as much of the image for
// three times the products. All arithmetic is float (FFMA); the order of every sum is fixed.
//
// In half, bfloat16 and TF32 the layer is on tensor cores: conv2d_mma.cu, conv2d_weight_grad_mma.cu and
// conv2d_input_grad_mma.cu.
#include "images.h"
#include "slabs.h"

namespace alexnet_cuda {
namespace {

constexpr int kKernel = 11, kArea = kKernel * kKernel, kStride = 4;
constexpr int kTileRows = 128, kSlab = 11, kConvThreads = 128;

struct ConvArgs {
  int height, width, filters, padding, out_height, out_width;

  explicit ConvArgs(const Conv& c)
      : height(static_cast<int>(c.height)),
        width(static_cast<int>(c.width)),
        filters(static_cast<int>(c.filters)),
        padding(c.padding),
        out_height(static_cast<int>(c.out_height)),
        out_width(static_cast<int>(c.out_width)) {}
};

// ---- the product of the unfolded image and another matrix ----------------------------------------------------------

// v[k] = x at channel c, row y and column x0 + k kStep of an image; the value `outside` beyond it and from column `end`
// on.
template <int kStep, int kChannels, bool kLast>
GPU_DEVICE void fetch_left(const View<const float, kLast>& x, const float* image, const ConvArgs& conv, int c, int y,
                           int x0, int end, float outside, float (&v)[kSlab]) {
  const bool inside = static_cast<unsigned>(y) < static_cast<unsigned>(conv.height);
  const float* from = image + x.offset(y * conv.width + x0, c);
#pragma unroll
  for (int k = 0; k < kSlab; ++k) {
    const bool there = inside && static_cast<unsigned>(x0 + k * kStep) < static_cast<unsigned>(end);
    v[k] = there ? from[k * kStep * (kLast ? kChannels : 1)] : outside;
  }
}

// The elements of a right slab that a thread moves: neighbours along k or along the columns, whichever are neighbours
// in memory.
template <bool kAlongK>
struct RightElement {
  int k, column;

  GPU_DEVICE explicit RightElement(int i)
      : k(kAlongK ? threadIdx.x % kSlab : threadIdx.x / 32 + i % 3 * 4),
        column(kAlongK ? threadIdx.x / kSlab + i * kSlab : threadIdx.x % 32 + i / 3 * 32) {}
  GPU_DEVICE bool exists(int columns) const {
    return (kAlongK ? threadIdx.x < kSlab * kSlab : k < kSlab) && column < columns;
  }
};
template <int kColumns>
constexpr int kRight = kColumns / 32 * 3;  // of a thread
static_assert(kRight<96> == (96 + kSlab - 1) / kSlab && kRight<32> == (32 + kSlab - 1) / kSlab && kSlab <= 3 * 4);

// v[i] = the i-th of them, from a matrix whose slab begins at `from`; 0 behind the last of k and of the columns. The
// index that is not that of neighbours has `pitch`.
template <bool kAlongK, int n>
GPU_DEVICE void fetch_right(const float* from, int pitch, int ks, int columns, float (&v)[n]) {
  const RightElement<kAlongK> first(0);
  from += kAlongK ? first.column * pitch + first.k : first.k * pitch + first.column;
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const RightElement<kAlongK> e(i);
    const int along = kAlongK ? 0 : e.column - first.column, across = kAlongK ? i * kSlab : i % 3 * 4;
    v[i] = e.k < ks && e.column < columns ? from[across * pitch + along] : 0.f;
  }
}

// acc[i][j] += sum over k < 11 * slabs of left[row i][k] * right[k][column j]. Thread t fetches row t of each left slab
// with fetch_left(v) and then its elements of the right one with fetch_right(v), in the order of the slabs.
template <int kColumns, bool kAlongK, class FetchLeft, class FetchRight>
GPU_DEVICE void multiply(int slabs, float (&acc)[8][kColumns / 8], FetchLeft fetch_left, FetchRight fetch_right) {
  constexpr int kRightRow = kColumns + 4;  // floats
  GPU_SHARED_ARRAY(float, left, 2 * kSlab * kTileRows);
  GPU_SHARED_ARRAY(float, right, 2 * kSlab * kRightRow);
  const int t = threadIdx.x, row = t / 8 * 4, column = t % 8 * 4;
  float next_left[kSlab], next_right[kRight<kColumns>];
  fetch_left(next_left);
  fetch_right(next_right);
  for (int slab = 0; slab < slabs; ++slab) {
    const int a = slab % 2 * kSlab * kTileRows, b = slab % 2 * kSlab * kRightRow;
#pragma unroll
    for (int k = 0; k < kSlab; ++k) left[a + k * kTileRows + t] = next_left[k];
#pragma unroll
    for (int i = 0; i < kRight<kColumns>; ++i) {
      const RightElement<kAlongK> e(i);
      if (e.exists(kColumns)) right[b + e.k * kRightRow + e.column] = next_right[i];
    }
    __syncthreads();  // one barrier is enough: the other half of the buffers was last read before it
    if (slab + 1 < slabs) {
      fetch_left(next_left);
      fetch_right(next_right);
    }
#pragma unroll
    for (int k = 0; k < kSlab; ++k) {
      // Rows 4 (t / 8) .. + 3 and the same 64 further down: lanes read whole 128-byte rows of shared memory.
      const gpu::Quad<float> a0 = gpu::load4(left + (a + k * kTileRows + row));
      const gpu::Quad<float> a1 = gpu::load4(left + (a + k * kTileRows + row + 64));
#pragma unroll
      for (int c = 0; c < kColumns / 32; ++c) {  // columns 4 (t % 8) .. + 3, and those 32 further on
        const gpu::Quad<float> b0 = gpu::load4(right + (b + k * kRightRow + 32 * c + column));
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            acc[i][4 * c + j] = fmaf(a0.v[i], b0.v[j], acc[i][4 * c + j]);
            acc[i + 4][4 * c + j] = fmaf(a1.v[i], b0.v[j], acc[i + 4][4 * c + j]);
          }
      }
    }
  }
}

// Row i and column j of a thread's part of the tile.
GPU_DEVICE int result_row(int i) {
  return threadIdx.x / 8 * 4 + i % 4 + i / 4 * 64;
}
GPU_DEVICE int result_column(int j) {
  return threadIdx.x % 8 * 4 + j % 4 + j / 4 * 32;
}

// ---- kernels -------------------------------------------------------------------------------------------------------

template <int kChannels, bool kLast, int kColumns>
__global__ void __launch_bounds__(kConvThreads, kColumns == 32 ? 4 : 3)
    forward_kernel(View<const float, kLast> x, const float* weight, const float* bias, View<float, kLast> y,
                   int64_t pixels, ConvArgs conv) {
  const int64_t first_pixel = int64_t{blockIdx.x} * kTileRows, first_image = first_pixel / y.plane;
  const unsigned first = static_cast<unsigned>(first_pixel % y.plane);  // in its image
  const int rows = static_cast<int>(min(int64_t{kTileRows}, pixels - first_pixel));
  constexpr int kTaps = kChannels * kArea;
  const int first_filter = blockIdx.y * kColumns, filters = conv.filters - first_filter;
  float acc[8][kColumns / 8];
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j) {
    const float start = bias && result_column(j) < filters ? bias[first_filter + result_column(j)] : 0.f;
#pragma unroll
    for (int i = 0; i < 8; ++i) acc[i][j] = start;
  }
  const unsigned mine = first + min(static_cast<int>(threadIdx.x), rows - 1), pixel = mine % y.plane;
  const int y0 = static_cast<int>(pixel / conv.out_width) * kStride - conv.padding;
  const int x0 = static_cast<int>(pixel % conv.out_width) * kStride - conv.padding;
  const float* image = x.image(first_image + mine / y.plane);
  const float* next_weights = weight + int64_t{first_filter} * kTaps;
  int c = 0, ky = 0;  // the same in all threads
  multiply<kColumns, true>(
      kChannels * kKernel, acc,
      [&](float (&v)[kSlab]) {
        fetch_left<1, kChannels>(x, image, conv, c, y0 + ky, x0, conv.width, 0.f, v);
        if (++ky == kKernel) ky = 0, ++c;
      },
      [&](float (&v)[kRight<kColumns>]) {
        fetch_right<true>(next_weights, kTaps, kSlab, filters, v);
        next_weights += kSlab;
      });
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (result_row(i) >= rows) continue;
    const unsigned position = first + result_row(i);
    float* to =
        y.image(first_image + position / y.plane) + y.offset(static_cast<int>(position % y.plane), first_filter);
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j)
      if (result_column(j) < filters) to[y.offset(0, result_column(j))] = acc[i][j];
  }
}

// Slice s of the output's rows, summed into workspace[s][filter][tap, and the bias]. For 96 columns of NCHW the
// compiler needs more than a third of an SM's registers.
template <int kChannels, bool kLast, int kColumns>
__global__ void __launch_bounds__(kConvThreads, kColumns == 32 ? 4 : 2 + kLast)
    weight_grad_kernel(View<const float, kLast> grad, View<const float, kLast> x, float* workspace, int64_t rows,
                       int64_t slices, ConvArgs conv) {
  const int64_t slice = blockIdx.z, begin = rows * slice / slices, end = rows * (slice + 1) / slices;
  const int first_filter = blockIdx.y * kColumns, filters = conv.filters - first_filter;
  constexpr int kTaps = kChannels * kArea;
  const int first_tap = blockIdx.x * kTileRows;
  const int tap = min(first_tap + static_cast<int>(threadIdx.x), kTaps), c = tap / kArea;
  const int y0 = tap / kKernel % kKernel - conv.padding, x0 = tap % kKernel - conv.padding;
  // Behind the last column that this tap meets. The bias' tap meets no pixels.
  const int x_end = tap == kTaps ? 0 : max(0, min(conv.width, x0 + (conv.out_width - 1) * kStride + 1));
  const float outside = tap == kTaps ? 1.f : 0.f;
  int n = static_cast<int>(begin / conv.out_height);  // of the next slab, like oy and ox: the same in all threads
  int oy = static_cast<int>(begin % conv.out_height), ox = 0;
  float acc[8][kColumns / 8] = {};
  // Lanes take whatever of grad is contiguous: filters in NHWC, pixels in NCHW.
  multiply<kColumns, !kLast>(
      static_cast<int>(end - begin) * divide_up(conv.out_width, kSlab), acc,
      [&](float (&v)[kSlab]) {
        fetch_left<kStride, kChannels>(x, x.image(n), conv, c, y0 + oy * kStride, x0 + ox * kStride, x_end, outside, v);
      },
      [&](float (&v)[kRight<kColumns>]) {
        const float* from = grad.image(n) + grad.offset(oy * conv.out_width + ox, first_filter);
        fetch_right<!kLast>(from, kLast ? grad.channels : grad.plane, conv.out_width - ox, filters, v);
        if ((ox += kSlab) < conv.out_width) return;
        ox = 0;
        if (++oy < conv.out_height) return;
        oy = 0;
        ++n;
      });
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int to = first_tap + result_row(i);
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j)
      if (to <= kTaps && result_column(j) < filters)
        workspace[(slice * conv.filters + first_filter + result_column(j)) * (kTaps + 1) + to] = acc[i][j];
  }
}

// Adds the slices up, from the first to the last.
__global__ void __launch_bounds__(kThreads) sum_slices_kernel(const float* workspace, float* dweight, float* dbias,
                                                              int taps, int64_t elements, int64_t slices) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= elements) return;
  float sum = 0;
  for (int64_t s = 0; s < slices; ++s) sum += workspace[s * elements + i];
  const int64_t filter = i / (taps + 1), tap = i % (taps + 1);
  *(tap < taps ? dweight + filter * taps + tap : dbias + filter) = sum;
}

// dx of one input pixel: the sum over the output pixels whose windows cover it.
template <int kChannels, bool kLast>
__global__ void __launch_bounds__(kThreads) input_grad_kernel(View<const float, kLast> grad, const float* weight,
                                                              View<float, kLast> dx, int64_t pixels, ConvArgs conv) {
  const int64_t position = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (position >= pixels) return;
  const int64_t n = position / dx.plane;
  const int pixel = static_cast<int>(position % dx.plane);
  const int y = pixel / conv.width + conv.padding, x = pixel % conv.width + conv.padding;
  const int oy0 = max(0, (y - kKernel + kStride) / kStride), oy1 = min(y / kStride, conv.out_height - 1);
  const int ox0 = max(0, (x - kKernel + kStride) / kStride), ox1 = min(x / kStride, conv.out_width - 1);
  float sum[kChannels] = {};
  for (int oy = oy0; oy <= oy1; ++oy)
    for (int ox = ox0; ox <= ox1; ++ox) {
      const float* w = weight + ((y - oy * kStride) * kKernel + x - ox * kStride);
      const float* g = grad.image(n) + grad.offset(oy * conv.out_width + ox, 0);
#pragma unroll 4
      for (int filter = 0; filter < conv.filters; ++filter, w += kChannels * kArea, g += grad.offset(0, 1))
#pragma unroll
        for (int c = 0; c < kChannels; ++c) sum[c] = fmaf(*g, w[c * kArea], sum[c]);
    }
#pragma unroll
  for (int c = 0; c < kChannels; ++c) dx.at(n, pixel, c) = sum[c];
}

// ---- launchers -----------------------------------------------------------------------------------------------------

// body(channels, flag of channels_last)
template <class Body>
gpu::error_t dispatch_images(const Images& images, const Conv& conv, Body body) {
  return dispatch_channels(conv, [&](auto channels) {
    return dispatch_flag(images.channels_last, [&](auto last) { return body(channels, last); });
  });
}

// body(channels, flag of channels_last, columns) with the tile that leaves less of the last one empty.
template <class Body>
gpu::error_t dispatch_tile(const Images& images, const Conv& conv, Body body) {
  return dispatch_images(images, conv, [&](auto channels, auto last) {
    if (divide_up(conv.filters, 96) * 96 <= divide_up(conv.filters, 32) * 32)
      return body(channels, last, std::integral_constant<int, 96>{});
    return body(channels, last, std::integral_constant<int, 32>{});
  });
}

template <bool kLast>
View<const float, kLast> view(const void* data, int64_t channels, int64_t height, int64_t width) {
  return {static_cast<const float*>(data), static_cast<int>(channels), static_cast<int>(height * width)};
}
template <bool kLast>
View<float, kLast> view(void* data, int64_t channels, int64_t height, int64_t width) {
  return {static_cast<float*>(data), static_cast<int>(channels), static_cast<int>(height * width)};
}

}  // namespace

gpu::error_t launch_conv2d(const Images& images, const void* x, const void* weight, const void* bias, void* y,
                           const Conv& conv, float* workspace, gpu::stream_t stream) {
  if (!is_alexnet(conv)) return gpu::kInvalidValue;
  if (on_tensor_cores(images.dtype)) return launch_conv2d_mma(images, x, weight, bias, y, conv, workspace, stream);
  return dispatch_tile(images, conv, [&](auto channels, auto last, auto columns) {
    constexpr bool kLast = decltype(last)::value;
    constexpr int kColumns = decltype(columns)::value;
    const int64_t pixels = images.n * conv.out_height * conv.out_width;
    return gpu::launch(forward_kernel<decltype(channels)::value, kLast, kColumns>,
                       dim3(divide_up(pixels, kTileRows), divide_up(conv.filters, kColumns)), dim3(kConvThreads), 0,
                       stream, view<kLast>(x, conv.channels, conv.height, conv.width),
                       static_cast<const float*>(weight), static_cast<const float*>(bias),
                       view<kLast>(y, conv.filters, conv.out_height, conv.out_width), pixels, ConvArgs(conv));
  });
}

gpu::error_t launch_conv2d_weight_grad(const Images& images, const void* grad, const void* x, void* dweight,
                                       void* dbias, const Conv& conv, float* workspace, gpu::stream_t stream) {
  if (!is_alexnet(conv)) return gpu::kInvalidValue;
  if (on_tensor_cores(images.dtype))
    return launch_conv2d_weight_grad_mma(images, grad, x, dweight, dbias, conv, workspace, stream);
  const int64_t taps = conv.channels * kArea, elements = conv.filters * (taps + 1);
  const int64_t slices = conv2d_weight_grad_slices(images.n);
  const gpu::error_t error = dispatch_tile(images, conv, [&](auto channels, auto last, auto columns) {
    constexpr bool kLast = decltype(last)::value;
    constexpr int kColumns = decltype(columns)::value;
    const dim3 grid(divide_up(taps + 1, kTileRows), divide_up(conv.filters, kColumns), static_cast<unsigned>(slices));
    return gpu::launch(weight_grad_kernel<decltype(channels)::value, kLast, kColumns>, grid, dim3(kConvThreads), 0,
                       stream, view<kLast>(grad, conv.filters, conv.out_height, conv.out_width),
                       view<kLast>(x, conv.channels, conv.height, conv.width), workspace, images.n * conv.out_height,
                       slices, ConvArgs(conv));
  });
  if (error != gpu::kSuccess) return error;
  return gpu::launch(sum_slices_kernel, dim3(divide_up(elements, kThreads)), dim3(kThreads), 0, stream,
                     static_cast<const float*>(workspace), static_cast<float*>(dweight), static_cast<float*>(dbias),
                     static_cast<int>(taps), elements, slices);
}

gpu::error_t launch_conv2d_input_grad(const Images& images, const void* grad, const void* weight, void* dx,
                                      const Conv& conv, float* workspace, gpu::stream_t stream) {
  if (!is_alexnet(conv)) return gpu::kInvalidValue;
  if (on_tensor_cores(images.dtype))
    return launch_conv2d_input_grad_mma(images, grad, weight, dx, conv, workspace, stream);
  return dispatch_images(images, conv, [&](auto channels, auto last) {
    constexpr bool kLast = decltype(last)::value;
    const int64_t pixels = images.n * conv.height * conv.width;
    return gpu::launch(input_grad_kernel<decltype(channels)::value, kLast>, dim3(divide_up(pixels, kThreads)),
                       dim3(kThreads), 0, stream, view<kLast>(grad, conv.filters, conv.out_height, conv.out_width),
                       static_cast<const float*>(weight), view<kLast>(dx, conv.channels, conv.height, conv.width),
                       pixels, ConvArgs(conv));
  });
}

}  // namespace alexnet_cuda
