// AlexNet's 11x11 convolution of stride 4 as a sum of matrix products for tensor cores.
//
// Space to depth: cut into cells of 4x4 pixels, the image has 16 C channels per cell and the convolution becomes 3x3
// with stride 1, a sum of nine products (cells shifted by (by, bx)) x (weights). Tensor cores sum 16 channels at a
// time (8 of TF32); here these are two slabs, a slab being 16 bytes of channels (a plane) at one shift: 8 channels, or
// 4 of TF32. The 12x12 pixels of 3x3 cells are one row and one column more than a filter has, so some (channel, shift)
// pairs are not needed. Channels are sorted so that those fall into the same slabs, which are left out: 48 slabs
// instead of 54 for C = 3 (K = 384, of which 363 count), 93 instead of 108 of TF32.
#pragma once

#include <type_traits>
#include <utility>

#include "images.h"

namespace alexnet_cuda {

constexpr int kMaxSlabs = 128, kMaxTaps = 512;

struct Element {
  int c, y, x;  // channel and position within the 4x4 cell

  // A filter has 11 rows and columns; the cell's shift makes it row 4 by + y.
  constexpr bool needed(int by, int bx) const { return 4 * by + y < 11 && 4 * bx + x < 11; }
  constexpr int tap(int by, int bx) const { return needed(by, bx) ? (c * 11 + 4 * by + y) * 11 + 4 * bx + x : -1; }
};

// First come the elements needed at all nine shifts (y, x < 3). What is left over modulo a slab's width of the bottom
// row (not needed for by = 2) and the right column (bx = 2) fills up their last plane; the rest of both has planes of
// its own.
constexpr Element element_of(int channels, int i, int width = 8) {
  const int edge = 3 * channels, head = edge % width;
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

template <int kChannels, int kWidth = 8>
struct Plan {
  Slab slabs[kMaxSlabs] = {};  // behind the last one, of empty masks
  int count = 0, steps = 0;

  constexpr Plan() {
    for (int by = 0; by < 3; ++by)
      for (int bx = 0; bx < 3; ++bx)
        for (int plane = 0; plane < 16 * kChannels / kWidth; ++plane) {
          int mask = 0;
          for (int e = 0; e < kWidth; ++e)
            mask |= element_of(kChannels, kWidth * plane + e, kWidth).needed(by, bx) << e;
          if (mask) slabs[count++] = {plane, by, bx, mask};
        }
    steps = (count + 1) / 2;
  }
};
template <int kChannels, int kWidth = 8>
constexpr Plan<kChannels, kWidth> kPlan{};
static_assert(kPlan<1>.steps == 9 && kPlan<3>.steps == 24 && kPlan<4>.steps == 32);
static_assert(kPlan<1, 4>.steps == 17 && kPlan<3, 4>.steps == 47 && kPlan<4, 4>.steps == 61);

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
  int16_t tap[kMaxTaps];  // of filter[channel][ky][kx], for every summed index; -1 where there is none
};

template <int kChannels, int kWidth = 8>
Taps taps() {
  Taps taps = {};
  for (int i = 0; i < kMaxTaps; ++i) {
    const Slab& slab = kPlan<kChannels, kWidth>.slabs[i / kWidth];
    const int tap = element_of(kChannels, kWidth * slab.plane + i % kWidth, kWidth).tap(slab.by, slab.bx);
    taps.tap[i] = static_cast<int16_t>(slab.mask ? tap : -1);
  }
  return taps;
}

// ---- elements ------------------------------------------------------------------------------------------------------

// How tensor cores see what is T in memory, and how many make a slab: TF32 is stored as float.
template <class T>
using Stored = std::conditional_t<sizeof(T) == 4, float, uint16_t>;
template <class T>
constexpr int kWidthOf = 16 / sizeof(T);
template <class T, int kChannels>
constexpr int kPlanesOf = 16 * kChannels / kWidthOf<T>;

// A word for the tensor cores: two elements of 16 bits, or one of TF32.
GPU_DEVICE uint32_t word_of(const uint16_t* v) {
  return v[0] | uint32_t{v[1]} << 16;
}
GPU_DEVICE uint32_t word_of(const float* v) {
  return gpu::to_tf32(v[0]);
}

// The product of a step: two slabs.
template <class T>
GPU_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (sizeof(T) == 4)
    gpu::mma_m16n8k8_tf32(d, a, b);
  else
    gpu::mma_m16n8k16<T>(d, a, b);
}

