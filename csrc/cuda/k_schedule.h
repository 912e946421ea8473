// The K dimension of AlexNet's 11x11 convolution of stride 4 as a matrix product for tensor cores (implicit GEMM).
//
// Space to depth (s2d): cut into blocks of 4x4 pixels, an image with C channels has 16 C channels per s2d block, and
// the convolution becomes 3x3 with stride 1: a sum over nine shifts (by, bx) of (s2d blocks shifted by (by, bx)) x
// weights.
//
// Layout of K: a channel group is 16 bytes of an s2d block's channels (8 of 16 bits, or 4 of TF32). A K slice is one
// channel group at one shift. One tensor core instruction sums over two K slices, a k step.
//
// The trick: the 12x12 pixels of 3x3 s2d blocks are one row and one column more than a filter has, so some (channel,
// shift) pairs meet no weight. Channels are ordered so that these fall into the same K slices, which are left out. For
// C = 3 this leaves 48 slices of 54 (K = 384, of which 363 have weights), and 93 of 108 of TF32.
//
//   pixels of an s2d block       needed at
//     i i i c                    i  inner: all nine shifts
//     i i i c                    r  bottom row: by < 2, six shifts
//     i i i c                    c  right column: bx < 2, six shifts
//     r r r x                    x  corner: by < 2 and bx < 2, four shifts
#pragma once

#include <type_traits>
#include <utility>

#include "launch.h"

namespace alexnet_cuda {

constexpr int kKernel = 11, kKernelArea = kKernel * kKernel, kStride = 4;
constexpr int kMaxSlices = 128, kMaxTaps = 512;

// A convolution's geometry as kernels take it, in 32 bits.
struct ConvGeometry {
  int height, width, filters, padding, out_height, out_width;

  explicit ConvGeometry(const Conv& c)
      : height(c.height),
        width(c.width),
        filters(c.filters),
        padding(c.padding),
        out_height(c.out_height),
        out_width(c.out_width) {}
};

// visit(output pixel, position in its window) for the outputs whose windows cover pixel (y, x) of the image.
template <class Visit>
GPU_DEVICE void for_each_covering_output(const ConvGeometry& conv, int y, int x, Visit visit) {
  y += conv.padding, x += conv.padding;
#pragma unroll 1
  for (int oy = max(0, (y - kKernel + kStride) / kStride); oy <= min(y / kStride, conv.out_height - 1); ++oy)
#pragma unroll 1
    for (int ox = max(0, (x - kKernel + kStride) / kStride); ox <= min(x / kStride, conv.out_width - 1); ++ox)
      visit(oy * conv.out_width + ox, (y - oy * kStride) * kKernel + x - ox * kStride);
}

// A channel of an s2d block: image channel c of pixel (y, x) in the block.
struct S2dChannel {
  int c, y, x;

  // At shift (by, bx) it meets row 4 by + y and column 4 bx + x of a filter, if the filter has them.
  constexpr bool needed(int by, int bx) const { return 4 * by + y < kKernel && 4 * bx + x < kKernel; }
  // That filter element, as an index into weight[filter][c][ky][kx]; -1 if there is none.
  constexpr int tap(int by, int bx) const {
    return needed(by, bx) ? (c * kKernel + 4 * by + y) * kKernel + 4 * bx + x : -1;
  }
};

// The i-th channel of an s2d block. First come those needed at all nine shifts (y, x < 3). The bottom row (y = 3, not
// needed at by = 2) and the right column (x = 3, not at bx = 2) follow: `head` channels of each, then the corner, fill
// the last channel group of the first kind; the rest of the row and of the column have groups of their own.
//
// C = 3, groups of 8: groups 0-3 hold 27 channels with y, x < 3, one of the row, one of the column and 3 of the corner,
// at 9 shifts; group 4 the other 8 of the row and group 5 the other 8 of the column, at 6 shifts: 36 + 6 + 6 slices.
constexpr S2dChannel s2d_channel(int channels, int i, int group_size = 8) {
  const int edge = 3 * channels, head = edge % group_size;
  if (i < 3 * edge) return {i % channels, i / edge, i / channels % 3};
  i -= 3 * edge;
  if (i >= 2 * head && i < 2 * head + channels) return {i - 2 * head, 3, 3};
  const bool in_head = i < 2 * head;
  const int j = in_head ? i : i - 2 * head - channels, length = in_head ? head : edge - head;
  const int k = j % length + (in_head ? 0 : head);
  return j < length ? S2dChannel{k % channels, 3, k / channels} : S2dChannel{k % channels, k / channels, 3};
}

// Bit e: channel e of a group of an s2d block's channels meets a weight at this shift.
constexpr int needed_channels(int channels, int group, int by, int bx, int group_size = 8) {
  int mask = 0;
  for (int e = 0; e < group_size; ++e)
    mask |= s2d_channel(channels, group_size * group + e, group_size).needed(by, bx) << e;
  return mask;
}

// One channel group at one shift.
struct KSlice {
  int group, by, bx, mask;  // mask: needed_channels
};

// All K slices in which at least one channel meets a weight, ordered by shift. Computed by the compiler.
template <int kChannels, int kSize = 8>
struct KSchedule {
  KSlice slices[kMaxSlices] = {};  // beyond `count`: empty masks
  int count = 0, steps = 0;

