// The host side that convolutions share: blocks of filters; weights packed for conv.h, and the arguments.
#pragma once

#include "host.h"

namespace alexnet_cuda {

// Filters of one packed block: two vectors.
inline int64_t filter_block(DType dtype) {
  return 2 * vector_bytes() / (dtype == DType::kDouble ? 8 : 4);
}

inline int64_t blocks_of(int64_t n, int64_t block) {
  return (n + block - 1) / block;
}

// Weights [block][kernel row][tap][filter in block], taps being (kernel column, channel), in the type of the sums;
// filters are padded with zeros. The bias likewise. Owns what `args` points to.
struct PackedConv {
  Tensor x, weight, points, bias;
  ConvArgs args;
};

PackedConv pack_conv(const char* op, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                     int64_t stride, int64_t padding, bool ceil_mode);

}  // namespace alexnet_cuda
