// The CPU caching allocator. malloc takes large blocks from the system and gives them back, so that each output of
// AlexNet's first layer (37 MB at 32 images) costs 9,000 page faults, more time than the arithmetic. A few freed blocks
// stay here for the next request of about the same size.
#pragma once

#include <cstdint>

namespace alexnet_cuda {

constexpr int64_t kMinCachedBytes = int64_t{1} << 20;  // smaller blocks stay in malloc's heap anyway

// Uninitialised memory, aligned to 64 bytes; release_memory() needs the same number of bytes.
void* allocate_memory(int64_t bytes);
void release_memory(void* data, int64_t bytes);

// The most bytes of freed blocks that are cached; the latest freed stay. Setting it returns the limit before.
int64_t set_cache_limit(int64_t bytes);
int64_t cache_limit();

// `count` uninitialised elements for the duration of one operator.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : bytes_(count * int64_t{sizeof(T)}), data_(static_cast<T*>(allocate_memory(bytes_))) {}
  ~Buffer() { release_memory(data_, bytes_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() const { return data_; }

 private:
  int64_t bytes_;
  T* data_;
};

}  // namespace alexnet_cuda
