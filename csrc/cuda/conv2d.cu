// AlexNet's first convolution (11x11, stride 4, 1, 3 or 4 channels) in float32, and its two gradients. float16,
// bfloat16 and TF32 run on tensor cores: conv2d_mma.cu, conv2d_weight_grad_mma.cu and conv2d_input_grad_mma.cu. So does
// float32 where kernels.h says.
//
// Forward and weight gradient are matrix products whose left operand, the unfolded image, is never stored:
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
#include "space_to_depth.h"
#include "view.h"

namespace alexnet_cuda {
namespace {

// ---- the matrix product: acc[row][column] += sum over k of left[row][k] right[k][column] ---------------------------
//
// A thread block of 128 threads makes a 128 x kColumns tile, 8 x kColumns / 8 of it per thread in registers.
//
// Memory: K slices of 11 values of k go through shared memory, left as [k][128], right as [k][kColumns + 4]. For each
// k a thread loads 16 bytes of these 2 + kColumns / 32 times, for kColumns FFMA. 4 columns more, since two threads that
// store a right slice along k then meet at a bank, instead of eleven. Two buffers: while slice s is multiplied from
// one, slice s + 1 is loaded from global memory to registers.
// Numerics: FFMA only; every sum runs over k in ascending order.

constexpr int kTileRows = 128, kSlice = 11, kConvThreads = 128;

// One row of the left matrix: v[k] = x at channel c, row y, column x0 + k kStep of an image; `outside` beyond its edges
// and from column `end` on.
template <int kStep, int kChannels, bool kNhwc>
GPU_DEVICE void fetch_left(const View<const float, kNhwc>& x, const float* image, const ConvGeometry& conv, int c,
                           int y, int x0, int end, float outside, float (&v)[kSlice]) {
  const bool inside = is_inside(y, conv.height);
  const float* from = image + x.offset(y * conv.width + x0, c);
#pragma unroll
  for (int k = 0; k < kSlice; ++k) {
    const bool valid = inside && is_inside(x0 + k * kStep, end);
    v[k] = valid ? from[k * kStep * (kNhwc ? kChannels : 1)] : outside;
  }
}

// The i-th element of a right slice that a thread moves. Consecutive threads take what is consecutive in memory: k with
// kAlongK, else columns.
template <bool kAlongK>
struct RightElement {
  int k, column;

