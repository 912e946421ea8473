// 11x11 convolution with stride 4: packing of weights, the forward (rows by conv.h or winograd_rows.h), the weight
// gradient (weight_grad.h) and the input gradient.
// Numerics: sums in float32 (float64 for float64), in an order that depends on the sizes alone.
#include "weight_grad.h"

namespace alexnet_cuda::ALEXNET_CPU_LEVEL {
namespace {

template <class T>
void pack_weight(const ConvTask& a, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  constexpr int64_t kBlock = kFilterBlock<A>;
  const int64_t channels = a.conv.channels, pixels = kSize * kSize, taps = pixels * channels;
  Scratch<A> scratch(padded_size<A>(taps, kBlock));
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kBlock, count = min64(kBlock, a.conv.filters - first);
    A* weight = static_cast<A*>(a.packed_weight) + first * taps;
    // Transpose (filter, channel, pixel) -> (channel, pixel, filter), then exchange channels and pixels.
    read_pixels<A>(static_cast<const T*>(a.weight) + first * taps, Channels{1, taps, 1, count, kBlock}, taps,
                   scratch + 0, kBlock);
    for (int64_t i = 0; i < taps; ++i) {
      for (int64_t f = 0; f < kBlock; f += kLanes<A>) {
        const Vec<A> v = f < count ? load<A>(scratch + i * kBlock + f) : Vec<A>{};
        store<A>(weight + (i % pixels * channels + i / pixels) * kBlock + f, v);
      }
    }
    for (int64_t f = 0; f < kBlock; f += kLanes<A>) {
      Vec<A> bias = {};
      const T* from = static_cast<const T*>(a.bias) + first + f;
      if (a.bias != nullptr && f < count) bias = load_part<A>(from, min64(kLanes<A>, count - f));
      store<A>(static_cast<A*>(a.packed_bias) + first + f, bias);
    }
    if constexpr (!__is_same(T, double)) {
      if (!a.winograd) continue;
      if (!all(within_range(weight, taps * kBlock))) __atomic_store_n(a.in_range, false, __ATOMIC_RELAXED);
      transform_filters(weight, a.winograd_weight + first * kWinogradProducts * 16 * channels, channels);
    }
  }
}

template <class T, class Rows>
void forward(const ConvTask& a, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const Conv& conv = a.conv;
  const Channels c = output_channels<A>(a);
  Scratch<A> out(padded_size<A>(conv.out_width, c.padded));
  Rows rows(a);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t n = t / conv.out_height, o = t % conv.out_height;
    const OutputRow<A, T> y(static_cast<T*>(a.out) + row_offset(output_images(a), c, n, o), c, out);
    rows.compute(n, o, y.pixels);
    for (int64_t p = 0; a.relu && p < conv.out_width; ++p) {
      for (int64_t f = 0; f < y.pixels.stride; f += kLanes<A>) {
        store<A>(y.pixels[p] + f, relu<A>(load<A>(y.pixels[p] + f)));
      }
    }
    y.finish(conv.out_width);
  }
}

// Chunk t adds up its share of the batch's output rows in order.
template <class A, class Grad>
void weight_grad(const ConvTask& a, int64_t begin, int64_t end) {
  const Conv& conv = a.conv;
  const int64_t size = (kSize * kSize * conv.channels + 1) * round_up(conv.filters, kFilterBlock<A>);
  const int64_t steps = (conv.out_height + Grad::kRows - 1) / Grad::kRows, total = a.images.count * steps;
  Grad grad(a);
  for (int64_t t = begin; t < end; ++t) {
    A* sum = static_cast<A*>(a.sums) + t * size;
    for (int64_t i = 0; i < size; ++i) sum[i] = 0;
    for (int64_t s = total * t / a.chunks; s < total * (t + 1) / a.chunks; ++s) {
      grad.add(s / steps, s % steps * Grad::kRows, sum);
    }
    grad.finish(sum);
  }
}

// Adds up the chunks for a block of filters and undoes the order of pack_weight.
template <class T>
void weight_grad_reduce(const ConvTask& a, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  constexpr int64_t kBlock = kFilterBlock<A>;
  const int64_t channels = a.conv.channels, pixels = kSize * kSize, taps = pixels * channels;
  const int64_t padded = round_up(a.conv.filters, kBlock);
  Scratch<A> scratch(padded_size<A>(taps + 1, kBlock));
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kBlock, count = min64(kBlock, a.conv.filters - first);
    for (int64_t i = 0; i <= taps; ++i) {
      const int64_t tap = i < taps ? i % channels * pixels + i / channels : taps;
      for (int64_t f = 0; f < kBlock; f += kLanes<A>) {
        Vec<A> sum = {};
        for (int64_t t = 0; t < a.chunks; ++t) {
          sum += load<A>(static_cast<const A*>(a.sums) + (t * (taps + 1) + i) * padded + first + f);
        }
        store<A>(scratch + tap * kBlock + f, sum);
      }
    }
    write_pixels<A>(static_cast<const A*>(scratch), kBlock, Channels{1, taps, 1, count, kBlock}, taps,
                    static_cast<T*>(a.grad_weight) + first * taps);
    if (a.grad_bias == nullptr) continue;
    write_pixels<A>(scratch + taps * kBlock, kBlock, Channels{kBlock, 1, 1, count, kBlock}, 1,
                    static_cast<T*>(a.grad_bias) + first);
  }
}

