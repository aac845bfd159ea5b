// The grid: one block at a time, a fiber a thread.
//
// A warp is run lane by lane: each runs until it stops, at a barrier, at a collective of the warp or at its end. Then
// all 32 must have stopped at the same place; a collective is worked out for the whole warp at once, and the warp may
// go on. A warp runs on until it stops at a barrier of the block, when another is taken. So a thread runs as far ahead
// of the others as barriers let it, and what a barrier should have kept apart falls together.
//
// A fiber whose thread ends goes on with the next thread that has not begun, so threads that never stop are a plain
// loop. `start_lane` is where to start reading.

#include "emulated_grid.h"

#include <atomic>
#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <new>
#include <vector>

#include <pthread.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {
namespace {

constexpr unsigned LANES = 32;
constexpr unsigned MOST_THREADS = 1024;
constexpr unsigned MOST_WARPS = MOST_THREADS / LANES;
constexpr unsigned MOST_SHARED = 227 << 10;
constexpr size_t STACK = 128 << 10;
// Below a stack: more than any kernel's frame.
constexpr size_t STACK_GUARD = 64 << 10;
constexpr size_t SIGNAL_STACK = 64 << 10;
constexpr unsigned char UNSET = 0xff;

enum class Order : unsigned { forward, backward, shuffled };

// What is asked for; laid out as Rust writes it.
struct Launch {
  const Kernel* kernel;
  unsigned variant;
  unsigned grid[3];
  unsigned threads;
  unsigned shared;
  Order order;
  uint64_t seed;
  const uint64_t* args;
  // A barrier to leave out, or null.
  const char* without_file;
  int without_line;
};

// Works a collective out, given what each lane hands in.
typedef void (*Collective)(void* const lanes[LANES]);

enum class Stop { block, warp, end };

struct Fiber {
  jmp_buf at;
  char* stack;
  bool started;
};

struct Thread {
  Fiber* fiber;
  Stop stop;
  Site site;
  Collective collective;
  void* operands;
};

// All of it belongs to the one launch that runs; Rust sees to that.
const Launch* launch;
Fiber fibers[MOST_THREADS];
Fiber* idle[MOST_THREADS];
unsigned n_idle;
Thread threads[MOST_THREADS];
unsigned current;
jmp_buf scheduler;
// The warp that runs: its lanes in order, and how many have been started.
unsigned lanes[LANES];
unsigned n_started;
unsigned warp_of_lanes;
uint64_t random_state;
char* shared_end;
std::vector<Site> barriers;

// The way out of a kernel that fails.
sigjmp_buf failed;
char message[1024];
uint64_t fault_address;
std::atomic<bool> running;
pthread_t runner;
struct sigaction previous[NSIG];

// splitmix64 (Steele, Lea and Flood 2014).
uint64_t next_random() {
  uint64_t z = random_state += 0x9E3779B97F4A7C15;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
  z = (z ^ z >> 27) * 0x94D049BB133111EB;
  return z ^ z >> 31;
}

const char* name_of(const char* path) {
  const char* slash = strrchr(path, '/');
  return slash ? slash + 1 : path;
}

bool same_file(const char* a, const char* b) { return a == b || strcmp(name_of(a), name_of(b)) == 0; }

bool same(Site a, Site b) { return a.line == b.line && same_file(a.file, b.file); }

// Ends the launch. What it leaves behind is on the stacks of fibers alone, which are begun anew.
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...) {
  int n = snprintf(message, sizeof message, "kernel `%s`, block (%u, %u, %u): ", launch->kernel->name, blockIdx.x,
                   blockIdx.y, blockIdx.z);
  va_list args;
  va_start(args, format);
  vsnprintf(message + n, sizeof message - n, format, args);
  va_end(args);
  siglongjmp(failed, 1);
}

void run_fiber();

// Goes on with the current thread where it stopped, or begins it.
[[noreturn]] void resume() {
  Thread& thread = threads[current];
  threadIdx.x = current;
  if (!thread.fiber) thread.fiber = idle[--n_idle];
  Fiber& fiber = *thread.fiber;
  if (fiber.started) _longjmp(fiber.at, 1);
  if (!fiber.stack) {
    void* at = mmap(nullptr, STACK_GUARD + STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED || mprotect(at, STACK_GUARD, PROT_NONE) != 0) fail("no memory for stacks");
    fiber.stack = static_cast<char*>(at) + STACK_GUARD;
  }
  fiber.started = true;
  ucontext_t start;
  if (getcontext(&start) != 0) fail("no context");
  // Tops of stacks that lie a multiple of a page apart would fight for the same lines of the cache.
  start.uc_stack.ss_sp = fiber.stack;
  start.uc_stack.ss_size = STACK - (&fiber - fibers) % 16 * 256;
  start.uc_link = nullptr;
  makecontext(&start, run_fiber, 0);
  setcontext(&start);
  fail("no context");
}

