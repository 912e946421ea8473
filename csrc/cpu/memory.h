// The CPU caching allocator. malloc takes large blocks from the system and gives them back, so that each output of
// AlexNet's first layer (37 MB at 32 images) costs 9,000 page faults, more time than the arithmetic. A few freed blocks
// stay here for the next request of about the same size.
#pragma once

#include <cstdint>
#include <memory>

namespace alexnet_cuda {

constexpr int64_t kMinCachedBytes = int64_t{1} << 20;  // smaller blocks stay in malloc's heap anyway

// Uninitialised memory, aligned to 64 bytes; release_memory() needs the same number of bytes.
void* allocate_memory(int64_t bytes);
void release_memory(void* data, int64_t bytes);

// The most bytes of freed blocks that are cached; the latest freed stay. Setting it returns the limit before.
int64_t set_cache_limit(int64_t bytes);
int64_t cache_limit();

// `count` uninitialised elements.
template <class T>
using Buffer = std::shared_ptr<T[]>;
template <class T>
Buffer<T> make_buffer(int64_t count) {
  const int64_t bytes = count * int64_t{sizeof(T)};
  return {static_cast<T*>(allocate_memory(bytes)), [bytes](T* data) { release_memory(data, bytes); }};
}

}  // namespace alexnet_cuda