// One kernel row for the input gradient: (filter, channel, kernel column) -> (block of taps, filter, tap in block), a
// tap being (kernel column, channel).
template <class T>
void pack_taps(const ConvTask& a, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  constexpr int64_t kBlock = kFilterBlock<A>;
  const int64_t channels = a.conv.channels, filters = a.conv.filters;
  const int64_t size = round_up(kSize * channels, kBlock) * filters;
  for (int64_t i = begin; i < end; ++i) {
    A* to = static_cast<A*>(a.packed_weight) + i * size;
    for (int64_t n = 0; n < size; ++n) to[n] = 0;
    const T* from = static_cast<const T*>(a.weight) + i * kSize;
    for (int64_t f = 0; f < filters; ++f) {
      for (int64_t c = 0; c < channels; ++c, from += kSize * kSize) {
        for (int64_t j = 0; j < kSize; ++j) {
          const int64_t tap = j * channels + c;
          to[(tap / kBlock * filters + f) * kBlock + tap % kBlock] = to_accumulator<A>(from[j]);
        }
      }
    }
  }
}

// What P output pixels from `first` on contribute to a row of the gradient of x through one block of taps.
template <class A, int P>
inline void input_tile(const ConvTask& a, const A* weight, Pixels<const A> grad, int64_t first, A* dx) {
  Tile<A, P> tile = {};
  multiply<A, P>(tile, grad[first], grad.stride, 1, weight, kFilterBlock<A>, a.conv.filters);
#pragma GCC unroll 11
  for (int p = 0; p < P; ++p) {  // neighbours overlap, so one pixel at a time
    A* to = dx + (first + p) * kStride * a.conv.channels;
    store<A>(to, load<A>(to) + tile.sum[p][0]);
    store<A>(to + kLanes<A>, load<A>(to + kLanes<A>) + tile.sum[p][1]);
  }
}

template <class T>
void input_grad(const ConvTask& a, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const Conv& conv = a.conv;
  const Channels in = channels_of<A>(a.images), c = output_channels<A>(a);
  const int64_t blocks = round_up(kSize * conv.channels, kFilterBlock<A>) / kFilterBlock<A>;
  const int64_t row_size = padded_size<A>(conv.out_width, c.padded), slots = (kSize + kStride - 1) / kStride + 1;
  const int64_t width = max64((conv.out_width - 1) * kStride + kSize, conv.padding + conv.width);
  const int64_t dx_size = (width + kLanes<A>)*conv.channels + blocks * kFilterBlock<A>;
  Scratch<A> grads(slots * row_size), dx(dx_size);
  Ring<Pixels<const A>> ring(slots);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t n = t / conv.height, h = t % conv.height, r = h + conv.padding;
    if (h == 0) ring.restart();
    const int64_t first = r < kSize ? 0 : (r - kSize) / kStride + 1;
    const int64_t last = min64(conv.out_height, r / kStride + 1);
    ring.advance(first, last, [&](int64_t o, int slot) { return grad_row<T>(a, c, n, o, grads + slot * row_size); });
    // Gather from the output rows whose windows cover this row, in order; within one, from pixel to pixel.
    for (int64_t i = 0; i < dx_size; ++i) dx[i] = 0;
    for (int64_t o = first; o < last; ++o) {
      for (int64_t block = 0; block < blocks; ++block) {
        const A* weight = static_cast<const A*>(a.packed_weight) +
                          ((r - o * kStride) * blocks + block) * conv.filters * kFilterBlock<A>;
        A* to = dx + block * kFilterBlock<A>;
        int64_t w = 0;
        for (; w + kTileRows <= conv.out_width; w += kTileRows) input_tile<A, kTileRows>(a, weight, ring[o], w, to);
        for (; w < conv.out_width; ++w) input_tile<A, 1>(a, weight, ring[o], w, to);
      }
    }
    // The row without its padding.
    T* out = static_cast<T*>(a.out) + row_offset(a.images, in, n, h);
    const A* from = dx + conv.padding * conv.channels;
    if (in.channel_stride == 1) {  // width * C contiguous numbers
      write_pixels<A>(from, 0, Channels{0, 1, 1, conv.width * conv.channels, 0}, 1, out);
    } else {
      write_pixels<A>(from, conv.channels, in, conv.width, out);
    }
  }
}

}  // namespace

ALEXNET_CPU_KERNEL_OF(conv2d_pack_weight, ConvTask, pack_weight<T>)
ALEXNET_CPU_KERNEL_OF(conv2d_weight_grad_reduce, ConvTask, weight_grad_reduce<T>)
ALEXNET_CPU_KERNEL_OF(conv2d_pack_taps, ConvTask, pack_taps<T>)
ALEXNET_CPU_KERNEL_OF(conv2d_input_grad, ConvTask, input_grad<T>)

void conv2d_forward(const ConvTask& a, int64_t begin, int64_t end) {
  dispatch_rows<DirectRows, WinogradRows>(a, [&]<class T, class Rows>() { forward<T, Rows>(a, begin, end); });
}

void conv2d_weight_grad(const ConvTask& a, int64_t begin, int64_t end) {
  dispatch_rows<DirectWeightGrad, WinogradWeightGrad>(
      a, [&]<class T, class Grad>() { weight_grad<Accumulator<T>, Grad>(a, begin, end); });
}

}  // namespace alexnet_cuda::ALEXNET_CPU_LEVEL
