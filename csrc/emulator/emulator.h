// Runs a CUDA kernel on the CPU, to test it and to step through it: the machine that device.h is written against.
//
// One thread block runs at a time. Each of its CUDA threads is a fiber with its own stack, and runs until it has to
// wait: at a barrier, or in a warp operation (whose last lane to arrive does the work for all). In which order the
// fibers run is chosen by set_order, and a correct kernel gives the same result for every order.
//
// Shared memory is watched byte by byte. An access is an error, reported as an emulator::Error that names the launch,
// block and thread, if it
//   - lies outside the array it was made through, or is misaligned;
//   - reads bytes that this block never wrote;
//   - conflicts with an access of another thread (one of the two a write) and no barrier lies between them;
//   - touches the destination of a cp.async that has not been waited for.
// Arrays in global memory lie between guards, which are looked at after every launch.
// So are barriers that threads reach at different places, and deadlocks. Not modelled: the memory order of different
// warps through global memory, proxy fences, clusters, TMA, and time.
#pragma once

#include <cstdint>
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

using Place = std::source_location;

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Order { kAscending, kDescending, kRandom };
void set_order(Order order, unsigned seed);

enum class State { kReady, kInBarrier, kInWarp, kInWarpgroup, kDone };

// "Everything that thread u did up to its time clock[u]"; an empty vector is the beginning of time.
using Knowledge = std::vector<uint32_t>;

struct Copy {
  uint32_t destination;
  const void* source;  // null: zeros
  int group;
};

struct Thread {
  dim3 index;
  unsigned number;  // in the block
  State state;
  Place place;  // of the barrier or operation it waits in
  void* stack_pointer;
  uint32_t clock;   // advances when others may learn what this thread has done
  Knowledge known;  // what it knows of the others since the last __syncthreads
  std::vector<Copy> copies;
  int copy_groups;
};

struct Block {
  dim3 grid, size, index;
  uint32_t dynamic_bytes;
};

extern Thread* self;  // the running CUDA thread; in gdb: break ... if emulator::self->index.x == 5
extern Block block;

[[noreturn]] void fail(const std::string& what);

// Runs body() once per thread of the grid.
void run(const Place& launched_at, dim3 grid, dim3 block_size, size_t dynamic_bytes, const std::function<void()>& body);

// ---- rendezvous ----------------------------------------------------------------------------------------------------

void barrier(const Place& place);

// All lanes of the warp named in `mask` (or all 128 threads of the warpgroup) pass an argument; the last one to arrive
// runs work(arguments by lane, null for absent lanes); then all go on.
using Work = void (*)(void** arguments);
void warp_operation(unsigned mask, void* argument, Work work, const Place& place);
void warpgroup_operation(void* argument, Work work, const Place& place);
// These two also order the threads' accesses to shared memory.
void warp_barrier(unsigned mask, const Place& place);
void warpgroup_barrier(const Place& place);

// ---- shared memory -------------------------------------------------------------------------------------------------

// A byte offset into the block's shared memory, and the array [begin, end) that it must stay in.
struct SharedRange {
  int64_t offset;
  uint32_t begin, end;
};

SharedRange dynamic_shared();
SharedRange static_shared(const void* key, uint32_t bytes);  // the same array for every thread that passes this key
SharedRange shared_at(uint32_t address);                     // bounds: all of shared memory

// Checks the access of `bytes` bytes by this thread, takes note of it, and says where they are. (The reads of a wgmma
// belong to no single thread and leave no tag.)
const unsigned char* read_shared(const SharedRange& at, uint32_t bytes, bool leave_tag = true);
unsigned char* write_shared(const SharedRange& at, uint32_t bytes);

void start_copy(const SharedRange& destination, const void* source);  // cp.async of 16 bytes
void finish_copies(int groups_left);

// A multiplication that a warpgroup has started: done (by `work`) when it is waited for.
struct Multiplication {
  float* sums[128];
  const uint32_t* a[128];
  uint64_t b;
  void (*work)(const Multiplication&);
};
void start_multiplication(const Multiplication& multiplication);
void commit_multiplications();
void finish_multiplications(int groups_left);

// ---- global memory -------------------------------------------------------------------------------------------------

// Device memory between two guards. It is full of 0xff at first, a NaN in every format; a changed guard of any array is
// an error of the kernel that ran.
class Array {
 public:
  explicit Array(int64_t bytes, int64_t offset = 0);  // `offset` bytes behind a multiple of 256
  ~Array();
  Array(const Array&) = delete;

  const int64_t bytes;
  std::vector<unsigned char> storage;
  unsigned char* data;
};

// ---- between emulator.cpp (fibers and rendezvous) and the memories -------------------------------------------------

extern std::vector<Thread> threads;
void wait_as(State state, const Place& place);  // hands over to the other fibers until this one is made ready
void begin_block();
void begin_epoch();                           // after __syncthreads: all that was done before is known to all
void publish(Thread& thread, Knowledge& to);  // the thread's work so far, and what it knows of others
std::string name_of(const dim3& index);
std::string changed_guard();  // empty, or of which array

}  // namespace emulator
