#include "emulator.h"

#include <algorithm>
#include <bit>
#include <exception>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <tuple>

#if defined(__x86_64__) && !defined(ALEXNET_CUDA_UCONTEXT)  // define it to use the portable way
// Switches stacks: pushes the callee-saved registers on the old fiber's stack and pops the new one's.
// rdi: where to save the old stack pointer; rsi: the new stack pointer.
extern "C" [[gnu::naked, gnu::noipa]] void emulator_switch(void**, void*) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
}
#else
#include <ucontext.h>  // ten times slower: each switch is a system call
#define ALEXNET_CUDA_UCONTEXT 1
#endif

namespace emulator {

Thread* self = nullptr;
Block block;
size_t shared_memory_limit = 227 << 10;
std::vector<Thread> threads;

std::string name_of(const dim3& d) {
  const auto number = [](unsigned n) { return std::to_string(n); };
  return '(' + number(d.x) + ", " + number(d.y) + ", " + number(d.z) + ')';
}

namespace {

constexpr size_t kStackBytes = 64 << 10;

Order fiber_order = Order::kAscending;
std::minstd_rand fiber_random;

std::vector<unsigned char> stacks;
std::function<void()> kernel;
Location launch;
std::exception_ptr error;

// ---- fibers --------------------------------------------------------------------------------------------------------

#if ALEXNET_CUDA_UCONTEXT
using Context = ucontext_t;
void switch_context(Context& from, Context& to) {
  swapcontext(&from, &to);
}
#else
using Context = void*;  // the stack pointer
void switch_context(Context& from, Context& to) {
  emulator_switch(&from, to);
}
#endif
Context scheduler;
std::vector<Context> contexts;  // of the threads

void to_scheduler() {
  switch_context(contexts[self->number], scheduler);
}

void resume(Thread& thread) {
  self = &thread;
  switch_context(scheduler, contexts[thread.number]);
  self = nullptr;
}

// Ends the running fiber; run() throws its error.
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
    if (!self->copies.empty()) fail("this thread ends before it has waited for its copies to shared memory");
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
  contexts[thread.number] = sp;
#endif
}

// ---- messages ------------------------------------------------------------------------------------------------------

std::string name(const Location& at) {
  const std::string file = at.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(at.line());
}

std::string where_threads_are() {
  const char* const names[] = {"ready", "in __syncthreads", "in a warp operation", "in a warpgroup operation",
                               "returned"};
  std::map<std::string, std::vector<const Thread*>> groups;
  for (const Thread& t : threads) {
    const bool done = t.state == State::kDone;
    groups[names[static_cast<int>(t.state)] + (done ? "" : " at " + name(t.at))].push_back(&t);
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
  return "kernel launched at " + name(launch) + ", block " + name_of(block.index);
}

// ---- collective operations -----------------------------------------------------------------------------------------

// Where the threads of one collective wait for each other, with the arguments of those that have arrived.
struct Rendezvous {
  Location at;
  std::vector<void*> arguments;
  std::vector<Thread*> waiting;
};
std::map<std::tuple<State, unsigned, unsigned>, Rendezvous> rendezvous;  // by kind, warp or warpgroup, mask

void arrive(State kind, unsigned group, unsigned mask, unsigned slots, unsigned slot, unsigned expected, void* argument,
            Work work, const Location& at) {
  Rendezvous& r = rendezvous[{kind, group, mask}];
  if (r.waiting.empty()) {
    r.at = at;
    r.arguments.assign(slots, nullptr);
  } else if (r.at.line() != at.line() || r.at.column() != at.column()) {
    fail("divergence: this thread is at " + name(at) + ", thread " + name_of(r.waiting.front()->index) +
         " waits for it at " + name(r.at));
  }
  r.arguments[slot] = argument;
  r.waiting.push_back(self);
  if (r.waiting.size() < expected) {
    self->state = kind;
    self->at = at;
    return to_scheduler();
  }
  if (work) work(r.arguments.data());
  for (Thread* t : r.waiting) t->state = State::kReady;
  r.waiting.clear();
}

// ---- one block -----------------------------------------------------------------------------------------------------

void run_block() {
  const unsigned n = block.size.x * block.size.y * block.size.z;
  rendezvous.clear();
  begin_block();
  for (unsigned i = 0; i < n; ++i) {
    threads[i] = {.index = dim3(i % block.size.x, i / block.size.x % block.size.y, i / block.size.x / block.size.y),
                  .number = i};
    prepare_fiber(threads[i]);
  }
  // Rounds over all fibers: each that is ready runs until it waits or returns. A round without progress is a deadlock.
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

void run(const Location& at, dim3 grid, dim3 size, size_t dynamic_bytes, const std::function<void()>& body) {
  const uint64_t n = uint64_t{size.x} * size.y * size.z;
  if (n == 0 || n > 1024 || grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535 || dynamic_bytes > shared_memory_limit)
    throw Error("invalid launch at " + name(at) + ": grid " + name_of(grid) + ", block " + name_of(size) + ", " +
                std::to_string(dynamic_bytes) + " bytes of shared memory");
  launch = at;
  kernel = body;
  error = nullptr;
  threads.resize(n);
  stacks.resize(std::max(stacks.size(), n * kStackBytes));
  contexts.resize(n);
  for (uint64_t i = 0; i < uint64_t{grid.x} * grid.y * grid.z; ++i) {
    const dim3 index(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
    block = {grid, size, index, static_cast<uint32_t>(dynamic_bytes)};
    run_block();
  }
  if (const std::string where = changed_guard(); !where.empty())
    throw Error("kernel launched at " + name(at) + ": it wrote outside an array, " + where);
}

void barrier(const Location& at) {
  arrive(State::kInBarrier, 0, 0, 1, 0, threads.size(), nullptr, [](void**) { begin_epoch(); }, at);
}

void warp_operation(unsigned mask, void* argument, Work work, const Location& at) {
  const unsigned warp = self->number / 32, lane = self->number % 32;
  const size_t lanes = std::min<size_t>(32, threads.size() - warp * 32);
  mask &= lanes == 32 ? ~0u : (1u << lanes) - 1;
  if (!(mask >> lane & 1))
    fail("this lane takes part in a warp operation at " + name(at) + " whose mask does not name it");
  arrive(State::kInWarp, warp, mask, 32, lane, std::popcount(mask), argument, work, at);
}

static void synchronise(void** of, int n) {
  VectorClock all;
  for (int i = 0; i < n; ++i)
    if (of[i]) release(*static_cast<Thread*>(of[i]), all);
  for (int i = 0; i < n; ++i)
    if (of[i]) static_cast<Thread*>(of[i])->seen = all;
}

void warp_barrier(unsigned mask, const Location& at) {
  warp_operation(mask, self, [](void** lanes) { synchronise(lanes, 32); }, at);
}

void warpgroup_operation(void* argument, Work work, const Location& at) {
  arrive(State::kInWarpgroup, self->number / 128, 0, 128, self->number % 128, 128, argument, work, at);
}

void warpgroup_barrier(const Location& at) {
  warpgroup_operation(self, [](void** of) { synchronise(of, 128); }, at);
}

}  // namespace emulator

// Called by -fsanitize=alignment from code that expects it neither to return nor to throw.
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
