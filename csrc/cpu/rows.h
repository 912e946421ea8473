// How kernels read and write tensors. Every kernel computes on pixels whose channels are contiguous, in the type of the
// sums: vectors run along channels, so neither memory format nor dtype changes the arithmetic.
//
// Memory: an NHWC tensor of the sums' own type whose channels fill whole vectors is used where it lies. Any
// other tensor is converted, a row of pixels at a time, to scratch memory in the cache, [pixel][group][channel], with
// every group padded to whole vectors; results are converted back.
//
// Trick: NCHW is transposed in registers, a square of kLanes channels x kLanes pixels at a time.
#pragma once

#include <new>

#include "vec.h"

namespace alexnet_cuda::ALEXNET_CPU_LEVEL {

ALEXNET_INLINE int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}
ALEXNET_INLINE int64_t min64(int64_t a, int64_t b) {
  return a < b ? a : b;
}
ALEXNET_INLINE int64_t max64(int64_t a, int64_t b) {
  return a > b ? a : b;
}

// Requests a cache line early, because hardware prefetchers do not keep up with loops that compute much for each line.
// Into the second-level cache: the first holds the data that is being computed.
ALEXNET_INLINE void prefetch(const void* p) {
  __builtin_prefetch(p, 0, 2);
}
constexpr int64_t kPrefetchPixels = 8;    // NHWC: how far ahead of the current pixel
constexpr int64_t kPrefetchColumns = 64;  // NCHW: how far ahead in each of the planes that are read together

// The vector at p, after ReLU if RELU.
template <class A, bool RELU, class T>
ALEXNET_INLINE Vec<A> activation(const T* p) {
  return RELU ? relu<A>(load<A>(p)) : load<A>(p);
}

// Uninitialised memory for one thread. One vector more than requested, so that whole vectors may be stored at the end.
template <class A>
class Scratch {
 public:
  explicit Scratch(int64_t n) : data_(static_cast<A*>(::operator new((n + kLanes<A>)*sizeof(A), kAlign))) {}
  ~Scratch() { ::operator delete(data_, kAlign); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  operator A*() { return data_; }

 private:
  static constexpr std::align_val_t kAlign{64};
  A* data_;
};

// Elements of scratch memory for `count` pixels that are `stride` apart: a transposition reads and writes whole
// squares, also beyond the last pixel.
template <class A>
ALEXNET_INLINE int64_t padded_size(int64_t count, int64_t stride) {
  return round_up(count, kLanes<A>) * stride;
}

// Where the channels of a pixel lie in a tensor (strides in elements, one of the two is 1), and their number in a group
// without and with the padding of scratch memory.
struct Channels {
  int64_t pixel_stride, channel_stride;
  int64_t groups, per_group, padded;

  int64_t stride() const { return groups * padded; }  // from pixel to pixel in scratch memory
  // Whether pixels of the type of the sums can be computed on where they lie.
  bool in_place() const { return channel_stride == 1 && per_group == padded; }
};

template <class A>
ALEXNET_INLINE Channels channels_of(const Images& images, int64_t groups = 1) {
  const int64_t per_group = images.channels / groups;
  // With one pixel, or one channel, NCHW and NHWC are the same.
  const bool channels_last = images.channels_last || images.pixels() == 1 || images.channels == 1;
  return {channels_last ? images.channels : 1, channels_last ? 1 : images.pixels(), groups, per_group,
          round_up(per_group, kLanes<A>)};
}

// The index of row `row` of image n in a dense tensor of such images.
ALEXNET_INLINE int64_t row_offset(const Images& images, const Channels& c, int64_t n, int64_t row) {
  return n * images.channels * images.pixels() + row * images.width * c.pixel_stride;
}

// Pixels with contiguous channels, `stride` elements apart. write() is for results: it uses non-temporal stores if
// `nontemporal`.
template <class A>
struct Pixels {
  A* data;
  int64_t stride;
  bool nontemporal = false;

  A* operator[](int64_t pixel) const { return data + pixel * stride; }

