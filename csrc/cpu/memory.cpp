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

struct Kept {
  std::mutex mutex;
  std::vector<Block> blocks;  // oldest first
  int64_t bytes = 0;
  std::atomic<int64_t> limit{int64_t{512} << 20};

  void drop_to(int64_t most) {
    size_t n = 0;
    for (; bytes > most; ++n) {
      bytes -= blocks[n].bytes;
      ::operator delete(blocks[n].data, kAlign);
    }
    blocks.erase(blocks.begin(), blocks.begin() + n);
  }
};

Kept& kept() {
  static Kept& instance = *new Kept;  // never destroyed: tensors may outlive this library's other statics
  return instance;
}

// Blocks come in steps of an eighth of their size at most, so that sizes that differ a little share them.
int64_t block_bytes(int64_t bytes) {
  int64_t step = kLeastKept / 8;
  while (16 * step <= bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

}  // namespace

// Whoever finds the list busy goes past it: nobody waits, not even in a child process that was forked while another
// thread held the lock.
void* take_memory(int64_t bytes) {
  bytes = block_bytes(bytes);
  {
    Kept& k = kept();
    const std::unique_lock<std::mutex> lock(k.mutex, std::try_to_lock);
    if (lock) {
      const auto latest =
          std::find_if(k.blocks.rbegin(), k.blocks.rend(), [&](const Block& b) { return b.bytes == bytes; });
      if (latest != k.blocks.rend()) {
        void* data = latest->data;
        k.blocks.erase(std::next(latest).base());
        k.bytes -= bytes;
        return data;
      }
    }
  }
  return ::operator new(bytes, kAlign);
}

void give_memory(void* data, int64_t bytes) {
  bytes = block_bytes(bytes);
  Kept& k = kept();
  const std::unique_lock<std::mutex> lock(k.mutex, std::try_to_lock);
  const int64_t limit = k.limit;
  if (!lock || bytes > limit) return ::operator delete(data, kAlign);
  k.drop_to(limit - bytes);
  k.blocks.push_back({data, bytes});
  k.bytes += bytes;
}

int64_t set_kept_memory(int64_t limit) {
  Kept& k = kept();
  const std::lock_guard<std::mutex> lock(k.mutex);
  const int64_t before = k.limit.exchange(limit);
  k.drop_to(limit);
  return before;
}

int64_t kept_memory_limit() {
  return kept().limit;
}

}  // namespace alexnet_cuda
