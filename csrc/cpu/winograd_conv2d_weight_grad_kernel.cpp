// Weight and bias gradients of 3x3 and 5x5 convolutions with stride 1 by Winograd's algorithm: the forward
// (winograd_conv2d_kernel.cpp) transposed. float32, channels_last.
//
// Memory, for a part of the batch's tiles at a time:
//   inputs   [product][vector of channels][tile][channel in vector]
//   grads    [product][block of filters][tile][filter in block]; a 37th plane has the plain sum of each tile's
//   gradients sums     [block of filters][product][channel][filter in block] += inputs x grads over the tiles: 36
//   matrix products
// After the last part the sums are transformed into weight gradients.
// Numerics: sums of kPart tiles at a time, in an order that depends on the sizes alone. The results are checked as in
// the forward.
#include "winograd_tiles.h"

namespace alexnet_cuda::ALEXNET_CPU_LEVEL {
namespace {

constexpr int64_t kBlock = kFilterBlock<float>;
constexpr int kChannels = kVectorBytes == 64 ? 8 : 4;  // whose sums stay in registers
constexpr int kPart = 64;

template <int R>
void inputs(const WinogradTask& a, int64_t begin, int64_t end) {
  const Conv& conv = a.conv;
  const int64_t filters = conv.filters / conv.groups, padded = round_up(filters, kBlock);
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

void products(const WinogradTask& a, int64_t begin, int64_t end) {
  const Conv& conv = a.conv;
  const int64_t channels = conv.channels / conv.groups, filters = conv.filters / conv.groups;
  const int64_t blocks = round_up(filters, kBlock) / kBlock, plane = conv.groups * blocks * kBlock * a.tiles;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t block = task / kWinogradProducts, p = task % kWinogradProducts, group = block / blocks;
    const float* inputs = a.inputs + (p * conv.channels + group * channels) * a.tiles;
    const float* grads = a.grads + p * plane + block * kBlock * a.tiles;
    float* sums = a.sums + task * channels * kBlock;
    // [channel][tile] x [tile][filter]: a part of the tiles, which stays in the cache, for all channels.
    for (int64_t t = 0; t < a.tiles; t += kPart) {
      for (int64_t c = 0; c < channels; c += kChannels) {
        const float* from = inputs + c / kLanes<float> * kLanes<float> * a.tiles + c % kLanes<float>;
        multiply_in_parts<kChannels, kPart>(from + t * kLanes<float>, 1, kLanes<float>, grads + t * kBlock,
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

template <int R>
void weights(const WinogradTask& a, int64_t begin, int64_t end) {
  const int64_t channels = a.conv.channels / a.conv.groups, filters = a.conv.filters / a.conv.groups, taps = R * R;
  const int64_t blocks = round_up(filters, kBlock) / kBlock;
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

void winograd_grad_inputs(const WinogradTask& a, int64_t begin, int64_t end) {
  a.conv.kernel_size == 3 ? inputs<3>(a, begin, end) : inputs<5>(a, begin, end);
}

void winograd_grad_products(const WinogradTask& a, int64_t begin, int64_t end) {
  products(a, begin, end);
}

void winograd_grad_weights(const WinogradTask& a, int64_t begin, int64_t end) {
  a.conv.kernel_size == 3 ? weights<3>(a, begin, end) : weights<5>(a, begin, end);
}

}  // namespace alexnet_cuda::ALEXNET_CPU_LEVEL