  template <class V>
  ALEXNET_INLINE void write(A* p, V v) const {
    nontemporal ? stream<A>(p, v) : store<A>(p, v);
  }
};

// Results larger than the caches use non-temporal stores: they would not stay in the cache, and a line that is written
// whole past the cache is not read first.
constexpr int64_t kNontemporalBytes = int64_t{32} << 20;

template <class T>
ALEXNET_INLINE bool is_nontemporal(const Images& images) {
  return images.count * images.channels * images.pixels() * int64_t{sizeof(T)} >= kNontemporalBytes;
}

// One square: `rows` channels x `columns` pixels at x (ALL: kLanes of both) become pixels at `out`, missing channels
// zero. Of each pixel `stored` channels are stored.
template <class A, class T, bool ALL>
ALEXNET_INLINE void read_block(const T* x, int64_t channel_stride, int64_t rows, int64_t columns, A* out,
                               int64_t stride, int64_t stored) {
  constexpr int kN = kLanes<A>;
  Vec<A> block[kN];
#pragma GCC unroll 16
  for (int r = 0; r < kN; ++r) {
    const T* from = x + r * channel_stride;
    prefetch(from + kPrefetchColumns);
    block[r] = ALL ? load<A>(from) : r < rows ? load_part<A>(from, columns) : Vec<A>{};
  }
  transpose<A>(block);
  if (stored == kN) {
#pragma GCC unroll 16
    for (int r = 0; r < kN; ++r) store<A>(out + r * stride, block[r]);
  } else {
#pragma GCC unroll 16
    for (int r = 0; r < kN; ++r) store_part<A>(out + r * stride, block[r], stored);
  }
}

// The reverse: one square of pixels at `from` becomes `rows` channels x `columns` pixels at y.
template <class A, class T, bool ALL>
ALEXNET_INLINE void write_block(const A* from, int64_t stride, T* y, int64_t channel_stride, int64_t rows,
                                int64_t columns) {
  constexpr int kN = kLanes<A>;
  Vec<A> block[kN];
#pragma GCC unroll 16
  for (int r = 0; r < kN; ++r) block[r] = load<A>(from + r * stride);
  transpose<A>(block);
#pragma GCC unroll 16
  for (int r = 0; r < kN; ++r) {
    T* to = y + r * channel_stride;
    prefetch(to + kPrefetchColumns);
    if (ALL) {
      store<A>(to, block[r]);
    } else if (r < rows) {
      store_part<A>(to, block[r], columns);
    }
  }
}

// Converts `count` pixels at x to pixels at `out`, which has padded_size() elements. If `stride` is less than
// c.stride(), as for the few channels of a convolution's input, stores overlap, in an order that leaves every pixel
// complete.
template <class A, class T>
__attribute__((noinline)) void read_pixels(const T* x, const Channels& c, int64_t count, A* out, int64_t stride) {
  constexpr int kN = kLanes<A>;
  for (int64_t g = 0; g < c.groups; ++g, x += c.per_group * c.channel_stride, out += c.padded) {
    if (c.channel_stride == 1) {  // NHWC: copy each pixel, the last vector of a group in part
      for (int64_t p = 0; p < count; ++p) {
        const T* from = x + p * c.pixel_stride;
        int64_t i = 0;
        for (; i + kN <= c.per_group; i += kN) store<A>(out + p * stride + i, load<A>(from + i));
        if (i < c.per_group) store<A>(out + p * stride + i, load_part<A>(from + i, c.per_group - i));
      }
      continue;
    }
    for (int64_t i = 0; i < c.per_group; i += kN) {  // NCHW: kLanes planes at a time, from left to right
      const int64_t rows = min64(kN, c.per_group - i);
      const int64_t stored = i == 0 || stride >= c.padded ? kN : rows;
      for (int64_t p = 0; p < count; p += kN) {
        const int64_t columns = min64(kN, count - p);
        const T* from = x + i * c.channel_stride + p;
        A* to = out + p * stride + i;
        (rows == kN && columns == kN)
            ? read_block<A, T, true>(from, c.channel_stride, rows, columns, to, stride, stored)
            : read_block<A, T, false>(from, c.channel_stride, rows, columns, to, stride, stored);
      }
    }
  }
}

// The reverse of read_pixels. Padding is read, but not written.
template <class A, class T>
__attribute__((noinline)) void write_pixels(const A* from, int64_t stride, const Channels& c, int64_t count, T* y) {
  constexpr int kN = kLanes<A>;
  for (int64_t g = 0; g < c.groups; ++g, y += c.per_group * c.channel_stride, from += c.padded) {
    if (c.channel_stride == 1) {  // NHWC: copy each pixel
      for (int64_t p = 0; p < count; ++p) {
        T* to = y + p * c.pixel_stride;
        int64_t i = 0;
        for (; i + kN <= c.per_group; i += kN) store<A>(to + i, load<A>(from + p * stride + i));
        if (i < c.per_group) store_part<A>(to + i, load<A>(from + p * stride + i), c.per_group - i);
      }
      continue;
    }
    for (int64_t i = 0; i < c.per_group; i += kN) {  // NCHW: kLanes planes at a time
      const int64_t rows = min64(kN, c.per_group - i);
      for (int64_t p = 0; p < count; p += kN) {
        const int64_t columns = min64(kN, count - p);
        T* to = y + i * c.channel_stride + p;
        (rows == kN && columns == kN)
            ? write_block<A, T, true>(from + p * stride + i, stride, to, c.channel_stride, rows, columns)
            : write_block<A, T, false>(from + p * stride + i, stride, to, c.channel_stride, rows, columns);
      }
    }
  }
}

// Converts `count` pixels of three planes to pixels of three channels; `out` has room for kLanes pixels more.
template <class A, class T>
ALEXNET_INLINE void interleave3(const T* x, int64_t plane, int64_t count, A* out) {
  constexpr int kN = kLanes<A>;
  for (int64_t p = 0; p < count; p += kN, out += 3 * kN) {
    const int64_t n = min64(kN, count - p);
    Vec<A> v[3];
    // kLanes pixels of each plane become three vectors of interleaved channels.
    for (int i = 0; i < 3; ++i) v[i] = n == kN ? load<A>(x + i * plane + p) : load_part<A>(x + i * plane + p, n);
    store<A>(out, interleaved<A, 0>(v[0], v[1], v[2]));
    store<A>(out + kN, interleaved<A, 1>(v[0], v[1], v[2]));
    store<A>(out + 2 * kN, interleaved<A, 2>(v[0], v[1], v[2]));
  }
}

// `count` pixels of a tensor for reading: where they lie, or converted to `scratch`.
template <class A, class T>
ALEXNET_INLINE Pixels<const A> pixels_at(const T* x, const Channels& c, int64_t count, A* scratch) {
  if constexpr (__is_same(A, T)) {
    if (c.in_place()) return {x, c.pixel_stride};
  }
  read_pixels<A>(x, c, count, scratch, c.stride());
  return {scratch, c.stride()};
}

// A row of results: compute `pixels`, then call finish(), which converts them to the tensor at `out` if they are in
// scratch memory. `nontemporal`: the kernel writes them with Pixels::write and does not read them again.
template <class A, class T>
struct OutputRow {
  T* y;
  const Channels& channels;
  Pixels<A> pixels;

