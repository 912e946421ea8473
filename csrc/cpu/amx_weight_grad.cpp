// Weight gradients of convolutions with stride 1 in bfloat16, channels_last, by the matrix unit of Intel's CPUs (AMX).
// They are matrix products whose inner dimension, all pixels of the batch, is by far the longest.
//
// The images of a part of the batch are laid out as one row of positions, with `padding` columns of zeros before each
// row of pixels and `padding` rows of zeros before each image: what lies beyond the right or bottom edge is the zeros
// before the next. A gradient of an output lies at the position of its window's first pixel, so that tap (r, s) reads
// inputs which are all r * pitch + s positions further on:
//   sums[tap][channel][filter] =
//     sum over positions of inputs[channel][position + r * pitch + s] * grads[position][filter]
//
// The unit multiplies a tile of 16 channels x 32 positions by one of 32 positions x 16 filters and adds the product to
// 16 x 16 float32 sums, in 16 cycles. Two tiles of channels and two of filters make four products of four loads. For
// kSlice positions these 32 KB stay in the first-level cache while all taps are computed.
#include "kernels.h"

#ifdef ALEXNET_CUDA_AMX
#include "amx.h"

namespace alexnet_cuda::amx {
namespace {

constexpr int64_t kSlice = 256;
constexpr int64_t kTile = 256;  // sums

// 16 dwords, each the number at p and the one at q.
__m512i pairs(const BFloat16* p, const BFloat16* q) {
  const auto load = [](const BFloat16* from) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  };
  return _mm512_or_si512(load(p), _mm512_slli_epi32(load(q), 16));
}

// The 16 x 16 dwords, transposed.
void transpose(__m512i (&v)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      v[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
      v[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
  }
  // Lane l of v[4 * i + j] now has rows 4 * i ... 4 * i + 3 of column 4 * l + j.
  for (int j = 0; j < 4; ++j) {
    const __m512i even0 = _mm512_shuffle_i32x4(v[j], v[4 + j], 0x88), odd0 = _mm512_shuffle_i32x4(v[j], v[4 + j], 0xdd);
    const __m512i even1 = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0x88),
                  odd1 = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0xdd);
    t[j] = _mm512_shuffle_i32x4(even0, even1, 0x88);
    t[4 + j] = _mm512_shuffle_i32x4(odd0, odd1, 0x88);
    t[8 + j] = _mm512_shuffle_i32x4(even0, even1, 0xdd);
    t[12 + j] = _mm512_shuffle_i32x4(odd0, odd1, 0xdd);
  }
  for (int i = 0; i < 16; ++i) v[i] = t[i];
}

// Adds the products of this part to the sums of Channels x Filters tiles. Tiles 0 to 3 hold the sums, 4 and 5 inputs,
// 6 and 7 gradients.
template <int Channels, int Filters>
void multiply(const AmxTask& a, const BFloat16* inputs, const BFloat16* grads, float* sums) {
  const int taps = a.conv.kernel_size;
  for (int64_t first = 0; first < a.positions; first += kSlice) {
    const int64_t last = first + kSlice < a.positions ? first + kSlice : a.positions;
    for (int tap = 0; tap < taps * taps; ++tap) {
      float* tile = sums + tap * 4 * kTile;
      _tile_loadd(0, tile, 64);
      if constexpr (Filters == 2) _tile_loadd(1, tile + kTile, 64);
      if constexpr (Channels == 2) _tile_loadd(2, tile + 2 * kTile, 64);
      if constexpr (Channels == 2 && Filters == 2) _tile_loadd(3, tile + 3 * kTile, 64);
      const BFloat16* shifted = inputs + tap / taps * a.pitch + tap % taps;
      for (int64_t p = first; p < last; p += 32) {
        _tile_loadd(4, shifted + p, 2 * a.stride);
        _tile_loadd(6, grads + p * 16, 64);
        if constexpr (Filters == 2) _tile_loadd(7, grads + (a.positions + p) * 16, 64);
        if constexpr (Channels == 2) _tile_loadd(5, shifted + 16 * a.stride + p, 2 * a.stride);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (Filters == 2) _tile_dpbf16ps(1, 4, 7);
        if constexpr (Channels == 2) _tile_dpbf16ps(2, 5, 6);
        if constexpr (Channels == 2 && Filters == 2) _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, tile, 64);
      if constexpr (Filters == 2) _tile_stored(1, tile + kTile, 64);
      if constexpr (Channels == 2) _tile_stored(2, tile + 2 * kTile, 64);
      if constexpr (Channels == 2 && Filters == 2) _tile_stored(3, tile + 3 * kTile, 64);
    }
  }
}

// Adds the gradients of 16 filters at all positions to the sums of the bias gradient.
void add_up(const AmxTask& a, const BFloat16* grads, float* sums) {
  __m512 sum = {};
  for (int64_t p = 0; p < a.positions; p += 2, grads += 32) {
    const __m512i pair = _mm512_loadu_si512(grads);
    sum += _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
    sum += _mm512_castsi512_ps(_mm512_and_si512(pair, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
  }
  _mm512_storeu_ps(sums, _mm512_loadu_ps(sums) + sum);
}

// 16 numbers to the nearest of bfloat16, ties to even.
void round_to(const float* from, BFloat16* to) {
  const __m512i bits = _mm512_castps_si512(_mm512_loadu_ps(from)), one = _mm512_set1_epi32(1);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
  const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(_mm512_srli_epi32(sum, 16)));
}

}  // namespace

