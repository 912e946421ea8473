// AlexNet's first convolution (11x11, stride 4, 1, 3 or 4 channels) on tensor cores: half, bfloat16 and TF32.
//
// slabs.h says how it becomes a product of matrices: cells of 4x4 pixels, slabs of 8 (TF32: 4) of their 16 C channels.
//
// A block of 8 warps makes 256 output pixels x 64 or 96 filters, a warp 32 pixels. The cells lie in shared memory as
// [plane][cell][16 bytes]: a shift is an address offset, and the rows that ldmatrix reads are consecutive. Output
// columns are cut into strips of at most 64. Pixels of a strip are numbered along its rows of cells, which are 2 longer
// than the rows of outputs: of these two results in each row nothing is stored.
//
// Weights come straight from global memory, packed so that a lane reads its fragments of 16 filters with one load. All
// warps and blocks read the same few ten kilobytes, which L1 keeps; TF32's 140 come from L2.
#include "images.h"
#include "slabs.h"

namespace alexnet_cuda {
namespace {

template <class T>
constexpr int kTransposed = kWarpPixels + 4 / sizeof(T);  // row length of transposed output: no bank conflicts

// ---- weights -------------------------------------------------------------------------------------------------------

// packed[filter tile][step][16 filters][lane][4]: b[0] and b[1] of two products. The filters of a tile are
// permuted: column 8 j + 2 q + e of the product is filter 32 (j / 4) + 8 q + 2 (j % 4) + e, so that a lane ends up with
// runs of 8.
template <class E>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(const E* weight, uint32_t* packed, int words, int filters, int tile, int steps, int length, Taps taps) {
  constexpr int kWidth = kWidthOf<E>, kEach = kWidth / 4;  // elements of a slab, of a word
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= words) return;
  const int word = i % 4, lane = i / 4 % 32, pair = i / 128 % (tile / 16), rest = i / (8 * tile);
  const int j = 2 * pair + word / 2, column = lane / 4, slab = rest % steps * 2 + word % 2;
  const int filter = rest / steps * tile + j / 4 * 32 + column / 2 * 8 + j % 4 * 2 + column % 2;
  E v[kEach];
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const int tap = taps.tap[slab * kWidth + lane % 4 * kEach + e];
    v[e] = tap >= 0 && filter < filters ? weight[filter * length + tap] : E{0};
  }
  packed[i] = word_of(v);
}

// ---- the product ---------------------------------------------------------------------------------------------------

template <class T>
struct alignas(16) Octet {
  T v[8];
};

// Blocks that share an SM's registers. From sm_100 on ptxas would spill two words of TF32's if there were to be two.
template <class T, int kTile>
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kMinBlocks = sizeof(T) == 4 && kTile == 96 ? 1 : 2;
#else
constexpr int kMinBlocks = 2;
#endif