// Goes on with the next lane, or back to the scheduler after the last.
[[noreturn]] void start_lane() {
  if (n_started == LANES) _longjmp(scheduler, 1);
  current = warp_of_lanes * LANES + lanes[n_started++];
  resume();
}

void run_fiber() {
  for (;;) {
    launch->kernel->run(launch->args);
    Thread& thread = threads[current];
    Fiber* fiber = std::exchange(thread.fiber, nullptr);
    thread.stop = Stop::end;
    if (n_started < LANES) {
      unsigned next = warp_of_lanes * LANES + lanes[n_started];
      if (!threads[next].fiber) {
        n_started++;
        current = threadIdx.x = next;
        threads[next].fiber = fiber;
        continue;
      }
    }
    idle[n_idle++] = fiber;
    if (!_setjmp(fiber->at)) start_lane();
  }
}

// Stops the current thread until it may go on.
void stop(Stop why, Site site, Collective collective, void* operands) {
  Thread& thread = threads[current];
  thread.stop = why;
  thread.site = site;
  thread.collective = collective;
  thread.operands = operands;
  if (!_setjmp(thread.fiber->at)) start_lane();
}

void stop_whole_warp(unsigned mask, Site site, Collective collective, void* operands) {
  if (mask != ~0u) {
    fail("thread %u: the mask 0x%08x at %s:%d is not the whole warp", current, mask, name_of(site.file), site.line);
  }
  stop(Stop::warp, site, collective, operands);
}

bool left_out(Site site) {
  return launch->without_line == site.line && launch->without_file && same_file(launch->without_file, site.file);
}

void remember(Site barrier) {
  for (const Site& known : barriers) {
    if (same(known, barrier)) return;
  }
  barriers.push_back(barrier);
}

// Where a thread stopped, in words.
struct Where {
  char text[256];
  explicit Where(const Thread& thread) {
    if (thread.stop == Stop::end) {
      snprintf(text, sizeof text, "has returned");
    } else {
      snprintf(text, sizeof text, "waits at %s:%d", name_of(thread.site.file), thread.site.line);
    }
  }
};

// Holds two threads to have stopped at the same place.
void check_together(unsigned a, unsigned b) {
  const Thread &x = threads[a], &y = threads[b];
  if (x.stop == y.stop && (x.stop == Stop::end || (x.collective == y.collective && same(x.site, y.site)))) return;
  fail("a barrier that not all threads reach: thread %u %s, thread %u %s", a, Where(x).text, b, Where(y).text);
}

void nothing(void* const*) {}

// Runs the lanes of a warp until each has stopped.
void run_lanes(unsigned warp) {
  warp_of_lanes = warp;
  n_started = 0;
  for (unsigned i = 0; i < LANES; i++) lanes[i] = launch->order == Order::backward ? LANES - 1 - i : i;
  if (launch->order == Order::shuffled) {
    for (unsigned i = LANES - 1; i > 0; i--) std::swap(lanes[i], lanes[next_random() % (i + 1)]);
  }
  if (!_setjmp(scheduler)) start_lane();
}

// One of the warps whose bits are set.
unsigned choose(unsigned ready) {
  switch (launch->order) {
    case Order::forward: return std::countr_zero(ready);
    case Order::backward: return 31 - std::countl_zero(ready);
    default: break;
  }
  for (unsigned skip = next_random() % std::popcount(ready); skip > 0; skip--) ready &= ready - 1;
  return std::countr_zero(ready);
}

