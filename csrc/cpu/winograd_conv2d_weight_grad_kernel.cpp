// The weight gradient of 3x3 and 5x5 convolutions with stride 1, in Winograd's way: the forward's (winograd_conv2d)
// transposed. A part of the batch's tiles at a time,
//
//   points  of the inputs, [point][vector of channels][tile][channel in vector], and
//           of the gradients, [point][block of filters][tile][filter in block], all of the part's;
//   sums    += inputs' x gradients' points over the tiles: [block of filters][point][channel][filter in block];
//
// and at the end the sums become weights. Every sum is added up in one order, whoever does it.
#include "winograd_tiles.h"

namespace alexnet_cuda::ALEXNET_CPU_LEVEL {
namespace {

constexpr int64_t kBlock = kFilters<float>;
constexpr int kChannels = kVectorBytes == 64 ? 8 : 4;  // of a tile of sums in registers
constexpr int64_t kSum = 64;                           // tiles that are summed up there

template <int R>
void points(const WinogradGradArgs& a, int64_t begin, int64_t end) {
  const Conv& conv = a.conv;
  const int64_t filters = conv.filters / a.groups, padded = round_up(filters, kBlock);
  WinogradTiles<R> tiles(conv, a.count);
  for (int64_t t = begin; t < end; ++t) {
    tiles.inputs(a.x, a.first + t, 0, conv.channels, [&](int64_t c, const Square& v) {
      store_points(v, a.inputs + c * a.tiles + t * kLanes<float>, conv.channels * a.tiles);
    });
    const auto [offset, rows, columns] = tiles.outputs(a.first + t);
    for (int64_t group = 0; group < a.groups; ++group) {
      for (int64_t f = 0; f < padded; f += kLanes<float>) {
        Square v = {};
        for (int i = 0; i < rows && f < filters; ++i) {
          for (int j = 0; j < columns; ++j) {
            v[i][j] = load<float>(a.grad + offset + (i * conv.out_width + j) * conv.filters + group * filters + f);
          }
        }
        grad_points<WinogradTiles<R>::M>(v);
        const int64_t block = (group * padded + f) / kBlock * kBlock;
        store_points(v, a.grads + block * a.tiles + t * kBlock + f % kBlock, a.groups * padded * a.tiles);
      }
    }
  }
}

// A task is a point of a block of filters.
void products(const WinogradGradArgs& a, int64_t begin, int64_t end) {
  const int64_t channels = a.conv.channels / a.groups, filters = round_up(a.conv.filters / a.groups, kBlock);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t block = task / kWinogradPoints, p = task % kWinogradPoints, group = block * kBlock / filters;
    const float* inputs = a.inputs + (p * a.conv.channels + group * channels) * a.tiles;
    const float* grads = a.grads + (p * a.groups * filters + block * kBlock) * a.tiles;
    float* sums = a.sums + task * channels * kBlock;
    for (int64_t t = 0; t < a.tiles; t += kSum) {
      for (int64_t c = 0; c < channels; c += kChannels) {
        const float* from = inputs + c / kLanes<float> * kLanes<float> * a.tiles + c % kLanes<float>;
        float* sum = sums + c * kBlock;
        Tile<float, kChannels> tile = {}, before = {};
        multiply<float, kChannels>(tile, from + t * kLanes<float>, 1, kLanes<float>, grads + t * kBlock, kBlock,
                                   lesser(kSum, a.tiles - t));
        if (a.first + t > 0) load_tile<float, kChannels>(before, sum, kBlock);
#pragma GCC unroll 8
        for (int i = 0; i < kChannels; ++i) tile.sum[i][0] += before.sum[i][0], tile.sum[i][1] += before.sum[i][1];
        store_tile<float, kChannels>(tile, sum, kBlock);
      }
    }
  }
}

// A task is a block of filters.
template <int R>
void weights(const WinogradGradArgs& a, int64_t begin, int64_t end) {
  const int64_t channels = a.conv.channels / a.groups, filters = a.conv.filters / a.groups, taps = R * R;
  const int64_t blocks = round_up(filters, kBlock) / kBlock;
  Scratch<float> scratch(room<float>(taps, kBlock));
  Vec<float> zero = {};
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block % blocks * kBlock, count = lesser(kBlock, filters - first);
    const float* from = a.sums + block * kWinogradPoints * channels * kBlock;
    float* to = a.weight + (block / blocks * filters + first) * channels * taps;
    for (int64_t c = 0; c < channels; ++c, from += kBlock, to += taps) {
      for (int64_t f = 0; f < kBlock; f += kLanes<float>) {
        Square v;
        load_points(v, from + f, channels * kBlock);
        weight_grads<R>(v);
        for (int tap = 0; tap < taps; ++tap) {
          const Vec<float> sum = v[tap / R][tap % R];
          zero += sum * sum * 0;
          store<float>(scratch + tap * kBlock + f, sum);
        }
      }
      write_pixels<float>(static_cast<const float*>(scratch), kBlock, Channels{1, channels * taps, 1, count, kBlock},
                          taps, to);
    }
  }
  if (!all_finite(zero)) __atomic_store_n(a.finite, false, __ATOMIC_RELAXED);
}

}  // namespace

void winograd_grad_points(const WinogradGradArgs& a, int64_t begin, int64_t end) {
  a.conv.kernel_size == 3 ? points<3>(a, begin, end) : points<5>(a, begin, end);
}

void winograd_grad_products(const WinogradGradArgs& a, int64_t begin, int64_t end) {
  products(a, begin, end);
}

void winograd_grad_weights(const WinogradGradArgs& a, int64_t begin, int64_t end) {
  a.conv.kernel_size == 3 ? weights<3>(a, begin, end) : weights<5>(a, begin, end);
}

}  // namespace alexnet_cuda::ALEXNET_CPU_LEVEL
