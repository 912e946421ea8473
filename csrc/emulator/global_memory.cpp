// Arrays between guards: see emulator.h.
#include <set>

#include "emulator.h"

namespace emulator {

namespace {

constexpr int64_t kGuard = 8192;  // bytes

std::set<const Array*>& arrays() {
  static auto& all = *new std::set<const Array*>;  // never destroyed: tensors may outlive this library's statics
  return all;
}

}  // namespace

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
