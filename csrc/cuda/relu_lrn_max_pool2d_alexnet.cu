// ReLU, local response normalisation and max pooling in one kernel, forward and backward, for AlexNets' settings: a
// window of 5 channels and beta of 3/4 (lrn.h), then 3x3 pooling with stride 2 and no padding (pool3x3s2.h). Other
// settings take the kernels of relu_lrn_max_pool2d.cu, the backward in NCHW that of
// relu_lrn_max_pool2d_alexnet_nchw.cu.
//
// Memory: a thread's tile is two neighbouring columns of x, 8 channels and some rows. It goes down two rows at a time
// with everything in registers. It reads its channels and two (backward: four) on either side; neighbouring threads
// find these in cache. In NHWC a warp has 32 channels of 8 pairs of columns, in NCHW 8 channels of 32 pairs (or, of
// narrow images, several tiles). Chunks of channels are the fastest index of the grid, so that what they share is in
// cache.
//
// The trick: maxima are taken down the columns first. The third column of a window is the first of the next thread's,
// which sends its maxima by shuffles; so the last pair of a row's lanes has no window of its own. Numerics: float.
//
//   lane p            lane p + 1
//   2p      2p + 1    2p + 2    2p + 3       columns of x, each the maximum of three rows
//   |______ window p ______|
//
// The backward goes down the quads of dx (pool3x3s2.h) instead: gradients of 12 channels for each quad's four windows
// are gathered, and LRN is differentiated at each of its pixels. Windows of the row above stay in registers.
#include "lrn.h"
#include "pool3x3s2.h"

namespace alexnet_cuda {
namespace {

template <bool kNhwc>
constexpr int kWarpRuns = kNhwc ? 4 : 1;  // runs of 8 channels side by side in a warp

struct TailGeometry {
  int64_t first_image;
  uint32_t warps;
  int channels, runs, group_runs, chunks;   // of an image; chunk: the runs of a warp
  int row_lanes, row_pairs, column_blocks;  // pairs of columns in a warp's row, those with a window, warps per row
  int height, width, out_height, out_width, rows;  // rows: pooled rows (backward: pairs of rows) of a tile
  bool relu_first;
};

// What a thread has. What a warp's lanes are, and what they touch of a row of x at once:
//
//   NHWC   lane = 4 pair + run   8 pairs x 32 channels: 64 bytes (float32: 128) of every second column; the loads of
//                                the other columns and of the runs' neighbours find the rest of these lines in L1
//   NCHW   lane = pair           up to 32 pairs: an element of every second column of a plane, likewise. Of images with
//                                fewer pairs, a warp has 2 tiles of 16 or 4 of 8
template <bool kNhwc>
struct TailThread {
  int64_t image;
  int pair, tile, channel;   // of columns; first channel of its run
  bool has_left, has_right;  // the group has channels before and after the run
  bool last_pair, active;

