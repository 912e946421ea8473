// Every kernel computes on pixels whose channels are contiguous, in the type of the sums: vectors run along channels,
// and neither layout nor dtype reaches the arithmetic. They only decide how pixels are read and written, here: an
// NHWC tensor of the sums' own type is used where it lies, another is converted into scratch memory, and an NCHW
// tensor passes through a transposition in registers.
#pragma once

#include <new>

#include "vec.h"

namespace alexnet_cuda::ALEXNET_CPU_LEVEL {

ALEXNET_INLINE int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}
ALEXNET_INLINE int64_t lesser(int64_t a, int64_t b) {
  return a < b ? a : b;
}
ALEXNET_INLINE int64_t greater(int64_t a, int64_t b) {
  return a > b ? a : b;
}

// Asks for memory long before it is read or written: hardware prefetchers lose streams that wait for arithmetic. Into
// the second-level cache: the first is full of what is being worked on.
ALEXNET_INLINE void prefetch(const void* p) {
  __builtin_prefetch(p, 0, 2);
}

// Uninitialised memory for one thread, with a vector more than asked for so that whole vectors may be stored at its
// end.
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

// How the channels of an image lie in its tensor (strides in elements, one of the two is 1) and in scratch memory: in
// groups of `each`, every group padded with zeros to whole vectors.
struct Channels {
  int64_t pixel_stride, channel_stride;
  int64_t groups, each, padded;

  int64_t stride() const { return groups * padded; }
};

template <class A>
ALEXNET_INLINE Channels channels_of(const Images& images, int64_t groups = 1) {
  const int64_t each = images.channels / groups;
  // With one pixel, or one channel, both layouts are the same.
  const bool channels_last = images.channels_last || images.pixels() == 1 || images.channels == 1;
  return {channels_last ? images.channels : 1, channels_last ? 1 : images.pixels(), groups, each,
          round_up(each, kLanes<A>)};
}

// Pixels: pixel p has its channels at data + p * stride. Where `streamed` says so they are best written past the
// caches.
template <class A>
struct Pixels {
  A* data;
  int64_t stride;
  bool streamed = false;

  A* operator[](int64_t pixel) const { return data + pixel * stride; }

  template <class V>
  ALEXNET_INLINE void write(A* p, V v) const {
    if (streamed) {
      stream<A>(p, v);
    } else {
      store<A>(p, v);
    }
  }
};

// A result larger than caches are does not stay there, and a line that is written past them need not be read first.
constexpr int64_t kStreamedBytes = int64_t{32} << 20;

template <class T>
ALEXNET_INLINE bool is_streamed(const Images& images) {
  return images.count * images.channels * images.pixels() * int64_t{sizeof(T)} >= kStreamedBytes;
}

// Whether pixels of type T can be used where they lie.
template <class A, class T>
ALEXNET_INLINE bool in_place(const Channels& c) {
  return __is_same(A, T) && c.channel_stride == 1 && c.each == c.padded;
}

// Scratch memory for `count` pixels: whole blocks of a transposition are read and written there. (Where the stride is
// less than a vector, the last pixel's needs what a vector has more.)
template <class A>
ALEXNET_INLINE int64_t room(int64_t count, int64_t stride) {
  return round_up(count, kLanes<A>) * stride;
}

// An NCHW tensor is walked in strips of about so many pixels of every plane.
constexpr int64_t kBlockAhead = 64;

// `rows` channels of `columns` pixels at x (ALL: a whole block) become vectors of channels at `out`, of which `stored`
// are stored; the others are zero.
template <class A, class T, bool ALL>
ALEXNET_INLINE void read_block(const T* x, int64_t channel_stride, int64_t rows, int64_t columns, A* out,
                               int64_t stride, int64_t stored) {
  constexpr int kN = kLanes<A>;
  Vec<A> block[kN];
#pragma GCC unroll 16
  for (int r = 0; r < kN; ++r) {
    const T* from = x + r * channel_stride;
    prefetch(from + kBlockAhead);
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
    prefetch(to + kBlockAhead);
    if (ALL) {
      store<A>(to, block[r]);
    } else if (r < rows) {
      store_part<A>(to, block[r], columns);
    }
  }
}

// Converts `count` pixels from x on; `out` has room() for them. With a stride of less than the padded channels the
// stores overlap, in an order that leaves every pixel whole.
template <class A, class T>
__attribute__((noinline)) void read_pixels(const T* x, const Channels& c, int64_t count, A* out, int64_t stride) {
  constexpr int kN = kLanes<A>;
  for (int64_t g = 0; g < c.groups; ++g, x += c.each * c.channel_stride, out += c.padded) {
    if (c.channel_stride == 1) {
      for (int64_t p = 0; p < count; ++p) {
        const T* from = x + p * c.pixel_stride;
        int64_t i = 0;
        for (; i + kN <= c.each; i += kN) store<A>(out + p * stride + i, load<A>(from + i));
        if (i < c.each) store<A>(out + p * stride + i, load_part<A>(from + i, c.each - i));
      }
      continue;
    }
    for (int64_t i = 0; i < c.each; i += kN) {
      const int64_t rows = lesser(kN, c.each - i);
      const int64_t stored = i == 0 || stride >= c.padded ? kN : rows;
      for (int64_t p = 0; p < count; p += kN) {
        const int64_t columns = lesser(kN, count - p);
        const T* from = x + i * c.channel_stride + p;
        if (rows == kN && columns == kN) {
          read_block<A, T, true>(from, c.channel_stride, kN, kN, out + p * stride + i, stride, stored);
        } else {
          read_block<A, T, false>(from, c.channel_stride, rows, columns, out + p * stride + i, stride, stored);
        }
      }
    }
  }
}