template <class T, int kChannels, int kTile>
__global__ void __launch_bounds__(kThreads, kMinBlocks<T, kTile>)
    mma_kernel(const Stored<T>* __restrict__ x, const gpu::Quad<uint32_t>* __restrict__ packed,
               const T* __restrict__ bias, T* __restrict__ y, int64_t first_image, Geometry g, Operands operands) {
  constexpr int kSteps = kPlan<kChannels, kWidthOf<T>>.steps, kPairs = kTile / 16;
  const gpu::shared<uint32_t> shared = gpu::dynamic_shared<uint32_t>();
  const int pitch = g.pitch(), warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane % 4;
  const int64_t image = first_image + blockIdx.x / (g.blocks * g.strips);
  const int strip = blockIdx.x / g.blocks % g.strips, first = blockIdx.x % g.blocks * kBlockPixels;
  const int mine = first + warp * kWarpPixels, first_filter = blockIdx.y * kTile + quad * 8;
  const bool live = mine < g.out_height * pitch;

  const Stored<T>* in = x + image * kChannels * g.height * g.width;
  if (g.channels_last)
    stage<kChannels, true>(shared, in, g, strip, first);
  else
    stage<kChannels, false>(shared, in, g, strip, first);
  __syncthreads();

  float sums[2][2 * kPairs][4] = {};
  if (live) {
    const gpu::shared<uint16_t> cells =
        gpu::shared_cast<uint16_t>(shared) + (warp * kWarpPixels + lane % 16) * 8;  // lanes 16-31: the second slab
    const gpu::Quad<uint32_t>* weights = packed + blockIdx.y * (kSteps * kPairs * 32) + lane;
#pragma unroll 1
    for (int step = 0; step < kSteps; ++step) {
      const auto &low = operands.slab[2 * step], &high = operands.slab[2 * step + 1];
      uint32_t a[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        gpu::ldmatrix_x4(a[i], cells + (operands.slab[2 * step + lane / 16].offset + i * 16 * 8));
        clear_unneeded<T>(low.mask, a[i][0], a[i][1]);
        clear_unneeded<T>(high.mask, a[i][2], a[i][3]);
      }
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        const gpu::Quad<uint32_t> b = weights[pair * 32];
        const uint32_t even[2] = {b.v[0], b.v[1]}, odd[2] = {b.v[2], b.v[3]};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          mma<T>(sums[i][2 * pair], a[i], even);
          mma<T>(sums[i][2 * pair + 1], a[i], odd);
        }
      }
      weights += kPairs * 32;
    }
  }

  const int plane = g.out_height * g.out_width;
  T* out = y + image * g.filters * plane;
  const auto add_bias = [&](int j) {  // to the lane's filters among 32 j .. 32 j + 31
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const int filter = first_filter + 32 * j + k;
      const float b = bias && filter < g.filters ? gpu::to_float(bias[filter]) : 0.f;
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[i / 2][4 * j + k / 2][i % 2 * 2 + k % 2] += b;
    }
  };
  if (g.channels_last) {  // the four lanes of a pixel write 64 bytes at once
    if (!live) return;
    int pixels[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) pixels[i] = g.position(strip, mine + 8 * i + lane / 4);
#pragma unroll
    for (int j = 0; j < kTile / 32; ++j) {
      const int filter = first_filter + 32 * j;
      add_bias(j);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (pixels[i] < 0 || filter >= g.filters) continue;
        Octet<T> run;
#pragma unroll
        for (int k = 0; k < 8; ++k) run.v[k] = gpu::from_float<T>(sums[i / 2][4 * j + k / 2][i % 2 * 2 + k % 2]);
        T* to = out + (pixels[i] * g.filters + filter);
        if (g.octets) {
          *reinterpret_cast<Octet<T>*>(to) = run;
        } else {
#pragma unroll
          for (int k = 0; k < 8; ++k)
            if (filter + k < g.filters) to[k] = run.v[k];
        }
      }
    }
  } else {  // each warp transposes 32 pixels x 32 filters at a time, then writes rows of pixels
    __syncthreads();
    if (!live) return;
    const gpu::shared<T> buffer = gpu::shared_cast<T>(shared) + warp * (32 * kTransposed<T>);
    const int pixel = g.position(strip, mine + lane);
#pragma unroll
    for (int j = 0; j < kTile / 32; ++j) {
      add_bias(j);
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int k = 0; k < 8; ++k)
          buffer[(quad * 8 + k) * kTransposed<T> + 8 * i + lane / 4] =
              gpu::from_float<T>(sums[i / 2][4 * j + k / 2][i % 2 * 2 + k % 2]);
      __syncwarp();
      const int filter = blockIdx.y * kTile + 32 * j, count = pixel < 0 ? 0 : min(32, g.filters - filter);
      for (int k = 0; k < count; ++k) {
        const T value = buffer[k * kTransposed<T> + lane];
        out[(filter + k) * plane + pixel] = value;
      }
    }
  }
}

// ---- host ----------------------------------------------------------------------------------------------------------

