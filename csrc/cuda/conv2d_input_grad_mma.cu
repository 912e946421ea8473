// The input gradient of AlexNet's first convolution on tensor cores: float16, bfloat16, TF32, and float32 by
// TF32x3.
//
//   dx[s2d block, channel] = sum over shifts and filters of  dy[s2d block - shift, filter]  w[filter, channel at shift]
//
// (k_schedule.h): a 3x3 convolution, with the shifts in reverse, of the output's gradient between two rows and columns
// of zeros. A thread block of 8 warps makes 256 s2d blocks, a warp 32, with all their 16 C channels.
//
// Memory: the gradient lies in shared memory as [filter group][output][16 bytes], groups of 8 (TF32: 4) filters, so a
// shift is an address offset. 12 groups fit; more follow in further passes, into the same sums. s2d blocks are cut into
// strips and numbered as outputs are in conv2d_mma.cu, and weights come from global memory as there.
//
// Numerics: products of T, float sums. Products with channels that a shift does not need are kept out of the sums.
// TF32x3 (space_to_depth.h) keeps nothing out: where the result is not finite, it is made again by float products.
#include "float_products.h"

namespace alexnet_cuda {
namespace {

constexpr int kFilterGroups = 12;  // in shared memory
constexpr int kShifts = 9;

// packed[4 filter groups][shift][8 channels of an s2d block][lane][4]: b[0] and b[1] of two products. For 8 channels a
// lane of the main kernel reads 16 bytes of it, a warp 512 consecutive ones. All warps read the same, in this order.
template <class E>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(const E* weight, uint32_t* packed, int words, int filters, int channels) {
  constexpr int kPerWord = kGroupSize<E> / 4;
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= words) return;
  // i counts the words of `packed`: word, lane and group of 8 channels, then shift and four filter groups.
  const int word = i % 4, lane = i / 4 % 32, column = i / 128 % (2 * channels), rest = i / (256 * channels);
  const int shift = rest % kShifts, first = (rest / kShifts * 4 + word) * kGroupSize<E> + lane % 4 * kPerWord;
  const int tap = s2d_channel(channels, 8 * column + lane / 4).tap(shift / 3, shift % 3);
  // A word of the packed array: one or two filters' weights from memory, 0 where there are none.
  E v[kPerWord];
#pragma unroll
  for (int e = 0; e < kPerWord; ++e)
    v[e] = tap >= 0 && first + e < filters ? weight[(first + e) * channels * kKernelArea + tap] : E{0};
  store_weight(packed, i, v);
}

// Which channels of a group of 8 a shift needs (needed_channels): all, none, or (at the bottom and right of a filter, a
// shift of 2) some.
template <int kChannels, int kGroup>
struct Needed {
  static constexpr int kBottom = needed_channels(kChannels, kGroup, 2, 0);
  static constexpr int kRight = needed_channels(kChannels, kGroup, 0, 2);
  static constexpr bool kIsPartial = kBottom % 0xff != 0 || kRight % 0xff != 0;

