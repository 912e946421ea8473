// 3x3 and 5x5 convolutions with stride 1, their input gradients and their weight and bias gradients by Winograd's
// algorithm (winograd.h): for AlexNet's layers a 2.6th of the products. float32, channels_last.
//
// Memory of the forward, for one group of channels and kTiles tiles of any images at a time:
//   inputs     [product][tile][channel]
//   weights    [block of filters][product][channel][filter in block], transformed once
//   products   [product][tile][filter]: 36 matrix products
// Memory of the weight gradient, which is the forward transposed, for a part of the batch's tiles at a time:
//   inputs     [product][vector of channels][tile][channel in vector]
//   grads      [product][block of filters][tile][filter in block]; a 37th plane has the sum of each tile's gradients
//   sums       [block of filters][product][channel][filter in block] += inputs x grads over the tiles: 36 matrix
//              products; after the last part they are transformed into weight gradients
// Numerics: sums of kPart channels (or tiles) at a time, in an order that depends on the sizes alone. A number that is
// not finite, or so large that others in its tile are lost beside it, always reaches the outputs that depend on it;
// these are checked, and the caller lets torch compute the convolution if one is not finite.
//
// The 11x11 convolution (winograd_rows.h) shares the transforms and the multiplication but has loops of its own, since
// the fused first block needs single rows of one image, while here a batch of tiles runs across images.
#include "winograd.h"

namespace alexnet_cuda::ALEXNET_CPU_LEVEL {
namespace {

constexpr int64_t kBlock = kFilterBlock<float>;
constexpr int kRows = kVectorBytes == 64 ? 8 : 4;  // tiles, or channels, whose sums stay in registers
constexpr int64_t kTiles = 64;                     // the transformed weights are read once for so many
constexpr int kPart = 64;
constexpr int64_t kPad = kLanes<float>;  // keeps the 36 numbers of a tile out of one set of the cache

// The tiles of a batch: 6x6 inputs, M x M outputs, numbered through all images.
template <int R>
class WinogradTiles {
 public:
  static constexpr int M = 7 - R;

  explicit WinogradTiles(const WinogradTask& a) : conv_(a.conv), images_(a.images.count) {
    for (int64_t c = 0; c < conv_.channels; ++c) zeros_[c] = 0;
  }

  int64_t count() const { return images_ * down_ * across_; }

  // Transforms the inputs of a tile, channels [first, last), and gives each vector to `store(channel, transformed)`.
  // Pixels in the padding and of tiles behind the last are zeros.
  template <class F>
  ALEXNET_INLINE void inputs(const void* x, int64_t tile, int64_t first, int64_t last, F store) {
    const int64_t n = tile / (down_ * across_), top = tile / across_ % down_ * M - conv_.padding,
                  left = tile % across_ * M - conv_.padding;
    const float* from[6][6];
    for (int i = 0; i < 6; ++i) {
      for (int j = 0; j < 6; ++j) {
        const int64_t h = top + i, w = left + j, pixel = (n * conv_.height + h) * conv_.width + w;
        const bool inside = n < images_ && h >= 0 && h < conv_.height && w >= 0 && w < conv_.width;
        from[i][j] = inside ? static_cast<const float*>(x) + pixel * conv_.channels : zeros_ + 0;
      }
    }
    for (int64_t c = first; c < last; c += kLanes<float>) {
      Tile6x6 v;
      load_input(v, [&](int i, int j) { return from[i][j] + c; });
      store(c, v);
    }
  }

  // The outputs of a tile inside the image: rows x columns pixels, the first at `offset`.
  struct Outputs {
    int64_t offset, rows, columns;
  };

  Outputs outputs(int64_t tile) const {
    const int64_t n = tile / (down_ * across_), y = tile / across_ % down_ * M, x = tile % across_ * M;
    return {((n * conv_.out_height + y) * conv_.out_width + x) * conv_.filters, min64(M, conv_.out_height - y),
            min64(M, conv_.out_width - x)};
  }

