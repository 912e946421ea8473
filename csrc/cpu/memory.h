// Memory for results. malloc takes large blocks from the system and gives them back, so that each result of AlexNet's
// first layer (37 MB at 32 images) costs 9,000 page faults, more time than the arithmetic. A few freed blocks are kept
// here for the next result of about the same size.
#pragma once

#include <cstdint>

namespace alexnet_cuda {

constexpr int64_t kLeastKept = int64_t{1} << 20;  // smaller blocks stay in malloc's heap anyway

// At least kLeastKept `bytes` of uninitialised memory, aligned to 64; give_memory() gets the same number.
void* take_memory(int64_t bytes);
void give_memory(void* data, int64_t bytes);

// The most bytes kept while nobody uses them; with 0 results come from torch's allocator. The latest freed stay.
// Setting it returns what it was.
int64_t set_kept_memory(int64_t limit);
int64_t kept_memory_limit();

}  // namespace alexnet_cuda
