// Shared memory under watch: see emulator.h for what is checked.
#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <utility>

#include "emulator.h"

namespace emulator {

namespace {

constexpr uint32_t kSharedBytes = 256 << 10;

// ---- who knows what ------------------------------------------------------------------------------------------------

// Every byte of shared memory has a tag for its last write and for two readers: the time of the access. __syncthreads
// starts a new epoch for all threads; within one, each thread has its own clock.
struct Tags {
  uint64_t write = 0, read[2] = {};
  uint32_t copying = 0;  // the block, by its first epoch, whose cp.async fills this byte
};
uint32_t epoch = 0, first_epoch = 0;  // of this block; epochs are never used again, so no tag has to be cleared

uint64_t tag_of(const Thread& t) {
  return uint64_t{epoch} << 32 | uint64_t{t.clock} << 10 | t.number;
}
uint32_t thread_of(uint64_t tag) {
  return tag & 1023;
}

bool before_now(uint64_t tag) {
  if (tag >> 32 < epoch || thread_of(tag) == self->number) return true;
  const uint32_t clock = static_cast<uint32_t>(tag) >> 10;
  return !self->known.empty() && clock <= self->known[thread_of(tag)];
}

alignas(1024) unsigned char memory[kSharedBytes];
Tags tags[kSharedBytes];
uint32_t allocated;
std::map<const void*, SharedRange> static_arrays;

struct Multiplications {
  std::deque<std::pair<Multiplication, int>> queue;
  int groups = 0;
};
std::map<unsigned, Multiplications> multiplications;  // by warpgroup

void check_bounds(const SharedRange& at, uint32_t bytes) {
  if (at.offset < at.begin || at.offset + bytes > at.end)
    fail("shared memory access out of bounds: bytes " + std::to_string(at.offset - at.begin) + " to " +
         std::to_string(at.offset - at.begin + bytes - 1) + " of an array of " + std::to_string(at.end - at.begin));
  if (at.offset % bytes)
    fail("misaligned shared memory access: " + std::to_string(bytes) + " bytes at offset " + std::to_string(at.offset));
}

[[noreturn]] void race(const char* what, uint64_t tag, int64_t byte) {
  fail(std::string("race in shared memory: ") + what + " thread " + name_of(threads[thread_of(tag)].index) +
       " at byte " + std::to_string(byte) + " of an array without a barrier between them");
}

}  // namespace

void learn(Knowledge& known, const Knowledge& other) {
  if (other.empty()) return;
  if (known.empty()) known.resize(threads.size());
  for (size_t i = 0; i < known.size(); ++i) known[i] = std::max(known[i], other[i]);
}

// What a thread tells others at a point of synchronisation: all it knows, and its own work so far.
void publish(Thread& t, Knowledge& to) {
  if (to.empty()) to.resize(threads.size());
  learn(to, t.known);
  to[t.number] = std::max(to[t.number], t.clock);
  ++t.clock;
}

void begin_block() {
  multiplications.clear();
  static_arrays.clear();
  allocated = block.dynamic_bytes;
  first_epoch = ++epoch;
}

void begin_epoch() {
  ++epoch;
  for (Thread& t : threads) {
    t.clock = 1;
    t.known.clear();
  }
}

SharedRange dynamic_shared() {
  return {0, 0, block.dynamic_bytes};
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

const unsigned char* read_shared(const SharedRange& at, uint32_t bytes, bool leave_tag) {
  check_bounds(at, bytes);
  const uint64_t now = tag_of(*self);
  for (int64_t i = at.offset; i < at.offset + bytes; ++i) {
    Tags& t = tags[i];
    if (t.write >> 32 < first_epoch)
      fail("read of uninitialised shared memory at byte " + std::to_string(i - at.begin) + " of an array");
    if (t.copying == first_epoch) fail("read of shared memory that a cp.async, not waited for yet, is filling");
    if (!before_now(t.write)) race("this thread reads what was written by", t.write, i - at.begin);
    if (leave_tag) t.read[before_now(t.read[0]) ? 0 : 1] = now;
  }
  return memory + at.offset;
}

unsigned char* write_shared(const SharedRange& at, uint32_t bytes) {
  check_bounds(at, bytes);
  for (int64_t i = at.offset; i < at.offset + bytes; ++i) {
    Tags& t = tags[i];
    if (t.copying == first_epoch) fail("write to shared memory that a cp.async, not waited for yet, is filling");
    if (!before_now(t.write)) race("this thread overwrites what was written by", t.write, i - at.begin);
    for (uint64_t reader : t.read)
      if (!before_now(reader)) race("this thread overwrites what was read by", reader, i - at.begin);
    t.write = tag_of(*self);
  }
  return memory + at.offset;
}

void start_copy(const SharedRange& destination, const void* source) {
  if (reinterpret_cast<uintptr_t>(source) % 16) fail("cp.async from an address that is not a multiple of 16");
  write_shared(destination, 16);
  for (int i = 0; i < 16; ++i) tags[destination.offset + i].copying = first_epoch;
  self->copies.push_back({static_cast<uint32_t>(destination.offset), source, self->copy_groups});
}

void finish_copies(int groups_left) {
  std::erase_if(self->copies, [&](const Copy& c) {
    if (c.group >= self->copy_groups - groups_left) return false;
    for (int i = 0; i < 16; ++i) tags[c.destination + i].copying = 0;
    unsigned char* to = write_shared(shared_at(c.destination), 16);
    c.source ? static_cast<void>(std::memcpy(to, c.source, 16)) : static_cast<void>(std::memset(to, 0, 16));
    return true;
  });
}

void start_multiplication(const Multiplication& m) {
  Multiplications& mine = multiplications[self->number / 128];
  mine.queue.emplace_back(m, mine.groups);
}

void commit_multiplications() {
  ++multiplications[self->number / 128].groups;
}

void finish_multiplications(int groups_left) {
  Multiplications& mine = multiplications[self->number / 128];
  while (!mine.queue.empty() && mine.queue.front().second < mine.groups - groups_left) {
    mine.queue.front().first.work(mine.queue.front().first);
    mine.queue.pop_front();
  }
}

}  // namespace emulator