// ---- cells in shared memory ----------------------------------------------------------------------------------------

constexpr int kWarpPixels = 32, kBlockPixels = kThreads / 32 * kWarpPixels;
constexpr int kStrip = 64;
constexpr int kSharedEverywhere = 99 << 10;  // bytes that a block may have on 8.6, 8.9 and 12.0; elsewhere more
template <int kPixels>
constexpr int kCellsFor = kPixels + 2 * (kStrip + 2) + 2;  // two rows and two cells beyond the pixels
template <int kPixels>
constexpr int kPlaneFor = 8 * kCellsFor<kPixels>;  // 16-bit words of a plane
constexpr int kCells = kCellsFor<kBlockPixels>, kPlane = kPlaneFor<kBlockPixels>;

struct Geometry {
  int height, width, filters, padding, out_height, out_width;
  int strips, strip_width, blocks;  // blocks: of kBlockPixels in a strip, or as many as the kernel takes
  bool channels_last, octets;       // octets: runs of 8 channels of y are 16-byte aligned

  GPU_DEVICE int pitch() const { return strip_width + 2; }
  // Position in the output of a pixel of a strip, or -1.
  GPU_DEVICE int position(int strip, int pixel) const {
    const int row = pixel / pitch(), column = pixel % pitch(), x = strip * strip_width + column;
    return row < out_height && column < strip_width && x < out_width ? row * out_width + x : -1;
  }
};

// The elements of one plane of the cell whose upper left pixel is (y, x); 0 outside the image.
template <int kChannels, bool kLast, int kWhich, class E>
GPU_DEVICE void load_cell(const E* image, int height, int width, int y, int x, E (&v)[16 / sizeof(E)]) {
  constexpr int kWidth = kWidthOf<E>;
  const int corner = y * width + x;
  unroll<kWidth>([&](auto e) {
    constexpr Element at = element_of(kChannels, kWidth * kWhich + decltype(e)::value, kWidth);
    const bool inside = static_cast<unsigned>(y + at.y) < static_cast<unsigned>(height) &&
                        static_cast<unsigned>(x + at.x) < static_cast<unsigned>(width);
    const int pixel = corner + at.y * width + at.x;
    v[e] = inside ? image[kLast ? pixel * kChannels + at.c : at.c * height * width + pixel] : E{0};
  });
}
template <class E>
GPU_DEVICE void store_cell(gpu::shared<uint32_t> to, const E (&v)[16 / sizeof(E)]) {
  gpu::Quad<uint32_t> words;
#pragma unroll
  for (int k = 0; k < 4; ++k) words.v[k] = word_of(v + k * kWidthOf<E> / 4);
  gpu::store4(to, words);
}

// Cells first .. first + kPixels + 2 rows + 1 of a strip of one image, a cell per thread at a time; 0 outside.
template <int kChannels, bool kLast, int kPixels = kBlockPixels, class E>
GPU_DEVICE void stage(gpu::shared<uint32_t> cells, const E* image, const Geometry& g, int strip, int first) {
  const int pitch = g.pitch();
  for (int i = threadIdx.x; i < kPixels + 2 * pitch + 2; i += kThreads) {
    const int row = (first + i) / pitch, column = (first + i) % pitch + strip * g.strip_width;
    unroll<kPlanesOf<E, kChannels>>([&](auto p) {
      E v[kWidthOf<E>];
      load_cell<kChannels, kLast, decltype(p)::value>(image, g.height, g.width, 4 * row - g.padding,
                                                      4 * column - g.padding, v);
      store_cell(cells + (p * (kPlaneFor<kPixels> / 2) + i * 4), v);
    });
  }
}