  ALEXNET_INLINE OutputRow(T* out, const Channels& c, A* scratch, bool nontemporal = false)
      : y(out), channels(c), pixels{scratch, c.stride()} {
    if constexpr (__is_same(A, T)) {
      const bool aligned = (reinterpret_cast<uintptr_t>(y) | (c.pixel_stride * sizeof(A))) % kVectorBytes == 0;
      if (c.in_place()) pixels = {y, c.pixel_stride, nontemporal && aligned};
    }
  }
  ALEXNET_INLINE void finish(int64_t count) const {
    if (static_cast<const void*>(pixels.data) != y) write_pixels<A>(pixels.data, pixels.stride, channels, count, y);
  }
};

// Ring buffer of the last rows of an image, each made once, when it is first needed.
template <class Row>
struct Ring {
  Scratch<Row> row;
  int64_t slots, next = 0;

  explicit Ring(int64_t rows) : row(rows), slots(rows) {}
  void restart() { next = 0; }  // before the first row of another image
  Row& operator[](int64_t r) { return row[r % slots]; }

  // Makes rows [first, last) available. make(row, slot) may use the memory of slot `slot` and returns the Row.
  template <class Make>
  ALEXNET_INLINE void advance(int64_t first, int64_t last, Make make) {
    for (next = max64(next, first); next < last; ++next) row[next % slots] = make(next, next % slots);
  }
};

// Blocks of planes, for operators that treat every channel by itself (max pooling, LRN in the plane). In NHWC a block
// is some channels of one image. In NCHW it is some of the batch's planes, across images, so that images of few
// channels fill vectors, too.
struct Planes {
  bool channels_last;
  int64_t channels;       // of an image; in NCHW, of the batch
  int64_t image, first;   // the block's image, 0 in NCHW, and its first plane there
  int64_t count, padded;  // planes of the block, without and with padding to whole vectors

  // The block's first element and its layout in a tensor whose planes have `pixels` pixels.
  int64_t offset(int64_t pixels) const { return image * channels * pixels + first * (channels_last ? 1 : pixels); }
  Channels layout(int64_t pixels) const {
    return {channels_last ? channels : 1, channels_last ? 1 : pixels, 1, count, padded};
  }
};

// Block t of at most `size` planes.
template <class A>
ALEXNET_INLINE Planes planes_of(const Images& images, int64_t t, int64_t size) {
  const int64_t channels = images.channels * (images.channels_last ? 1 : images.count);
  const int64_t blocks = (channels + size - 1) / size, first = t % blocks * size, count = min64(size, channels - first);
  return {images.channels_last, channels, t / blocks, first, count, round_up(count, kLanes<A>)};
}

}  // namespace alexnet_cuda::ALEXNET_CPU_LEVEL
