// AlexNet's first convolution (11x11, stride 4, 1, 3 or 4 channels) on tensor cores: float16, bfloat16, TF32, and
// float32 by TF32x3.
//
// An implicit GEMM by space to depth: k_schedule.h says how it becomes a matrix product, space_to_depth.h how the image
// lies in shared memory and how output pixels are numbered in strips. A thread block of 8 warps makes 256 output pixels
// x 64 or 96 filters, a warp 32 pixels.
//
// Memory: the s2d blocks of the pixels go to shared memory once. Weights come from global memory at every k step,
// packed so that a lane reads its fragments of 16 filters with one load; all warps and thread blocks read the same few
// ten kilobytes, which L1 keeps (TF32's 140 come from L2).
//
// Numerics: products of T, float sums; channels that meet no weight are masked, so that NaN in them has no effect.
// TF32x3 (space_to_depth.h) masks nothing: outputs that are not finite are made again by float products.
//
// Count: a k step of TF32x3, 32 pixels x 96 filters x 8 k, takes a warp 223 instructions on sm_90 (72 HMMA, 104 FADD,
// 12 loads of weights). In conv2d.cu as many products take 909 (768 FFMA).
#include "float_products.h"

namespace alexnet_cuda {
namespace {

template <class T>
constexpr int kTransposedRow = kWarpPixels + 4 / sizeof(T);  // elements per filter; the padding avoids bank conflicts

// ---- weights -------------------------------------------------------------------------------------------------------

// packed[filter tile][k step][16 filters][lane][4]: b[0] and b[1] of two products. Filters of a tile are permuted so
// that a lane ends up with runs of 8: column 8 j + 2 q + e of the product is filter 32 (j / 4) + 8 q + 2 (j % 4) + e.
// Products j = 0 .. 3 then give the lanes with q = lane % 4 filters 8 q .. 8 q + 7 of a pixel: 16 bytes to store.
template <class E>
__global__ void __launch_bounds__(kThreads) pack_kernel(const E* weight, uint32_t* packed, int words, int filters,
                                                        int tile, int steps, int length, TapTable taps) {
  constexpr int kPerWord = kGroupSize<E> / 4;  // elements of a word
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= words) return;
  // i counts the words of `packed`: word and lane within the fragments of 16 filters, then k step and filter tile.
  const int word = i % 4, lane = i / 4 % 32, pair = i / 128 % (tile / 16), rest = i / (8 * tile);
  const int j = 2 * pair + word / 2, column = lane / 4, slice = rest % steps * 2 + word % 2;
  const int filter = rest / steps * tile + j / 4 * 32 + column / 2 * 8 + j % 4 * 2 + column % 2;
  // A word of the packed array: one or two weights from memory, 0 where K has no filter element.
  E v[kPerWord];
#pragma unroll
  for (int e = 0; e < kPerWord; ++e) {
    const int tap = taps.tap[slice * kGroupSize<E> + lane % 4 * kPerWord + e];
    v[e] = tap >= 0 && filter < filters ? weight[filter * length + tap] : E{0};
  }
  store_weight(packed, i, v);
}

// ---- the product ---------------------------------------------------------------------------------------------------

// Thread blocks that share an SM's registers. If there were two, ptxas would spill a few words of TF32x3, and from
// sm_100 on two of TF32.
template <class T, int kTile>
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kMmaMinBlocks = kIsTF32x3<T> || (sizeof(T) == 4 && kTile == 96) ? 1 : 2;
#else
constexpr int kMmaMinBlocks = kIsTF32x3<T> ? 1 : 2;
#endif

// A k step of 16-bit elements takes a warp two ldmatrix (128 consecutive bytes for the eight rows of a matrix: no bank
// conflicts) and kTile / 16 loads of weights for kTile / 4 products. More pixels per warp would spare loads of weights,
// but not leave two thread blocks room for their sums: 32 pixels x 96 filters are 96 registers.
template <class T, int kChannels, int kTile>
__global__ void __launch_bounds__(kThreads, kMmaMinBlocks<T, kTile>)
    mma_kernel(const Storage<T>* __restrict__ x, const gpu::Vec4<uint32_t>* __restrict__ packed,
               const T* __restrict__ bias, T* __restrict__ y, int64_t first_image, StripGeometry g, SliceTable table,
               bool relu, const Storage<T>* __restrict__ weight) {
  constexpr int kSteps = kSchedule<kChannels, kGroupSize<T>>.steps, kLoads = kTile / (kIsTF32x3<T> ? 8 : 16);
  const gpu::shared<uint32_t> shared = gpu::dynamic_shared<uint32_t>();
  const int pitch = g.pitch(), warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad_lane = lane % 4;
  // Thread blocks run over pixels of a strip, strips and images in x, over filter tiles in y.
  const int64_t image = first_image + blockIdx.x / (g.blocks * g.strips);
  const int strip = blockIdx.x / g.blocks % g.strips, first = blockIdx.x % g.blocks * kBlockPixels;
  const int warp_pixel = first + warp * kWarpPixels, first_filter = blockIdx.y * kTile + quad_lane * 8;
  const bool active = warp_pixel < g.out_height * pitch;

  // The s2d blocks of 256 pixels: image to shared memory.
  const Storage<T>* in = x + image * kChannels * g.height * g.width;
  if (g.channels_last)
    stage_blocks<kChannels, true>(shared, in, g, strip, first);
  else
    stage_blocks<kChannels, false>(shared, in, g, strip, first);
  __syncthreads();

  // One k step per iteration: fragments a of 32 pixels from shared memory (lanes 16-31 address the second K slice), b
  // of 16 filters at a time from global memory; sums stay in registers.
  float sums[2][kTile / 8][4] = {};
  if (active) {
    // Rows of ldmatrix: lane l addresses pixel l % 16 of the warp, 16 bytes of its s2d block.
    const gpu::shared<uint16_t> blocks = gpu::shared_cast<uint16_t>(shared) + (warp * kWarpPixels + lane % 16) * 8;
    const gpu::Vec4<uint32_t>* weights = packed + blockIdx.y * (kSteps * kLoads * 32) + lane;
#pragma unroll 1
    for (int step = 0; step < kSteps; ++step) {
      const auto &low = table.slice[2 * step], &high = table.slice[2 * step + 1];
      uint32_t a[2][4], a_low[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        gpu::ldmatrix_x4(a[i], blocks + (table.slice[2 * step + lane / 16].offset + i * 16 * 8));
        if constexpr (kIsTF32x3<T>) {
#pragma unroll
          for (int k = 0; k < 4; ++k) split(a[i][k], a[i][k], a_low[i][k]);
        } else {
          mask_fragment<T>(low.mask, a[i][0], a[i][1]);
          mask_fragment<T>(high.mask, a[i][2], a[i][3]);
        }
      }
#pragma unroll
      for (int load = 0; load < kLoads; ++load) {
        const gpu::Vec4<uint32_t> b = weights[load * 32];
        const uint32_t even[2] = {b.v[0], b.v[1]}, odd[2] = {b.v[2], b.v[3]};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if constexpr (kIsTF32x3<T>) {
            mma_tf32x3(sums[i][load], a[i], a_low[i], even, odd);
          } else {
            mma<T>(sums[i][2 * load], a[i], even);
            mma<T>(sums[i][2 * load + 1], a[i], odd);
          }
        }
      }
      weights += kLoads * 32;
    }
  }

