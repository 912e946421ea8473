// 3x3 and 5x5 convolutions with stride 1 in Winograd's way (winograd.h), which takes 2.6 times fewer products for
// AlexNet's. The weights become points once; then, group by group, some tiles of any images are worked on together:
//
//   inputs' points    [point][tile][channel]
//   products          [point][tile][filter]: for each point a matrix product with the weights' points
//
// A number that is not finite, or so large that others in its tile are lost beside it, always reaches those outputs
// that it belongs to: one look at the outputs tells whether all is well.
#include "winograd_tiles.h"

namespace alexnet_cuda::ALEXNET_CPU_LEVEL {
namespace {

constexpr int64_t kBlock = kFilters<float>;
constexpr int kRows = kVectorBytes == 64 ? 8 : 4;  // tiles whose sums stay in registers
constexpr int64_t kTiles = 64;                     // worked on together: the weights' points are read once for so many
constexpr int64_t kSum = 64;             // channels that are summed up in registers: shorter sums are more exact
constexpr int64_t kPad = kLanes<float>;  // so that the points of a tile are not all in one set of the cache

// Filters of a group, padded to whole blocks.
int64_t padded_filters(const WinogradConvArgs& a) {
  return round_up(a.conv.filters / a.groups, kBlock);
}

template <int R>
void weights(const WinogradConvArgs& a, int64_t begin, int64_t end) {
  const int64_t channels = a.conv.channels / a.groups, filters = a.conv.filters / a.groups;
  const int64_t blocks = padded_filters(a) / kBlock, taps = R * R;
  const int64_t filter_stride = (a.transposed ? 1 : channels) * taps;
  const int64_t channel_stride = (a.transposed ? filters : 1) * taps;
  Scratch<float> scratch(room<float>(taps, kBlock));
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block % blocks * kBlock, count = lesser(kBlock, filters - first);
    const float* from = a.weight + block / blocks * filters * channels * taps + first * filter_stride;
    float* to = a.points + block * kWinogradPoints * channels * kBlock;
    for (int64_t c = 0; c < channels; ++c, from += channel_stride, to += kBlock) {
      read_pixels<float>(from, Channels{1, filter_stride, 1, count, kBlock}, taps, scratch + 0, kBlock);
      for (int64_t f = 0; f < kBlock; f += kLanes<float>) {
        Square v = {};
        for (int t = 0; t < taps && f < count; ++t) {
          const int tap = a.transposed ? taps - 1 - t : t;
          v[t / R][t % R] = load<float>(scratch + tap * kBlock + f);
        }
        weight_points<R>(v);
        store_points(v, to + f, channels * kBlock);
      }
    }
  }
}

template <int R>
class Forward {
 public:
  explicit Forward(const WinogradConvArgs& a)
      : a_(a),
        channels_(a.conv.channels / a.groups),
        filters_(a.conv.filters / a.groups),
        padded_(padded_filters(a)),
        points_size_(kTiles * channels_ + kPad),
        products_size_(kTiles * padded_ + kPad),
        tiles_(a.conv, a.count),
        points_(kWinogradPoints * points_size_),
        products_(kWinogradPoints * products_size_) {}

  // Tiles [first, last), at most kTiles and whole tasks of them.
  void compute(int64_t first, int64_t last) {
    for (int64_t group = 0; group < a_.groups; ++group) {
      for (int64_t t = first; t < last; ++t) {
        float* to = points_ + (t - first) * channels_ - group * channels_;
        tiles_.inputs(a_.x, t, group * channels_, (group + 1) * channels_,
                      [&](int64_t c, const Square& v) { store_points(v, to + c, points_size_); });
      }
      multiply_points(group, last - first);
      for (int64_t t = first; t < lesser(last, tiles_.count()); ++t) {
        transform_products(t, group, products_ + (t - first) * padded_);
      }
    }
  }

  bool finite() const { return all_finite(zero_); }

 private:
  void multiply_points(int64_t group, int64_t count) {
    const float* weights = a_.points + group * padded_ * kWinogradPoints * channels_;
    for (int64_t p = 0; p < kWinogradPoints; ++p) {
      for (int64_t f = 0; f < padded_; f += kBlock) {
        for (int64_t t = 0; t < count; t += kRows) {
          multiply_tiles(points_ + p * points_size_ + t * channels_,
                         weights + (f * kWinogradPoints + p * kBlock) * channels_,
                         products_ + p * products_size_ + t * padded_ + f);
        }
      }
    }
  }

  ALEXNET_INLINE void multiply_tiles(const float* points, const float* weights, float* products) {
    for (int64_t c = 0; c < channels_; c += kSum) {
      Tile<float, kRows> tile = {};
      multiply<float, kRows>(tile, points + c, channels_, 1, weights + c * kBlock, kBlock, lesser(kSum, channels_ - c));
      if (c > 0) {
        Tile<float, kRows> sum;
        load_tile<float, kRows>(sum, products, padded_);
#pragma GCC unroll 8
        for (int p = 0; p < kRows; ++p) tile.sum[p][0] += sum.sum[p][0], tile.sum[p][1] += sum.sum[p][1];
      }
      store_tile<float, kRows>(tile, products, padded_);
    }
  }

  void transform_products(int64_t tile, int64_t group, const float* from) {
    const auto [offset, rows, columns] = tiles_.outputs(tile);
    float* out = a_.out + offset + group * filters_;
    for (int64_t f = 0; f < filters_; f += kLanes<float>) {
      Square v;
      load_points(v, from + f, products_size_);
      outputs<WinogradTiles<R>::M>(v);
      const Vec<float> bias = a_.bias ? load<float>(a_.bias + group * filters_ + f) : Vec<float>{};
      for (int i = 0; i < rows; ++i) {
        for (int j = 0; j < columns; ++j) {
          const Vec<float> sum = v[i][j] + bias;
          zero_ += sum * sum * 0;
          store<float>(out + (i * a_.conv.out_width + j) * a_.conv.filters + f, a_.relu ? relu<float>(sum) : sum);
        }
      }
    }
  }

  const WinogradConvArgs& a_;
  const int64_t channels_, filters_, padded_;  // of a group
  const int64_t points_size_, products_size_;
  WinogradTiles<R> tiles_;
  Scratch<float> points_, products_;
  Vec<float> zero_ = {};
};

template <int R>
void forward(const WinogradConvArgs& a, int64_t begin, int64_t end) {
  Forward<R> tiles(a);
  end *= kWinogradTask;
  for (int64_t t = begin * kWinogradTask; t < end; t += kTiles) tiles.compute(t, lesser(t + kTiles, end));
  if (!tiles.finite()) __atomic_store_n(a.finite, false, __ATOMIC_RELAXED);
}

}  // namespace

void winograd_conv2d_weights(const WinogradConvArgs& a, int64_t begin, int64_t end) {
  a.conv.kernel_size == 3 ? weights<3>(a, begin, end) : weights<5>(a, begin, end);
}

void winograd_conv2d(const WinogradConvArgs& a, int64_t begin, int64_t end) {
  a.conv.kernel_size == 3 ? forward<3>(a, begin, end) : forward<5>(a, begin, end);
}

}  // namespace alexnet_cuda::ALEXNET_CPU_LEVEL