 private:
  const Conv& conv_;
  const int64_t images_;
  const int64_t across_ = (conv_.out_width + M - 1) / M, down_ = (conv_.out_height + M - 1) / M;
  Scratch<float> zeros_{conv_.channels};
};

// Collects whether numbers are finite and below 1.8e19: 0 times the square of any other is NaN.
struct FiniteCheck {
  Vec<float> zero = {};

  ALEXNET_INLINE void add(Vec<float> v) { zero += v * v * 0; }
  void report(bool* finite) const {
    if (!all(zero == 0)) __atomic_store_n(finite, false, __ATOMIC_RELAXED);
  }
};

// Filters of a group, padded to whole blocks.
int64_t padded_filters(const WinogradTask& a) {
  return round_up(a.conv.filters / a.conv.groups, kBlock);
}

template <int R>
void weights(const WinogradTask& a, int64_t begin, int64_t end) {
  const int64_t channels = a.conv.channels / a.conv.groups, filters = a.conv.filters / a.conv.groups;
  const int64_t blocks = padded_filters(a) / kBlock, taps = R * R;
  const int64_t filter_stride = (a.transposed ? 1 : channels) * taps;
  const int64_t channel_stride = (a.transposed ? filters : 1) * taps;
  Scratch<float> scratch(padded_size<float>(taps, kBlock));
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block % blocks * kBlock, count = min64(kBlock, filters - first);
    const float* from =
        static_cast<const float*>(a.weight) + block / blocks * filters * channels * taps + first * filter_stride;
    float* to = a.winograd_weight + block * kWinogradProducts * channels * kBlock;
    // One channel: (filter, tap) -> (tap, filter), for an input gradient with the taps reversed, -> (product, filter).
    for (int64_t c = 0; c < channels; ++c, from += channel_stride, to += kBlock) {
      read_pixels<float>(from, Channels{1, filter_stride, 1, count, kBlock}, taps, scratch + 0, kBlock);
      for (int64_t f = 0; f < kBlock; f += kLanes<float>) {
        Tile6x6 v = {};
        for (int t = 0; t < taps && f < count; ++t) {
          const int tap = a.transposed ? taps - 1 - t : t;
          v[t / R][t % R] = load<float>(scratch + tap * kBlock + f);
        }
        transform_weight<R>(v);
        store_domain(v, to + f, channels * kBlock);
      }
    }
  }
}

// The products of one tile, `stride` apart, and a group of filters -> its outputs, with bias and ReLU.
template <int R>
void transform_products(const WinogradTask& a, const typename WinogradTiles<R>::Outputs& tile, int64_t group,
                        const float* from, int64_t stride, FiniteCheck& check) {
  const int64_t filters = a.conv.filters / a.conv.groups;
  const float* bias = static_cast<const float*>(a.bias) + group * filters;
  float* out = static_cast<float*>(a.out) + tile.offset + group * filters;
  for (int64_t f = 0; f < filters; f += kLanes<float>) {
    Tile6x6 v;
    load_domain(v, from + f, stride);
    transform_output<WinogradTiles<R>::M>(v);
    const Vec<float> b = a.bias ? load<float>(bias + f) : Vec<float>{};
    for (int i = 0; i < tile.rows; ++i) {
      for (int j = 0; j < tile.columns; ++j) {
        const Vec<float> sum = v[i][j] + b;
        check.add(sum);
        store<float>(out + (i * a.conv.out_width + j) * a.conv.filters + f, a.relu ? relu<float>(sum) : sum);
      }
    }
  }
}

template <int R>
void forward(const WinogradTask& a, int64_t begin, int64_t end) {
  const int64_t channels = a.conv.channels / a.conv.groups, padded = padded_filters(a);          // of a group
  const int64_t inputs_size = kTiles * channels + kPad, products_size = kTiles * padded + kPad;  // of one product
  Scratch<float> inputs(kWinogradProducts * inputs_size), products(kWinogradProducts * products_size);
  WinogradTiles<R> tiles(a);
  FiniteCheck check;
  for (int64_t first = begin * kWinogradTask; first < end * kWinogradTask; first += kTiles) {
    const int64_t last = min64(first + kTiles, end * kWinogradTask);
    for (int64_t group = 0; group < a.conv.groups; ++group) {
      const int64_t channel = group * channels;
      for (int64_t t = first; t < last; ++t) {
        float* to = inputs + (t - first) * channels - channel;
        tiles.inputs(a.x, t, channel, channel + channels,
                     [&](int64_t c, const Tile6x6& v) { store_domain(v, to + c, inputs_size); });
      }
      // [tile][channel] x [channel][filter] for each of the 36 products.
      const float* weights = a.winograd_weight + group * padded * kWinogradProducts * channels;
      for (int64_t p = 0; p < kWinogradProducts; ++p) {
        for (int64_t f = 0; f < padded; f += kBlock) {
          for (int64_t t = 0; t < last - first; t += kRows) {
            multiply_in_parts<kRows, kPart>(inputs + p * inputs_size + t * channels, channels, 1,
                                            weights + (f * kWinogradProducts + p * kBlock) * channels, channels,
                                            products + p * products_size + t * padded + f, padded, false);
          }
        }
      }
      for (int64_t t = first; t < min64(last, tiles.count()); ++t) {
        transform_products<R>(a, tiles.outputs(t), group, products + (t - first) * padded, products_size, check);
      }
    }
  }
  check.report(a.finite);
}

// ---- weight and bias gradients

template <int R>
void grad_inputs(const WinogradTask& a, int64_t begin, int64_t end) {
  const Conv& conv = a.conv;
  const int64_t filters = conv.filters / conv.groups, padded = padded_filters(a);
  const int64_t plane = conv.groups * padded * a.tiles;
  WinogradTiles<R> tiles(a);
  for (int64_t t = begin; t < end; ++t) {
    // Inputs: a vector of channels of the tile -> its place in each of the 36 products.
    tiles.inputs(a.x, a.first + t, 0, conv.channels, [&](int64_t c, const Tile6x6& v) {
      store_domain(v, a.inputs + c * a.tiles + t * kLanes<float>, conv.channels * a.tiles);
    });
    // Gradients likewise, a vector of filters at a time, padded filters being zero.
    const auto [offset, rows, columns] = tiles.outputs(a.first + t);
    for (int64_t group = 0; group < conv.groups; ++group) {
      const float* grad = static_cast<const float*>(a.grad) + offset + group * filters;
      for (int64_t f = 0; f < padded; f += kLanes<float>) {
        Tile6x6 v = {};
        Vec<float> sum = {};
        for (int i = 0; i < rows && f < filters; ++i) {
          for (int j = 0; j < columns; ++j) {
            v[i][j] = load<float>(grad + (i * conv.out_width + j) * conv.filters + f);
            sum += v[i][j];
          }
        }
        transform_grad<WinogradTiles<R>::M>(v);
        const int64_t block = (group * padded + f) / kBlock * kBlock;
        float* to = a.grads + block * a.tiles + t * kBlock + f % kBlock;
        store_domain(v, to, plane);
        store<float>(to + kWinogradProducts * plane, sum);
      }
    }
  }
}

// Adds the sums of tiles, [tile][filter in block], of one block of filters to the bias gradient.
void add_bias(const WinogradTask& a, const float* sums, float* grad_bias, int64_t filters) {
  for (int64_t f = 0; f < min64(kBlock, filters); f += kLanes<float>) {
    Vec<float> total = a.first > 0 ? load<float>(grad_bias + f) : Vec<float>{};
    for (int64_t t = 0; t < a.tiles; t += kPart) {
      Vec<float> part = {};
      for (int64_t i = t; i < min64(t + kPart, a.tiles); ++i) part += load<float>(sums + i * kBlock + f);
      total += part;
    }
    store<float>(grad_bias + f, total);
  }
}

template <int R>
void grad_weights(const WinogradTask& a, int64_t begin, int64_t end) {
  const int64_t channels = a.conv.channels / a.conv.groups, filters = a.conv.filters / a.conv.groups, taps = R * R;
  const int64_t blocks = padded_filters(a) / kBlock;
  Scratch<float> scratch(padded_size<float>(taps, kBlock));
  FiniteCheck check;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block % blocks * kBlock, count = min64(kBlock, filters - first);
    const float* from = a.sums + block * kWinogradProducts * channels * kBlock;
    float* to = static_cast<float*>(a.grad_weight) + (block / blocks * filters + first) * channels * taps;
    // One channel: (product, filter) -> (tap, filter) -> (filter, tap).
    for (int64_t c = 0; c < channels; ++c, from += kBlock, to += taps) {
      for (int64_t f = 0; f < kBlock; f += kLanes<float>) {
        Tile6x6 v;
        load_domain(v, from + f, channels * kBlock);
        transform_weight_grad<R>(v);
        for (int tap = 0; tap < taps; ++tap) {
          check.add(v[tap / R][tap % R]);
          store<float>(scratch + tap * kBlock + f, v[tap / R][tap % R]);
        }
      }
      write_pixels<float>(static_cast<const float*>(scratch), kBlock, Channels{1, channels * taps, 1, count, kBlock},
                          taps, to);
    }
  }
  check.report(a.finite);
}

}  // namespace