  GPU_DEVICE static int at(int shift) { return (shift / 3 == 2 ? kBottom : 0xff) & (shift % 3 == 2 ? kRight : 0xff); }
};

// 16 bytes of filters of the output's gradient from `filter` on, as operand words; 0 beyond the last filter, and for an
// output of -1.
template <class T>
GPU_DEVICE gpu::Vec4<uint32_t> load_gradient(const Storage<T>* image, const StripGeometry& g, int output, int filter) {
  constexpr int kSize = kGroupSize<T>;
  // One load of 16 bytes where filters are contiguous and aligned, else element by element.
  struct alignas(16) {
    Storage<T> v[kSize];
  } run = {};
  if (g.vectors && g.channels_last) {
    if (output >= 0 && filter < g.filters)
      run = *reinterpret_cast<const decltype(run)*>(image + (output * g.filters + filter));
  } else {
    const int pixels = g.out_height * g.out_width;
#pragma unroll
    for (int k = 0; k < kSize; ++k)
      if (output >= 0 && filter + k < g.filters)
        run.v[k] = image[g.channels_last ? output * g.filters + filter + k : (filter + k) * pixels + output];
  }
  return pack_group(run.v);
}

// Moves filter groups of the gradient to shared memory, as [filter group][output][16 bytes], from output `first` of a
// strip on: it is in the row two above the first s2d blocks, the columns start two to their left; 0 outside.
template <class T>
GPU_DEVICE void stage_gradient(gpu::shared<uint32_t> to, const Storage<T>* image, const StripGeometry& g, int strip,
                               int first, int first_group, int groups) {
  const int pitch = g.pitch(), lanes = g.channels_last ? 2 : 0;  // log2 of lanes per output, on neighbouring filters
  for (int i = threadIdx.x >> lanes; i < kBlockPixels + 2 * pitch + 2; i += kThreads >> lanes) {
    const int y = (first + i) / pitch - 2, x = (first + i) % pitch - 2 + strip * g.strip_width;
    const bool inside = is_inside(y, g.out_height) && is_inside(x, g.out_width);
    const int output = inside ? y * g.out_width + x : -1;
    for (int p = threadIdx.x & ((1 << lanes) - 1); p < groups; p += 1 << lanes)
      gpu::store4(to + (p * (kGroupStride / 2) + i * 4),
                  load_gradient<T>(image, g, output, (first_group + p) * kGroupSize<T>));
  }
}

// A warp's part: 32 s2d blocks, of which 16 are the rows of a product, and 2 C times 8 channels, the columns. An
// iteration takes four ldmatrix for 8 C products (not of TF32x3). The eight rows of a matrix are 128 consecutive bytes
// of shared memory: no bank conflicts. 73 KB hold 12 filter groups of 390 outputs: those of the 256 s2d blocks, and two
// rows and two columns before them.
//
// Two thread blocks share an SM's registers where ptxas spills nothing.
template <class T, int kChannels>
__global__ void __launch_bounds__(kThreads, kChannels == 4 || (kChannels == 3 && kIsTF32x3<T>) ? 1 : 2)
    input_grad_mma_kernel(const Storage<T>* __restrict__ grad, const gpu::Vec4<uint32_t>* __restrict__ packed,
                          T* __restrict__ dx, int64_t first_image, int rows, StripGeometry g,
                          const Storage<T>* __restrict__ weight) {
  constexpr int kColumns = 2 * kChannels;  // of 8 channels of an s2d block: the columns of a product
  constexpr int kLoads = kColumns * (kIsTF32x3<T> ? 2 : 1);
  const gpu::shared<uint32_t> shared = gpu::dynamic_shared<uint32_t>();
  const int pitch = g.pitch(), warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad_lane = lane % 4;
  // Thread blocks run over s2d blocks of a strip, strips and images.
  const int64_t image = first_image + blockIdx.x / (g.blocks * g.strips);
  const int strip = blockIdx.x / g.blocks % g.strips, first = blockIdx.x % g.blocks * kBlockPixels;
  const int warp_block = first + warp * kWarpPixels;
  const int all_groups = divide_up(g.filters, 4 * kGroupSize<T>) * 4;
  const bool active = warp_block < rows * pitch;

  float sums[2][kColumns][4] = {};
  const gpu::Vec4<uint32_t>* weights = packed + lane;
  for (int first_group = 0; first_group < all_groups; first_group += kFilterGroups) {
    const int groups = min(kFilterGroups, all_groups - first_group);
    __syncthreads();  // the groups before have been used
    stage_gradient<T>(shared, grad + image * g.filters * g.out_height * g.out_width, g, strip, first, first_group,
                      groups);
    __syncthreads();
    if (!active) continue;
    // Four filter groups at one shift per iteration, two k steps (TF32x3: two groups, one k step): fragments a of 32
    // s2d blocks from shared memory (lanes 16-31 address the second group of a k step), b of all channels from global
    // memory; sums stay in registers.
#pragma unroll 1
    for (int group = 0; group < groups; group += kIsTF32x3<T> ? 2 : 4) {
      if constexpr (kIsTF32x3<T>)
        weights = packed + (((first_group + group) / 4 * kShifts * kLoads + group / 2 % 2) * 32 + lane);
      const gpu::shared<uint16_t> outputs = gpu::shared_cast<uint16_t>(shared) +
                                            ((group + lane / 16) * kGroupStride + (warp * kWarpPixels + lane % 16) * 8);
#pragma unroll 1
      for (int shift = 0; shift < kShifts; ++shift) {
        // Shift (by, bx) reads the gradient `by` rows up and `bx` columns to the left; staging starts at (-2, -2).
        const int offset = (2 - shift / 3) * pitch + 2 - shift % 3;
        if constexpr (kIsTF32x3<T>) {
          uint32_t a[2][4], a_low[2][4];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            gpu::ldmatrix_x4(a[i], outputs + (offset + i * 16) * 8);
#pragma unroll
            for (int k = 0; k < 4; ++k) split(a[i][k], a[i][k], a_low[i][k]);
          }
          unroll<kColumns>([&](auto p) {
            if (!Needed<kChannels, decltype(p)::value>::at(shift)) return;
            const gpu::Vec4<uint32_t> b = weights[2 * p * 32];
            const uint32_t high[2] = {b.v[0], b.v[1]}, low[2] = {b.v[2], b.v[3]};
#pragma unroll
            for (int i = 0; i < 2; ++i) mma_tf32x3(sums[i][p], a[i], a_low[i], high, low);
          });
        } else {
          uint32_t a[2][2][4];
#pragma unroll
          for (int k = 0; k < 2; ++k)
#pragma unroll
            for (int i = 0; i < 2; ++i)
              gpu::ldmatrix_x4(a[k][i], outputs + (2 * k * kGroupStride + (offset + i * 16) * 8));
          gpu::Vec4<uint32_t> b[kColumns];
#pragma unroll
          for (int p = 0; p < kColumns; ++p) b[p] = weights[p * 32];
          unroll<kColumns>([&](auto p) {
            using Group = Needed<kChannels, decltype(p)::value>;
            const int needed = Group::at(shift);
            const uint32_t halves[2][2] = {{b[p].v[0], b[p].v[1]}, {b[p].v[2], b[p].v[3]}};
            if (!needed) return;
            if (!Group::kIsPartial || needed == 0xff) {
#pragma unroll
              for (int i = 0; i < 4; ++i) mma<T>(sums[i % 2][p], a[i / 2][i % 2], halves[i / 2]);
            } else {
              // Separate sums, of which only the needed channels are added: the other weights are 0, but 0 * NaN is
              // NaN.
              float part[2][4] = {};
#pragma unroll
              for (int i = 0; i < 4; ++i) mma<T>(part[i % 2], a[i / 2][i % 2], halves[i / 2]);
#pragma unroll
              for (int i = 0; i < 8; ++i)
                if (needed >> (2 * quad_lane + i % 2) & 1) sums[i / 4][p][i % 4] += part[i / 4][i % 4];
            }
          });
        }
        weights += kLoads * 32;
      }
    }
  }
  if (!active) return;

