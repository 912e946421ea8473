#include "emulator.h"

#include <algorithm>
#include <bit>
#include <exception>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <tuple>

#if defined(__x86_64__) && !defined(ALEXNET_CUDA_UCONTEXT)  // which one can define to try the portable path
// Saves the registers that a function must preserve on the stack of the old fiber, and takes them from the new one's.
// rdi: where to save the old stack pointer; rsi: the new one.
extern "C" [[gnu::naked, gnu::noipa]] void emulator_switch(void**, void*) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
}
#else
#include <ucontext.h>  // portable, and ten times slower: each switch is a system call
#define ALEXNET_CUDA_UCONTEXT 1
#endif

namespace emulator {

Thread* self = nullptr;
Block block;
std::vector<Thread> threads;

std::string name_of(const dim3& d) {
  std::string name = "(";
  return name.append(std::to_string(d.x))
      .append(", ")
      .append(std::to_string(d.y))
      .append(", ")
      .append(std::to_string(d.z) + ")");
}

namespace {

constexpr size_t kStackBytes = 64 << 10;

Order fiber_order = Order::kAscending;
std::minstd_rand fiber_random;

std::vector<unsigned char> stacks;
std::function<void()> kernel;
Place launched_at;
std::exception_ptr error;

// ---- fibers --------------------------------------------------------------------------------------------------------

#if ALEXNET_CUDA_UCONTEXT
ucontext_t scheduler;
std::vector<ucontext_t> contexts;
void to_scheduler() {
  swapcontext(&contexts[self->number], &scheduler);
}
void switch_to(Thread& thread) {
  swapcontext(&scheduler, &contexts[thread.number]);
}
#else
void* scheduler;
void to_scheduler() {
  emulator_switch(&self->stack_pointer, scheduler);
}
void switch_to(Thread& thread) {
  emulator_switch(&scheduler, thread.stack_pointer);
}
#endif

void resume(Thread& thread) {
  self = &thread;
  switch_to(thread);
  self = nullptr;
}

// Ends the running fiber where it stands; run() throws its error.
[[noreturn]] void leave_fiber(std::exception_ptr why) {
  error = why;
  self->state = State::kDone;
  to_scheduler();
  std::terminate();  // a finished fiber is never resumed
}

void fiber_main() {
  std::exception_ptr thrown;
  try {
    kernel();
  } catch (...) {
    thrown = std::current_exception();
  }
  leave_fiber(thrown);
}

void prepare_fiber(Thread& thread) {
  unsigned char* top = stacks.data() + (thread.number + 1) * kStackBytes;
#if ALEXNET_CUDA_UCONTEXT
  ucontext_t& context = contexts[thread.number];
  getcontext(&context);
  context.uc_stack.ss_sp = top - kStackBytes;
  context.uc_stack.ss_size = kStackBytes;
  makecontext(&context, fiber_main, 0);
#else
  void** sp = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t{15});
  *--sp = nullptr;  // fiber_main's return address: ends a back trace
  *--sp = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  thread.stack_pointer = sp;
#endif
}

// ---- messages ------------------------------------------------------------------------------------------------------

std::string name(const Place& place) {
  const std::string file = place.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(place.line());
}

std::string where_threads_are() {
  const char* const names[] = {"ready", "in __syncthreads", "in a warp operation", "in a warpgroup operation",
                               "returned"};
  std::map<std::string, std::vector<const Thread*>> groups;
  for (const Thread& t : threads) {
    const bool done = t.state == State::kDone;
    groups[names[static_cast<int>(t.state)] + (done ? "" : " at " + name(t.place))].push_back(&t);
  }
  std::string text;
  for (const auto& [what, members] : groups) {
    text += (text.empty() ? "" : "; ") + std::to_string(members.size()) + " of " + std::to_string(threads.size()) +
            " threads " + what + " (first " + name_of(members.front()->index) + ", last " +
            name_of(members.back()->index) + ")";
  }
  return text;
}

std::string in_block() {
  return "kernel launched at " + name(launched_at) + ", block " + name_of(block.index);
}

// ---- rendezvous ----------------------------------------------------------------------------------------------------

struct Meeting {
  Place place;
  std::vector<void*> arguments;
  std::vector<Thread*> waiting;
};
std::map<std::tuple<State, unsigned, unsigned>, Meeting> meetings;  // by kind, warp or warpgroup, and mask

void meet(State kind, unsigned group, unsigned mask, unsigned slots, unsigned slot, unsigned expected, void* argument,
          Work work, const Place& place) {
  Meeting& m = meetings[{kind, group, mask}];
  if (m.waiting.empty()) {
    m.place = place;
    m.arguments.assign(slots, nullptr);
  } else if (m.place.line() != place.line() || m.place.column() != place.column()) {
    fail("divergence: this thread is at " + name(place) + ", thread " + name_of(m.waiting.front()->index) +
         " waits for it at " + name(m.place));
  }
  m.arguments[slot] = argument;
  m.waiting.push_back(self);
  if (m.waiting.size() < expected) return wait_as(kind, place);
  if (work) work(m.arguments.data());
  for (Thread* t : m.waiting) t->state = State::kReady;
  m.waiting.clear();
}

// ---- one block -----------------------------------------------------------------------------------------------------

void run_block() {
  const unsigned n = block.size.x * block.size.y * block.size.z;
  meetings.clear();
  begin_block();
  for (unsigned i = 0; i < n; ++i) {
    threads[i] = {.index = dim3(i % block.size.x, i / block.size.x % block.size.y, i / block.size.x / block.size.y),
                  .number = i,
                  .state = State::kReady,
                  .place = {},
                  .stack_pointer = nullptr,
                  .clock = 1,
                  .known = {},
                  .copies = {},
                  .copy_groups = 0};
    prepare_fiber(threads[i]);
  }
  std::vector<unsigned> order(n);
  std::iota(order.begin(), order.end(), 0u);
  if (fiber_order == Order::kDescending) std::reverse(order.begin(), order.end());
  for (unsigned finished = 0; finished < n;) {
    if (fiber_order == Order::kRandom) std::shuffle(order.begin(), order.end(), fiber_random);
    bool progress = false;
    for (unsigned i : order) {
      if (threads[i].state != State::kReady) continue;
      progress = true;
      resume(threads[i]);
      if (error) std::rethrow_exception(error);
      finished += threads[i].state == State::kDone;
    }
    if (!progress) throw Error(in_block() + ": deadlock: " + where_threads_are());
  }
}

}  // namespace