  [[maybe_unused]] const float not_finite = kIsTF32x3<T> ? nan_unless_finite(sums) : 0.f;
  const float floor = relu ? 0.f : -INFINITY;  // a branch on `relu` would spill two registers on sm_120
  const int plane = g.out_height * g.out_width;
  T* out = y + image * g.filters * plane;
  // Where a lane has the sum of its pixel i, which is 8 i + lane / 4 of the warp's, and of filter k of its run among
  // filters 32 j .. 32 j + 31: rows of a product are pixels, columns filters in the order of pack_kernel.
  const auto sum_of = [&](int i, int j, int k) -> float& { return sums[i / 2][4 * j + k / 2][i % 2 * 2 + k % 2]; };
  // Bias and ReLU of these filters, for all 4 pixels.
  const auto add_bias = [&](int j) {
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const int filter = first_filter + 32 * j + k;
      const float b = bias && filter < g.filters ? gpu::to_float(bias[filter]) : 0.f;
#pragma unroll
      for (int i = 0; i < 4; ++i) sum_of(i, j, k) = gpu::max_nan(sum_of(i, j, k) + b, floor);
    }
  };
  if (g.channels_last) {
    // Registers to y: the four lanes of a pixel write 64 consecutive bytes (of 16-bit elements) at a time.
    if (!active) return;
    int pixels[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) pixels[i] = g.output_index(strip, warp_pixel + 8 * i + lane / 4);
#pragma unroll
    for (int j = 0; j < kTile / 32; ++j) {
      const int filter = first_filter + 32 * j;
      add_bias(j);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (pixels[i] < 0 || filter >= g.filters) continue;
        struct alignas(16) {
          T v[8];
        } run;
#pragma unroll
        for (int k = 0; k < 8; ++k) run.v[k] = gpu::from_float<T>(sum_of(i, j, k));
        T* to = out + (pixels[i] * g.filters + filter);
        if (g.vectors) {
          *reinterpret_cast<decltype(run)*>(to) = run;
        } else {
#pragma unroll
          for (int k = 0; k < 8; ++k)
            if (filter + k < g.filters) to[k] = run.v[k];
        }
      }
    }
  } else {
    // Each warp transposes 32 pixels x 32 filters at a time in shared memory and writes rows of consecutive pixels.
    __syncthreads();
    if (!active) return;
    const gpu::shared<T> buffer = gpu::shared_cast<T>(shared) + warp * (32 * kTransposedRow<T>);
    const int pixel = g.output_index(strip, warp_pixel + lane);
#pragma unroll
    for (int j = 0; j < kTile / 32; ++j) {
      add_bias(j);
      __syncwarp();  // the previous 32 filters have been read
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int k = 0; k < 8; ++k)
          buffer[(quad_lane * 8 + k) * kTransposedRow<T> + 8 * i + lane / 4] = gpu::from_float<T>(sum_of(i, j, k));
      __syncwarp();
      const int filter = blockIdx.y * kTile + 32 * j, count = pixel < 0 ? 0 : min(32, g.filters - filter);
      for (int k = 0; k < count; ++k) {
        const T value = buffer[k * kTransposedRow<T> + lane];
        out[(filter + k) * plane + pixel] = value;
      }
    }
  }
  if constexpr (kIsTF32x3<T>) {
    // The low part of an infinity is NaN, and 0 * NaN: outputs that are not finite are made again by float products.
    __syncwarp();  // other lanes may have stored them
    if (not_finite == 0) return;
#pragma unroll 1
    for (int n = 0; n < kTile; ++n) {  // the lane's sums: 4 pixels, runs of 8 filters
      const int output = g.output_index(strip, warp_pixel + n % 4 * 8 + lane / 4);
      const int filter = first_filter + n / 32 * 32 + n / 4 % 8;
      if (output < 0 || filter >= g.filters) continue;
      T& to = out[g.channels_last ? output * g.filters + filter : filter * plane + output];
      if (to.value - to.value == 0) continue;
      const T* filter_weight = weight + filter * (kChannels * kKernelArea);
      const float sum = float_output<kChannels>(in, filter_weight, g, output, bias ? bias[filter].value : 0.f);
      to.value = gpu::max_nan(sum, floor);
    }
  }
}

