// The backward pass of relu_lrn_max_pool2d_alexnet.cu for NCHW.
//
// Memory: a thread has 2x2 pixels of x and goes through the channels of a group, or of a share of one, two at a time.
// The gradients and positions of the four windows that cover these pixels are read once for each channel; x, d and the
// terms of the windows of 5 stay in registers until no channel needs them. Neighbouring lanes have neighbouring pixels.
//
// dx of channel c needs t of c - 2 .. c + 2 (lrn.h), and t of channel j needs the gradient of j and x of j - 2 .. j
// + 2. So the thread reads gradients two channels, and x four, ahead of dx. To finish channels c and c + 1:
//
//            from the step before              new
//   x        c       c + 1   c + 2   c + 3     c + 4   c + 5
//   t        c - 2   c - 1   c       c + 1     c + 2   c + 3
//   direct                   c       c + 1     c + 2   c + 3
//   dx                                         c       c + 1
//
// A share that does not begin with its group's first channel computes the terms of the four channels around its
// beginning, and the last one's gradients end with the group: beyond it x and t are 0.
#include "lrn.h"
#include "pool3x3s2.h"

namespace alexnet_cuda {
namespace {

constexpr int kStep = 2;           // channels finished at a time
constexpr int kQuadThreads = 128;  // of a thread block, three of them per SM: 168 registers

// How a batch is cut into threads. A share is a part of a group's channels.
struct Quads {
  int64_t first_image;
  uint32_t total;          // quads of all images
  int per_image, per_row;  // quads
  int group_channels, shares, share_channels;
  int channels, height, width, out_height, out_width;
};

// The four windows that cover a quad, those in pooled rows row - 1 and row, columns pair - 1 and pair: gradients and
// positions of one channel after the other. A window outside the image never matches.
template <class T>
struct QuadWindows {
  const T* grads[2];
  const uint8_t* codes[2];
  bool has_left, has_right;
  int never[2];  // by row