  // Registers to dx: each channel of an s2d block to its pixel, unless that is in the padding. A lane stores single
  // elements, a warp 4 channels of 8 s2d blocks in a row at a time; other channels fill the gaps of 4 pixels while the
  // lines are in L2. For 96 filters dx has half as many elements as the gradient.
  const auto corner = [&](int i, int& y, int& x) {  // of the lane's s2d block i
    const int block = warp_block + 8 * i + lane / 4, column = block % pitch;
    y = 4 * (block / pitch) - g.padding;
    x = column < g.strip_width ? 4 * (strip * g.strip_width + column) - g.padding : g.width;
  };
  int corner_y[4], corner_x[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) corner(i, corner_y[i], corner_x[i]);
  T* out = dx + image * kChannels * g.height * g.width;
#pragma unroll
  for (int p = 0; p < kColumns; ++p)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const S2dChannel at = s2d_channel(kChannels, 8 * p + 2 * quad_lane + e);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int y = corner_y[i] + at.y, x = corner_x[i] + at.x, pixel = y * g.width + x;
        if (is_inside(y, g.height) && is_inside(x, g.width))
          out[g.channels_last ? pixel * kChannels + at.c : at.c * g.height * g.width + pixel] =
              gpu::from_float<T>(sums[i / 2][p][i % 2 * 2 + e]);
      }
    }
  if constexpr (kIsTF32x3<T>) {
    // The low part of an infinity is NaN, and 0 * NaN: results that are not finite are made again by float products.
    if (nan_unless_finite(sums) == 0) return;
    const T* dy = grad + image * g.filters * g.out_height * g.out_width;
#pragma unroll 1
    for (int n = 0; n < 8 * kColumns; ++n) {
      const S2dChannel at = s2d_channel(kChannels, n / 8 * 8 + 2 * quad_lane + n / 4 % 2);
      int y, x;
      corner(n % 4, y, x);
      y += at.y, x += at.x;
      if (!is_inside(y, g.height) || !is_inside(x, g.width)) continue;
      const int pixel = y * g.width + x;
      T& to = out[g.channels_last ? pixel * kChannels + at.c : at.c * g.height * g.width + pixel];
      if (to.value - to.value != 0) to.value = float_input_grad<kChannels>(dy, weight, g, y, x, at.c);
    }
  }
}