void pack(const AmxTask& a, int64_t begin, int64_t end) {
  const Conv& c = a.conv;
  const auto* x = static_cast<const BFloat16*>(a.x);
  const auto* grad = static_cast<const BFloat16*>(a.grad);
  int64_t n = a.first + 32 * begin / a.span, row = 32 * begin % a.span / a.pitch, column = 32 * begin % a.pitch;
  for (int64_t block = begin; block < end; ++block) {
    const BFloat16 *pixels[32], *outputs[32];
    for (int i = 0; i < 32; ++i) {
      const int64_t h = row - c.padding, w = column - c.padding;
      const bool image = n < a.first + a.count, pixel = image && h >= 0 && h < c.height && w >= 0 && w < c.width;
      const bool output = image && row < c.out_height && column < c.out_width;
      pixels[i] = pixel ? x + ((n * c.height + h) * c.width + w) * c.channels : a.zeros;
      outputs[i] = output ? grad + ((n * c.out_height + row) * c.out_width + column) * c.filters : a.zeros;
      if (++column == a.pitch) column = 0, ++row;
      if (row * a.pitch == a.span) row = 0, ++n;
    }
    for (int64_t channel = 0; channel < c.channels; channel += 16) {
      __m512i v[16];
      for (int i = 0; i < 16; ++i) v[i] = pairs(pixels[2 * i] + channel, pixels[2 * i + 1] + channel);
      transpose(v);
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(a.inputs + (channel + i) * a.stride + 32 * block, v[i]);
    }
    if (32 * block >= a.positions) continue;  // inputs alone, which the last windows read
    for (int64_t filter = 0; filter < c.filters; filter += 16) {
      BFloat16* to = a.grads + filter * a.positions + 32 * block * 16;
      for (int i = 0; i < 16; ++i, to += 32) {
        _mm512_storeu_si512(to, pairs(outputs[2 * i] + filter, outputs[2 * i + 1] + filter));
      }
    }
  }
}

void multiply(const AmxTask& a, int64_t begin, int64_t end) {
  const TileConfiguration configuration;
  const int taps = a.conv.kernel_size * a.conv.kernel_size;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t group = t / (a.down * a.across), channel = t / a.across % a.down * 32, filter = t % a.across * 32;
    const BFloat16* inputs = a.inputs + (group * a.channels + channel) * a.stride;
    const BFloat16* grads = a.grads + (group * a.filters + filter) * a.positions;
    float* sums = a.sums + t * taps * 4 * kTile;
    for (int64_t f = 0; f < 32 && filter + f < a.filters && channel == 0 && a.grad_bias; f += 16) {
      add_up(a, grads + f * a.positions, a.bias_sums + group * a.filters + filter + f);
    }
    const bool channels32 = channel + 16 < a.channels, filters32 = filter + 16 < a.filters;
    if (channels32) {
      filters32 ? multiply<2, 2>(a, inputs, grads, sums) : multiply<2, 1>(a, inputs, grads, sums);
    } else {
      filters32 ? multiply<1, 2>(a, inputs, grads, sums) : multiply<1, 1>(a, inputs, grads, sums);
    }
  }
}

void write(const AmxTask& a, int64_t begin, int64_t end) {
  const int taps = a.conv.kernel_size * a.conv.kernel_size;
  __m512 zero = {};  // NaN where a sum is not finite
  for (int64_t first = 16 * begin; first < 16 * end; first += 16) {
    const int64_t group = first / a.filters, filter = first % a.filters;
    auto* to = static_cast<BFloat16*>(a.grad_weight) + first * a.channels * taps;
    BFloat16 numbers[16];
    for (int64_t channel = 0; channel < a.channels; ++channel) {
      const int64_t t = (group * a.down + channel / 32) * a.across + filter / 32;
      const float* from =
          a.sums + t * taps * 4 * kTile + (channel % 32 / 16 * 2 + filter % 32 / 16) * kTile + channel % 16 * 16;
      for (int tap = 0; tap < taps; ++tap, from += 4 * kTile, ++to) {
        zero += _mm512_loadu_ps(from) * 0.0f;
        round_to(from, numbers);
        for (int i = 0; i < 16; ++i) to[i * a.channels * taps] = numbers[i];
      }
    }
    if (a.grad_bias) round_to(a.bias_sums + first, static_cast<BFloat16*>(a.grad_bias) + first);
  }
  if (_mm512_cmp_ps_mask(zero, zero, _CMP_UNORD_Q)) __atomic_store_n(a.finite, false, __ATOMIC_RELAXED);
}

}  // namespace alexnet_cuda::amx

#else  // nor is has_amx() true

namespace alexnet_cuda::amx {
void pack(const AmxTask&, int64_t, int64_t) {}
void multiply(const AmxTask&, int64_t, int64_t) {}
void write(const AmxTask&, int64_t, int64_t) {}
}  // namespace alexnet_cuda::amx
#endif
