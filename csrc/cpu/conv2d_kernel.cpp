// 11x11 convolution with stride 4: packing of weights, the forward (rows by conv.h or winograd_rows.h), the weight
// gradient and the input gradient.
// Numerics: sums in float32 (float64 for float64), in an order that depends on the sizes alone.
#include "amx_rows.h"
#include "winograd_rows.h"

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
    const T* bias = static_cast<const T*>(a.bias) + first;
    A* packed_bias = static_cast<A*>(a.packed_bias) + first;
    for (int64_t f = 0; f < kBlock; ++f) packed_bias[f] = a.bias && f < count ? to_accumulator<A>(bias[f]) : A{};
    if constexpr (__is_same(T, BFloat16)) {
      if (a.amx) {
        pack_amx_weight(weight, a.amx_weight + first / 16 * 12 * 512);
        continue;
      }
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

// ---- weight gradient, added up over output rows: [tap][filter] += input x gradient over the pixels of a row. One more
// row of these sums, of the gradient alone, is the bias gradient. Taps are counted as (kernel row, kernel column,
// channel); filters are padded to whole blocks.

// P taps of one kernel row from `first` on, one block of filters from `f` on.
template <class A, int P>
inline void weight_tile(const ConvTask& a, const A* input, Pixels<const A> grad, int64_t first, int64_t f, A* sum,
                        int64_t sum_stride) {
  Tile<A, P> tile;
  A* sums = sum + first * sum_stride + f;
  for_each_vector<A, P>(tile, sums, sum_stride, [](Vec<A>& v, const A* p) { v = load<A>(p); });
  multiply<A, P>(tile, input + first, 1, kStride * a.conv.channels, grad.data + f, grad.stride, a.conv.out_width);
  for_each_vector<A, P>(tile, sums, sum_stride, [](Vec<A>& v, A* p) { store<A>(p, v); });
}

template <class T>
class DirectWeightGrad {
  using A = Accumulator<T>;

 public:
  static constexpr int kRows = 1;

  explicit DirectWeightGrad(const ConvTask& a) : a_(a) {}

  // Output row `o` of image n.
  void add(int64_t n, int64_t o, A* sum) {
    const int64_t taps = kSize * a_.conv.channels, padded = channels_.padded;
    input_.advance(n, o);
    const Pixels<const A> grad = grad_row<T>(a_, channels_, n, o, grad_ + 0);
    // Each kernel row's taps, as many at a time as there are registers.
    for (int i = 0; i < kSize; ++i, sum += taps * padded) {
      const A* input = input_[o * kStride + i];
      for (int64_t f = 0; f < padded; f += kFilterBlock<A>) {
        int64_t first = 0;
        for (; first + kTileRows <= taps; first += kTileRows) {
          weight_tile<A, kTileRows>(a_, input, grad, first, f, sum, padded);
        }
        for (; first + 3 <= taps; first += 3) weight_tile<A, 3>(a_, input, grad, first, f, sum, padded);
        for (; first < taps; ++first) weight_tile<A, 1>(a_, input, grad, first, f, sum, padded);
      }
    }
    // The bias gradient.
    for (int64_t f = 0; f < padded; f += kLanes<A>) {
      Vec<A> row = {};
      for (int64_t p = 0; p < a_.conv.out_width; ++p) row += load<A>(grad[p] + f);
      store<A>(sum + f, load<A>(sum + f) + row);
    }
  }

  void finish(A*) {}

 private:
  const ConvTask& a_;
  InputRows<T> input_{a_};
  const Channels channels_ = output_channels<A>(a_);
  Scratch<A> grad_{padded_size<A>(a_.conv.out_width, channels_.padded)};
};

// Winograd's algorithm transposed: the sum over all tiles of (B' input B) x (A grad A'), [product][16 C][filter], and
// at the end G' sum G. Rows with values out of range go to DirectWeightGrad.
template <class T>
class WinogradWeightGrad {
 public:
  static constexpr int kRows = 4;

  explicit WinogradWeightGrad(const ConvTask& a) : a_(a) { clear(); }

  // Output rows [first, first + 4) of image n, or fewer at the end of the image.
  void add(int64_t n, int64_t first, float* sum) {
    const Conv& conv = a_.conv;
    const int64_t rows = min64(kRows, conv.out_height - first), padded = channels_.padded;
    Pixels<const float> grad[kRows];
    Bits<float> mask = Bits<float>{} - 1;
    for (int64_t i = 0; i < rows; ++i) {
      grad[i] = grad_row<T>(a_, channels_, n, first + i, rows_ + i * row_size_);
      for (int64_t p = 0; p < conv.out_width; ++p) mask &= within_range(grad[i][p], channels_.per_group);
    }
    if (!all(mask) || !input_.compute(n, first)) {
      for (int64_t i = 0; i < rows; ++i) direct_.add(n, first + i, sum);
      return;
    }
    for (int64_t f = 0; f < padded; f += kBlock) {
      transform(grad, rows, f, sum + kSize * kSize * conv.channels * padded + f);
      // [channel][tile] x [tile][filter] for each of the 36 products, added to the sum.
      float* to = sum_ + f;
      for (int64_t p = 0; p < kWinogradProducts; ++p) {
        for (int64_t c = 0; c < input_.channels; c += kChannels, to += kChannels * padded) {
          multiply_in_parts<kChannels, 64>(input_[p] + c, 1, input_.channels, grads_ + p * input_.tiles * kBlock,
                                           input_.tiles, to, padded, true);
        }
      }
    }
  }

  // Adds the sum in the Winograd domain to `sum` and clears it.
  void finish(float* sum) {
    const int64_t padded = channels_.padded;
    for (int64_t c = 0; c < input_.channels; ++c) {
      for (int64_t f = 0; f < padded; f += kLanes<float>) {
        Tile6x6 v;
        load_domain(v, sum_ + c * padded + f, input_.channels * padded);
        transform_weight_grad<3>(v);
        for_each_tap(c, a_.conv.channels, [&](int i, int j, int64_t tap) {
          float* to = sum + tap * padded + f;
          store<float>(to, load<float>(to) + v[i][j]);
        });
      }
    }
    clear();
  }

 private:
  static constexpr int64_t kBlock = kFilterBlock<float>;
  static constexpr int kChannels = kVectorBytes == 64 ? 8 : 4;

  void clear() {
    for (int64_t i = 0; i < sum_size_; ++i) sum_[i] = 0;
  }

  // Gradients of a block of filters, tiles of 4x4 -> [product][tile][filter]; their sum is added to `bias_sum`.
  void transform(const Pixels<const float>* grad, int64_t rows, int64_t filter, float* bias_sum) {
    Vec<float> bias[2] = {};
    for (int64_t t = 0; t < input_.tiles; ++t) {
      const int64_t columns = min64(4, a_.conv.out_width - 4 * t);
      for (int64_t f = 0; f < kBlock; f += kLanes<float>) {
        Tile6x6 v = {};
        for (int i = 0; i < rows; ++i) {
          for (int j = 0; j < columns; ++j) v[i][j] = load<float>(grad[i][4 * t + j] + filter + f);
        }
        for (int i = 0; i < rows; ++i) bias[f / kLanes<float>] += (v[i][0] + v[i][1]) + (v[i][2] + v[i][3]);
        transform_grad<4>(v);
        store_domain(v, grads_ + t * kBlock + f, input_.tiles * kBlock);
      }
    }
    store<float>(bias_sum, load<float>(bias_sum) + bias[0]);
    store<float>(bias_sum + kLanes<float>, load<float>(bias_sum + kLanes<float>) + bias[1]);
  }

  const ConvTask& a_;
  DirectWeightGrad<T> direct_{a_};
  WinogradInput<T> input_{a_};
  const Channels channels_ = output_channels<float>(a_);
  const int64_t row_size_ = padded_size<float>(a_.conv.out_width, channels_.padded);
  const int64_t sum_size_ = kWinogradProducts * input_.channels * channels_.padded;
  Scratch<float> rows_{kRows * row_size_}, grads_{kWinogradProducts * input_.tiles * kBlock}, sum_{sum_size_};
};

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
  // Neighbours overlap, so one pixel at a time.
  const int64_t step = kStride * a.conv.channels;
  for_each_vector<A, P>(tile, dx + first * step, step, [](Vec<A>& sum, A* to) { store<A>(to, load<A>(to) + sum); });
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
    ring.advance(first, last,
                 [&](int64_t o, int64_t slot) { return grad_row<T>(a, c, n, o, grads + slot * row_size); });
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
  dispatch_rows<DirectRows, WinogradRows, AmxRows>(a, [&]<class T, class Rows>() { forward<T, Rows>(a, begin, end); });
}

void conv2d_weight_grad(const ConvTask& a, int64_t begin, int64_t end) {
  dispatch_rows<DirectWeightGrad, WinogradWeightGrad, AmxWeightGrad>(
      a, [&]<class T, class Grad>() { weight_grad<Accumulator<T>, Grad>(a, begin, end); });
}

}  // namespace alexnet_cuda::ALEXNET_CPU_LEVEL