  constexpr KSchedule() {
    for (int by = 0; by < 3; ++by)
      for (int bx = 0; bx < 3; ++bx)
        for (int group = 0; group < 16 * kChannels / kSize; ++group)
          if (const int mask = needed_channels(kChannels, group, by, bx, kSize))
            slices[count++] = {group, by, bx, mask};
    steps = (count + 1) / 2;
  }
};
template <int kChannels, int kSize = 8>
constexpr KSchedule<kChannels, kSize> kSchedule{};
static_assert(kSchedule<1>.steps == 9 && kSchedule<3>.steps == 24 && kSchedule<4>.steps == 32);
static_assert(kSchedule<1, 4>.steps == 17 && kSchedule<3, 4>.steps == 47 && kSchedule<4, 4>.steps == 61);

// body(integral_constant) for 0 .. n - 1, so that it can read the schedule at compile time.
template <int... i, class Body>
GPU_DEVICE void unroll(std::integer_sequence<int, i...>, Body body) {
  (body(std::integral_constant<int, i>{}), ...);
}
template <int n, class Body>
GPU_DEVICE void unroll(Body body) {
  unroll(std::make_integer_sequence<int, n>{}, body);
}

// The filter element of every index of K, -1 where there is none. Passed by value: an indexed kernel argument is a read
// of the constant bank.
struct TapTable {
  int16_t tap[kMaxTaps];
};

template <int kChannels, int kSize>
constexpr TapTable make_tap_table() {
  TapTable table = {};
  for (int i = 0; i < kMaxTaps; ++i) {
    const KSlice& slice = kSchedule<kChannels, kSize>.slices[i / kSize];
    const int tap = s2d_channel(kChannels, kSize * slice.group + i % kSize, kSize).tap(slice.by, slice.bx);
    table.tap[i] = static_cast<int16_t>(slice.mask ? tap : -1);
  }
  return table;
}
// Computed by the compiler.
template <int kChannels, int kSize = 8>
const TapTable& tap_table() {
  static constexpr TapTable table = make_tap_table<kChannels, kSize>();
  return table;
}

// body(integral_constant) with the number of channels, of those that is_conv11x11s4 allows.
template <class Body>
auto dispatch_channels(const Conv& conv, Body body) {
  return conv.channels == 1   ? body(std::integral_constant<int, 1>{})
         : conv.channels == 3 ? body(std::integral_constant<int, 3>{})
                              : body(std::integral_constant<int, 4>{});
}

inline bool is_16bit(DType dtype) {
  return dtype == DType::kHalf || dtype == DType::kBFloat16;
}

// k steps of the convolution for a dtype.
inline int k_steps(DType dtype, const Conv& conv) {
  return dispatch_channels(conv, [&](auto channels) {
    constexpr int kChannels = decltype(channels)::value;
    return is_16bit(dtype) ? kSchedule<kChannels, 8>.steps : kSchedule<kChannels, 4>.steps;
  });
}

}  // namespace alexnet_cuda