  GPU_DEVICE explicit TailThread(const TailGeometry& g) {
    const uint32_t warp = blockIdx.x * (kThreads / 32) + threadIdx.x / 32, used = min(warp, g.warps - 1);
    const int lane = threadIdx.x % 32, lane_pair = lane / kWarpRuns<kNhwc>, local = lane_pair % g.row_lanes;
    const uint32_t rest = used / g.chunks, block = rest % g.column_blocks;
    const int wanted = (used - rest * g.chunks) * kWarpRuns<kNhwc> + lane % kWarpRuns<kNhwc>;
    const int run = min(wanted, g.runs - 1), in_group = run % g.group_runs;
    image = g.first_image + rest / g.column_blocks;
    pair = block * g.row_pairs + local;
    tile = blockIdx.y * (32 / kWarpRuns<kNhwc> / g.row_lanes) + lane_pair / g.row_lanes;
    channel = run * kRun;
    has_left = in_group > 0;
    has_right = in_group + 1 < g.group_runs;
    last_pair = local + 1 == g.row_lanes;
    active = warp < g.warps && wanted < g.runs;
  }
};

// ---- forward -------------------------------------------------------------------------------------------------------

// What is compared are the bits of normalised values. Different zeros are not told apart by it correctly, nor which of
// several NaN is the last, but neither has an effect: the gradient of ReLU is 0 at zeros, that of LRN is NaN at every
// NaN.
GPU_DEVICE bool same(float a, float b) {
  return __float_as_uint(a) == __float_as_uint(b);
}

// Why this tile: LRN takes most of the instructions, so a pixel should be normalised once. Down the columns, only the
// row between two tiles is normalised by both. Across, lanes send each other their maxima; of the 8 (NCHW: up to 32)
// pairs of a row of lanes only the last, which has no window, is normalised again, as the next warp's first.
template <class T, bool kNhwc, bool kSave>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    forward_kernel(const T* __restrict__ x, T* __restrict__ y, uint8_t* __restrict__ code, TailGeometry g,
                   LrnConstants lrn) {
  const TailThread<kNhwc> thread(g);
  const int plane = g.height * g.width, out_plane = g.out_height * g.out_width, channel = thread.channel;
  const int step = kNhwc ? g.channels : 1;
  const int64_t out = thread.image * g.channels * out_plane + channel * (kNhwc ? 1 : out_plane);
  // A window that hangs over the edge sees the last row or column twice: no branch, and of equal values the first wins.
  const T* columns[2];
#pragma unroll
  for (int k = 0; k < 2; ++k)
    columns[k] = x + (thread.image * g.channels * plane + channel * (kNhwc ? 1 : plane) +
                      min(2 * thread.pair + k, g.width - 1) * step);
  const auto normalise_row = [&](int row, float (&v)[2][kRun]) {
    const int offset = min(row, g.height - 1) * g.width * step;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      float in[kRun + 4];
      if constexpr (kNhwc) load_run<2>(columns[k] + offset, thread.has_left, thread.has_right, in);
#pragma unroll
      for (int i = 0; i < kRun + 4; ++i) {
        if constexpr (!kNhwc) {
          const bool inside = i < 2 ? thread.has_left : i < kRun + 2 || thread.has_right;
          in[i] = inside ? gpu::to_float(columns[k][offset + (i - 2) * plane]) : 0.f;
        }
        in[i] = g.relu_first ? relu(in[i]) : in[i];
      }
      normalise_run(in, lrn, v[k]);
    }
  };

