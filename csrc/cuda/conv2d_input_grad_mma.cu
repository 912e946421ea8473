// The input gradient of AlexNet's first convolution on tensor cores: half, bfloat16 and TF32.
//
//   dx[cell, plane element] = sum over shifts and filters of  dy[cell - shift, filter]  w[filter, slab element]
//
// (slabs.h): a convolution of the output's gradient, with two rows and columns of zeros around it, that has 3x3 cells
// and the shifts in reverse. A block of 8 warps makes 256 cells, a warp 32, with all their 16 C elements. The gradient
// lies in shared memory as [plane][output][16 bytes], planes of 8 (TF32: 4) filters: a shift is an address offset.
// What 12 planes do not hold comes after them, to the same sums. Cells are cut into strips and numbered as outputs are
// in conv2d_mma.cu, and weights come from global memory as there.
#include "slabs.h"

namespace alexnet_cuda {
namespace {

constexpr int kPlanes = 12;  // of filters, in shared memory
constexpr int kShifts = 9;

// packed[4 planes of filters][shift][plane of elements][lane][4]: b[0] and b[1] of two products.
template <class E>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(const E* weight, uint32_t* packed, int words, int filters, int channels) {
  constexpr int kWidth = kWidthOf<E>, kEach = kWidth / 4;  // elements of 16 bytes, of a word
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= words) return;
  const int word = i % 4, lane = i / 4 % 32, plane = i / 128 % (2 * channels), rest = i / (256 * channels);
  const int shift = rest % kShifts, first = (rest / kShifts * 4 + word) * kWidth + lane % 4 * kEach;
  const int tap = element_of(channels, 8 * plane + lane / 4).tap(shift / 3, shift % 3);
  E v[kEach];
#pragma unroll
  for (int e = 0; e < kEach; ++e)
    v[e] = tap >= 0 && first + e < filters ? weight[(first + e) * channels * 121 + tap] : E{0};
  packed[i] = word_of(v);
}

// Which elements of a plane filters meet at a shift: a bit each. Only shifts of 2 leave some out.
constexpr int needed_of(int channels, int plane, int by, int bx) {
  int mask = 0;
  for (int e = 0; e < 8; ++e) mask |= element_of(channels, 8 * plane + e).needed(by, bx) << e;
  return mask;
}
constexpr bool some(int mask) {
  return mask != 0 && mask != 0xff;
}

// Planes of the gradient, as [plane][output][16 bytes], from output `first` of a strip on: the row that is two above
// the first cells, the columns from two to their left; 0 outside.
template <class T>
GPU_DEVICE void stage_gradient(gpu::shared<uint32_t> to, const Stored<T>* image, const Geometry& g, int strip,
                               int first, int first_plane, int planes) {
  const int pitch = g.pitch(), lanes = g.channels_last ? 2 : 0;  // 4 lanes an output, which take neighbouring filters
  for (int i = threadIdx.x >> lanes; i < kBlockPixels + 2 * pitch + 2; i += kThreads >> lanes) {
    const int y = (first + i) / pitch - 2, x = (first + i) % pitch - 2 + strip * g.strip_width;
    const bool inside = static_cast<unsigned>(y) < static_cast<unsigned>(g.out_height) &&
                        static_cast<unsigned>(x) < static_cast<unsigned>(g.out_width);
    const int output = inside ? y * g.out_width + x : -1;
    for (int p = threadIdx.x & ((1 << lanes) - 1); p < planes; p += 1 << lanes)
      gpu::store4(to + (p * (kPlane / 2) + i * 4),
                  gradient_words<T>(image, g, output, (first_plane + p) * kWidthOf<T>));
  }
}

template <class T, int kChannels>
__global__ void __launch_bounds__(kThreads, kChannels == 4 ? 1 : 2)
    input_grad_mma_kernel(const Stored<T>* __restrict__ grad, const gpu::Quad<uint32_t>* __restrict__ packed,
                          T* __restrict__ dx, int64_t first_image, int rows, Geometry g) {
  constexpr int kElementPlanes = 2 * kChannels;
  const gpu::shared<uint32_t> shared = gpu::dynamic_shared<uint32_t>();
  const int pitch = g.pitch(), warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane % 4;
  const int64_t image = first_image + blockIdx.x / (g.blocks * g.strips);
  const int strip = blockIdx.x / g.blocks % g.strips, first = blockIdx.x % g.blocks * kBlockPixels;
  const int mine = first + warp * kWarpPixels;
  const int all_planes = divide_up(g.filters, 4 * kWidthOf<T>) * 4;
  const bool live = mine < rows * pitch;

  float sums[2][kElementPlanes][4] = {};
  const gpu::Quad<uint32_t>* weights = packed + lane;
  for (int first_plane = 0; first_plane < all_planes; first_plane += kPlanes) {
    const int planes = min(kPlanes, all_planes - first_plane);
    __syncthreads();  // the planes before have been used
    stage_gradient<T>(shared, grad + image * g.filters * g.out_height * g.out_width, g, strip, first, first_plane,
                      planes);
    __syncthreads();
    if (!live) continue;
#pragma unroll 1
    for (int plane = 0; plane < planes; plane += 4) {
      const gpu::shared<uint16_t> outputs =  // lanes 16-31: the second plane of a product
          gpu::shared_cast<uint16_t>(shared) + ((plane + lane / 16) * kPlane + (warp * kWarpPixels + lane % 16) * 8);
#pragma unroll 1
      for (int shift = 0; shift < kShifts; ++shift) {
        const int offset = (2 - shift / 3) * pitch + 2 - shift % 3;
        uint32_t a[2][2][4];
#pragma unroll
        for (int k = 0; k < 2; ++k)
#pragma unroll
          for (int i = 0; i < 2; ++i) gpu::ldmatrix_x4(a[k][i], outputs + (2 * k * kPlane + (offset + i * 16) * 8));
        gpu::Quad<uint32_t> b[kElementPlanes];
#pragma unroll
        for (int p = 0; p < kElementPlanes; ++p) b[p] = weights[p * 32];
        unroll<kElementPlanes>([&](auto p) {
          constexpr int kBottom = needed_of(kChannels, decltype(p)::value, 2, 0);
          constexpr int kRight = needed_of(kChannels, decltype(p)::value, 0, 2);
          const int needed = (shift / 3 == 2 ? kBottom : 0xff) & (shift % 3 == 2 ? kRight : 0xff);
          const uint32_t halves[2][2] = {{b[p].v[0], b[p].v[1]}, {b[p].v[2], b[p].v[3]}};
          if (!needed) return;
          if (!(some(kBottom) || some(kRight)) || needed == 0xff) {
#pragma unroll
            for (int i = 0; i < 4; ++i) mma<T>(sums[i % 2][p], a[i / 2][i % 2], halves[i / 2]);
          } else {  // apart, since the weights of the others are 0, but 0 * NaN is not
            float part[2][4] = {};
#pragma unroll
            for (int i = 0; i < 4; ++i) mma<T>(part[i % 2], a[i / 2][i % 2], halves[i / 2]);
#pragma unroll
            for (int i = 0; i < 8; ++i)
              if (needed >> (2 * quad + i % 2) & 1) sums[i / 4][p][i % 4] += part[i / 4][i % 4];
          }
        });
        weights += kElementPlanes * 32;
      }
    }
  }
  if (!live) return;

  int corner_y[4], corner_x[4];  // of the lane's cells
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int cell = mine + 8 * i + lane / 4, column = cell % pitch;
    corner_y[i] = 4 * (cell / pitch) - g.padding;
    corner_x[i] = column < g.strip_width ? 4 * (strip * g.strip_width + column) - g.padding : g.width;
  }
  T* out = dx + image * kChannels * g.height * g.width;
#pragma unroll
  for (int p = 0; p < kElementPlanes; ++p)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const Element at = element_of(kChannels, 8 * p + 2 * quad + e);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int y = corner_y[i] + at.y, x = corner_x[i] + at.x, pixel = y * g.width + x;
        if (static_cast<unsigned>(y) < static_cast<unsigned>(g.height) &&
            static_cast<unsigned>(x) < static_cast<unsigned>(g.width))
          out[g.channels_last ? pixel * kChannels + at.c : at.c * g.height * g.width + pixel] =
              gpu::from_float<T>(sums[i / 2][p][i % 2 * 2 + e]);
      }
    }
}

