#include "memory.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace alexnet_cuda {
namespace {

constexpr int64_t kLeast = int64_t{1} << 20;  // smaller blocks stay in malloc's heap anyway
constexpr std::align_val_t kAlign{64};

struct Block {
  void* data;
  int64_t bytes;
};

struct Kept {
  std::mutex mutex;
  std::vector<Block> blocks;  // oldest first
  int64_t bytes = 0;
  int64_t limit = int64_t{512} << 20;

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
  int64_t step = kLeast / 8;
  while (16 * step <= bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

}  // namespace

// Whoever finds the list busy goes past it: nobody waits, not even in a child process that was forked while another
// thread held the lock.
void* take_memory(int64_t bytes) {
  if (bytes < kLeast) return ::operator new(bytes, kAlign);
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
  if (bytes >= kLeast) {
    bytes = block_bytes(bytes);
    Kept& k = kept();
    const std::unique_lock<std::mutex> lock(k.mutex, std::try_to_lock);
    if (lock && bytes <= k.limit) {
      k.drop_to(k.limit - bytes);
      k.blocks.push_back({data, bytes});
      k.bytes += bytes;
      return;
    }
  }
  ::operator delete(data, kAlign);
}

void set_kept_memory(int64_t limit) {
  Kept& k = kept();
  const std::lock_guard<std::mutex> lock(k.mutex);
  k.limit = limit;
  k.drop_to(limit);
}

int64_t kept_memory_limit() {
  Kept& k = kept();
  const std::lock_guard<std::mutex> lock(k.mutex);
  return k.limit;
}

}  // namespace alexnet_cuda
