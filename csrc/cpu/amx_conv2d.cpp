// 11x11 convolutions with stride 4 of three channels in bfloat16 by the matrix unit of Intel's CPUs (AMX).
//
// Forward: a kernel row covers 33 contiguous numbers of an input row with interleaved channels, and the next pixel's
// begin 12 further on. So 16 pixels x 32 taps of a kernel row are a tile where they lie, with 24 bytes between its
// rows. The eleven 33rd taps are gathered into a twelfth tile. Each is multiplied by tiles of 32 taps x 16 filters, and
// up to six tiles of 16 pixels x 16 filters of float32 sums stay in the unit.
//
// Weight gradient: a product over pixels. Input rows lie as [tap of a kernel row][pixel], one after the other, so that
// the next kernel row's taps follow those of this one, and 16 of the 363 taps x 32 pixels are a tile anywhere among
// them. The sums of 32 taps x 32 filters stay in the unit for some output rows.
#include "kernels.h"

#ifdef ALEXNET_CUDA_AMX
#include "amx.h"

namespace alexnet_cuda::amx {
namespace {

constexpr int kSums = 6;  // tiles 0 to 5; tile 6 holds pixels, tile 7 weights

// DO(0) ... DO(N - 1); the instructions name tiles by literals.
#define FOR_EACH_SUM(N, DO)          \
  DO(0) DO(1) if constexpr (N > 2) { \
    DO(2) DO(3)                      \
  }                                  \
  if constexpr (N > 4) {             \
    DO(4) DO(5)                      \
  }

// 16 pixels from `first` on, N tiles of filters.
template <int N>
void row(const ConvRow& a, int64_t first, const BFloat16* weight, const float* bias, float* out) {
  out += first * a.stride;
#define LOAD(T) _tile_loadd(T, bias + 16 * T, 0);
  FOR_EACH_SUM(N, LOAD)
  for (int k = 0; k < 12; ++k, weight += 512) {
    if (k < 11) {
      _tile_loadd(6, a.rows[k] + 12 * first, 24);
    } else {
      _tile_loadd(6, a.last_taps + 32 * first, 64);
    }
#define MULTIPLY(T)                          \
  _tile_loadd(7, weight + 12 * 512 * T, 64); \
  _tile_dpbf16ps(T, 6, 7);
    FOR_EACH_SUM(N, MULTIPLY)
  }
#define STORE(T) _tile_stored(T, out + 16 * T, 4 * a.stride);
  FOR_EACH_SUM(N, STORE)
}

}  // namespace

void conv_row(const ConvRow& a) {
  const TileConfiguration configuration;
  for (int64_t f = 0; f < a.filters; f += 16 * kSums) {
    const BFloat16* weight = a.weight + f / 16 * 12 * 512;
    const int64_t tiles = (a.filters - f) / 16;
    const auto run = tiles >= kSums ? &row<kSums> : tiles == 4 ? &row<4> : &row<2>;
    // The last tile of a row overlaps the one before, so that it ends with the row.
    for (int64_t w = 0; w < a.width; w += 16) {
      run(a, w + 16 < a.width ? w : a.width - 16, weight, a.bias + f, a.out + f);
    }
  }
}

void add_weight_grad(const ConvWeightGrad& a) {
  const TileConfiguration configuration;
  const int64_t stride = 4 * a.filters, parts = a.pixels / 32;
  for (int64_t f = 0; f < a.filters; f += 32) {
    for (int64_t tap = 0; tap < 363; tap += 32) {
      float* sums = a.sums + tap * a.filters + f;
      _tile_loadd(0, sums, stride);
      _tile_loadd(1, sums + 16, stride);
      _tile_loadd(2, sums + 16 * a.filters, stride);
      _tile_loadd(3, sums + 16 * a.filters + 16, stride);
      for (int64_t row = 0; row < a.rows; ++row) {
        const BFloat16* inputs = a.inputs + (row * 4 * 33 + tap) * a.pixels;
        const BFloat16* grads = a.grads + (f / 16 * kRows + row) * parts * 512;
        for (int64_t part = 0; part < parts; ++part, inputs += 32, grads += 512) {
          _tile_loadd(4, inputs, 2 * a.pixels);
          _tile_loadd(6, grads, 64);
          _tile_loadd(7, grads + kRows * parts * 512, 64);
          _tile_loadd(5, inputs + 16 * a.pixels, 2 * a.pixels);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
      _tile_stored(0, sums, stride);
      _tile_stored(1, sums + 16, stride);
      _tile_stored(2, sums + 16 * a.filters, stride);
      _tile_stored(3, sums + 16 * a.filters + 16, stride);
    }
  }
}

}  // namespace alexnet_cuda::amx

#else  // nor is has_amx() true

namespace alexnet_cuda::amx {
void conv_row(const ConvRow&) {}
void add_weight_grad(const ConvWeightGrad&) {}
}  // namespace alexnet_cuda::amx
#endif
