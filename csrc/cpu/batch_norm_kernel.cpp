// Batch normalisation with the statistics of the batch, optionally followed by ReLU: sums over each channel, and the
// pass that applies them, forward and backward.
//
// Memory: NHWC, channels a multiple of 16. A task is a strip of kNormStrip pixels; blocks of its channels are done one
// after the other, while the strip lies in the cache.
//
// Numerics: the forward sums differences from the channel's first pixel, so that a large mean cancels nothing. A strip
// is summed in the type of the sums, strips in double (backend.cpp).
#include "rows.h"

namespace alexnet_cuda::ALEXNET_CPU_LEVEL {
namespace {

// Calls f<N>(c) for blocks of N vectors of channels: four, then fewer.
template <class A, int N = 4, class F>
ALEXNET_INLINE void for_each_block(int64_t c, int64_t channels, F f) {
  for (; c + N * kLanes<A> <= channels; c += N * kLanes<A>) f.template operator()<N>(c);
  if constexpr (N > 1) for_each_block<A, N / 2>(c, channels, f);
}

// y = (x - mean) * scale + bias of N vectors of channels; of the gradient of y what passes ReLU.
template <class A, int N>
struct Affine {
  Vec<A> mean[N], scale[N], bias[N];
  bool relu;

  ALEXNET_INLINE Affine(const NormTask& a, int64_t c) : relu(a.relu) {
    for (int i = 0; i < N; ++i, c += kLanes<A>) {
      mean[i] = load<A>(static_cast<const A*>(a.mean) + c);
      scale[i] = load<A>(static_cast<const A*>(a.scale) + c);
      bias[i] = load<A>(static_cast<const A*>(a.bias) + c);
    }
  }
  ALEXNET_INLINE Vec<A> y(int i, Vec<A> x) const { return (x - mean[i]) * scale[i] + bias[i]; }
  ALEXNET_INLINE Vec<A> before_relu(int i, Vec<A> x, Vec<A> grad) const {
    return relu ? (y(i, x) <= Vec<A>{} ? Vec<A>{} : grad) : grad;
  }
};

// Forward: the sums of x - first pixel and of its square. Backward: those of the gradient before ReLU and of its
// product with x - mean.
template <class T, bool BACKWARD>
void sums(const NormTask& a, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const int64_t channels = a.images.channels, pixels = a.images.count * a.images.pixels();
  const T* const x = static_cast<const T*>(a.x);
  for (int64_t t = begin; t < end; ++t) {  // one strip
    const int64_t first = t * kNormStrip * channels, last = min64((t + 1) * kNormStrip, pixels) * channels;
    A* const out = static_cast<A*>(a.sums) + t * 3 * channels;
    for_each_block<A>(0, channels, [&]<int N>(int64_t c) {  // N vectors of channels down the strip's pixels
      const Affine<A, N> affine(a, c);
      Vec<A> pivot[N], sum[N] = {}, product[N] = {};
      for (int i = 0; i < N; ++i) pivot[i] = BACKWARD ? affine.mean[i] : load<A>(x + c + i * kLanes<A>);
      for (int64_t p = first + c; p < last; p += channels) {
        for (int i = 0; i < N; ++i) {
          const Vec<A> v = load<A>(x + p + i * kLanes<A>);
          Vec<A> term = v - pivot[i];
          if (BACKWARD) term = affine.before_relu(i, v, load<A>(static_cast<const T*>(a.grad) + p + i * kLanes<A>));
          sum[i] += term;
          product[i] += term * (v - pivot[i]);
        }
      }
      for (int i = 0; i < N; ++i) {
        store<A>(out + c + i * kLanes<A>, sum[i]);
        store<A>(out + channels + c + i * kLanes<A>, product[i]);
        store<A>(out + 2 * channels + c + i * kLanes<A>, pivot[i]);
      }
    });
  }
}

// Forward: y. Backward: dx = scale * (gradient before ReLU) + slope * (x - mean) + offset.
template <class T, bool BACKWARD>
void apply(const NormTask& a, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const int64_t channels = a.images.channels, pixels = a.images.count * a.images.pixels();
  const bool nontemporal = __is_same(A, T) && is_nontemporal<T>(a.images);
  for (int64_t t = begin; t < end; ++t) {  // one strip
    const int64_t first = t * kNormStrip * channels, last = min64((t + 1) * kNormStrip, pixels) * channels;
    for_each_block<A>(0, channels, [&]<int N>(int64_t c) {  // N vectors of channels down the strip's pixels
      const Affine<A, N> affine(a, c);
      Vec<A> slope[N], offset[N];
      for (int i = 0; i < N && BACKWARD; ++i) {
        slope[i] = load<A>(static_cast<const A*>(a.slope) + c + i * kLanes<A>);
        offset[i] = load<A>(static_cast<const A*>(a.offset) + c + i * kLanes<A>);
      }
      for (int64_t p = first + c; p < last; p += channels) {
        for (int i = 0; i < N; ++i) {
          const int64_t at = p + i * kLanes<A>;
          const Vec<A> x = load<A>(static_cast<const T*>(a.x) + at);
          Vec<A> v = affine.y(i, x);
          if (!BACKWARD && a.relu) v = relu<A>(v);
          if (BACKWARD) {
            const Vec<A> grad = affine.before_relu(i, x, load<A>(static_cast<const T*>(a.grad) + at));
            v = affine.scale[i] * grad + (slope[i] * (x - affine.mean[i]) + offset[i]);
          }
          T* const out = static_cast<T*>(a.out) + at;
          if constexpr (__is_same(A, T)) {
            nontemporal ? stream<A>(out, v) : store<A>(out, v);
          } else {
            store<A>(out, v);
          }
        }
      }
    });
  }
}

}  // namespace

ALEXNET_CPU_KERNEL_OF(batch_norm_sums, NormTask, sums<T, false>)
ALEXNET_CPU_KERNEL_OF(batch_norm_grad_sums, NormTask, sums<T, true>)
ALEXNET_CPU_KERNEL_OF(batch_norm_apply, NormTask, apply<T, false>)
ALEXNET_CPU_KERNEL_OF(batch_norm_input_grad, NormTask, apply<T, true>)

}  // namespace alexnet_cuda::ALEXNET_CPU_LEVEL
