// Runs CUDA kernels on the host: g++ -x c++ -std=c++17 -DARRIERO_HOST. For tests only; common.cuh includes it.
//
// Each CUDA thread is a fibre with a stack of its own; one of a block runs at a time, until it waits for others or ends.
// Of those that could go on the first does, or the last, or the one that a random order of a seed names: a warp runs as
// far ahead of others as barriers allow, so what a kernel leaves to chance for want of one comes out differently.
// Blocks run one after another, in the same kinds of order. Reported, not hung: a barrier that some threads
// do not reach, or that they reach at different lines. Shared memory is filled with NaN before each block, and lies
// between canaries. What this cannot find: races that need two threads at the very same instant.
//
// A library runs one launch at a time: what belongs to no thread is found several times as fast as what does.
#pragma once
#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <dlfcn.h>
#include <memory>
#include <new>
#include <numeric>
#include <sanitizer/asan_interface.h>  // without the sanitizer its macros do nothing
#include <sys/mman.h>
#include <type_traits>
#include <ucontext.h>
#include <utility>
#include <vector>

#include "launch.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x, y, z; };
static uint3 threadIdx, blockIdx;
static dim3 blockDim, gridDim;
static const int warpSize = 32;

namespace shim {

constexpr unsigned char POISON = 0xff, CANARY = 0xa5;
constexpr size_t WARP = 32, SLOT = 48, STACK = 64 << 10, PAGE = 4096, EDGE = 16;
constexpr size_t STATIC_LIMIT = 48 << 10, SHARED_LIMIT = 163 << 10;  // the latter is what sm_80 has

enum State { READY, AT_BARRIER, IN_WARP, DONE };
enum Kind { SYNC, SHUFFLE, VOTE, MMA, MATRIX };

// Lanes of a warp that meet: each leaves its value, and reads others' once all are there.
struct Group {
  unsigned wanted, mask, arrived, unread;
  int kind, line;
  alignas(16) unsigned char data[WARP][SLOT];
};

struct Copy { void *to; const void *from; };

struct Fibre {
  ucontext_t context;
  jmp_buf jump;
  bool started;
  State state;
  int line;  // where it waits
  std::vector<Copy> copies;     // asynchronous ones that have not been waited for
  std::vector<size_t> batches;  // their number in each committed batch
};

struct Array { const void *key; size_t offset, bytes; };

struct Machine {
  Launch launch;
  std::vector<Fibre> fibres;
  std::vector<std::vector<std::unique_ptr<Group>>> groups;  // of each warp
  std::vector<unsigned> turns, rank;  // who goes before whom, and the inverse
  uint64_t ready[16];                 // a bit for each rank whose fibre could go on
  std::vector<Array> arrays;
  std::vector<unsigned char> shared;
  unsigned char *stacks = nullptr;
  size_t stacked = 0;
  ucontext_t home;
  jmp_buf back;
  size_t current = 0, live = 0, at_barrier = 0;
  int barrier_line = 0;
  unsigned long long random = 0;
  void (*body)(void *) = nullptr;
  void *arguments = nullptr;
  bool fault = false, astray = false;  // astray: fibres have been left in the middle of a kernel
  char message[512] = "";