// Runs the block `blockIdx`.
void run_block(const Variant& variant) {
  memset(variant.shared, UNSET, variant.shared_end - variant.shared);
  if (launch->shared) memset(static_cast<char*>(dynamic_shared()), UNSET, shared_end - (char*)dynamic_shared());
  const unsigned n_warps = launch->threads / LANES;
  const unsigned all = n_warps == 32 ? ~0u : (1u << n_warps) - 1;
  unsigned ready = all;
  for (;;) {
    while (ready) {
      const unsigned warp = choose(ready), first = warp * LANES;
      run_lanes(warp);
      for (unsigned i = 1; i < LANES; i++) check_together(first, first + i);
      if (threads[first].stop != Stop::warp) {
        ready &= ~(1u << warp);
        continue;
      }
      if (threads[first].collective == nothing) remember(threads[first].site);
      void* operands[LANES];
      for (unsigned i = 0; i < LANES; i++) operands[i] = threads[first + i].operands;
      threads[first].collective(operands);
    }
    for (unsigned warp = 1; warp < n_warps; warp++) check_together(0, warp * LANES);
    if (threads[0].stop == Stop::end) return;
    remember(threads[0].site);
    ready = all;
  }
}

void run_grid(const Variant& variant) {
  const uint64_t x = launch->grid[0], y = launch->grid[1], n = x * y * launch->grid[2];
  // The i-th block is number first + i * step, modulo n; so all come by where step and n share no factor.
  uint64_t first = 0, step = 1;
  if (launch->order == Order::backward) {
    first = n - 1, step = n - 1;
  } else if (launch->order == Order::shuffled) {
    first = next_random() % n;
    auto divisor = [](uint64_t a, uint64_t b) {
      while (b) a = std::exchange(b, a % b);
      return a;
    };
    do {
      step = next_random() % n;
    } while (divisor(step, n) != 1);
  }
  uint64_t block = first;
  for (uint64_t i = 0; i < n; i++) {
    blockIdx = {static_cast<unsigned>(block % x), static_cast<unsigned>(block / x % y),
                static_cast<unsigned>(block / x / y)};
    run_block(variant);
    block = static_cast<uint64_t>((static_cast<unsigned __int128>(block) + step) % n);
  }
}

void on_fault(int signal, siginfo_t* info, void* context) {
  if (running && pthread_equal(runner, pthread_self())) {
    if (signal == SIGFPE) fail("thread %u divides by zero", current);
    fault_address = reinterpret_cast<uint64_t>(info->si_addr);
    const char* does = "touches";
#if defined(__x86_64__)
    does = static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_ERR] & 2 ? "writes" : "reads";
#endif
    // Where the processor does not tell which address, it was none of memory or not a multiple of the vector's size.
    if (signal != SIGSEGV || (info->si_code != SEGV_MAPERR && info->si_code != SEGV_ACCERR)) {
      fault_address = 0;
      fail("thread %u: a misaligned vector, or no address at all", current);
    }
    for (const Fiber& fiber : fibers) {
      const uint64_t stack = reinterpret_cast<uint64_t>(fiber.stack);
      if (stack && fault_address < stack && stack - fault_address <= STACK_GUARD) {
        fault_address = 0;
        fail("thread %u: its stack of %zu bytes overflows", current, STACK);
      }
    }
    const uint64_t end = reinterpret_cast<uint64_t>(shared_end);
    if (fault_address >= end && fault_address - end < static_cast<uint64_t>(sysconf(_SC_PAGESIZE))) {
      const unsigned long long past = fault_address - end;
      fault_address = 0;
      fail("thread %u %s %llu bytes past the end of dynamic shared memory", current, does, past);
    }
    fail("thread %u %s 0x%llx", current, does, static_cast<unsigned long long>(fault_address));
  }
  const struct sigaction& before = previous[signal];
  if (before.sa_flags & SA_SIGINFO) {
    before.sa_sigaction(signal, info, context);
  } else if (before.sa_handler == SIG_DFL || before.sa_handler == SIG_IGN) {
    // The instruction is run again, without us.
    sigaction(signal, &before, nullptr);
  } else {
    before.sa_handler(signal);
  }
}

