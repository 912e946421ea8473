// Max pooling, forward and backward; pool.h has the rules. 3x3 windows of stride 2 have faster kernels in
// max_pool2d_3x3s2.cu.
//
// A thread computes one element of the output (backward: of dx), or in NHWC four neighbouring channels of it if these
// can be moved with one load. Overlapping windows find their shared elements in cache, so each is read from memory
// once. Neighbouring threads have neighbouring elements of the output; a block strides over images, so that indices
// within one, which have 32 bits, are computed once.
#include "pool.h"

namespace alexnet_cuda {
namespace {

// Lanes: neighbouring channels of an output pixel (kStep to a thread) in NHWC, neighbouring outputs of a plane in NCHW,
// whose windows lie `stride` elements apart.
template <class T, int kStep, bool kNhwc>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    forward_kernel(View<const T, kNhwc> x, uint8_t* code, View<T, kNhwc> y, int64_t images, PoolGeometry pool,
                   bool relu) {
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
      if (relu) best[i].relu();
      values.v[i] = gpu::from_float<T>(best[i].value);
      codes.v[i] = static_cast<uint8_t>(best[i].code);
    }
    *reinterpret_cast<gpu::Vec<T, kStep>*>(y.data + offset) = values;
    if (code) *reinterpret_cast<gpu::Vec<uint8_t, kStep>*>(code + offset) = codes;
  });
}

// The same lanes over dx. A thread gathers what the windows over its pixel give: no two threads add to one element, so
// that sums need no atomics and have a fixed order.
template <class T, int kStep, bool kNhwc>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    backward_kernel(View<const T, kNhwc> grad, const uint8_t* code, View<T, kNhwc> dx, int64_t images,
                    PoolGeometry pool) {
  // Gradients and codes of the windows that cover the pixel from memory or cache, summed in registers.
  for_each_element<kStep, kNhwc>(images, dx.channels, dx.pixels, [&](int64_t image, int pixel, int c) {
    float sum[kStep];
    gather(grad, code, pool, image, pixel, c, sum);
    gpu::Vec<T, kStep> values;
#pragma unroll
    for (int i = 0; i < kStep; ++i) values.v[i] = gpu::from_float<T>(sum[i]);
    *reinterpret_cast<gpu::Vec<T, kStep>*>(&dx.at(image, pixel, c)) = values;
  });
}

// Launches kernel_of(Type<T>, integral constant kStep, channels_last), which takes `more` last and writes args.out of
// so many pixels per image.
template <class KernelOf, class... More>
gpu::error_t launch(const PoolArguments& args, const void* from, int64_t from_pixels, int64_t out_pixels,
                    gpu::stream_t stream, KernelOf kernel_of, More... more) {
  const Images& images = args.images;
  return dispatch_images(images, [&](auto type, auto nhwc) {
    using T = typename decltype(type)::type;
    constexpr bool kNhwc = decltype(nhwc)::value;
    const auto run = [&](auto step) {
      return gpu::launch(
          kernel_of(type, step, nhwc), element_grid(images.count, images.channels / decltype(step)::value * out_pixels),
          kThreads, 0, stream, view_of<const T, kNhwc>(from, images.channels, from_pixels), args.code,
          view_of<T, kNhwc>(args.out, images.channels, out_pixels), images.count, PoolGeometry(args.pool), more...);
    };
    if constexpr (kNhwc)
      if (images.channels % 4 == 0 && are_aligned(4 * sizeof(T), from, args.out) && are_aligned(4, args.code))
        return run(std::integral_constant<int, 4>{});
    return run(std::integral_constant<int, 1>{});
  });
}

}  // namespace

gpu::error_t launch_max_pool2d(const PoolArguments& args, gpu::stream_t stream, bool relu) {
  if (has_max_pool2d_3x3s2(args)) return launch_max_pool2d_3x3s2(args, stream, relu);
  const int64_t outputs = args.pool.out_height * args.pool.out_width;
  const auto kernel_of = [](auto type, auto step, auto nhwc) {
    return forward_kernel<typename decltype(type)::type, decltype(step)::value, decltype(nhwc)::value>;
  };
  return launch(args, args.x, args.images.pixels(), outputs, stream, kernel_of, relu);
}

gpu::error_t launch_max_pool2d_backward(const PoolArguments& args, gpu::stream_t stream) {
  if (has_max_pool2d_3x3s2(args)) return launch_max_pool2d_3x3s2_backward(args, stream);
  const int64_t outputs = args.pool.out_height * args.pool.out_width;
  return launch(args, args.grad, outputs, args.images.pixels(), stream, [](auto type, auto step, auto nhwc) {
    return backward_kernel<typename decltype(type)::type, decltype(step)::value, decltype(nhwc)::value>;
  });
}

}  // namespace alexnet_cuda