  ~Machine() { if (stacks) munmap(stacks, stacked * (STACK + PAGE)); }
};

static Machine the_machine;
inline Machine &machine() { return the_machine; }

__attribute__((format(printf, 1, 2))) inline void fail(const char *format, ...) {
  Machine &m = machine();
  if (m.fault) return;
  m.fault = true;
  int used = snprintf(m.message, sizeof m.message, "block (%u, %u, %u), thread %zu: ", blockIdx.x, blockIdx.y,
                      blockIdx.z, m.current);
  va_list list;
  va_start(list, format);
  vsnprintf(m.message + used, sizeof m.message - used, format, list);
  va_end(list);
}

inline void wake(size_t index) {
  Machine &m = machine();
  m.fibres[index].state = READY;
  m.ready[m.rank[index] / 64] |= 1ull << m.rank[index] % 64;
}

inline void rest(State state) {
  Machine &m = machine();
  m.fibres[m.current].state = state;
  m.ready[m.rank[m.current] / 64] &= ~(1ull << m.rank[m.current] % 64);
}

#ifdef __SANITIZE_ADDRESS__
// The C library's own: what the sanitizer puts before it forgets what lies beside arrays on the other stack.
inline int swap_stacks(ucontext_t *from, ucontext_t *to) {
  static void *found = dlsym(dlopen("libc.so.6", RTLD_LAZY), "swapcontext");
  return reinterpret_cast<int (*)(ucontext_t *, ucontext_t *)>(found)(from, to);
}
#endif

// Back to the scheduler. The sanitizer knows nothing of jumps to other stacks; without it they spare two system calls a
// switch.
__attribute__((noinline)) inline void pause() {
  Machine &m = machine();
  Fibre &fibre = m.fibres[m.current];
#ifdef __SANITIZE_ADDRESS__
  swap_stacks(&fibre.context, &m.home);
#else
  if (!_setjmp(fibre.jump)) _longjmp(m.back, 1);
#endif
}

// A fibre that has ended waits here for the next block.
inline void enter() {
  Machine &m = machine();
  for (;;) {
    m.body(m.arguments);
    rest(DONE);
    pause();
  }
}

__attribute__((noinline)) inline void resume(size_t index) {
  Machine &m = machine();
  m.current = index;
  unsigned x = m.launch.block[0], y = m.launch.block[1];
  threadIdx = {unsigned(index % x), unsigned(index / x % y), unsigned(index / x / y)};
  ucontext_t &context = m.fibres[index].context;
  bool first = !m.fibres[index].started;
  if (first) {
    m.fibres[index].started = true;
    getcontext(&context);
    context.uc_stack.ss_sp = m.stacks + index * (STACK + PAGE) + PAGE;
    context.uc_stack.ss_size = STACK;
    context.uc_link = nullptr;
    makecontext(&context, enter, 0);
  }
#ifdef __SANITIZE_ADDRESS__
  swap_stacks(&m.home, &context);
#else
  if (!_setjmp(m.back)) {
    if (first) setcontext(&m.fibres[m.current].context);
    _longjmp(m.fibres[m.current].jump, 1);
  }
#endif
}

// A barrier lets go once every thread that has not ended has arrived.
inline void open_barrier() {
  Machine &m = machine();
  if (m.at_barrier == 0 || m.at_barrier != m.live) return;
  for (size_t i = 0; i < m.fibres.size(); i++)
    if (m.fibres[i].state == AT_BARRIER) wake(i);
  m.at_barrier = 0;
}

inline void barrier(int line) {
  Machine &m = machine();
  if (m.at_barrier == 0) m.barrier_line = line;
  if (m.barrier_line != line) fail("divergent barrier: at line %d, others at line %d", line, m.barrier_line);
  m.at_barrier++;
  rest(AT_BARRIER);
  m.fibres[m.current].line = line;
  open_barrier();
  pause();
}

// Meets the other lanes of `mask`, leaving `bytes` for them to read.
inline Group &meet(Kind kind, unsigned mask, const void *value, size_t bytes, int line) {
  Machine &m = machine();
  size_t lane = m.current % WARP, first = m.current - lane;
  size_t lanes = std::min(WARP, m.fibres.size() - first);
  unsigned wanted = lanes < WARP ? mask & ((1u << lanes) - 1) : mask;
  if (!(wanted >> lane & 1)) fail("line %d: the mask %08x lacks the caller's lane", line, mask);
  auto &groups = m.groups[first / WARP];
  Group *group = nullptr, *unused = nullptr;
  for (auto &one : groups) {
    bool open = one->arrived != 0 && one->arrived != one->wanted;
    if (open && one->mask == mask && one->kind == kind && one->line == line && !(one->arrived >> lane & 1))
      group = one.get();
    if (one->arrived == 0) unused = one.get();
  }
  if (!group) {
    if (!unused) {
      groups.emplace_back(new Group);
      unused = groups.back().get();
    }
    group = unused;
    group->mask = mask, group->wanted = wanted, group->arrived = 0, group->kind = kind, group->line = line;
    group->unread = 0;
    memset(group->data, POISON, sizeof group->data);
  }
  if (bytes) memcpy(group->data[lane], value, bytes);
  group->arrived |= 1u << lane;
  group->unread++;
  m.fibres[m.current].line = line;
  rest(IN_WARP);
  for (size_t i = 0; i < lanes && group->arrived == wanted; i++)
    if (wanted >> i & 1) wake(first + i);
  pause();
  return *group;
}

inline void part(Group &group) {
  if (--group.unread == 0) group.arrived = 0;
}

template <typename V> V shuffle(unsigned mask, V value, unsigned source, int line) {
  static_assert(sizeof(V) <= 8 && std::is_trivially_copyable<V>::value, "as CUDA's shuffles");
  Group &group = meet(SHUFFLE, mask, &value, sizeof value, line);
  memcpy(&value, group.data[source], sizeof value);
  part(group);
  return value;
}

// With the address sanitizer nobody may read beside a shared array either.
inline void fence_shared() {
  Machine &m = machine();
  ASAN_POISON_MEMORY_REGION(m.shared.data(), m.shared.size());
  for (const Array &array : m.arrays) ASAN_UNPOISON_MEMORY_REGION(m.shared.data() + array.offset, array.bytes);
}

inline void unfence_shared() { ASAN_UNPOISON_MEMORY_REGION(machine().shared.data(), machine().shared.size()); }

// An array of the block, found by an address that stands for its declaration.
inline void *shared(const void *key, size_t bytes) {
  Machine &m = machine();
  for (const Array &array : m.arrays)
    if (array.key == key) return m.shared.data() + array.offset;
  size_t offset = EDGE, total = m.launch.shared;
  for (const Array &array : m.arrays) {
    offset = array.offset + (array.bytes + 15) / 16 * 16 + EDGE;
    if (array.key != &m) total += array.bytes;
  }
  if (key != &m && total + bytes - m.launch.shared > STATIC_LIMIT) fail("over 48 KiB of static shared memory");
  if (total + bytes > SHARED_LIMIT + (key == &m ? m.launch.shared : 0)) fail("too much shared memory");
  m.arrays.push_back({key, offset, bytes});
  if (offset + bytes + EDGE > m.shared.size()) {
    fail("the shim has no room for so many shared arrays");
    return m.shared.data() + EDGE;
  }
  fence_shared();
  memset(m.shared.data() + offset, POISON, bytes);
  return m.shared.data() + offset;
}

inline void check_shared() {
  Machine &m = machine();
  unfence_shared();
  for (const Array &array : m.arrays) {
    unsigned char *data = m.shared.data() + array.offset;
    for (size_t i = 1; i <= EDGE; i++)
      if (data[array.bytes + i - 1] != CANARY || *(data - i) != CANARY) fail("a write beside a shared array");
    memset(data, POISON, array.bytes);
  }
  fence_shared();
}

inline size_t draw(size_t below) {
  Machine &m = machine();
  m.random = m.random * 6364136223846793005ull + 1442695040888963407ull;
  return size_t(m.random >> 33) % below;
}

inline void take_turns(std::vector<unsigned> &turns) {
  unsigned order = machine().launch.order;
  for (size_t i = 0; i < turns.size(); i++) turns[i] = order == 1 ? turns.size() - 1 - i : i;
  for (size_t i = turns.size(); order == 2 && i > 1; i--) std::swap(turns[i - 1], turns[draw(i)]);
}

inline void report_deadlock() {
  Machine &m = machine();
  for (State state : {AT_BARRIER, IN_WARP})
    for (m.current = 0; m.current < m.fibres.size(); m.current++)
      if (m.fibres[m.current].state == state)
        return fail("%s at line %d waits for threads that never come", state == IN_WARP ? "a warp's step" : "a barrier",
                    m.fibres[m.current].line);
}

inline void draw_ranks() {
  Machine &m = machine();
  take_turns(m.turns);
  memset(m.ready, 0, sizeof m.ready);
  for (size_t i = 0; i < m.turns.size(); i++) m.rank[m.turns[i]] = i;
  for (size_t i = 0; i < m.fibres.size(); i++)
    if (m.fibres[i].state == READY) wake(i);
}

inline void run_block() {
  Machine &m = machine();
  m.live = m.fibres.size(), m.at_barrier = 0;
  for (Fibre &fibre : m.fibres) fibre.state = READY, fibre.copies.clear(), fibre.batches.clear();
  for (auto &warp : m.groups)
    for (auto &group : warp) group->arrived = 0;
  draw_ranks();
  for (size_t steps = 1; m.live; steps++) {
    size_t word = 0;
    while (word < 16 && !m.ready[word]) word++;
    if (word == 16) return report_deadlock();
    size_t index = m.turns[word * 64 + __builtin_ctzll(m.ready[word])];
    resume(index);
    if (m.fault) return;
    if (m.fibres[index].state == DONE) {
      m.live--;
      open_barrier();
    }
    if (m.launch.order == 2 && steps % (4 * m.fibres.size()) == 0) draw_ranks();
  }
  check_shared();
}

inline bool prepare(const Launch &launch) {
  Machine &m = machine();
  m.launch = launch, m.fault = false, m.message[0] = 0, m.random = launch.seed, m.current = 0;
  blockIdx = {0, 0, 0};
  gridDim = {launch.grid[0], launch.grid[1], launch.grid[2]};
  blockDim = {launch.block[0], launch.block[1], launch.block[2]};
  size_t threads = size_t(launch.block[0]) * launch.block[1] * launch.block[2];
  if (threads == 0 || threads > 1024) fail("a block of %zu threads", threads);
  if (launch.grid[0] == 0 || launch.grid[1] == 0 || launch.grid[2] == 0) fail("an empty grid");
  if (launch.grid[0] > 0x7fffffff || launch.grid[1] > 65535 || launch.grid[2] > 65535) fail("too large a grid");
  if (m.fault) return false;
  if (m.stacked < threads) {
    if (m.stacks) munmap(m.stacks, m.stacked * (STACK + PAGE));
    m.stacked = threads, m.astray = true;
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void *stacks = mmap(nullptr, threads * (STACK + PAGE), PROT_READ | PROT_WRITE, flags, -1, 0);
    m.stacks = stacks == MAP_FAILED ? nullptr : static_cast<unsigned char *>(stacks);
    if (!m.stacks) return fail("no memory for %zu stacks", threads), m.stacked = 0, false;
    for (size_t i = 0; i < threads; i++) mprotect(m.stacks + i * (STACK + PAGE), PAGE, PROT_NONE);
  }
  if (m.fibres.size() != threads || m.astray) m.fibres = std::vector<Fibre>(threads);
  // Frames that were left in the middle are not there any more.
  if (m.astray) ASAN_UNPOISON_MEMORY_REGION(m.stacks, m.stacked * (STACK + PAGE));
  m.astray = false;
  m.groups.clear();
  m.groups.resize((threads + WARP - 1) / WARP);
  m.turns.resize(threads), m.rank.resize(threads);
  m.arrays.clear();
  unfence_shared();
  m.shared.assign(SHARED_LIMIT + STATIC_LIMIT, CANARY);
  if (launch.shared) shared(&m, launch.shared);
  return !m.fault;
}

inline int run(const Launch &launch, void (*body)(void *), void *arguments) {
  Machine &m = machine();
  if (!prepare(launch)) return 1;
  m.body = body, m.arguments = arguments;
  size_t x = launch.grid[0], y = launch.grid[1];
  std::vector<unsigned> blocks(x * y * launch.grid[2]);
  take_turns(blocks);
  for (size_t index : blocks) {
    blockIdx = {unsigned(index % x), unsigned(index / x % y), unsigned(index / x / y)};
    if (blockIdx.x < launch.first) continue;
    run_block();
    if (m.fault) return m.astray = true, 1;
  }
  return 0;
}

template <typename... A, size_t... I>
void spread(void (*kernel)(A...), void *const *given, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_const_t<A> *>(given[I])...);
}