  float first[2][kRun];  // the first row of the windows to come
  int oy = thread.tile * g.rows;
  normalise_row(2 * oy, first);
  const bool stores = thread.active && !thread.last_pair && thread.pair < g.out_width;
#pragma unroll 1
  for (int i = 0; i < g.rows; ++i, ++oy) {
    // Down the columns: two more rows, the maxima of three, and 0, 3 or 6 for where they were. Registers hold 48
    // normalised values, of which the next iteration needs the 16 of the third row.
    float second[2][kRun], third[2][kRun], largest[2][kRun];
    int position[2][kRun];
    normalise_row(2 * oy + 1, second);
    normalise_row(2 * oy + 2, third);
#pragma unroll
    for (int k = 0; k < 2; ++k)
#pragma unroll
      for (int c = 0; c < kRun; ++c) {
        largest[k][c] = gpu::max_nan(gpu::max_nan(first[k][c], second[k][c]), third[k][c]);
        position[k][c] = same(first[k][c], largest[k][c]) ? 0 : same(second[k][c], largest[k][c]) ? 3 : 6;
        first[k][c] = third[k][c];
      }
    // Across three columns, the third from the next pair's lane.
    gpu::Vec<T, kRun> values;
    gpu::Vec<uint8_t, kRun> codes;
#pragma unroll
    for (int c = 0; c < kRun; ++c) {
      const int next = (threadIdx.x + kWarpRuns<kNhwc>) % 32;
      const float left = largest[0][c], middle = largest[1][c], right = __shfl_sync(~0u, left, next);
      const float value = gpu::max_nan(gpu::max_nan(left, middle), right);
      values.v[c] = gpu::from_float<T>(g.relu_first ? value : relu(value));
      if constexpr (kSave) {
        const int of_right = __shfl_sync(~0u, position[0][c], next) + 2;
        const int of_two = min(same(left, value) ? position[0][c] : 9, same(middle, value) ? position[1][c] + 1 : 9);
        codes.v[c] = static_cast<uint8_t>(min(of_two, same(right, value) ? of_right : 9));
      }
    }
    if (!stores || oy >= g.out_height) continue;
    // To memory: 8 channels of a pixel at once, or one element of each plane.
    const int64_t to = out + (oy * g.out_width + thread.pair) * step;
    if constexpr (kNhwc) {
      *reinterpret_cast<gpu::Vec<T, kRun>*>(y + to) = values;
      if constexpr (kSave) *reinterpret_cast<gpu::Vec<uint8_t, kRun>*>(code + to) = codes;
    } else {
#pragma unroll
      for (int c = 0; c < kRun; ++c) {
        y[to + c * out_plane] = values.v[c];
        if constexpr (kSave) code[to + c * out_plane] = codes.v[c];
      }
    }
  }
}

// ---- backward ------------------------------------------------------------------------------------------------------

// w = channels c - 2 .. c + 9 of a window in NHWC, from the place of its channel c.
template <class T, int n>
GPU_DEVICE void load_window(const T* grads, const uint8_t* codes, bool has_left, bool has_right, Window<T, n>& w) {
  constexpr int kPerWord = 4 / sizeof(T);
  T g[kRun + 4] = {};
  uint8_t c[kRun + 4] = {};
  const auto copy = [&](auto count, int first) {  // of some channels
    constexpr int m = decltype(count)::value;
    const auto from = *reinterpret_cast<const gpu::Vec<T, m>*>(grads + (first - 2));
    const auto from_codes = *reinterpret_cast<const gpu::Vec<uint8_t, m>*>(codes + (first - 2));
#pragma unroll
    for (int i = 0; i < m; ++i) {
      g[first + i] = from.v[i];
      c[first + i] = from_codes.v[i];
    }
  };
  if (has_left) copy(std::integral_constant<int, 2>{}, 0);
  copy(std::integral_constant<int, kRun>{}, 2);
  if (has_right) copy(std::integral_constant<int, 2>{}, kRun + 2);
  memcpy(w.grad, g, sizeof(w.grad));
#pragma unroll
  for (int i = 0; i < n; ++i)
    w.code[i] = kPerWord == 1 ? c[i] : c[kPerWord * i] | static_cast<uint32_t>(c[kPerWord * i + kPerWord - 1]) << 16;
}

// NHWC; relu_lrn_max_pool2d_alexnet_nchw.cu has the other. A quad's four windows, gradients and positions of 12
// channels each, take 48 registers, in float32 96. Two of them stay there from the quad above; each of the others is
// loaded by two lanes, 4 apart, and one of the two reads L1. In float32 two blocks would spill 8 bytes on 8.0.
template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 1 : kMinBlocks)
    backward_nhwc_kernel(const T* __restrict__ x, const T* __restrict__ grad, const uint8_t* __restrict__ code,
                         T* __restrict__ dx, TailGeometry g, LrnConstants lrn) {
  constexpr int kPerWord = 4 / sizeof(T), kWords = (kRun + 4) / kPerWord;
  const TailThread<true> thread(g);
  if (!thread.active) return;
  const int64_t at = thread.image * g.channels * (g.height * g.width) + thread.channel;
  const int64_t from = thread.image * g.channels * (g.out_height * g.out_width) + thread.channel;
  CoveringWindows<T, kWords> windows;
  const auto load_row = [&](int oy) {
    const auto exists = [&](int k) {
      return is_inside(oy, g.out_height) && is_inside(thread.pair - 1 + k, g.out_width);
    };
    windows.advance(exists, [&](int k, Window<T, kWords>& w) {
      const int64_t offset = from + (oy * g.out_width + thread.pair - 1 + k) * g.channels;
      load_window(grad + offset, code + offset, thread.has_left, thread.has_right, w);
    });
  };
  int quad = thread.tile * g.rows;
  load_row(quad - 1);
#pragma unroll 1
  for (int n = 0; n < g.rows; ++n, ++quad) {
    load_row(quad);
#pragma unroll
    for (int k = 0; k < 4; ++k) {  // the four pixels of two rows and columns
      const int row = 2 * quad + k / 2, column = 2 * thread.pair + k % 2;
      if (row >= g.height || column >= g.width) continue;
      const int64_t pixel = at + (row * g.width + column) * g.channels;
      float in[kRun + 8], sums[kRun + 4], out[kRun];
      load_run<4>(x + pixel, thread.has_left, thread.has_right, in);
#pragma unroll
      for (int i = 0; i < kRun + 4; ++i) {
        const auto sum = [&](auto... words) { return (element<T>(words, i % kPerWord) + ...); };
        sums[i] = windows.gather(0, k, i / kPerWord, sum);
        // A pooled value is positive exactly if its x is.
        if (!g.relu_first) sums[i] = relu_gradient(in[i + 2], sums[i]);
      }
      if (g.relu_first) {
#pragma unroll
        for (int i = 0; i < kRun + 8; ++i) in[i] = relu(in[i]);
      }
      differentiate_run(in, sums, lrn, out);
#pragma unroll
      for (int i = 0; i < kRun; ++i) out[i] = g.relu_first ? relu_gradient(in[i + 4], out[i]) : out[i];
      store_run(dx + pixel, out);
    }
  }
}

