// 3x3 and 5x5 convolutions with stride 1, and their input gradients, by Winograd's algorithm (winograd.h): for
// AlexNet's layers a 2.6th of the products. float32, channels_last.
//
// Memory, for one group of channels and kTiles tiles of any images at a time:
//   inputs     [product][tile][channel]
//   weights    [block of filters][product][channel][filter in block], transformed once
//   products   [product][tile][filter]: 36 matrix products
// Numerics: sums of kPart channels at a time. A number that is not finite, or so large that others in its tile are lost
// beside it, always reaches the outputs that depend on it; these are checked, and the caller computes the convolution
// in another way if one is not finite.
#include "winograd_tiles.h"

namespace alexnet_cuda::ALEXNET_CPU_LEVEL {
namespace {

constexpr int64_t kBlock = kFilterBlock<float>;
constexpr int kRows = kVectorBytes == 64 ? 8 : 4;  // tiles whose sums stay in registers
constexpr int64_t kTiles = 64;                     // the transformed weights are read once for so many
constexpr int kPart = 64;
constexpr int64_t kPad = kLanes<float>;  // keeps the 36 numbers of a tile out of one set of the cache

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

template <int R>
class Forward {
 public:
  explicit Forward(const WinogradTask& a)
      : a_(a),
        channels_(a.conv.channels / a.conv.groups),
        filters_(a.conv.filters / a.conv.groups),
        padded_(padded_filters(a)),
        inputs_size_(kTiles * channels_ + kPad),
        products_size_(kTiles * padded_ + kPad),
        tiles_(a),
        inputs_(kWinogradProducts * inputs_size_),
        products_(kWinogradProducts * products_size_) {}

  // Tiles [first, last), at most kTiles and whole tasks of them.
  void compute(int64_t first, int64_t last) {
    for (int64_t group = 0; group < a_.conv.groups; ++group) {
      const int64_t channel = group * channels_;
      for (int64_t t = first; t < last; ++t) {
        float* to = inputs_ + (t - first) * channels_ - channel;
        tiles_.inputs(a_.x, t, channel, channel + channels_,
                      [&](int64_t c, const Tile6x6& v) { store_domain(v, to + c, inputs_size_); });
      }
      multiply_tiles(group, last - first);
      for (int64_t t = first; t < min64(last, tiles_.count()); ++t) {
        transform_products(t, group, products_ + (t - first) * padded_);
      }
    }
  }

  FiniteCheck check;

 private:
  // [tile][channel] x [channel][filter] for each of the 36 products.
  void multiply_tiles(int64_t group, int64_t count) {
    const float* weights = a_.winograd_weight + group * padded_ * kWinogradProducts * channels_;
    for (int64_t p = 0; p < kWinogradProducts; ++p) {
      for (int64_t f = 0; f < padded_; f += kBlock) {
        for (int64_t t = 0; t < count; t += kRows) {
          multiply_in_parts<kRows, kPart>(inputs_ + p * inputs_size_ + t * channels_, channels_, 1,
                                          weights + (f * kWinogradProducts + p * kBlock) * channels_, channels_,
                                          products_ + p * products_size_ + t * padded_ + f, padded_, false);
        }
      }
    }
  }

  // Products of one tile -> its outputs, with bias and ReLU.
  void transform_products(int64_t tile, int64_t group, const float* from) {
    const auto [offset, rows, columns] = tiles_.outputs(tile);
    const float* bias = static_cast<const float*>(a_.bias) + group * filters_;
    float* out = static_cast<float*>(a_.out) + offset + group * filters_;
    for (int64_t f = 0; f < filters_; f += kLanes<float>) {
      Tile6x6 v;
      load_domain(v, from + f, products_size_);
      transform_output<WinogradTiles<R>::M>(v);
      const Vec<float> b = a_.bias ? load<float>(bias + f) : Vec<float>{};
      for (int i = 0; i < rows; ++i) {
        for (int j = 0; j < columns; ++j) {
          const Vec<float> sum = v[i][j] + b;
          check.add(sum);
          store<float>(out + (i * a_.conv.out_width + j) * a_.conv.filters + f, a_.relu ? relu<float>(sum) : sum);
        }
      }
    }
  }

  const WinogradTask& a_;
  const int64_t channels_, filters_, padded_;  // of a group
  const int64_t inputs_size_, products_size_;  // of one of the 36 products
  WinogradTiles<R> tiles_;
  Scratch<float> inputs_, products_;
};

template <int R>
void forward(const WinogradTask& a, int64_t begin, int64_t end) {
  Forward<R> tiles(a);
  end *= kWinogradTask;
  for (int64_t t = begin * kWinogradTask; t < end; t += kTiles) tiles.compute(t, min64(t + kTiles, end));
  tiles.check.report(a.finite);
}

}  // namespace

void winograd_weights(const WinogradTask& a, int64_t begin, int64_t end) {
  a.conv.kernel_size == 3 ? weights<3>(a, begin, end) : weights<5>(a, begin, end);
}

void winograd_forward(const WinogradTask& a, int64_t begin, int64_t end) {
  a.conv.kernel_size == 3 ? forward<3>(a, begin, end) : forward<5>(a, begin, end);
}

}  // namespace alexnet_cuda::ALEXNET_CPU_LEVEL