// Calls a kernel with arguments that lie behind pointers, as the driver's own launch takes them. Their sizes, where a
// caller knows them, are checked: it cannot see a kernel's types.
template <typename... A>
int launch(void (*kernel)(A...), const Launch &how, void *const *given, const size_t *sizes, size_t count) {
  const size_t expected[] = {sizeof(A)..., 0};
  machine().fault = false, machine().current = 0;
  if (sizes && count != sizeof...(A)) return fail("%zu arguments, expected %zu", count, sizeof...(A)), 2;
  for (size_t i = 0; sizes && i < count; i++)
    if (sizes[i] != expected[i]) return fail("argument %zu has %zu bytes, expected %zu", i, sizes[i], expected[i]), 2;
  struct Call { void (*kernel)(A...); void *const *given; } call{kernel, given};
  return run(how, [](void *data) {
    Call &call = *static_cast<Call *>(data);
    spread(call.kernel, call.given, std::index_sequence_for<A...>());
  }, &call);
}

}  // namespace shim

extern "C" inline __attribute__((used)) const char *host_message() { return shim::machine().message; }

#define SHIM_LINE int line = __builtin_LINE()
inline void __syncthreads(SHIM_LINE) { shim::barrier(line); }
inline void __syncwarp(unsigned mask = 0xffffffffu, SHIM_LINE) {
  shim::part(shim::meet(shim::SYNC, mask, nullptr, 0, line));
}
inline unsigned shim_lane() { return shim::machine().current % shim::WARP; }
template <typename V> V __shfl_sync(unsigned mask, V v, int source, int width = 32, SHIM_LINE) {
  unsigned lane = shim_lane();
  return shim::shuffle(mask, v, (lane & ~(width - 1)) + (source & (width - 1)), line);
}
template <typename V> V __shfl_xor_sync(unsigned mask, V v, int distance, int width = 32, SHIM_LINE) {
  unsigned lane = shim_lane(), source = lane ^ distance;
  return shim::shuffle(mask, v, source / width > lane / width || source > 31 ? lane : source, line);
}
template <typename V> V __shfl_down_sync(unsigned mask, V v, unsigned distance, int width = 32, SHIM_LINE) {
  unsigned lane = shim_lane(), source = lane + distance;
  return shim::shuffle(mask, v, source / width != lane / width ? lane : source, line);
}
template <typename V> V __shfl_up_sync(unsigned mask, V v, unsigned distance, int width = 32, SHIM_LINE) {
  unsigned lane = shim_lane();
  return shim::shuffle(mask, v, lane % width < distance ? lane : lane - distance, line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, SHIM_LINE) {
  unsigned char vote = predicate != 0;
  shim::Group &group = shim::meet(shim::VOTE, mask, &vote, 1, line);
  unsigned votes = 0;
  for (unsigned i = 0; i < 32; i++) votes |= unsigned(group.data[i][0] == 1) << i;
  shim::part(group);
  return votes;
}
inline int __any_sync(unsigned mask, int p, SHIM_LINE) { return __ballot_sync(mask, p, line) != 0; }
inline int __all_sync(unsigned mask, int p, SHIM_LINE) { return __ballot_sync(mask, !p, line) == 0; }

template <typename To, typename From> To shim_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
inline unsigned __float_as_uint(float x) { return shim_cast<unsigned>(x); }
inline int __float_as_int(float x) { return shim_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return shim_cast<float>(x); }
inline float __int_as_float(int x) { return shim_cast<float>(x); }
inline long long __double_as_longlong(double x) { return shim_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return shim_cast<double>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) { volatile float product = a * b; return product; }
inline double __dmul_rn(double a, double b) { volatile double product = a * b; return product; }
inline float __fadd_rn(float a, float b) { volatile float sum = a + b; return sum; }
template <typename V> V __ldg(const V *from) { return *from; }
template <typename V> constexpr const V &min(const V &a, const V &b) { return b < a ? b : a; }
template <typename V> constexpr const V &max(const V &a, const V &b) { return a < b ? b : a; }
