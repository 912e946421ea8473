// AlexNet's 11x11 convolution of stride 4 as a sum of matrix products for tensor cores.
//
// Space to depth: cut into cells of 4x4 pixels, the image has 16 C channels per cell and the convolution becomes 3x3
// with stride 1, a sum of nine products (cells shifted by (by, bx)) x (weights). Tensor cores sum 16 channels at a
// time; here each 16 are two slabs, a slab being 8 channels (a plane) at one shift. The 12x12 pixels of 3x3 cells are
// one row and one column more than a filter has, so some (channel, shift) pairs are not needed. Channels are sorted so
// that those fall into the same slabs, which are left out: 48 slabs instead of 54 for C = 3 (K = 384, of which 363
// count).
#pragma once

#include <utility>

#include "images.h"

namespace alexnet_cuda {

constexpr int kMaxSteps = 32;

struct Element {
  int c, y, x;  // channel and position within the 4x4 cell

  // A filter has 11 rows and columns; the cell's shift makes it row 4 by + y.
  constexpr bool needed(int by, int bx) const { return 4 * by + y < 11 && 4 * bx + x < 11; }
  constexpr int tap(int by, int bx) const { return needed(by, bx) ? (c * 11 + 4 * by + y) * 11 + 4 * bx + x : -1; }
};

// First come the elements needed at all nine shifts (y, x < 3). What is left over modulo 8 of the bottom row (not
// needed for by = 2) and the right column (bx = 2) fills up their last plane; the rest of both has planes of its own.
constexpr Element element_of(int channels, int i) {
  const int edge = 3 * channels, head = edge % 8;
  if (i < 3 * edge) return {i % channels, i / edge, i / channels % 3};
  i -= 3 * edge;
  if (i >= 2 * head && i < 2 * head + channels) return {i - 2 * head, 3, 3};
  const bool in_head = i < 2 * head;
  const int j = in_head ? i : i - 2 * head - channels, length = in_head ? head : edge - head;
  const int k = j % length + (in_head ? 0 : head);
  return j < length ? Element{k % channels, 3, k / channels} : Element{k % channels, k / channels, 3};
}

struct Slab {
  int plane, by, bx, mask;  // bit e of the mask: element e of the plane is needed at this shift
};

template <int kChannels>
struct Plan {
  Slab slabs[2 * kMaxSteps] = {};
  int steps = 0;

  constexpr Plan() {
    int n = 0;
    for (int by = 0; by < 3; ++by)
      for (int bx = 0; bx < 3; ++bx)
        for (int plane = 0; plane < 2 * kChannels; ++plane) {
          int mask = 0;
          for (int e = 0; e < 8; ++e) mask |= element_of(kChannels, 8 * plane + e).needed(by, bx) << e;
          if (mask) slabs[n++] = {plane, by, bx, mask};
        }
    steps = (n + 1) / 2;  // an odd slab's partner has an empty mask
  }
};
template <int kChannels>
constexpr Plan<kChannels> kPlan{};
static_assert(kPlan<1>.steps == 9 && kPlan<3>.steps == 24 && kPlan<4>.steps == 32);

template <int... i, class Body>
GPU_DEVICE void unroll(std::integer_sequence<int, i...>, Body body) {
  (body(std::integral_constant<int, i>{}), ...);
}
// body(integral_constant) for 0 .. n - 1, so that it can look things up in the plan at compile time.
template <int n, class Body>
GPU_DEVICE void unroll(Body body) {
  unroll(std::make_integer_sequence<int, n>{}, body);
}

// By value to a kernel: indexed kernel arguments are reads of the constant bank.
struct Taps {
  int16_t tap[16 * kMaxSteps];  // of filter[channel][ky][kx], for every summed index; -1 where there is none
};

template <int kChannels>
Taps taps() {
  Taps taps = {};
  for (int i = 0; i < 16 * kPlan<kChannels>.steps; ++i) {
    const Slab& slab = kPlan<kChannels>.slabs[i / 8];
    const int tap = element_of(kChannels, 8 * slab.plane + i % 8).tap(slab.by, slab.bx);
    taps.tap[i] = static_cast<int16_t>(slab.mask ? tap : -1);
  }
  return taps;
}

// ---- cells in shared memory ----------------------------------------------------------------------------------------

constexpr int kWarpPixels = 32, kBlockPixels = kThreads / 32 * kWarpPixels;
constexpr int kStrip = 64, kCells = kBlockPixels + 2 * (kStrip + 2) + 2;  // two rows and two cells beyond the pixels
constexpr int kPlane = 8 * kCells;                                        // 16-bit words of a plane

struct Geometry {
  int height, width, filters, padding, out_height, out_width;
  int strips, strip_width, blocks;  // blocks: of 256 pixels in a strip
  bool channels_last, octets;       // octets: runs of 8 channels of y are 16-byte aligned