// Converts three planes' `count` pixels to neighbouring channels; `out` has room for a vector's pixels more.
template <class A, class T>
ALEXNET_INLINE void interleave3(const T* x, int64_t plane, int64_t count, A* out) {
  constexpr int kN = kLanes<A>;
  constexpr auto kAll = std::make_integer_sequence<int, kN>{};
  for (int64_t p = 0; p < count; p += kN, out += 3 * kN) {
    const int64_t n = lesser(kN, count - p);
    Vec<A> v[3];
    for (int i = 0; i < 3; ++i) v[i] = n == kN ? load<A>(x + i * plane + p) : load_part<A>(x + i * plane + p, n);
    store<A>(out, interleaved<A, 0>(v[0], v[1], v[2], kAll));
    store<A>(out + kN, interleaved<A, 1>(v[0], v[1], v[2], kAll));
    store<A>(out + 2 * kN, interleaved<A, 2>(v[0], v[1], v[2], kAll));
  }
}

// The reverse; padding is read, but not written.
template <class A, class T>
__attribute__((noinline)) void write_pixels(const A* from, int64_t stride, const Channels& c, int64_t count, T* y) {
  constexpr int kN = kLanes<A>;
  for (int64_t g = 0; g < c.groups; ++g, y += c.each * c.channel_stride, from += c.padded) {
    if (c.channel_stride == 1) {
      for (int64_t p = 0; p < count; ++p) {
        T* to = y + p * c.pixel_stride;
        int64_t i = 0;
        for (; i + kN <= c.each; i += kN) store<A>(to + i, load<A>(from + p * stride + i));
        if (i < c.each) store_part<A>(to + i, load<A>(from + p * stride + i), c.each - i);
      }
      continue;
    }
    for (int64_t i = 0; i < c.each; i += kN) {
      const int64_t rows = lesser(kN, c.each - i);
      for (int64_t p = 0; p < count; p += kN) {
        const int64_t columns = lesser(kN, count - p);
        T* to = y + i * c.channel_stride + p;
        if (rows == kN && columns == kN) {
          write_block<A, T, true>(from + p * stride + i, stride, to, c.channel_stride, kN, kN);
        } else {
          write_block<A, T, false>(from + p * stride + i, stride, to, c.channel_stride, rows, columns);
        }
      }
    }
  }
}

// `count` pixels for reading: in place, or in scratch memory.
template <class A, class T>
ALEXNET_INLINE Pixels<const A> pixels_at(const T* x, const Channels& c, int64_t count, A* scratch) {
  if constexpr (__is_same(A, T)) {
    if (in_place<A, T>(c)) return {x, c.pixel_stride};
  }
  read_pixels<A>(x, c, count, scratch, c.stride());
  return {scratch, c.stride()};
}

// Where `count` pixels of a result are to be computed; finish() writes them if that is scratch memory. `streamed`: only
// written, never read again here.
template <class A, class T>
struct Result {
  T* y;
  const Channels& channels;
  Pixels<A> pixels;

  ALEXNET_INLINE Result(T* out, const Channels& c, A* scratch, bool streamed = false)
      : y(out), channels(c), pixels{scratch, c.stride()} {
    if constexpr (__is_same(A, T)) {
      const bool aligned = (reinterpret_cast<uintptr_t>(y) | (c.pixel_stride * sizeof(A))) % kVectorBytes == 0;
      if (in_place<A, T>(c)) pixels = {y, c.pixel_stride, streamed && aligned};
    }
  }
  ALEXNET_INLINE void finish(int64_t count) const {
    if (static_cast<const void*>(pixels.data) != y) write_pixels<A>(pixels.data, pixels.stride, channels, count, y);
  }
};

// The last few rows of an image, each made when it is first asked for.
template <class Row>
struct Ring {
  Scratch<Row> row;
  int slots;
  int64_t next = 0;

  explicit Ring(int64_t rows) : row(rows), slots(static_cast<int>(rows)) {}
  void restart() { next = 0; }
  Row& operator[](int64_t r) { return row[r % slots]; }

  // Makes the rows [first, last) available: make(row, slot) fills slot `slot` and says where the row lies.
  template <class Make>
  ALEXNET_INLINE void advance(int64_t first, int64_t last, Make make) {
    for (next = greater(next, first); next < last; ++next) {
      const int slot = static_cast<int>(next % slots);
      row[slot] = make(next, slot);
    }
  }
};

}  // namespace alexnet_cuda::ALEXNET_CPU_LEVEL