void wait_as(State state, const Place& place) {
  self->state = state;
  self->place = place;
  to_scheduler();
}

void set_order(Order order, unsigned seed) {
  fiber_order = order;
  fiber_random.seed(seed);
}

static Error error_of(const std::string& what) {
  return Error(in_block() + ", thread " + name_of(self->index) + ": " + what);
}

void fail(const std::string& what) {
  throw error_of(what);
}

void run(const Place& place, dim3 grid, dim3 size, size_t dynamic_bytes, const std::function<void()>& body) {
  const uint64_t n = uint64_t{size.x} * size.y * size.z;
  if (n == 0 || n > 1024 || grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535 || dynamic_bytes > 227 * 1024)
    throw Error("invalid launch at " + name(place) + ": grid " + name_of(grid) + ", block " + name_of(size) + ", " +
                std::to_string(dynamic_bytes) + " bytes of shared memory");
  launched_at = place;
  kernel = body;
  error = nullptr;
  threads.resize(n);
  stacks.resize(std::max(stacks.size(), n * kStackBytes));
#if ALEXNET_CUDA_UCONTEXT
  contexts.resize(n);
#endif
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        block = {grid, size, dim3(x, y, z), static_cast<uint32_t>(dynamic_bytes)};
        run_block();
      }
  if (const std::string where = changed_guard(); !where.empty())
    throw Error("kernel launched at " + name(place) + ": it wrote outside an array, " + where);
}

void barrier(const Place& place) {
  meet(State::kInBarrier, 0, 0, 1, 0, threads.size(), nullptr, [](void**) { begin_epoch(); }, place);
}

void warp_operation(unsigned mask, void* argument, Work work, const Place& place) {
  const unsigned warp = self->number / 32, lane = self->number % 32;
  const size_t lanes = std::min<size_t>(32, threads.size() - warp * 32);
  mask &= lanes == 32 ? ~0u : (1u << lanes) - 1;
  if (!(mask >> lane & 1))
    fail("this lane takes part in a warp operation at " + name(place) + " whose mask does not name it");
  meet(State::kInWarp, warp, mask, 32, lane, std::popcount(mask), argument, work, place);
}

static void share_knowledge(void** of, int n) {
  Knowledge all;
  for (int i = 0; i < n; ++i)
    if (of[i]) publish(*static_cast<Thread*>(of[i]), all);
  for (int i = 0; i < n; ++i)
    if (of[i]) static_cast<Thread*>(of[i])->known = all;
}

void warp_barrier(unsigned mask, const Place& place) {
  warp_operation(mask, self, [](void** lanes) { share_knowledge(lanes, 32); }, place);
}

void warpgroup_operation(void* argument, Work work, const Place& place) {
  meet(State::kInWarpgroup, self->number / 128, 0, 128, self->number % 128, 128, argument, work, place);
}

void warpgroup_barrier(const Place& place) {
  warpgroup_operation(self, [](void** of) { share_knowledge(of, 128); }, place);
}

}  // namespace emulator

// What -fsanitize=alignment calls, from code that takes it for a function that neither returns nor throws.
struct Mismatch {
  const char* file;
  uint32_t line, column;
  const void* type;
  unsigned char log_alignment, kind;
};
extern "C" [[noreturn]] void __ubsan_handle_type_mismatch_v1_abort(const Mismatch* m, uintptr_t address) {
  const std::string file = m->file, place = file.substr(file.rfind('/') + 1) + ":" + std::to_string(m->line);
  const unsigned alignment = 1u << m->log_alignment;
  const std::string what = "misaligned access to global memory at " + place + ": " +
                           std::to_string(address % alignment) + " bytes behind a multiple of " +
                           std::to_string(alignment);
  if (!emulator::self) throw emulator::Error(what);
  emulator::leave_fiber(std::make_exception_ptr(emulator::error_of(what)));
}