// ---- host ----------------------------------------------------------------------------------------------------------

template <class T, int kChannels>
gpu::error_t launch_channels(const Images& images, const void* grad, const void* weight, void* dx, const Conv& conv,
                             float* workspace, gpu::stream_t stream) {
  uint32_t* packed = reinterpret_cast<uint32_t*>(workspace);
  const int words = static_cast<int>(conv2d_input_grad_workspace(images.dtype, conv));
  const gpu::error_t error =
      gpu::launch(pack_kernel<Stored<T>>, dim3(divide_up(words, kThreads)), dim3(kThreads), 0, stream,
                  static_cast<const Stored<T>*>(weight), packed, words, static_cast<int>(conv.filters), kChannels);
  if (error != gpu::kSuccess) return error;
  Geometry g = geometry_of(images.channels_last, conv, grad);  // strips and blocks are of cells
  const int rows = divide_up(conv.height + conv.padding, 4), columns = divide_up(conv.width + conv.padding, 4);
  g.strips = divide_up(columns, kStrip);
  g.strip_width = divide_up(columns, g.strips);
  g.blocks = divide_up(rows * (g.strip_width + 2), kBlockPixels);
  constexpr int kBytes = kPlanes * kPlane * 2;
  static_assert(kBytes <= kSharedEverywhere);
  return for_each_batch(images.n, int64_t{g.strips} * g.blocks, [&](int64_t first, int64_t count) {
    return gpu::launch(input_grad_mma_kernel<T, kChannels>, dim3(static_cast<unsigned>(count * g.strips * g.blocks)),
                       dim3(kThreads), kBytes, stream, static_cast<const Stored<T>*>(grad),
                       reinterpret_cast<const gpu::Quad<uint32_t>*>(packed), static_cast<T*>(dx), first, rows, g);
  });
}

}  // namespace

int64_t conv2d_input_grad_workspace(DType dtype, const Conv& conv) {
  if (!on_tensor_cores(dtype)) return 0;
  const int planes = divide_up(conv.filters, dtype == kTF32 ? 16 : 32) * 4;
  return planes / 4 * kShifts * 2 * conv.channels * 128;
}

gpu::error_t launch_conv2d_input_grad_mma(const Images& images, const void* grad, const void* weight, void* dx,
                                          const Conv& conv, float* workspace, gpu::stream_t stream) {
  return dispatch(images.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return dispatch_channels(conv, [&](auto channels) {
      return launch_channels<T, decltype(channels)::value>(images, grad, weight, dx, conv, workspace, stream);
    });
  });
}

}  // namespace alexnet_cuda