  GPU_DEVICE int pitch() const { return strip_width + 2; }
  // Position in the output of a pixel of a strip, or -1.
  GPU_DEVICE int position(int strip, int pixel) const {
    const int row = pixel / pitch(), column = pixel % pitch(), x = strip * strip_width + column;
    return row < out_height && column < strip_width && x < out_width ? row * out_width + x : -1;
  }
};

// The elements of one plane of the cell whose upper left pixel is (y, x); 0 outside the image.
template <int kChannels, bool kLast, int kWhich>
GPU_DEVICE void load_cell(const uint16_t* image, int height, int width, int y, int x, uint16_t (&v)[8]) {
  const int corner = y * width + x;
  unroll<8>([&](auto e) {
    constexpr Element at = element_of(kChannels, 8 * kWhich + decltype(e)::value);
    const bool inside = static_cast<unsigned>(y + at.y) < static_cast<unsigned>(height) &&
                        static_cast<unsigned>(x + at.x) < static_cast<unsigned>(width);
    const int pixel = corner + at.y * width + at.x;
    v[e] = inside ? image[kLast ? pixel * kChannels + at.c : at.c * height * width + pixel] : uint16_t{0};
  });
}
GPU_DEVICE void store_cell(gpu::shared<uint32_t> to, const uint16_t (&v)[8]) {
  gpu::Quad<uint32_t> words;
#pragma unroll
  for (int k = 0; k < 4; ++k) words.v[k] = v[2 * k] | uint32_t{v[2 * k + 1]} << 16;
  gpu::store4(to, words);
}

// Cells first .. first + kBlockPixels + 2 rows + 1 of a strip of one image, a cell per thread at a time; 0 outside.
template <int kChannels, bool kLast>
GPU_DEVICE void stage(gpu::shared<uint32_t> cells, const uint16_t* image, const Geometry& g, int strip, int first) {
  const int pitch = g.pitch();
  for (int i = threadIdx.x; i < kBlockPixels + 2 * pitch + 2; i += kThreads) {
    const int row = (first + i) / pitch, column = (first + i) % pitch + strip * g.strip_width;
    unroll<2 * kChannels>([&](auto p) {
      uint16_t v[8];
      load_cell<kChannels, kLast, decltype(p)::value>(image, g.height, g.width, 4 * row - g.padding,
                                                      4 * column - g.padding, v);
      store_cell(cells + (p * (kPlane / 2) + i * 4), v);
    });
  }
}

// Clears what a fragment holds of elements that no filter element meets: their weights are 0, but 0 * NaN is not.
GPU_DEVICE void clear_unneeded(int mask, uint32_t& first, uint32_t& second) {
  const int two = mask >> threadIdx.x % 4 * 2;
  const uint32_t keep = (two & 1 ? 0xffffu : 0) | (two & 2 ? 0xffff0000u : 0);
  first &= keep;
  second &= keep;
}

// What the kernels need of the plan.
struct Operands {
  struct {
    int offset, mask;  // offset in 16-bit words of shared memory
  } slab[2 * kMaxSteps];
};

// ---- host ----------------------------------------------------------------------------------------------------------

template <int kChannels>
Operands operands(int pitch) {
  Operands operands = {};
  for (int i = 0; i < 2 * kPlan<kChannels>.steps; ++i) {
    const Slab& slab = kPlan<kChannels>.slabs[i];
    operands.slab[i] = {slab.plane * kPlane + (slab.by * pitch + slab.bx) * 8, slab.mask};
  }
  return operands;
}

inline Geometry geometry_of(bool channels_last, const Conv& conv, const void* y) {
  const int strips = divide_up(conv.out_width, kStrip), strip_width = divide_up(conv.out_width, strips);
  return {static_cast<int>(conv.height),
          static_cast<int>(conv.width),
          static_cast<int>(conv.filters),
          conv.padding,
          static_cast<int>(conv.out_height),
          static_cast<int>(conv.out_width),
          strips,
          strip_width,
          divide_up(conv.out_height * (strip_width + 2), kBlockPixels),
          channels_last,
          conv.filters % 8 == 0 && is_aligned(y, 16)};
}

inline bool on_tensor_cores(DType dtype, const Conv& conv) {
  return dtype != kFloat && conv.kernel_size == 11 && conv.stride == 4 &&
         (conv.channels == 1 || conv.channels == 3 || conv.channels == 4);
}

// The weights in the order in which conv2d_mma.cu, which says what it is, wants them: conv2d_workspace floats.
gpu::error_t pack_conv2d_weight(const void* weight, const Conv& conv, float* packed, gpu::stream_t stream);

// 64 or 96, whichever leaves less of the last tile empty.
inline int filter_tile(const Conv& conv) {
  return divide_up(conv.filters, 96) * 96 <= divide_up(conv.filters, 64) * 64 ? 96 : 64;
}

}  // namespace alexnet_cuda
