// Max pooling with 3x3 windows, stride 2 and no padding, backward; pool3x3s2.h explains the method.
//
// Memory: threads and words are those of the forward, with quads of dx in place of outputs. Going down, a thread loads
// one pooled row of gradients and codes for two rows of dx, and keeps it for the next two: each pooled element is
// loaded by the two threads whose quads its window covers (NCHW: of two quads each), each element of dx is stored once.
//
//   pooled row        q - 1       q           q + 1
//   quads of row q    window[0]   window[1]
//   of row q + 1                  window[0]   window[1]
#include "pool3x3s2.h"

namespace alexnet_cuda {
namespace {

// NHWC: a thread writes 2x2 pixels of dx, 16 bytes of each, one quad below the other.
//
// Lanes have consecutive 16 bytes of a pixel's channels, then those of the next pair of columns. So a warp reads 512
// consecutive bytes of a pooled row's gradients and 256 (float32: 128) of its codes at a time, and writes every second
// pixel of a row of dx, whole pixels of `channels` elements; the next store fills the gaps.
//
// Why quads: a pixel in an even row and column lies in four windows, one in an odd row and column in one, 2.25 on
// average. A quad holds one pixel of each kind, so every thread does the same: 9 comparisons for 4 pixels and 4 windows
// in registers, of which it loads two per quad. Nothing is staged in shared memory: what two threads need, L1 has.
template <class T>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    backward_3x3s2_nhwc_kernel(const T* __restrict__ grad, const uint8_t* __restrict__ code, T* __restrict__ dx,
                               ThreadTiles s) {
  constexpr int kWords = 4, kChannels = 16 / sizeof(T);
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= s.items) return;
  const uint32_t slice = i / s.per_slice, item = i - slice * s.per_slice;
  const int pair = item / s.runs, channel = (item - pair * s.runs) * kChannels;
  const int64_t image = s.first_slice + slice, plane = s.height * s.width, out_plane = s.out_height * s.out_width;
  const int out_row = s.out_width * s.channels, row = s.width * s.channels;
  // Quad row q needs pooled rows q - 1 and q. `next` is the pooled row to come.
  int quad = blockIdx.y * s.rows, next = quad - 1;
  const int end = min(quad + s.rows, divide_up(s.height, 2));
  const T* grads = grad + (image * out_plane * s.channels + ((next * s.out_width + pair) * s.channels + channel));
  const uint8_t* codes = code + (image * out_plane * s.channels + ((next * s.out_width + pair) * s.channels + channel));
  T* to = dx + (image * plane * s.channels + ((2 * quad * s.width + 2 * pair) * s.channels + channel));
  CoveringWindows<T, kWords> windows;
  const auto load_row = [&] {
    const auto exists = [&](int k) { return is_inside(next, s.out_height) && is_inside(pair - 1 + k, s.out_width); };
    windows.advance(exists, [&](int k, Window<T, kWords>& w) {
      const int offset = (k - 1) * s.channels;
      const auto words = *reinterpret_cast<const gpu::Vec4<uint32_t>*>(grads + offset);
      const auto bytes = *reinterpret_cast<const gpu::Vec<uint32_t, kChannels / 4>*>(codes + offset);
#pragma unroll
      for (int j = 0; j < kWords; ++j) {
        w.grad[j] = words.v[j];
        // Of 16-bit elements two positions to a word, else one.
        w.code[j] = sizeof(T) == 4 ? bytes.v[0] >> 8 * j & 0xff
                                   : __byte_perm(bytes.v[j / 2 % (kChannels / 4)], 0, j % 2 ? 0x4342 : 0x4140);
      }
    });
    grads += out_row;
    codes += out_row;
    ++next;
  };
  load_row();
#pragma unroll 1
  for (; quad < end; ++quad, to += 2 * row) {
    load_row();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      gpu::Vec4<uint32_t> pixel;
#pragma unroll
      for (int j = 0; j < kWords; ++j) pixel.v[j] = windows.gather(0, k, j, SumWords<T>());
      if (2 * quad + k / 2 < s.height && 2 * pair + k % 2 < s.width)
        *reinterpret_cast<gpu::Vec4<uint32_t>*>(to + ((k / 2) * row + k % 2 * s.channels)) = pixel;
    }
  }
}

