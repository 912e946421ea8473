// Convolution with few input channels (AlexNet's first layer: 11x11, stride 4, 3 channels) and its two gradients.
//
// Forward and weight gradient are matrix products whose left operand, the unfolded image, is never stored:
//   forward        y[pixel, filter]   = bias + sum over taps   of  x[pixel, tap]  w[filter, tap]
//   weight grad    dw[tap, filter]    =        sum over pixels of  x[pixel, tap]  dy[pixel, filter]
// where "pixel" counts the output pixels of all images and "tap" = (channel, ky, kx) the elements of a filter. A block
// of 128 threads makes a 128 x 32 or 128 x 96 tile of the result, an 8 x 4 or 8 x 12 part per thread in registers;
// slabs of 8 of the summed index come through shared memory, the next one being fetched while the present one is
// multiplied. The wide tile is AlexNet's 96 filters: it fetches as much of the image for three times the products. All
// arithmetic is float (FFMA); the order of every sum is fixed.
//
// AlexNet's own layer in half, bfloat16 and TF32 is on tensor cores: conv2d_mma.cu, conv2d_weight_grad_mma.cu and
// conv2d_input_grad_mma.cu.
#include "images.h"

namespace alexnet_cuda {
namespace {

constexpr int kRows = 128, kSlab = 8, kConvThreads = 128;

struct ConvArgs {
  int channels, height, width, filters, kernel_size, stride, padding, out_height, out_width;

  explicit ConvArgs(const Conv& c)
      : channels(static_cast<int>(c.channels)),
        height(static_cast<int>(c.height)),
        width(static_cast<int>(c.width)),
        filters(static_cast<int>(c.filters)),
        kernel_size(c.kernel_size),
        stride(c.stride),
        padding(c.padding),
        out_height(static_cast<int>(c.out_height)),
        out_width(static_cast<int>(c.out_width)) {}
  GPU_DEVICE int taps() const { return channels * kernel_size * kernel_size; }
  GPU_DEVICE int out_plane() const { return out_height * out_width; }
};

struct Tap {
  int c, ky, kx;

  GPU_DEVICE Tap(int tap, int kernel_size)
      : c(tap / (kernel_size * kernel_size)), ky(tap / kernel_size % kernel_size), kx(tap % kernel_size) {}
  GPU_DEVICE void next(int kernel_size) {
    if (++kx < kernel_size) return;
    kx = 0;
    if (++ky < kernel_size) return;
    ky = 0;
    ++c;
  }
};

struct OutputPixel {
  int64_t image;
  int y, x;

