#include "memory.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <new>
#include <vector>

namespace alexnet_cuda {
namespace {

constexpr std::align_val_t kAlign{64};

struct Block {
  void* data;
  int64_t bytes;
};

struct Cache {
  std::mutex mutex;
  std::vector<Block> blocks;  // oldest first
  int64_t bytes = 0;
  std::atomic<int64_t> limit{int64_t{512} << 20};

  void shrink_to(int64_t most) {
    size_t n = 0;
    for (; bytes > most; ++n) {
      bytes -= blocks[n].bytes;
      ::operator delete(blocks[n].data, kAlign);
    }
    blocks.erase(blocks.begin(), blocks.begin() + n);
  }
};

Cache& cache() {
  static Cache& instance = *new Cache;  // never destroyed: tensors may outlive this library's other statics
  return instance;
}

// Sizes are rounded up by at most an eighth, so that requests that differ a little share blocks.
int64_t block_bytes(int64_t bytes) {
  int64_t step = kMinCachedBytes / 8;
  while (16 * step <= bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

}  // namespace

// If the lock is taken the cache is bypassed: nobody waits for memory, not even in a child process that was forked
// while another thread held the lock.
void* allocate_memory(int64_t bytes) {
  if (bytes < kMinCachedBytes) return ::operator new(bytes, kAlign);
  bytes = block_bytes(bytes);
  {
    Cache& c = cache();
    const std::unique_lock<std::mutex> lock(c.mutex, std::try_to_lock);
    if (lock) {
      const auto latest = std::ranges::find(c.blocks.rbegin(), c.blocks.rend(), bytes, &Block::bytes);
      if (latest != c.blocks.rend()) {
        void* data = latest->data;
        c.blocks.erase(std::next(latest).base());
        c.bytes -= bytes;
        return data;
      }
    }
  }
  return ::operator new(bytes, kAlign);
}

void release_memory(void* data, int64_t bytes) {
  if (bytes < kMinCachedBytes) return ::operator delete(data, kAlign);
  bytes = block_bytes(bytes);
  Cache& c = cache();
  const std::unique_lock<std::mutex> lock(c.mutex, std::try_to_lock);
  const int64_t limit = c.limit;
  if (!lock || bytes > limit) return ::operator delete(data, kAlign);
  c.shrink_to(limit - bytes);
  c.blocks.push_back({data, bytes});
  c.bytes += bytes;
}

int64_t set_cache_limit(int64_t bytes) {
  bytes = std::max<int64_t>(bytes, 0);
  Cache& c = cache();
  const std::lock_guard<std::mutex> lock(c.mutex);
  const int64_t before = c.limit.exchange(bytes);
  c.shrink_to(bytes);
  return before;
}

int64_t cache_limit() {
  return cache().limit;
}

}  // namespace alexnet_cuda