// ---- host ----------------------------------------------------------------------------------------------------------

// Of T; TF32x3 has two for each.
int packed_words(DType dtype, const Conv& conv) {
  return divide_up(conv.filters, filter_tile(conv)) * filter_tile(conv) * k_steps(dtype, conv) * 8;
}

template <class T, int kChannels, int kTile>
gpu::error_t launch_tile(const ConvArguments& args, gpu::stream_t stream) {
  const gpu::error_t error = pack_conv2d_weight(args.images.dtype, args.weight, args.conv, args.workspace, stream);
  if (error != gpu::kSuccess) return error;
  const void* packed = args.workspace;
  const StripGeometry g = strip_geometry(args.images.channels_last, args.conv, args.out);
  constexpr int kBytes =
      std::max<int>(kGroups<T, kChannels> * kGroupStride * 2, kThreads * kTransposedRow<T> * sizeof(T));
  static_assert(kBytes <= kMinSharedMemory);
  return for_each_batch(args.images.count, int64_t{g.strips} * g.blocks, [&](int64_t first, int64_t count) {
    return gpu::launch(mma_kernel<T, kChannels, kTile>,
                       dim3(count * g.strips * g.blocks, divide_up(args.conv.filters, kTile)), kThreads, kBytes, stream,
                       args.x, packed, args.bias, args.out, first, g,
                       slice_table<kChannels, kGroupSize<T>>(g.strip_width + 2), args.relu, args.weight);
  });
}

}  // namespace

int64_t conv2d_workspace(DType dtype, const Conv& conv) {
  return uses_tensor_cores(dtype) ? packed_words(dtype, conv) * (dtype == DType::kTF32x3 ? 2 : 1) : 0;
}

gpu::error_t pack_conv2d_weight(DType dtype, const void* weight, const Conv& conv, float* packed,
                                gpu::stream_t stream) {
  const auto run = [&](auto element) {
    using E = decltype(element);
    const int words = packed_words(dtype, conv);
    return gpu::launch(
        pack_kernel<E>, dim3(divide_up(words, kThreads)), kThreads, 0, stream, weight, static_cast<void*>(packed),
        words, conv.filters, filter_tile(conv), k_steps(dtype, conv), conv.channels * kKernelArea,
        dispatch_channels(conv, [](auto channels) { return tap_table<decltype(channels)::value, kGroupSize<E>>(); }));
  };
  return dispatch_product(dtype, [&](auto type) { return run(Storage<typename decltype(type)::type>{}); });
}

gpu::error_t launch_conv2d_mma(const ConvArguments& args, gpu::stream_t stream) {
  return dispatch_product(args.images.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return dispatch_channels(args.conv, [&](auto channels) {
      constexpr int kChannels = decltype(channels)::value;
      return filter_tile(args.conv) == 96 ? launch_tile<T, kChannels, 96>(args, stream)
                                          : launch_tile<T, kChannels, 64>(args, stream);
    });
  });
}

}  // namespace alexnet_cuda
