// Max pooling, forward and backward; pool.h has the rules. 3x3 windows of stride 2 have faster kernels in
// max_pool2d_3x3s2.cu.
//
// A thread computes one element of the output (backward: of dx), or in NHWC four neighbouring channels of it if these
// can be moved with one load. Overlapping windows find their shared elements in cache, so each is read from memory
// once.
#include "pool.h"

namespace alexnet_cuda {
namespace {

// body(image, pixel, first channel): blockIdx.x and threadIdx.x cover the pixels and channels (kStep at a time) of one
// image, blockIdx.y strides over images.
template <int kStep, bool kNhwc, class Body>
GPU_DEVICE void for_each_element(int64_t images, int channels, int pixels, Body body) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int steps = channels / kStep, item = static_cast<int>(i);
  if (i >= int64_t{steps} * pixels) return;
  const int c = kNhwc ? item % steps : item / pixels, pixel = kNhwc ? item / steps : item % pixels;
  for (int64_t image = blockIdx.y; image < images; image += gridDim.y) body(image, pixel, c * kStep);
}

template <class T, int kStep, bool kNhwc>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    forward_kernel(View<const T, kNhwc> x, uint8_t* code, View<T, kNhwc> y, int64_t images, PoolGeometry pool) {
  for_each_element<kStep, kNhwc>(images, y.channels, y.pixels, [&](int64_t image, int pixel, int c) {
    Maximum best[kStep];
    const T* in = x.image(image);
    // The window's elements from memory or cache; maxima stay in registers.
    for_each_in_window(pool, pixel / pool.out_width, pixel % pool.out_width, [&](int position, int iy, int ix) {
      const int offset = x.offset(iy * pool.width + ix, c);
      const auto values = *reinterpret_cast<const gpu::Vec<T, kStep>*>(in + offset);
#pragma unroll
      for (int i = 0; i < kStep; ++i) best[i].update(gpu::to_float(values.v[i]), position);
    });
    // Values, and codes if wanted, to memory.
    const int64_t offset = image * y.channels * y.pixels + y.offset(pixel, c);
    gpu::Vec<T, kStep> values;
    gpu::Vec<uint8_t, kStep> codes;
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      values.v[i] = gpu::from_float<T>(best[i].value);
      codes.v[i] = static_cast<uint8_t>(best[i].code);
    }
    *reinterpret_cast<gpu::Vec<T, kStep>*>(y.data + offset) = values;
    if (code) *reinterpret_cast<gpu::Vec<uint8_t, kStep>*>(code + offset) = codes;
  });
}

template <class T, int kStep, bool kNhwc>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    backward_kernel(View<const T, kNhwc> grad, const uint8_t* code, View<T, kNhwc> dx, int64_t images,
                    PoolGeometry pool) {
  // Gradients and codes of the windows that cover the pixel from memory or cache, summed in registers.
  for_each_element<kStep, kNhwc>(images, dx.channels, dx.pixels, [&](int64_t image, int pixel, int c) {
    if constexpr (kStep == 4) {
      float v[16];
      gather_run<kHalo, kHalo + 4, true>(grad, code, pool, image, pixel, c, 0, dx.channels, v);
      gpu::Vec4<T> four;
#pragma unroll
      for (int i = 0; i < 4; ++i) four.v[i] = gpu::from_float<T>(v[kHalo + i]);
      *reinterpret_cast<gpu::Vec4<T>*>(&dx.at(image, pixel, c)) = four;
    } else {
      dx.at(image, pixel, c) = gpu::from_float<T>(gather(grad, code, pool, image, pixel, c));
    }
  });
}

// Launches kernel_of(Type<T>, integral constant kStep, channels_last), which writes args.out of so many pixels per
// image.
template <class KernelOf>
gpu::error_t launch(const PoolArguments& args, const void* from, int64_t from_pixels, int64_t out_pixels,
                    gpu::stream_t stream, KernelOf kernel_of) {
  const Images& images = args.images;
  return dispatch_images(images, [&](auto type, auto nhwc) {
    using T = typename decltype(type)::type;
    constexpr bool kNhwc = decltype(nhwc)::value;
    const auto run = [&](auto step) {
      const int64_t items = images.channels / decltype(step)::value * out_pixels;
      return gpu::launch(
          kernel_of(type, step, nhwc), dim3(divide_up(items, kThreads), std::min<int64_t>(images.count, 65535)),
          kThreads, 0, stream, view_of<const T, kNhwc>(from, images.channels, from_pixels), args.code,
          view_of<T, kNhwc>(args.out, images.channels, out_pixels), images.count, PoolGeometry(args.pool));
    };
    if constexpr (kNhwc)
      if (images.channels % 4 == 0 && are_aligned(4 * sizeof(T), from, args.out) && are_aligned(4, args.code))
        return run(std::integral_constant<int, 4>{});
    return run(std::integral_constant<int, 1>{});
  });
}

}  // namespace

gpu::error_t launch_max_pool2d(const PoolArguments& args, gpu::stream_t stream) {
  if (has_max_pool2d_3x3s2(args)) return launch_max_pool2d_3x3s2(args, stream);
  const int64_t outputs = args.pool.out_height * args.pool.out_width;
  return launch(args, args.x, args.images.pixels(), outputs, stream, [](auto type, auto step, auto nhwc) {
    return forward_kernel<typename decltype(type)::type, decltype(step)::value, decltype(nhwc)::value>;
  });
}

gpu::error_t launch_max_pool2d_backward(const PoolArguments& args, gpu::stream_t stream) {
  if (has_max_pool2d_3x3s2(args)) return launch_max_pool2d_3x3s2_backward(args, stream);
  const int64_t outputs = args.pool.out_height * args.pool.out_width;
  return launch(args, args.grad, outputs, args.images.pixels(), stream, [](auto type, auto step, auto nhwc) {
    return backward_kernel<typename decltype(type)::type, decltype(step)::value, decltype(nhwc)::value>;
  });
}

}  // namespace alexnet_cuda