// Clears what a fragment holds of elements that no filter element meets: their weights are 0, but 0 * NaN is not.
template <class T>
GPU_DEVICE void clear_unneeded(int mask, uint32_t& first, uint32_t& second) {
  const int mine = mask >> threadIdx.x % 4 * (kWidthOf<T> / 4);
  const uint32_t keep = sizeof(T) == 4 ? (mine & 1 ? ~0u : 0) : (mine & 1 ? 0xffffu : 0) | (mine & 2 ? 0xffff0000u : 0);
  first &= keep;
  second &= keep;
}

// 16 bytes of the gradient as tensor cores take them: an output's filters from `filter` on; 0 where there are none, and
// for an output of -1.
template <class T>
GPU_DEVICE gpu::Quad<uint32_t> gradient_words(const Stored<T>* image, const Geometry& g, int output, int filter) {
  constexpr int kWidth = kWidthOf<T>;
  struct alignas(16) {
    Stored<T> v[kWidth];
  } run = {};
  if (g.octets && g.channels_last) {
    if (output >= 0 && filter < g.filters)
      run = *reinterpret_cast<const decltype(run)*>(image + (output * g.filters + filter));
  } else {
    const int plane = g.out_height * g.out_width;
#pragma unroll
    for (int k = 0; k < kWidth; ++k)
      if (output >= 0 && filter + k < g.filters)
        run.v[k] = image[g.channels_last ? output * g.filters + filter + k : (filter + k) * plane + output];
  }
  gpu::Quad<uint32_t> words;
#pragma unroll
  for (int k = 0; k < 4; ++k) words.v[k] = word_of(run.v + k * kWidth / 4);
  return words;
}

// What the kernels need of the plan.
struct Operands {
  struct {
    int offset, mask;  // offset in 16-bit words of shared memory
  } slab[kMaxSlabs];
};

// ---- host ----------------------------------------------------------------------------------------------------------

template <int kChannels, int kWidth = 8, int kPixels = kBlockPixels>
Operands operands(int pitch) {
  Operands operands = {};
  for (int i = 0; i < kMaxSlabs; ++i) {
    const Slab& slab = kPlan<kChannels, kWidth>.slabs[i];
    operands.slab[i] = {slab.plane * kPlaneFor<kPixels> + (slab.by * pitch + slab.bx) * 8, slab.mask};
  }
  return operands;
}

inline Geometry geometry_of(bool channels_last, const Conv& conv, const void* y, int pixels = kBlockPixels) {
  const int strips = divide_up(conv.out_width, kStrip), strip_width = divide_up(conv.out_width, strips);
  return {static_cast<int>(conv.height),
          static_cast<int>(conv.width),
          static_cast<int>(conv.filters),
          conv.padding,
          static_cast<int>(conv.out_height),
          static_cast<int>(conv.out_width),
          strips,
          strip_width,
          divide_up(conv.out_height * (strip_width + 2), pixels),
          channels_last,
          conv.filters % 8 == 0 && is_aligned(y, 16)};
}

inline bool on_tensor_cores(DType dtype) {
  return dtype != kFloat;
}

// body(integral_constant) with the number of channels, of those that is_alexnet allows.
template <class Body>
auto dispatch_channels(const Conv& conv, Body body) {
  return conv.channels == 1   ? body(std::integral_constant<int, 1>{})
         : conv.channels == 3 ? body(std::integral_constant<int, 3>{})
                              : body(std::integral_constant<int, 4>{});
}

// The weights in the order in which conv2d_mma.cu, which says what it is, wants them: conv2d_workspace floats. Done at
// every call, by a kernel that moves 70 KB: a write through a parameter's .data, or in a captured graph, leaves no
// trace in its version, so whoever kept packed weights would sooner or later compute with old ones.
gpu::error_t pack_conv2d_weight(DType dtype, const void* weight, const Conv& conv, float* packed, gpu::stream_t stream);

// 64 or 96, whichever leaves less of the last tile empty.
inline int filter_tile(const Conv& conv) {
  return divide_up(conv.filters, 96) * 96 <= divide_up(conv.filters, 64) * 64 ? 96 : 64;
}

}  // namespace alexnet_cuda