// ---- host ----------------------------------------------------------------------------------------------------------

// Of T; TF32x3 has two for each.
int packed_words(DType dtype, const Conv& conv) {
  return divide_up(conv.filters, is_16bit(dtype) ? 32 : 16) * kShifts * 2 * conv.channels * 128;
}

template <class T, int kChannels>
gpu::error_t launch_channels(const ConvArguments& args, gpu::stream_t stream) {
  const Conv& conv = args.conv;
  void* packed = args.workspace;
  const int words = packed_words(args.images.dtype, conv);
  const gpu::error_t error = gpu::launch(pack_kernel<Storage<T>>, dim3(divide_up(words, kThreads)), kThreads, 0, stream,
                                         args.weight, packed, words, conv.filters, kChannels);
  if (error != gpu::kSuccess) return error;
  StripGeometry g = strip_geometry(args.images.channels_last, conv, args.grad);  // strips and blocks are of s2d blocks
  const int rows = divide_up(conv.height + conv.padding, 4), columns = divide_up(conv.width + conv.padding, 4);
  g.strips = divide_up(columns, kMaxStripWidth);
  g.strip_width = divide_up(columns, g.strips);
  g.blocks = divide_up(rows * (g.strip_width + 2), kBlockPixels);
  constexpr int kBytes = kFilterGroups * kGroupStride * 2;
  static_assert(kBytes <= kMinSharedMemory);
  return for_each_batch(args.images.count, int64_t{g.strips} * g.blocks, [&](int64_t first, int64_t count) {
    return gpu::launch(input_grad_mma_kernel<T, kChannels>, dim3(count * g.strips * g.blocks), kThreads, kBytes, stream,
                       args.grad, packed, args.out, first, rows, g, args.weight);
  });
}

}  // namespace

int64_t conv2d_input_grad_workspace(DType dtype, const Conv& conv) {
  return uses_tensor_cores(dtype) ? int64_t{packed_words(dtype, conv)} * (dtype == DType::kTF32x3 ? 2 : 1) : 0;
}

gpu::error_t launch_conv2d_input_grad_mma(const ConvArguments& args, gpu::stream_t stream) {
  return dispatch_product(args.images.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return dispatch_channels(
        args.conv, [&](auto channels) { return launch_channels<T, decltype(channels)::value>(args, stream); });
  });
}

}  // namespace alexnet_cuda
