// Checked shared memory and arrays in global memory between guards: see emulator.h.
#include <algorithm>
#include <cstring>
#include <map>
#include <set>
#include <utility>

#include "emulator.h"

namespace emulator {

namespace {

constexpr uint32_t kSharedBytes = 256 << 10;
constexpr int64_t kGuard = 8192;  // bytes

// ---- race detection by vector clocks -------------------------------------------------------------------------------

// Every byte of shared memory has a tag for its last write and for two readers: epoch, clock and thread of the access.
// __syncthreads starts a new epoch for all threads; within an epoch each thread has its own clock.
struct Tags {
  uint64_t write = 0, read[2] = {};
  uint32_t copying = 0;  // the block, by its first epoch, whose cp.async fills this byte
};
uint32_t epoch = 0, first_epoch = 0;  // of this block; epochs are never reused, so tags need no clearing

uint64_t tag_of(const Thread& t) {
  return uint64_t{epoch} << 32 | uint64_t{t.clock} << 10 | t.number;
}
uint32_t thread_of(uint64_t tag) {
  return tag & 1023;
}

// Whether the access happened before whatever this thread does now.
bool is_ordered(uint64_t tag) {
  if (tag >> 32 < epoch || thread_of(tag) == self->number) return true;
  const uint32_t clock = static_cast<uint32_t>(tag) >> 10;
  return !self->seen.empty() && clock <= self->seen[thread_of(tag)];
}

alignas(1024) unsigned char memory[kSharedBytes];
Tags tags[kSharedBytes];
uint32_t allocated;
std::map<const void*, SharedRange> static_arrays;

std::map<unsigned, std::deque<std::vector<std::function<void()>>>> wgmma_queues;  // by warpgroup

std::set<const Array*>& arrays() {
  static auto& all = *new std::set<const Array*>;  // never destroyed: tensors may outlive this library's statics
  return all;
}

void check_bounds(const SharedRange& range, uint32_t bytes) {
  if (range.offset < range.begin || range.offset + bytes > range.end)
    fail("shared memory access out of bounds: bytes " + std::to_string(range.offset - range.begin) + " to " +
         std::to_string(range.offset - range.begin + bytes - 1) + " of an array of " +
         std::to_string(range.end - range.begin));
  if (range.offset % bytes)
    fail("misaligned shared memory access: " + std::to_string(bytes) + " bytes at offset " +
         std::to_string(range.offset));
}

[[noreturn]] void race(const char* what, uint64_t tag, int64_t byte) {
  fail(std::string("race in shared memory: ") + what + " thread " + name_of(threads[thread_of(tag)].index) +
       " at byte " + std::to_string(byte) + " of an array without a barrier between them");
}

}  // namespace

void release(Thread& t, VectorClock& clock) {
  if (clock.empty()) clock.resize(threads.size());
  for (size_t i = 0; i < t.seen.size(); ++i) clock[i] = std::max(clock[i], t.seen[i]);
  clock[t.number] = std::max(clock[t.number], t.clock);
  ++t.clock;
}

void begin_block() {
  wgmma_queues.clear();
  static_arrays.clear();
  allocated = block.dynamic_bytes;
  first_epoch = ++epoch;
}

void begin_epoch() {
  ++epoch;
  for (Thread& t : threads) {
    t.clock = 1;
    t.seen.clear();
  }
}

SharedRange static_shared(const void* key, uint32_t bytes) {
  const auto found = static_arrays.find(key);
  if (found != static_arrays.end()) return found->second;
  const uint32_t begin = (allocated + 127) / 128 * 128;
  allocated = begin + bytes;
  if (allocated > kSharedBytes) fail("more than 256 KB of shared memory");
  return static_arrays[key] = {begin, begin, allocated};
}

SharedRange shared_at(uint32_t address) {
  return {address, 0, allocated};
}

const unsigned char* read_shared(const SharedRange& range, uint32_t bytes, bool record) {
  check_bounds(range, bytes);
  const uint64_t now = tag_of(*self);
  for (int64_t i = range.offset; i < range.offset + bytes; ++i) {
    Tags& t = tags[i];
    if (t.write >> 32 < first_epoch)
      fail("read of uninitialised shared memory at byte " + std::to_string(i - range.begin) + " of an array");
    if (t.copying == first_epoch) fail("read of shared memory that a cp.async, not waited for yet, is filling");
    if (!is_ordered(t.write)) race("this thread reads what was written by", t.write, i - range.begin);
    if (record) t.read[is_ordered(t.read[0]) ? 0 : 1] = now;
  }
  return memory + range.offset;
}

unsigned char* write_shared(const SharedRange& range, uint32_t bytes) {
  check_bounds(range, bytes);
  for (int64_t i = range.offset; i < range.offset + bytes; ++i) {
    Tags& t = tags[i];
    if (t.copying == first_epoch) fail("write to shared memory that a cp.async, not waited for yet, is filling");
    if (!is_ordered(t.write)) race("this thread overwrites what was written by", t.write, i - range.begin);
    for (uint64_t reader : t.read)
      if (!is_ordered(reader)) race("this thread overwrites what was read by", reader, i - range.begin);
    t.write = tag_of(*self);
  }
  return memory + range.offset;
}

void start_copy(const SharedRange& destination, const void* source) {
  if (reinterpret_cast<uintptr_t>(source) % 16) fail("cp.async from an address that is not a multiple of 16");
  write_shared(destination, 16);
  for (int i = 0; i < 16; ++i) tags[destination.offset + i].copying = first_epoch;
  self->copies.push_back({static_cast<uint32_t>(destination.offset), source, self->copy_groups});
}

void finish_copies(int groups_left) {
  std::erase_if(self->copies, [&](const AsyncCopy& c) {
    if (c.group >= self->copy_groups - groups_left) return false;
    for (int i = 0; i < 16; ++i) tags[c.destination + i].copying = 0;
    unsigned char* to = write_shared(shared_at(c.destination), 16);
    c.source ? static_cast<void>(std::memcpy(to, c.source, 16)) : static_cast<void>(std::memset(to, 0, 16));
    return true;
  });
}

std::deque<std::vector<std::function<void()>>>& wgmma_groups() {
  auto& queue = wgmma_queues[self->number / 128];
  if (queue.empty()) queue.emplace_back();
  return queue;
}

void finish_wgmma(int groups_left) {
  for (auto& queue = wgmma_groups(); queue.size() > groups_left + 1u; queue.pop_front())
    for (const auto& product : queue.front()) product();
}

// ---- global memory -------------------------------------------------------------------------------------------------

Array::Array(int64_t bytes, int64_t offset)
    : bytes(bytes), storage(bytes + offset + 2 * kGuard + 256, 0xff), data(storage.data() + kGuard) {
  data += -reinterpret_cast<uintptr_t>(data) % 256 + offset;
  arrays().insert(this);
}

Array::~Array() {
  arrays().erase(this);
}

std::string changed_guard() {
  for (const Array* a : arrays()) {
    const unsigned char* const end = a->storage.data() + a->storage.size();
    for (const unsigned char* p = a->storage.data(); p < end; ++p) {
      if (p == a->data) p += a->bytes;
      if (*p != 0xff) return "at byte " + std::to_string(p - a->data) + " of " + std::to_string(a->bytes);
    }
  }
  return "";
}

}  // namespace emulator