  GPU_DEVICE QuadWindows(const T* grad, const uint8_t* code, int row, int pair, int height, int width)
      : has_left(pair > 0), has_right(pair < width) {
#pragma unroll
    for (int y = 0; y < 2; ++y) {
      const int oy = row - 1 + y, inside = min(max(oy, 0), height - 1);
      grads[y] = grad + (inside * width + pair);
      codes[y] = code + (inside * width + pair);
      never[y] = inside == oy ? 0 : 256;
    }
  }
  // g[k]: the sum for pixel k of the channel `offset` elements on.
  GPU_DEVICE void gather(int64_t offset, float (&g)[4]) const {
    float of[2][2];
    int at[2][2];
#pragma unroll
    for (int y = 0; y < 2; ++y) {
      of[y][0] = has_left ? gpu::to_float(grads[y][offset - 1]) : 0.f;
      of[y][1] = has_right ? gpu::to_float(grads[y][offset]) : 0.f;
      at[y][0] = (has_left ? codes[y][offset - 1] : 255) | never[y];
      at[y][1] = (has_right ? codes[y][offset] : 255) | never[y];
    }
    const auto of_window = [&](int y, int x, int position) { return at[y][x] == position ? of[y][x] : 0.f; };
#pragma unroll
    for (int k = 0; k < 4; ++k) g[k] = gather_quad(k, of_window, [](auto... terms) { return (... + terms); });
  }
  GPU_DEVICE void advance(int64_t elements) {
#pragma unroll
    for (int y = 0; y < 2; ++y) {
      grads[y] += elements;
      codes[y] += elements;
    }
  }
};

// Why quads and no shared memory: the four windows of a quad, loaded once per channel, serve four pixels (one by one
// they would load nine). Between two steps a thread keeps 10 values of each pixel, 40 registers; the four pixels are
// independent, so their loads and square roots overlap. blockIdx.x and the lanes run over quads, along the rows of all
// images, blockIdx.y over groups and shares.
template <class T, bool kReluFirst>
__global__ void __launch_bounds__(kQuadThreads, 3)
    backward_nchw_kernel(const T* __restrict__ x, const T* __restrict__ grad, const uint8_t* __restrict__ code,
                         T* __restrict__ dx, Quads q, LrnConstants lrn) {
  const uint32_t thread = blockIdx.x * kQuadThreads + threadIdx.x;
  if (thread >= q.total) return;
  const uint32_t image = thread / q.per_image;
  const int quad = thread - image * q.per_image, row = quad / q.per_row, pair = quad - row * q.per_row;
  const int group = blockIdx.y / q.shares, begin = (blockIdx.y - group * q.shares) * q.share_channels;
  const int end = min(begin + q.share_channels, q.group_channels);
  const int64_t plane = q.height * q.width, out_plane = q.out_height * q.out_width;
  const int64_t first_plane = (q.first_image + image) * q.channels + group * q.group_channels + begin;
  const bool has_bottom = 2 * row + 1 < q.height, has_right = 2 * pair + 1 < q.width;
  const int64_t at = first_plane * plane + (2 * row * q.width + 2 * pair);
  // Pixels below the edge are read where it is, and not written.
  const T* from[2] = {x + at, x + at + (has_bottom ? q.width : 0)};
  T* to[2] = {dx + at, dx + at + q.width};
  QuadWindows<T> windows(grad + first_plane * out_plane, code + first_plane * out_plane, row, pair, q.out_height,
                         q.out_width);

  // Of each pixel, x of channels c .. c + 3, the direct terms of c and c + 1, and t of c - 2 .. c + 1.
  float x4[4][4], direct2[4][2], t4[4][4];
  const auto load_x = [&](int64_t offset, int k, bool inside) {
    const float v = inside && (k % 2 == 0 || has_right) ? gpu::to_float(from[k / 2][offset + k % 2]) : 0.f;
    return kReluFirst ? relu(v) : v;
  };
  // A pooled value is positive exactly if its x is.
  const auto mask = [&](float x, float g, bool inside) { return !inside ? 0.f : kReluFirst ? g : relu_gradient(x, g); };
  {
    const bool inside = begin > 0;
    float g[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float of[4];
      windows.gather(i >= 2 || inside ? (i - 2) * out_plane : 0, of);
#pragma unroll
      for (int k = 0; k < 4; ++k) g[k][i] = of[k];
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      float in[8], terms[4];
#pragma unroll
      for (int i = 0; i < 8; ++i) in[i] = load_x((i - 4) * plane, k, i >= 4 || inside);
#pragma unroll
      for (int i = 0; i < 4; ++i) g[k][i] = mask(in[i + 2], g[k][i], i >= 2 || inside);
      gradient_terms<4>(in, g[k], lrn, terms, t4[k]);
      direct2[k][0] = terms[2];
      direct2[k][1] = terms[3];
#pragma unroll
      for (int i = 0; i < 4; ++i) x4[k][i] = in[i + 4];
    }
  }
  windows.advance(2 * out_plane);
  from[0] += 4 * plane;
  from[1] += 4 * plane;
#pragma unroll 1
  for (int c = begin; c < end; c += kRun) {
    const bool has_next = c + kRun < q.group_channels;
#pragma unroll
    for (int first = 0; first < kRun; first += kStep) {  // channels c + first ..
      // Memory to registers: gradients and codes of two channels of the four windows, gathered for the four pixels.
      float g[4][kStep];
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
        float of[4];
        if (first + i == kRun - 2 && !has_next) windows.advance(-2 * out_plane);
        windows.gather(0, of);
        windows.advance(out_plane);
#pragma unroll
        for (int k = 0; k < 4; ++k) g[k][i] = of[k];
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        float in[kStep + 4], direct[kStep + 2], t[kStep + 4], out[kStep];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          in[i] = x4[k][i];
          t[i] = t4[k][i];
        }
        direct[0] = direct2[k][0];
        direct[1] = direct2[k][1];
        // Two channels of x from memory; t of two channels and dx of two others in registers; dx to memory.
#pragma unroll
        for (int i = 0; i < kStep; ++i) in[4 + i] = load_x(i * plane, k, first + i < 4 || has_next);
#pragma unroll
        for (int i = 0; i < kStep; ++i) g[k][i] = mask(in[2 + i], g[k][i], first + i < kRun - 2 || has_next);
        gradient_terms<kStep>(in, g[k], lrn, direct + 2, t + 4);
        finish_gradients(in, direct, t, lrn, out);
        if ((k < 2 || has_bottom) && (k % 2 == 0 || has_right)) {
#pragma unroll
          for (int i = 0; i < kStep; ++i)
            to[k / 2][i * plane + k % 2] = gpu::from_float<T>(kReluFirst ? relu_gradient(in[i], out[i]) : out[i]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          x4[k][i] = in[kStep + i];
          t4[k][i] = t[kStep + i];
        }
        direct2[k][0] = direct[kStep];
        direct2[k][1] = direct[kStep + 1];
      }
#pragma unroll
      for (int y = 0; y < 2; ++y) {
        from[y] += kStep * plane;
        to[y] += kStep * plane;
      }
    }
  }
}

}  // namespace

gpu::error_t launch_alexnet_tail_backward_nchw(const TailArguments& args, gpu::stream_t stream) {
  const Images& images = args.images;
  const int per_row = divide_up(images.width, 2), per_image = per_row * divide_up(images.height, 2);
  const int group_channels = static_cast<int>(images.channels) / args.lrn.groups;
  return for_each_batch(images.count, per_image, [&](int64_t first, int64_t count) {
    const int64_t total = count * per_image;
    const Shares shares(total * args.lrn.groups, group_channels);
    const Quads quads = {first,
                         static_cast<uint32_t>(total),
                         per_image,
                         per_row,
                         group_channels,
                         shares.count,
                         shares.channels,
                         static_cast<int>(images.channels),
                         static_cast<int>(images.height),
                         static_cast<int>(images.width),
                         static_cast<int>(args.pool.out_height),
                         static_cast<int>(args.pool.out_width)};
    const dim3 grid(divide_up(total, kQuadThreads), args.lrn.groups * shares.count);
    return dispatch_dtype(images.dtype, [&](auto type) {
      return dispatch_flag(args.order == kReluLrnPool, [&](auto relu_first) {
        return gpu::launch(backward_nchw_kernel<typename decltype(type)::type, decltype(relu_first)::value>, grid,
                           kQuadThreads, 0, stream, args.x, args.grad, args.code, args.out, quads,
                           LrnConstants(args.lrn));
      });
    });
  });
}

}  // namespace alexnet_cuda
