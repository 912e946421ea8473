// Max pooling, forward and backward (pool.h has the rules). A thread makes one element of the output (or of dx), or in
// NHWC four neighbouring channels of it when these can be moved with one load. Overlapping windows find their shared
// elements in cache, so that each is read from memory once.
#include "pool.h"

namespace alexnet_cuda {
namespace {

// The threads of blockIdx.x cover one image's pixels and channels (in steps of kStep); blockIdx.y strides over images.
template <int kStep, bool kChannelsLast, class Body>
GPU_DEVICE void for_each_element(int64_t n, int channels, int plane, Body body) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int steps = channels / kStep, item = static_cast<int>(i);
  if (i >= int64_t{steps} * plane) return;
  const int c = kChannelsLast ? item % steps : item / plane, pixel = kChannelsLast ? item / steps : item % plane;
  for (int64_t image = blockIdx.y; image < n; image += gridDim.y) body(image, pixel, c * kStep);
}

template <class T, int kStep, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, kBlocks)
    forward_kernel(View<const T, kChannelsLast> x, View<T, kChannelsLast> y, uint8_t* code, int64_t n, PoolArgs pool) {
  for_each_element<kStep, kChannelsLast>(n, y.channels, y.plane, [&](int64_t image, int pixel, int c) {
    Maximum best[kStep];
    const T* in = x.image(image);
    for_each_in_window(pool, pixel / pool.out_width, pixel % pool.out_width, [&](int position, int iy, int ix) {
      const int offset = x.offset(iy * pool.width + ix, c);
      if constexpr (kStep == 4) {
        const gpu::Quad<T> quad = *reinterpret_cast<const gpu::Quad<T>*>(in + offset);
#pragma unroll
        for (int i = 0; i < 4; ++i) best[i].offer(gpu::to_float(quad.v[i]), position);
      } else {
        best[0].offer(gpu::to_float(in[offset]), position);
      }
    });
    const int64_t offset = image * y.channels * y.plane + y.offset(pixel, c);
    if constexpr (kStep == 4) {
      gpu::Quad<T> values;
      gpu::Quad<uint8_t> codes;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        values.v[i] = gpu::from_float<T>(best[i].value);
        codes.v[i] = static_cast<uint8_t>(best[i].code);
      }
      *reinterpret_cast<gpu::Quad<T>*>(y.data + offset) = values;
      if (code) *reinterpret_cast<gpu::Quad<uint8_t>*>(code + offset) = codes;
    } else {
      y.data[offset] = gpu::from_float<T>(best[0].value);
      if (code) code[offset] = static_cast<uint8_t>(best[0].code);
    }
  });
}

template <class T, int kStep, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, kBlocks)
    backward_kernel(View<const T, kChannelsLast> grad, const uint8_t* code, View<T, kChannelsLast> dx, int64_t n,
                    PoolArgs pool) {
  for_each_element<kStep, kChannelsLast>(n, dx.channels, dx.plane, [&](int64_t image, int pixel, int c) {
    if constexpr (kStep == 4) {
      float v[16];
      gather_run<kHalo, kHalo + 4, true>(grad, code, pool, image, pixel, c, 0, dx.channels, v);
      gpu::Quad<T> quad;
#pragma unroll
      for (int i = 0; i < 4; ++i) quad.v[i] = gpu::from_float<T>(v[kHalo + i]);
      *reinterpret_cast<gpu::Quad<T>*>(&dx.at(image, pixel, c)) = quad;
    } else {
      dx.at(image, pixel, c) = gpu::from_float<T>(gather(grad, code, pool, image, pixel, c));
    }
  });
}

// body(Type<T>, integral constant of kStep, flag of channels_last, grid over `plane` pixels)
template <class Body>
gpu::error_t dispatch_all(const Images& images, int64_t plane, bool aligned, Body body) {
  return dispatch(images.dtype, [&](auto type) {
    const auto grid = [&](int step) {
      return dim3(divide_up(images.c / step * plane, kThreads),
                  static_cast<unsigned>(std::min<int64_t>(images.n, 65535)));
    };
    if (!images.channels_last) return body(type, std::integral_constant<int, 1>{}, std::false_type{}, grid(1));
    if (images.c % 4 || !aligned) return body(type, std::integral_constant<int, 1>{}, std::true_type{}, grid(1));
    return body(type, std::integral_constant<int, 4>{}, std::true_type{}, grid(4));
  });
}

bool all_aligned(DType dtype, const void* a, const void* b, const void* code) {
  const int bytes = dtype == kFloat ? 16 : 8;
  return is_aligned(a, bytes) && is_aligned(b, bytes) && is_aligned(code, 4);
}

}  // namespace

gpu::error_t launch_max_pool2d(const Images& images, const void* x, void* y, uint8_t* code, const Pool& pool,
                               gpu::stream_t stream) {
  const int channels = static_cast<int>(images.c);
  const int plane = static_cast<int>(images.h * images.w),
            out_plane = static_cast<int>(pool.out_height * pool.out_width);
  return dispatch_all(images, out_plane, all_aligned(images.dtype, x, y, code),
                      [&](auto type, auto step, auto last, dim3 grid) {
                        using T = typename decltype(type)::type;
                        constexpr bool kLast = decltype(last)::value;
                        const View<const T, kLast> in = {static_cast<const T*>(x), channels, plane};
                        const View<T, kLast> out = {static_cast<T*>(y), channels, out_plane};
                        return gpu::launch(forward_kernel<T, decltype(step)::value, kLast>, grid, dim3(kThreads), 0,
                                           stream, in, out, code, images.n, PoolArgs(pool));
                      });
}

gpu::error_t launch_max_pool2d_backward(const Images& images, const void* grad, const uint8_t* code, void* dx,
                                        const Pool& pool, gpu::stream_t stream) {
  const int channels = static_cast<int>(images.c);
  const int plane = static_cast<int>(images.h * images.w),
            out_plane = static_cast<int>(pool.out_height * pool.out_width);
  return dispatch_all(images, plane, all_aligned(images.dtype, grad, dx, code),
                      [&](auto type, auto step, auto last, dim3 grid) {
                        using T = typename decltype(type)::type;
                        constexpr bool kLast = decltype(last)::value;
                        const View<const T, kLast> in = {static_cast<const T*>(grad), channels, out_plane};
                        const View<T, kLast> out = {static_cast<T*>(dx), channels, plane};
                        return gpu::launch(backward_kernel<T, decltype(step)::value, kLast>, grid, dim3(kThreads), 0,
                                           stream, in, code, out, images.n, PoolArgs(pool));
                      });
}

}  // namespace alexnet_cuda