  GPU_DEVICE explicit RightElement(int i)
      : k(kAlongK ? threadIdx.x % kSlice : threadIdx.x / 32 + i % 3 * 4),
        column(kAlongK ? threadIdx.x / kSlice + i * kSlice : threadIdx.x % 32 + i / 3 * 32) {}
  GPU_DEVICE bool exists(int columns) const {
    return (kAlongK ? threadIdx.x < kSlice * kSlice : k < kSlice) && column < columns;
  }
};
template <int kColumns>
constexpr int kRightElements = kColumns / 32 * 3;  // per thread
static_assert(kRightElements<96> == (96 + kSlice - 1) / kSlice && kRightElements<32> == (32 + kSlice - 1) / kSlice);
static_assert(kSlice <= 3 * 4);

// v[i] = the thread's i-th element of the right slice that begins at `from`; 0 from k = ks and from `columns` on.
// `pitch` is the stride of the index that is not contiguous.
template <bool kAlongK, int n>
GPU_DEVICE void fetch_right(const float* from, int pitch, int ks, int columns, float (&v)[n]) {
  const RightElement<kAlongK> first(0);
  from += kAlongK ? first.column * pitch + first.k : first.k * pitch + first.column;
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const RightElement<kAlongK> e(i);
    const int along = kAlongK ? 0 : e.column - first.column, across = kAlongK ? i * kSlice : i % 3 * 4;
    v[i] = e.k < ks && e.column < columns ? from[across * pitch + along] : 0.f;
  }
}

// Adds `slices` K slices to acc. Thread t calls fetch_left(v) for row t of each left slice, then fetch_right(v) for its
// elements of the right one, slice by slice.
template <int kColumns, bool kAlongK, class FetchLeft, class FetchRight>
GPU_DEVICE void multiply(int slices, float (&acc)[8][kColumns / 8], FetchLeft fetch_left, FetchRight fetch_right) {
  constexpr int kRightRow = kColumns + 4;
  GPU_SHARED_ARRAY(float, left, 2 * kSlice * kTileRows);
  GPU_SHARED_ARRAY(float, right, 2 * kSlice * kRightRow);
  const int t = threadIdx.x, row = t / 8 * 4, column = t % 8 * 4;
  float next_left[kSlice], next_right[kRightElements<kColumns>];
  fetch_left(next_left);
  fetch_right(next_right);
  for (int slice = 0; slice < slices; ++slice) {
    // Registers to shared memory.
    const int a = slice % 2 * kSlice * kTileRows, b = slice % 2 * kSlice * kRightRow;
#pragma unroll
    for (int k = 0; k < kSlice; ++k) left[a + k * kTileRows + t] = next_left[k];
#pragma unroll
    for (int i = 0; i < kRightElements<kColumns>; ++i) {
      const RightElement<kAlongK> e(i);
      if (e.exists(kColumns)) right[b + e.k * kRightRow + e.column] = next_right[i];
    }
    __syncthreads();  // one barrier per slice is enough: the other buffer was last read before it
    // The next slice: global memory to registers.
    if (slice + 1 < slices) {
      fetch_left(next_left);
      fetch_right(next_right);
    }
    // Multiply. A thread has rows 4 (t / 8) .. + 3 and the same 64 further down, columns 4 (t % 8) .. + 3 and those at
    // distances of 32. A warp's 32 threads are 4 by rows and 8 by columns: it reads 128 consecutive bytes of the right
    // slice at once, and 64 of the left one, each of which goes to 8 lanes.
#pragma unroll
    for (int k = 0; k < kSlice; ++k) {
      const gpu::Vec4<float> a0 = gpu::load4(left + (a + k * kTileRows + row));
      const gpu::Vec4<float> a1 = gpu::load4(left + (a + k * kTileRows + row + 64));
#pragma unroll
      for (int c = 0; c < kColumns / 32; ++c) {
        const gpu::Vec4<float> b0 = gpu::load4(right + (b + k * kRightRow + 32 * c + column));
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
  // This thread's row of the left matrix: the window of one output pixel, a row (c, ky) of it per slice. Lanes have
  // neighbouring outputs, 4 pixels of x apart: the 11 loads of a slice touch the same lines, all but the first in L1.
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

// Thread blocks of the weight gradient on an SM. (96 columns of NCHW take more than a third of its registers.)
constexpr int weight_grad_blocks_per_sm(bool nhwc, int columns) {
  return columns == 32 ? 4 : 2 + nhwc;
}

// Split-K: split s of the output's rows is summed into workspace[s][filter][tap, then the bias].
template <int kChannels, bool kNhwc, int kColumns>
__global__ void __launch_bounds__(kConvThreads, weight_grad_blocks_per_sm(kNhwc, kColumns))
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

// dx of one input pixel per thread: a sum over the at most nine output pixels whose windows cover it, and over filters.
// Gradients and weights come from cache: neighbouring pixels share most of their windows, all images the weights.
template <int kChannels, bool kNhwc>
__global__ void __launch_bounds__(kThreads)
    input_grad_kernel(View<const float, kNhwc> grad, const float* weight, View<float, kNhwc> dx, int64_t pixels,
                      ConvGeometry conv) {
  const int64_t position = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (position >= pixels) return;
  const int64_t n = position / dx.pixels;
  const int pixel = static_cast<int>(position % dx.pixels);
  // For every window that covers the pixel: one weight per filter and channel, at the pixel's position in the window.
  float sum[kChannels] = {};
  for_each_covering_output(conv, pixel / conv.width, pixel % conv.width, [&](int output, int position) {
    const float *g = grad.image(n) + grad.offset(output, 0), *w = weight + position;
#pragma unroll 4
    for (int filter = 0; filter < conv.filters; ++filter, w += kChannels * kKernelArea, g += grad.offset(0, 1))
#pragma unroll
      for (int c = 0; c < kChannels; ++c) sum[c] = fmaf(*g, w[c * kKernelArea], sum[c]);
  });
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

// Columns of a tile: what leaves less of the last one empty.
int columns_of(const Conv& conv) {
  return divide_up(conv.filters, 96) * 96 <= divide_up(conv.filters, 32) * 32 ? 96 : 32;
}

// body(channels, channels_last, columns)
template <class Body>
gpu::error_t dispatch_columns(const ConvArguments& args, Body body) {
  return dispatch_conv(args, [&](auto channels, auto nhwc) {
    if (columns_of(args.conv) == 96) return body(channels, nhwc, std::integral_constant<int, 96>{});
    return body(channels, nhwc, std::integral_constant<int, 32>{});
  });
}

}  // namespace

gpu::error_t launch_conv2d(const ConvArguments& args, gpu::stream_t stream) {
  if (uses_tensor_cores(args.images.dtype)) return launch_conv2d_mma(args, stream);
  const Conv& conv = args.conv;
  const int64_t outputs = conv.out_height * conv.out_width, pixels = args.images.count * outputs;
  return dispatch_columns(args, [&](auto channels, auto nhwc, auto columns) {
    constexpr bool kNhwc = decltype(nhwc)::value;
    constexpr int kColumns = decltype(columns)::value;
    return gpu::launch(forward_kernel<decltype(channels)::value, kNhwc, kColumns>,
                       dim3(divide_up(pixels, kTileRows), divide_up(conv.filters, kColumns)), kConvThreads, 0, stream,
                       view_of<const float, kNhwc>(args.x, conv.channels, args.images.pixels()), args.weight, args.bias,
                       view_of<float, kNhwc>(args.out, conv.filters, outputs), pixels, ConvGeometry(conv), args.relu);
  });
}

// As many as fill 132 SMs once; not those of the device, so that results do not depend on it. At most four per image.
int64_t conv2d_weight_grad_splits(const ConvArguments& args) {
  const Conv& conv = args.conv;
  const int columns = columns_of(conv), blocks = 132 * weight_grad_blocks_per_sm(args.images.channels_last, columns);
  const int tiles = divide_up(conv.channels * kKernelArea + 1, kTileRows) * divide_up(conv.filters, columns);
  return std::min(args.images.count * std::min(conv.out_height, int64_t{4}), int64_t{std::max(blocks / tiles, 1)});
}

gpu::error_t launch_conv2d_weight_grad(const ConvArguments& args, gpu::stream_t stream) {
  if (uses_tensor_cores(args.images.dtype)) return launch_conv2d_weight_grad_mma(args, stream);
  const Conv& conv = args.conv;
  const int taps = conv.channels * kKernelArea;
  const int64_t splits = conv2d_weight_grad_splits(args);
  const gpu::error_t error = dispatch_columns(args, [&](auto channels, auto nhwc, auto columns) {
    constexpr bool kNhwc = decltype(nhwc)::value;
    constexpr int kColumns = decltype(columns)::value;
    const dim3 grid(divide_up(taps + 1, kTileRows), divide_up(conv.filters, kColumns), splits);
    return gpu::launch(weight_grad_kernel<decltype(channels)::value, kNhwc, kColumns>, grid, kConvThreads, 0, stream,
                       view_of<const float, kNhwc>(args.grad, conv.filters, conv.out_height * conv.out_width),
                       view_of<const float, kNhwc>(args.x, conv.channels, args.images.pixels()), args.workspace,
                       args.images.count * conv.out_height, splits, ConvGeometry(conv));
  });
  if (error != gpu::kSuccess) return error;
  TapTable all = {};  // every tap in order, then the bias
  for (int i = 0; i <= taps; ++i) all.tap[i] = i < taps ? i : -1;
  return sum_partials<float>(args, taps + 1, splits, conv.filters * (taps + 1), all, stream);
}

gpu::error_t launch_conv2d_input_grad(const ConvArguments& args, gpu::stream_t stream) {
  if (uses_tensor_cores(args.images.dtype)) return launch_conv2d_input_grad_mma(args, stream);
  const Conv& conv = args.conv;
  const int64_t pixels = args.images.count * args.images.pixels();
  return dispatch_conv(args, [&](auto channels, auto nhwc) {
    constexpr bool kNhwc = decltype(nhwc)::value;
    return gpu::launch(
        input_grad_kernel<decltype(channels)::value, kNhwc>, dim3(divide_up(pixels, kThreads)), kThreads, 0, stream,
        view_of<const float, kNhwc>(args.grad, conv.filters, conv.out_height * conv.out_width), args.weight,
        view_of<float, kNhwc>(args.out, conv.channels, args.images.pixels()), pixels, ConvGeometry(conv));
  });
}

}  // namespace alexnet_cuda