// What is set up once.
bool prepare() {
  const size_t page = sysconf(_SC_PAGESIZE), room = (MOST_SHARED + page - 1) / page * page;
  void* at = mmap(nullptr, room + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (at == MAP_FAILED) return false;
  shared_end = static_cast<char*>(at) + room;
  if (mprotect(shared_end, page, PROT_NONE) != 0) return false;
  struct sigaction ours = {};
  ours.sa_sigaction = on_fault;
  ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigemptyset(&ours.sa_mask);
  for (int signal : {SIGSEGV, SIGBUS, SIGFPE}) {
    if (sigaction(signal, &ours, &previous[signal]) != 0) return false;
  }
  return true;
}

Variant variant_of(unsigned number) {
  switch (number) {
    case 0: return variant_f32();
    case 1: return variant_tf32();
    case 2: return variant_bf16();
    default: return variant_tests();
  }
}

struct Shuffle {
  uint64_t value;
  unsigned from;
};

void work_out_shuffle(void* const lanes[LANES]) {
  uint64_t given[LANES];
  for (unsigned i = 0; i < LANES; i++) given[i] = static_cast<Shuffle*>(lanes[i])->value;
  for (unsigned i = 0; i < LANES; i++) {
    Shuffle& lane = *static_cast<Shuffle*>(lanes[i]);
    lane.value = given[lane.from];
  }
}

struct Mma {
  float* d;
  const unsigned* a;
  const unsigned* b;
};

// d += a b, once fragments are put together: products exact, summed one after the other. A card's order is its own.
template <unsigned K>
void multiply(void* const lanes[LANES], const float a[16][K], const float b[K][8]) {
  float d[16][8];
  auto each = [&](auto f) {
    for (unsigned lane = 0; lane < LANES; lane++) {
      for (unsigned i = 0; i < 4; i++) {
        f(static_cast<Mma*>(lanes[lane])->d[i], d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]);
      }
    }
  };
  each([](float& of_lane, float& of_d) { of_d = of_lane; });
  for (unsigned row = 0; row < 16; row++) {
    for (unsigned k = 0; k < K; k++) {
      for (unsigned column = 0; column < 8; column++) {
        d[row][column] = fmaf(a[row][k], b[k][column], d[row][column]);
      }
    }
  }
  each([](float& of_lane, float& of_d) { of_lane = of_d; });
}

float half_of(unsigned word, unsigned high) {
  return std::bit_cast<float>(high ? word & 0xffff0000 : word << 16);
}

void work_out_mma_bf16(void* const lanes[LANES]) {
  float a[16][16], b[16][8];
  for (unsigned lane = 0; lane < LANES; lane++) {
    const Mma& part = *static_cast<Mma*>(lanes[lane]);
    const unsigned g = lane / 4, t = lane % 4;
    for (unsigned high = 0; high < 2; high++) {
      for (unsigned i = 0; i < 4; i++) a[g + i % 2 * 8][2 * t + high + i / 2 * 8] = half_of(part.a[i], high);
      for (unsigned i = 0; i < 2; i++) b[2 * t + high + i * 8][g] = half_of(part.b[i], high);
    }
  }
  multiply<16>(lanes, a, b);
}

void work_out_mma_tf32(void* const lanes[LANES]) {
  float a[16][8], b[8][8];
  auto number = [](unsigned word) { return std::bit_cast<float>(word & 0xffffe000); };
  for (unsigned lane = 0; lane < LANES; lane++) {
    const Mma& part = *static_cast<Mma*>(lanes[lane]);
    const unsigned g = lane / 4, t = lane % 4;
    for (unsigned i = 0; i < 4; i++) a[g + i % 2 * 8][t + i / 2 * 4] = number(part.a[i]);
    for (unsigned i = 0; i < 2; i++) b[t + i * 4][g] = number(part.b[i]);
  }
  multiply<8>(lanes, a, b);
}

struct Ldmatrix {
  unsigned* r;
  const char* row;
};

template <bool TRANSPOSED>
void work_out_ldmatrix(void* const lanes[LANES]) {
  uint16_t m[LANES][8];
  for (unsigned lane = 0; lane < LANES; lane++) memcpy(m[lane], static_cast<Ldmatrix*>(lanes[lane])->row, 16);
  for (unsigned lane = 0; lane < LANES; lane++) {
    const unsigned g = lane / 4, t = lane % 4 * 2;
    for (unsigned i = 0; i < 4; i++) {
      const uint16_t(*of)[8] = m + 8 * i;
      const unsigned low = TRANSPOSED ? of[t][g] : of[g][t], high = TRANSPOSED ? of[t + 1][g] : of[g][t + 1];
      static_cast<Ldmatrix*>(lanes[lane])->r[i] = low | high << 16;
    }
  }
}

}  // namespace

void* dynamic_shared() { return shared_end - (launch->shared + 15) / 16 * 16; }

void syncthreads(Site site) {
  if (!left_out(site)) stop(Stop::block, site, nullptr, nullptr);
}

void syncwarp(unsigned mask, Site site) {
  if (!left_out(site)) stop_whole_warp(mask, site, nothing, nullptr);
}

uint64_t shuffle(unsigned mask, uint64_t value, unsigned from, Site site) {
  Shuffle shuffle = {value, from};
  stop_whole_warp(mask, site, work_out_shuffle, &shuffle);
  return shuffle.value;
}

