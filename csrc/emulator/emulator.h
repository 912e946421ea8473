// A machine that runs CUDA kernels on the CPU, for tests and debuggers. device.h and tensor_cores.h are written for it.
//
// One thread block runs at a time. Each of its CUDA threads is a fiber with its own stack and runs until it has to
// wait: at a barrier, or in a warp operation, which the last lane to arrive computes for all. set_order chooses the
// order in which fibers run; a correct kernel gives the same result for every order.
//
// Every access to shared memory is checked byte by byte, and arrays in global memory lie between guards that are
// checked after every launch. docs/emulator.md lists the mistakes that are found. Each is reported as an
// emulator::Error that names the launch, block and thread. Not modelled: the memory order of different warps through
// global memory, proxy fences, clusters, TMA, and time.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulator {

using Location = std::source_location;

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Order { kAscending, kDescending, kRandom };
void set_order(Order order, unsigned seed);

enum class State { kReady, kInBarrier, kInWarp, kInWarpgroup, kDone };

// Of every thread u, the clock up to which u's accesses are ordered before those of this thread; empty: all zeros.
using VectorClock = std::vector<uint32_t>;

struct AsyncCopy {
  uint32_t destination;
  const void* source;  // null: zeros
  int group;
};

struct Thread {
  dim3 index;
  unsigned number = 0;  // in the block
  State state = State::kReady;
  Location at = {};       // the barrier or operation that it waits in
  uint32_t clock = 1;     // advances at every synchronisation, starts anew at __syncthreads
  VectorClock seen = {};  // by synchronisation of warps and warpgroups since the last __syncthreads
  std::vector<AsyncCopy> copies = {};
  int copy_groups = 0;
};

struct Block {
  dim3 grid, size, index;
  uint32_t dynamic_bytes;
};

extern Thread* self;  // the running CUDA thread; in gdb: break ... if emulator::self->index.x == 5
extern Block block;

[[noreturn]] void fail(const std::string& what);

// Runs body() once per thread of the grid.
void run(const Location& at, dim3 grid, dim3 block_size, size_t dynamic_bytes, const std::function<void()>& body);

// ---- collective operations -----------------------------------------------------------------------------------------

void barrier(const Location& at);

// The lanes of a warp in `mask` (or the 128 threads of a warpgroup) each pass an argument. The last one to arrive runs
// work(arguments by lane, null for absent lanes), then all continue.
using Work = void (*)(void** arguments);
void warp_operation(unsigned mask, void* argument, Work work, const Location& at);
void warpgroup_operation(void* argument, Work work, const Location& at);
// The same with typed arguments: body(lane), where lane(l) is the argument of lane l; it captures nothing.
template <class Lane, class Body>
void warp_operation(unsigned mask, Lane& mine, const Location& at, Body) {
  warp_operation(mask, &mine, [](void** lanes) { Body{}([&](int l) { return static_cast<Lane*>(lanes[l]); }); }, at);
}
// These two also order the threads' accesses to shared memory.
void warp_barrier(unsigned mask, const Location& at);
void warpgroup_barrier(const Location& at);

// ---- shared memory -------------------------------------------------------------------------------------------------

// A byte offset into the block's shared memory, and the bounds [begin, end) of the array it belongs to.
struct SharedRange {
  int64_t offset;
  uint32_t begin, end;
};

SharedRange static_shared(const void* key, uint32_t bytes);  // one array per key and block
SharedRange shared_at(uint32_t address);                     // bounds: all of shared memory

// Checks and records an access of this thread and returns the address of its bytes. (Reads of a wgmma belong to no
// single thread and are not recorded.)
const unsigned char* read_shared(const SharedRange& range, uint32_t bytes, bool record = true);
unsigned char* write_shared(const SharedRange& range, uint32_t bytes);

void start_copy(const SharedRange& destination, const void* source);  // cp.async of 16 bytes
void finish_copies(int groups_left);

// The products of this warpgroup by commit group, of which the last is open. They are computed when waited for.
std::deque<std::vector<std::function<void()>>>& wgmma_groups();
void finish_wgmma(int groups_left);

// ---- global memory -------------------------------------------------------------------------------------------------

// Device memory between two guards, filled with 0xff (NaN in every format). A kernel that changes a guard of any array
// is in error.
class Array {
 public:
  explicit Array(int64_t bytes, int64_t offset = 0);  // data: `offset` bytes past a multiple of 256
  ~Array();
  Array(const Array&) = delete;

  const int64_t bytes;
  std::vector<unsigned char> storage;
  unsigned char* data;
};

// ---- internal: between emulator.cpp and the memories ---------------------------------------------------------------

extern std::vector<Thread> threads;
void begin_block();
void begin_epoch();  // __syncthreads: orders all accesses before it and all after it
// Synchronisation of fewer threads: adds the thread's own accesses, and those it has seen, to `clock`.
void release(Thread& thread, VectorClock& clock);
std::string name_of(const dim3& index);
std::string changed_guard();  // where, or empty

}  // namespace emulator