// Stores columns 0 .. 3 of a row of dx, of those `count` that the row has: two 16-bit columns at once where they share
// an aligned word. kShift as in PlaneRow: whether column 0 lies in the second half of one.
template <class T, int kShift>
GPU_DEVICE void store_columns(T* to, int count, const uint32_t (&columns)[4], int plane) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int c = 0; c < 4; ++c)
      if (c == 0 || c < count) reinterpret_cast<uint32_t*>(to)[c] = columns[c];
  } else {
    const auto store_pair = [&](int c) {  // two columns at once
      *reinterpret_cast<uint32_t*>(to + c) = __byte_perm(columns[c], columns[c + 1], plane ? 0x7632 : 0x5410);
    };
    const auto store_one = [&](int c) {
      *reinterpret_cast<uint16_t*>(to + c) = static_cast<uint16_t>(columns[c] >> 16 * plane);
    };
    if constexpr (kShift) {  // of an odd number of columns
      store_one(0);
      if (count > 2) store_pair(1);
      if (count > 3) store_one(3);
    } else {
      if (count > 1) store_pair(0);
      if (count > 3) store_pair(2);
      if (count == 1) store_one(0);
      if (count == 3) store_one(2);
    }
  }
}

// NCHW: a thread writes two quads side by side, of one plane or, of 16-bit elements, of two.
//
// Lanes have consecutive pairs of quads of a plane, then those of the next plane. Gradients and codes are read one by
// one, since a pooled row may begin at any element; their three pooled columns overlap by one with the next lane's.
// Two 16-bit planes share a word, so that a comparison, a mask and an addition serve both; stores take them apart.
template <class T, Parity kParity>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    backward_3x3s2_nchw_kernel(const T* __restrict__ grad, const uint8_t* __restrict__ code, T* __restrict__ dx,
                               ThreadTiles s) {
  constexpr int kPlanes = 4 / sizeof(T), kQuads = 2;
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= s.items) return;
  const uint32_t slice = i / s.per_slice;
  const int pair = (i - slice * s.per_slice) * kQuads, count = s.width - 2 * pair;
  const int64_t first_plane = (s.first_slice + slice) * kPlanes;
  const int plane = s.height * s.width, out_plane = s.out_height * s.out_width;
  int quad = blockIdx.y * s.rows, next = quad - 1;  // the pooled row to come
  const int end = min(quad + s.rows, divide_up(s.height, 2));
  const T* grads = grad + (first_plane * out_plane + (next * s.out_width + pair));
  const uint8_t* codes = code + (first_plane * out_plane + (next * s.out_width + pair));
  T* to = dx + (first_plane * plane + (2 * quad * s.width + 2 * pair));
  CoveringWindows<T, 1, kQuads> windows;
  const auto load_row = [&] {
    const auto exists = [&](int k) { return is_inside(next, s.out_height) && is_inside(pair - 1 + k, s.out_width); };
    windows.advance(exists, [&](int k, Window<T, 1>& w) {
      if constexpr (kPlanes == 1) {
        w.grad[0] = *reinterpret_cast<const uint32_t*>(grads + (k - 1));
        w.code[0] = codes[k - 1];
      } else {
        const auto* bits = reinterpret_cast<const uint16_t*>(grads);
        w.grad[0] = __byte_perm(bits[k - 1], bits[out_plane + k - 1], 0x5410);
        w.code[0] = codes[k - 1] | codes[out_plane + k - 1] << 16;
      }
    });
    grads += s.out_width;
    codes += s.out_width;
    ++next;
  };
  load_row();
#pragma unroll 1
  for (; quad < end; ++quad, to += 2 * s.width) {
    load_row();
#pragma unroll
    for (int y = 0; y < 2; ++y) {
      uint32_t columns[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) columns[c] = windows.gather(c / 2, 2 * y + c % 2, 0, SumWords<T>());
      if (2 * quad + y >= s.height) continue;
      T* const row = to + y * s.width;
      const auto store = [&](auto odd) {
        constexpr int kOdd = decltype(odd)::value;
        store_columns<T, shift_of(kParity, 0, kOdd)>(row, count, columns, 0);
        if constexpr (kPlanes == 2) store_columns<T, shift_of(kParity, 1, kOdd)>(row + plane, count, columns, 1);
      };
      if (y == 0)
        store(std::integral_constant<int, 0>{});
      else
        store(std::integral_constant<int, 1>{});
    }
  }
}

}  // namespace

gpu::error_t launch_max_pool2d_3x3s2_backward(const PoolArguments& args, gpu::stream_t stream) {
  const Pool& p = args.pool;
  return dispatch_images(args.images, [&](auto type, auto nhwc) {
    using T = typename decltype(type)::type;
    constexpr bool kNhwc = decltype(nhwc)::value;
    return dispatch_parity<T, kNhwc>(p, [&](auto parity) {
      const auto kernel = [&] {
        if constexpr (kNhwc)
          return backward_3x3s2_nhwc_kernel<T>;
        else
          return backward_3x3s2_nchw_kernel<T, decltype(parity)::value>;
      }();
      return launch_thread_tiles(
          args, divide_up(p.width, 2), divide_up(p.height, 2), [&](const ThreadTiles& tiles, dim3 grid) {
            return gpu::launch(kernel, grid, kThreads, 0, stream, args.grad, args.code, args.out, tiles);
          });
    });
  });
}

}  // namespace alexnet_cuda