void mma_bf16(float d[4], const unsigned a[4], const unsigned b[2], Site site) {
  Mma mma = {d, a, b};
  stop_whole_warp(~0u, site, work_out_mma_bf16, &mma);
}

void mma_tf32(float d[4], const unsigned a[4], const unsigned b[2], Site site) {
  Mma mma = {d, a, b};
  stop_whole_warp(~0u, site, work_out_mma_tf32, &mma);
}

void ldmatrix_x4(unsigned r[4], const void* row, bool transposed, Site site) {
  const char* at = static_cast<const char*>(row);
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) {
    fail("thread %u: the row for ldmatrix at %s:%d is not at a multiple of 16 bytes", current, name_of(site.file),
         site.line);
  }
  const Variant variant = variant_of(launch->variant);
  auto within = [at](const char* from, const char* to) { return from <= at && at + 16 <= to; };
  if (!within(variant.shared, variant.shared_end) && !within(static_cast<char*>(dynamic_shared()), shared_end)) {
    fail("thread %u: the row for ldmatrix at %s:%d is not in shared memory", current, name_of(site.file), site.line);
  }
  Ldmatrix ldmatrix = {r, at};
  stop_whole_warp(~0u, site, transposed ? work_out_ldmatrix<true> : work_out_ldmatrix<false>, &ldmatrix);
}

// What the compiler has called at an access that it checks (-fsanitize); each of the records begins with the place.
struct Checked {
  const char* file;
  uint32_t line;
  uint32_t column;
};

[[noreturn]] static void fail_check(const char* what, const Checked* at) {
  fail("thread %u: %s at %s:%u", current, what, name_of(at->file), at->line);
}

extern "C" {

void __ubsan_handle_type_mismatch_v1(const Checked* at, const void*) { fail_check("a misaligned address", at); }
void __ubsan_handle_out_of_bounds(const Checked* at, const void*) { fail_check("an index outside of its array", at); }
void __ubsan_handle_shift_out_of_bounds(const Checked* at, const void*, const void*) {
  fail_check("a shift by more than the width, or of a negative number", at);
}
}

// What Rust calls; lib.rs says how.
extern "C" {

const Kernel* emulated_grid_last_kernel(unsigned variant) { return variant_of(variant).last; }

bool emulated_grid_barrier(size_t i, const char** file, int* line) {
  if (i >= barriers.size()) return false;
  *file = name_of(barriers[i].file);
  *line = barriers[i].line;
  return true;
}

// Null, or what went wrong; the address too where one was touched that may not be.
const char* emulated_grid_launch(const Launch* asked, uint64_t* fault) {
  static const bool prepared = prepare();
  if (!prepared) return "the grid finds no memory, or may not handle faults";
  static char signal_stack[SIGNAL_STACK];
  stack_t ours = {}, theirs;
  ours.ss_sp = signal_stack;
  ours.ss_size = sizeof signal_stack;
  if (sigaltstack(&ours, &theirs) != 0) return "the grid may not handle faults";

  launch = asked;
  random_state = asked->seed;
  gridDim = {asked->grid[0], asked->grid[1], asked->grid[2]};
  blockDim = {asked->threads, 1, 1};
  threadIdx = {0, 0, 0};
  fault_address = 0;
  n_idle = 0;
  for (Fiber& fiber : fibers) idle[n_idle++] = &fiber;
  for (Thread& thread : threads) thread.fiber = nullptr;
  runner = pthread_self();
  const char* error = nullptr;
  if (sigsetjmp(failed, 1) == 0) {
    running = true;
    run_grid(variant_of(asked->variant));
  } else {
    error = message;
    // Fibers that were left in the middle are begun anew.
    for (Fiber& fiber : fibers) fiber.started = false;
  }
  running = false;
  launch = nullptr;
  sigaltstack(&theirs, nullptr);
  *fault = fault_address;
  return error;
}

// A range of addresses that nothing may touch; null where there is none.
void* emulated_grid_reserve(size_t bytes) {
  void* at = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return at == MAP_FAILED ? nullptr : at;
}

// Pages of such a range become memory.
bool emulated_grid_open(void* at, size_t bytes) { return mprotect(at, bytes, PROT_READ | PROT_WRITE) == 0; }

// And go back.
bool emulated_grid_close(void* at, size_t bytes) {
  return mmap(at, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) != MAP_FAILED;
}

size_t emulated_grid_page() { return sysconf(_SC_PAGESIZE); }
}

}  // namespace emulated
