// The weight gradient of a linear layer, 151 MB for AlexNet's first one: torch's matrix product into memory of the CPU
// caching allocator, since mapping that much new memory takes longer than the product.
#include <array>

#include "backend.h"

namespace alexnet_cuda {
namespace {

Tensor linear_weight_grad(const Tensor& grad, const Tensor& x) {
  using torch::stable::detail::from;
  Tensor grad_weight = Cpu::allocate(x, {grad.size(1), x.size(1)}, MemoryFormat::Contiguous);
  std::array<StableIValue, 3> stack = {from(torch::stable::transpose(grad, 0, 1)), from(x), from(grad_weight)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace
}  // namespace alexnet_cuda

STABLE_TORCH_LIBRARY_IMPL(alexnet_cuda, CPU, m) {
  m.impl("_linear_weight_grad", TORCH_BOX(&alexnet_cuda::linear_weight_grad));
}