// ---- launchers -----------------------------------------------------------------------------------------------------

// launch(geometry, grid) until all images are done; `pairs` of columns with `shared` of a row's lanes without their
// own, `rows` pooled rows or pairs of rows.
template <bool kNhwc, class Launch>
gpu::error_t launch_warps(const TailArguments& args, int pairs, int shared, int rows, Launch launch) {
  const Images& images = args.images;
  const int channels = static_cast<int>(images.channels), runs = channels / kRun,
            chunks = divide_up(runs, kWarpRuns<kNhwc>);
  const int lanes = 32 / kWarpRuns<kNhwc>;
  int row_lanes = 8;
  while (row_lanes < lanes && row_lanes < pairs + shared) row_lanes *= 2;
  const int row_pairs = row_lanes - shared, column_blocks = divide_up(pairs, row_pairs);
  return for_each_batch(images.count, int64_t{chunks} * column_blocks * 32, [&](int64_t first, int64_t count) {
    const int64_t warps = count * chunks * column_blocks;
    const int per_tile = tile_rows(warps * 32, rows, lanes / row_lanes), tiles = divide_up(rows, per_tile);
    const TailGeometry g = {first,
                            static_cast<uint32_t>(warps),
                            channels,
                            runs,
                            runs / args.lrn.groups,
                            chunks,
                            row_lanes,
                            row_pairs,
                            column_blocks,
                            static_cast<int>(images.height),
                            static_cast<int>(images.width),
                            static_cast<int>(args.pool.out_height),
                            static_cast<int>(args.pool.out_width),
                            per_tile,
                            args.order == kReluLrnPool};
    return launch(g, dim3(divide_up(warps, kThreads / 32), divide_up(tiles, lanes / row_lanes)));
  });
}

}  // namespace

bool has_alexnet_tail(const TailArguments& args) {
  const int size = element_size(args.images.dtype);
  return is_pool3x3s2(args.pool) && is_lrn5(args.lrn) && has_whole_runs(args.images, args.lrn) &&
         (!args.images.channels_last ||
          (are_aligned(kRun * size, args.x, args.out, args.grad) && are_aligned(kRun, args.code)));
}

gpu::error_t launch_alexnet_tail(const TailArguments& args, gpu::stream_t stream) {
  const int columns = static_cast<int>(args.pool.out_width), rows = static_cast<int>(args.pool.out_height);
  return dispatch_images(args.images, [&](auto type, auto nhwc) {
    constexpr bool kNhwc = decltype(nhwc)::value;
    return dispatch_flag(args.code != nullptr, [&](auto save) {
      return launch_warps<kNhwc>(args, columns, 1, rows, [&](const TailGeometry& g, dim3 grid) {
        return gpu::launch(forward_kernel<typename decltype(type)::type, kNhwc, decltype(save)::value>, grid, kThreads,
                           0, stream, args.x, args.out, args.code, g, LrnConstants(args.lrn));
      });
    });
  });
}

gpu::error_t launch_alexnet_tail_backward(const TailArguments& args, gpu::stream_t stream) {
  if (!args.images.channels_last) return launch_alexnet_tail_backward_nchw(args, stream);
  const int columns = divide_up(args.images.width, 2), rows = divide_up(args.images.height, 2);
  return dispatch_dtype(args.images.dtype, [&](auto type) {
    return launch_warps<true>(args, columns, 0, rows, [&](const TailGeometry& g, dim3 grid) {
      return gpu::launch(backward_nhwc_kernel<typename decltype(type)::type>, grid, kThreads, 0, stream, args.x,
                         args.grad, args.code, args.out, g, LrnConstants(args.lrn));
    });
  });
}

}  // namespace alexnet_cuda