#define ALEXNET_WINOGRAD_KERNEL(name, function)                                        \
  void name(const WinogradTask& a, int64_t begin, int64_t end) {                       \
    a.conv.kernel_size == 3 ? function<3>(a, begin, end) : function<5>(a, begin, end); \
  }
ALEXNET_WINOGRAD_KERNEL(winograd_weights, weights)
ALEXNET_WINOGRAD_KERNEL(winograd_forward, forward)
ALEXNET_WINOGRAD_KERNEL(winograd_grad_inputs, grad_inputs)
ALEXNET_WINOGRAD_KERNEL(winograd_grad_weights, grad_weights)

void winograd_grad_products(const WinogradTask& a, int64_t begin, int64_t end) {
  const Conv& conv = a.conv;
  const int64_t channels = conv.channels / conv.groups, filters = conv.filters / conv.groups;
  const int64_t blocks = padded_filters(a) / kBlock, plane = conv.groups * blocks * kBlock * a.tiles;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t block = task / kWinogradProducts, p = task % kWinogradProducts, group = block / blocks;
    const float* inputs = a.inputs + (p * conv.channels + group * channels) * a.tiles;
    const float* grads = a.grads + p * plane + block * kBlock * a.tiles;
    float* sums = a.sums + task * channels * kBlock;
    // [channel][tile] x [tile][filter]: a part of the tiles, which stays in the cache, for all channels.
    for (int64_t t = 0; t < a.tiles; t += kPart) {
      for (int64_t c = 0; c < channels; c += kRows) {
        const float* from = inputs + c / kLanes<float> * kLanes<float> * a.tiles + c % kLanes<float>;
        multiply_in_parts<kRows, kPart>(from + t * kLanes<float>, 1, kLanes<float>, grads + t * kBlock,
                                        min64(kPart, a.tiles - t), sums + c * kBlock, kBlock, a.first + t > 0);
      }
    }
    const int64_t first = block % blocks * kBlock;
    if (p == 0 && a.grad_bias != nullptr) {
      add_bias(a, grads + kWinogradProducts * plane, static_cast<float*>(a.grad_bias) + group * filters + first,
               filters - first);
    }
  }
}

}  // namespace alexnet_cuda::ALEXNET_CPU_LEVEL