  GPU_DEVICE OutputPixel(int64_t pixel, const ConvArgs& conv)
      : image(pixel / conv.out_plane()),
        y(static_cast<int>(pixel % conv.out_plane()) / conv.out_width),
        x(static_cast<int>(pixel % conv.out_plane()) % conv.out_width) {}
  GPU_DEVICE void next(const ConvArgs& conv) {
    if (++x < conv.out_width) return;
    x = 0;
    if (++y < conv.out_height) return;
    y = 0;
    ++image;
  }
};

// x[pixel, tap]: what filter element `tap` sees at an output pixel; 0 beyond the edges.
template <class T, bool kLast>
GPU_DEVICE float unfolded(const View<const T, kLast>& x, const ConvArgs& conv, const OutputPixel& o, const Tap& t) {
  const int iy = o.y * conv.stride - conv.padding + t.ky, ix = o.x * conv.stride - conv.padding + t.kx;
  const bool inside = static_cast<unsigned>(iy) < static_cast<unsigned>(conv.height) &&
                      static_cast<unsigned>(ix) < static_cast<unsigned>(conv.width);
  return inside ? gpu::to_float(x.at(o.image, iy * conv.width + ix, t.c)) : 0.f;
}

// The element of a right slab that a thread fetches i-th: neighbours along k, or along the columns.
template <bool kAlongK>
GPU_DEVICE int right_k(int i) {
  return kAlongK ? threadIdx.x % 8 : threadIdx.x / 32 + 4 * (i % 2);
}
template <bool kAlongK>
GPU_DEVICE int right_column(int i) {
  return kAlongK ? threadIdx.x / 8 + 16 * i : threadIdx.x % 32 + 32 * (i / 2);
}

// acc[i][j] += sum over k < 8 * slabs of left[row i][k] * right[k][column j]. Thread t fetches row t of each left slab
// with fetch_left(v) and its elements of the right one with fetch_right(v), in the order of the slabs.
template <int kColumns, bool kAlongK, class FetchLeft, class FetchRight>
GPU_DEVICE void multiply(int slabs, float (&acc)[8][kColumns / 8], FetchLeft fetch_left, FetchRight fetch_right) {
  constexpr int kRight = kColumns / 16, kStride = kColumns + 4;  // of a row of the right slab: no bank conflicts
  GPU_SHARED_ARRAY(float, left, 2 * kSlab * kRows);
  GPU_SHARED_ARRAY(float, right, 2 * kSlab * kStride);
  const int t = threadIdx.x, row = t / 8 * 4, column = t % 8 * 4;
  float next_left[kSlab], next_right[kRight];
  fetch_left(next_left);
  fetch_right(next_right);
  for (int slab = 0; slab < slabs; ++slab) {
    const int a = slab % 2 * kSlab * kRows, b = slab % 2 * kSlab * kStride;
#pragma unroll
    for (int k = 0; k < kSlab; ++k) left[a + k * kRows + t] = next_left[k];
#pragma unroll
    for (int i = 0; i < kRight; ++i)
      right[b + right_k<kAlongK>(i) * kStride + right_column<kAlongK>(i)] = next_right[i];
    __syncthreads();  // one barrier is enough: the other half of the buffers was last read before it
    if (slab + 1 < slabs) {
      fetch_left(next_left);
      fetch_right(next_right);
    }
#pragma unroll
    for (int k = 0; k < kSlab; ++k) {
      // Rows 4 (t / 8) .. + 3 and the same 64 further down: lanes read whole 128-byte rows of shared memory.
      const gpu::Quad<float> a0 = gpu::load4(left + (a + k * kRows + row));
      const gpu::Quad<float> a1 = gpu::load4(left + (a + k * kRows + row + 64));
#pragma unroll
      for (int c = 0; c < kColumns / 32; ++c) {  // columns 4 (t % 8) .. + 3, and those 32 further on
        const gpu::Quad<float> b0 = gpu::load4(right + (b + k * kStride + 32 * c + column));
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

// Calls body(row of the tile, column, value) for a thread's part of the tile.
template <int kEach, class Body>
GPU_DEVICE void for_each_result(const float (&acc)[8][kEach], Body body) {
#pragma unroll
  for (int i = 0; i < 8; ++i)
#pragma unroll
    for (int j = 0; j < kEach; ++j)
      body(threadIdx.x / 8 * 4 + i % 4 + i / 4 * 64, threadIdx.x % 8 * 4 + j % 4 + j / 4 * 32, acc[i][j]);
}

template <class T, bool kLast, int kColumns>
__global__ void __launch_bounds__(kConvThreads, kColumns == 32 ? 4 : 3)
    forward_kernel(View<const T, kLast> x, const T* weight, const T* bias, View<T, kLast> y, int64_t pixels,
                   ConvArgs conv) {
  const int64_t first_pixel = int64_t{blockIdx.x} * kRows, pixel = first_pixel + threadIdx.x;
  const int first_filter = blockIdx.y * kColumns, taps = conv.taps();
  const OutputPixel mine(min(pixel, pixels - 1), conv);
  float acc[8][kColumns / 8];
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j) {
    const int filter = first_filter + threadIdx.x % 8 * 4 + j % 4 + j / 4 * 32;
    const float start = bias && filter < conv.filters ? gpu::to_float(bias[filter]) : 0.f;
#pragma unroll
    for (int i = 0; i < 8; ++i) acc[i][j] = start;
  }
  Tap tap(0, conv.kernel_size);  // the same in all threads
  int left_tap = 0, right_tap = right_k<true>(0);
  multiply<kColumns, true>(
      divide_up(taps, kSlab), acc,
      [&](float (&v)[kSlab]) {
#pragma unroll
        for (int k = 0; k < kSlab; ++k) {
          v[k] = left_tap < taps ? unfolded(x, conv, mine, tap) : 0.f;
          ++left_tap;
          tap.next(conv.kernel_size);
        }
      },
      [&](float (&v)[kColumns / 16]) {
#pragma unroll
        for (int i = 0; i < kColumns / 16; ++i) {
          const int filter = first_filter + right_column<true>(i);
          const bool inside = filter < conv.filters && right_tap < taps;
          v[i] = inside ? gpu::to_float(weight[filter * taps + right_tap]) : 0.f;
        }
        right_tap += kSlab;
      });
  for_each_result(acc, [&](int row, int column, float value) {
    const int64_t p = first_pixel + row;
    const int filter = first_filter + column;
    if (p >= pixels || filter >= conv.filters) return;
    y.at(p / y.plane, static_cast<int>(p % y.plane), filter) = gpu::from_float<T>(value);
  });
}

// From sm_100 on the compiler needs more than a third of an SM's registers for 96 columns.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kWideBlocks = 2;
#else
constexpr int kWideBlocks = 3;
#endif

// Slice s of the pixels, summed into workspace[s][filter][tap].
template <class T, bool kLast, int kColumns>
__global__ void __launch_bounds__(kConvThreads, kColumns == 32 ? 4 : kWideBlocks)
    weight_grad_kernel(View<const T, kLast> grad, View<const T, kLast> x, float* workspace, int64_t pixels,
                       int64_t slices, ConvArgs conv) {
  const int64_t slice = blockIdx.z, begin = pixels * slice / slices, end = pixels * (slice + 1) / slices;
  const int first_tap = blockIdx.x * kRows, first_filter = blockIdx.y * kColumns, taps = conv.taps();
  const Tap tap(min(first_tap + static_cast<int>(threadIdx.x), taps - 1), conv.kernel_size);
  float acc[8][kColumns / 8] = {};
  OutputPixel here(begin, conv);  // the same in all threads
  int64_t left_pixel = begin, right_pixel = begin;
  // Lanes take whatever of grad is contiguous: filters in NHWC, pixels in NCHW.
  multiply<kColumns, !kLast>(
      divide_up(end - begin, kSlab), acc,
      [&](float (&v)[kSlab]) {
#pragma unroll
        for (int k = 0; k < kSlab; ++k) {
          v[k] = left_pixel < end ? unfolded(x, conv, here, tap) : 0.f;
          ++left_pixel;
          here.next(conv);
        }
      },
      [&](float (&v)[kColumns / 16]) {
#pragma unroll
        for (int i = 0; i < kColumns / 16; ++i) {
          const int filter = first_filter + right_column<!kLast>(i);
          const int64_t p = right_pixel + right_k<!kLast>(i);
          const bool inside = filter < conv.filters && p < end;
          v[i] = inside ? gpu::to_float(grad.at(p / grad.plane, static_cast<int>(p % grad.plane), filter)) : 0.f;
        }
        right_pixel += kSlab;
      });
  for_each_result(acc, [&](int row, int column, float value) {
    const int t = first_tap + row, filter = first_filter + column;
    if (t < taps && filter < conv.filters) workspace[(slice * conv.filters + filter) * taps + t] = value;
  });
}

// Adds the slices up, from the first to the last.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_slices_kernel(const float* workspace, T* dweight, int64_t elements, int64_t slices) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= elements) return;
  float sum = 0;
  for (int64_t s = 0; s < slices; ++s) sum += workspace[s * elements + i];
  dweight[i] = gpu::from_float<T>(sum);
}

// dx of one input pixel and up to four channels: the sum over the output pixels whose windows cover it.
template <class T, bool kLast>
__global__ void __launch_bounds__(kThreads)
    input_grad_kernel(View<const T, kLast> grad, const T* weight, View<T, kLast> dx, int64_t pixels, ConvArgs conv) {
  const int64_t position = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (position >= pixels) return;
  const int64_t n = position / dx.plane;
  const int pixel = static_cast<int>(position % dx.plane), first_channel = blockIdx.y * 4;
  const int y = pixel / conv.width + conv.padding, x = pixel % conv.width + conv.padding;
  const int k = conv.kernel_size, area = k * k, taps = conv.taps();
  const int channels = min(4, conv.channels - first_channel);
  const T* image = grad.image(n);
  float sum[4] = {};
  for (int oy = max(0, (y - k + conv.stride) / conv.stride); oy <= min(y / conv.stride, conv.out_height - 1); ++oy)
    for (int ox = max(0, (x - k + conv.stride) / conv.stride); ox <= min(x / conv.stride, conv.out_width - 1); ++ox) {
      const T* w = weight + first_channel * area + (y - oy * conv.stride) * k + x - ox * conv.stride;
      for (int filter = 0; filter < conv.filters; ++filter) {
        const float g = gpu::to_float(image[grad.offset(oy * conv.out_width + ox, filter)]);
#pragma unroll
        for (int c = 0; c < 4; ++c)
          if (c < channels) sum[c] = fmaf(g, gpu::to_float(w[filter * taps + c * area]), sum[c]);
      }
    }
#pragma unroll
  for (int c = 0; c < 4; ++c)
    if (c < channels) dx.at(n, pixel, first_channel + c) = gpu::from_float<T>(sum[c]);
}

// body(columns) with the tile that leaves less of the last one empty; the wide one for float alone, since AlexNet's
// layer in other types is on tensor cores.
template <class T, class Body>
gpu::error_t dispatch_columns(int64_t filters, Body body) {
  if constexpr (sizeof(T) == 4)
    if (divide_up(filters, 96) * 96 <= divide_up(filters, 32) * 32) return body(std::integral_constant<int, 96>{});
  return body(std::integral_constant<int, 32>{});
}

// body(Type<T>, flag of channels_last)
template <class Body>
gpu::error_t dispatch_both(const Images& images, Body body) {
  return dispatch(images.dtype, [&](auto type) {
    return dispatch_flag(images.channels_last, [&](auto last) { return body(type, last); });
  });
}

template <class T, bool kLast>
View<T, kLast> image_view(void* data, const Conv& c) {
  return {static_cast<T*>(data), static_cast<int>(c.channels), static_cast<int>(c.height * c.width)};
}
template <class T, bool kLast>
View<const T, kLast> image_view(const void* data, const Conv& c) {
  return {static_cast<const T*>(data), static_cast<int>(c.channels), static_cast<int>(c.height * c.width)};
}
template <class T, bool kLast, class Pointer>
View<T, kLast> output_view(Pointer data, const Conv& c) {
  return {static_cast<T*>(data), static_cast<int>(c.filters), static_cast<int>(c.out_height * c.out_width)};
}

}  // namespace

gpu::error_t launch_conv2d(const Images& images, const void* x, const void* weight, const void* bias, void* y,
                           const Conv& conv, float* workspace, gpu::stream_t stream) {
  if (conv2d_workspace(images.dtype, conv))
    return launch_conv2d_mma(images, x, weight, bias, y, conv, workspace, stream);
  return dispatch_both(images, [&](auto type, auto last) {
    using T = typename decltype(type)::type;
    constexpr bool kLast = decltype(last)::value;
    const int64_t pixels = images.n * conv.out_height * conv.out_width;
    return dispatch_columns<T>(conv.filters, [&](auto columns) {
      constexpr int kColumns = decltype(columns)::value;
      return gpu::launch(forward_kernel<T, kLast, kColumns>,
                         dim3(divide_up(pixels, kRows), divide_up(conv.filters, kColumns)), dim3(kConvThreads), 0,
                         stream, image_view<T, kLast>(x, conv), static_cast<const T*>(weight),
                         static_cast<const T*>(bias), output_view<T, kLast>(y, conv), pixels, ConvArgs(conv));
    });
  });
}

gpu::error_t launch_conv2d_weight_grad(const Images& images, const void* grad, const void* x, void* dweight,
                                       const Conv& conv, float* workspace, gpu::stream_t stream) {
  if (conv2d_workspace(images.dtype, conv))
    return launch_conv2d_weight_grad_mma(images, grad, x, dweight, conv, workspace, stream);
  return dispatch_both(images, [&](auto type, auto last) {
    using T = typename decltype(type)::type;
    constexpr bool kLast = decltype(last)::value;
    const int64_t taps = conv.channels * conv.kernel_size * conv.kernel_size, elements = conv.filters * taps;
    const int64_t slices = conv2d_weight_grad_slices(images.n);
    const gpu::error_t error = dispatch_columns<T>(conv.filters, [&](auto columns) {
      constexpr int kColumns = decltype(columns)::value;
      const dim3 grid(divide_up(taps, kRows), divide_up(conv.filters, kColumns), static_cast<unsigned>(slices));
      return gpu::launch(weight_grad_kernel<T, kLast, kColumns>, grid, dim3(kConvThreads), 0, stream,
                         output_view<const T, kLast>(grad, conv), image_view<T, kLast>(x, conv), workspace,
                         images.n * conv.out_height * conv.out_width, slices, ConvArgs(conv));
    });
    if (error != gpu::kSuccess) return error;
    return gpu::launch(sum_slices_kernel<T>, dim3(divide_up(elements, kThreads)), dim3(kThreads), 0, stream,
                       static_cast<const float*>(workspace), static_cast<T*>(dweight), elements, slices);
  });
}

gpu::error_t launch_conv2d_input_grad(const Images& images, const void* grad, const void* weight, void* dx,
                                      const Conv& conv, float* workspace, gpu::stream_t stream) {
  if (conv2d_input_grad_workspace(images.dtype, conv))
    return launch_conv2d_input_grad_mma(images, grad, weight, dx, conv, workspace, stream);
  return dispatch_both(images, [&](auto type, auto last) {
    using T = typename decltype(type)::type;
    constexpr bool kLast = decltype(last)::value;
    const int64_t pixels = images.n * conv.height * conv.width;
    return gpu::launch(input_grad_kernel<T, kLast>, dim3(divide_up(pixels, kThreads), divide_up(conv.channels, 4)),
                       dim3(kThreads), 0, stream, output_view<const T, kLast>(grad, conv),
                       static_cast<const T*>(weight), image_view<T, kLast>(dx, conv), pixels, ConvArgs(conv));
  });
}

}  // namespace alexnet_cuda