template <int kWidth>
int steps_of(const Conv& conv) {
  return dispatch_channels(conv, [](auto channels) { return kPlan<decltype(channels)::value, kWidth>.steps; });
}
int packed_words(DType dtype, const Conv& conv) {
  const int steps = dtype == kTF32 ? steps_of<4>(conv) : steps_of<8>(conv);
  return divide_up(conv.filters, filter_tile(conv)) * filter_tile(conv) * steps * 8;
}

template <class T, int kChannels, int kTile>
gpu::error_t launch_tile(const Images& images, const void* x, const void* weight, const void* bias, void* y,
                         const Conv& conv, float* workspace, gpu::stream_t stream) {
  const gpu::error_t error = pack_conv2d_weight(images.dtype, weight, conv, workspace, stream);
  if (error != gpu::kSuccess) return error;
  const Geometry geometry = geometry_of(images.channels_last, conv, y);
  constexpr int kBytes = std::max<int>(kPlanesOf<T, kChannels> * kPlane * 2, kThreads * kTransposed<T> * sizeof(T));
  static_assert(kBytes <= kSharedEverywhere);
  return for_each_batch(images.n, int64_t{geometry.strips} * geometry.blocks, [&](int64_t first, int64_t count) {
    return gpu::launch(
        mma_kernel<T, kChannels, kTile>,
        dim3(static_cast<unsigned>(count * geometry.strips * geometry.blocks), divide_up(conv.filters, kTile)),
        dim3(kThreads), kBytes, stream, static_cast<const Stored<T>*>(x),
        reinterpret_cast<const gpu::Quad<uint32_t>*>(workspace), static_cast<const T*>(bias), static_cast<T*>(y), first,
        geometry, operands<kChannels, kWidthOf<T>>(geometry.strip_width + 2));
  });
}

template <class T, int kChannels>
gpu::error_t launch_channels(const Images& images, const void* x, const void* weight, const void* bias, void* y,
                             const Conv& conv, float* workspace, gpu::stream_t stream) {
  return filter_tile(conv) == 96 ? launch_tile<T, kChannels, 96>(images, x, weight, bias, y, conv, workspace, stream)
                                 : launch_tile<T, kChannels, 64>(images, x, weight, bias, y, conv, workspace, stream);
}

}  // namespace

int64_t conv2d_workspace(DType dtype, const Conv& conv) {
  return on_tensor_cores(dtype) ? packed_words(dtype, conv) : 0;
}

gpu::error_t pack_conv2d_weight(DType dtype, const void* weight, const Conv& conv, float* packed,
                                gpu::stream_t stream) {
  const auto run = [&](auto element, auto width) {
    using E = decltype(element);
    constexpr int kWidth = decltype(width)::value;
    const int words = packed_words(dtype, conv);
    return gpu::launch(
        pack_kernel<E>, dim3(divide_up(words, kThreads)), dim3(kThreads), 0, stream, static_cast<const E*>(weight),
        reinterpret_cast<uint32_t*>(packed), words, static_cast<int>(conv.filters), filter_tile(conv),
        steps_of<kWidth>(conv), static_cast<int>(conv.channels) * 121,
        dispatch_channels(conv, [](auto channels) { return taps<decltype(channels)::value, kWidth>(); }));
  };
  return dtype == kTF32 ? run(float{}, std::integral_constant<int, 4>{})
                        : run(uint16_t{}, std::integral_constant<int, 8>{});
}

gpu::error_t launch_conv2d_mma(const Images& images, const void* x, const void* weight, const void* bias, void* y,
                               const Conv& conv, float* workspace, gpu::stream_t stream) {
  const auto run = [&](auto type) {
    using T = typename decltype(type)::type;
    return dispatch_channels(conv, [&](auto channels) {
      return launch_channels<T, decltype(channels)::value>(images, x, weight, bias, y, conv, workspace, stream);
    });
  };
  return dispatch(images.dtype, run);
}

}  // namespace alexnet_cuda
