// What every kernel uses. Built by nvcc or NVRTC for the device, and by g++ with host.h in the device's stead.
//
// No header of the toolkit is included, so NVRTC needs none either. Blocks have one dimension, of 32 to 1024 threads, a
// multiple of 32. Every reduction has one fixed order: the same numbers give the same bits, run after run.
#pragma once
#ifdef ARRIERO_HOST
#include "host.h"
#endif

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32;
typedef long long i64;

#define FULL 0xffffffffu
// `-inf`, without <math.h>.
#define NEG_INF __int_as_float(0xff800000)

// ---- Entries --------------------------------------------------------------------------------------------------------
//
// KERNEL(scale, (T *x, float by, u64 count), (x, by, count)) { ... }
//
// declares `scale<T>`, whose body follows, and the entries `scale_f32` and `scale_bf16`. KERNEL_BLOCK says first how
// many threads a block has at most. KERNEL_ONE and KERNEL_ONE_BLOCK have one entry, with the name itself, and no T.
// On the host each entry has a launcher `host_<entry>`.

#ifdef ARRIERO_HOST
#define ENTRY(entry, threads, params, call)                                                           \
  extern "C" __global__ void entry params { call; }                                                   \
  extern "C" int host_##entry(const shim::Launch *how, void *const *args, const size_t *sizes, size_t count) { \
    return shim::launch(&entry, *how, args, sizes, count);                                            \
  }
#else
// One block at least: without a number the assembler may aim at more, and spill.
#define ENTRY(entry, threads, params, call) \
  extern "C" __global__ void __launch_bounds__(threads, 1) entry params { call; }
#endif

#define KERNEL_BLOCK(threads, name, params, args)                                                      \
  template <typename T> __device__ void name params;                                                   \
  namespace name##_of_f32 { typedef float T; ENTRY(name##_f32, threads, params, ::name<T> args) }      \
  namespace name##_of_bf16 { typedef ::bf16 T; ENTRY(name##_bf16, threads, params, ::name<T> args) }   \
  template <typename T> __device__ void name params
#define KERNEL(name, params, args) KERNEL_BLOCK(1024, name, params, args)
#define KERNEL_ONE_BLOCK(threads, name, params, args)            \
  __device__ void name##_body params;                            \
  ENTRY(name, threads, params, name##_body args)                 \
  __device__ void name##_body params
#define KERNEL_ONE(name, params, args) KERNEL_ONE_BLOCK(1024, name, params, args)

// ---- Shared memory --------------------------------------------------------------------------------------------------
//
// SHARED(float, tile, [64][72]);       static, not initialised
// DYNAMIC_SHARED(float, scratch);      what the launch asks for: a pointer, aligned to 16 bytes

#ifdef ARRIERO_HOST
#define SHARED(type, name, dims)       \
  typedef type name##_array dims;      \
  static char name##_key;              \
  name##_array &name = *static_cast<name##_array *>(shim::shared(&name##_key, sizeof(name##_array)))
#define DYNAMIC_SHARED(type, name) type *name = static_cast<type *>(shim::shared(&shim::machine(), 0))
#else
#define SHARED(type, name, dims) __shared__ alignas(16) type name dims
extern __shared__ __align__(16) u8 dynamic_shared[];
#define DYNAMIC_SHARED(type, name) type *name = reinterpret_cast<type *>(dynamic_shared)
#endif

// ---- Numbers --------------------------------------------------------------------------------------------------------

// The upper half of an f32; arithmetic is in f32, rounded to nearest, ties to even, where it is written.
struct bf16 { u16 bits; };

__device__ __forceinline__ u16 bf16_bits(float x) {
#ifdef ARRIERO_HOST
  u32 bits = __float_as_uint(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;  // what the device makes of NaN
  return u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#else
  u16 bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
#endif
}

__device__ __forceinline__ float to_f32(float x) { return x; }
__device__ __forceinline__ float to_f32(bf16 x) { return __uint_as_float(u32(x.bits) << 16); }
template <typename T> __device__ __forceinline__ T from_f32(float x);
template <> __device__ __forceinline__ float from_f32<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_f32<bf16>(float x) { return bf16{bf16_bits(x)}; }

// Two numbers rounded to bf16, the first in the lower half: what a product's operands are made of.
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
#ifdef ARRIERO_HOST
  return bf16_bits(low) | u32(bf16_bits(high)) << 16;
#else
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#endif
}
__device__ __forceinline__ u32 pack_bf16(bf16 low, bf16 high) { return low.bits | u32(high.bits) << 16; }

// Elements that are read and written at once, where pointers and widths allow it: sixteen bytes unless told otherwise.
template <typename T, u32 N = 16 / sizeof(T)> struct alignas(N * sizeof(T)) Pack {
  static constexpr u32 SIZE = N;
  T at[N];
};

// Whether rows of `width` elements from this address on all begin where a pack may.
template <typename T> __device__ __forceinline__ bool packs(const T *data, u64 width) {
  return reinterpret_cast<u64>(data) % 16 == 0 && width % Pack<T>::SIZE == 0;
}
template <u32 N, typename T> __device__ __forceinline__ bool packs(const T *data, u64 width) {
  return reinterpret_cast<u64>(data) % (N * sizeof(T)) == 0 && width % N == 0;
}
template <typename T> __device__ __forceinline__ Pack<T> load_pack(const T *from) {
  return *reinterpret_cast<const Pack<T> *>(from);
}
template <u32 N, typename T> __device__ __forceinline__ Pack<T, N> load_pack(const T *from) {
  return *reinterpret_cast<const Pack<T, N> *>(from);
}
template <typename T, u32 N> __device__ __forceinline__ void store_pack(T *to, Pack<T, N> pack) {
  *reinterpret_cast<Pack<T, N> *>(to) = pack;
}

// A number that a loop's body may use as a constant.
template <u32 N> struct Count { static constexpr u32 SIZE = N; };

// Calls each(first, Count<N>()) or each(first, Count<1>()) for what falls to thread `thread` of `threads`: packs where
// `packed` says that all of the body's pointers allow them, and what is left of `count` one by one.
template <u32 N, typename Each>
__device__ __forceinline__ void each_pack(u64 count, bool packed, u64 thread, u64 threads, Each each) {
  u64 whole = packed ? count / N * N : 0;
  for (u64 i = thread * N; i < whole; i += threads * N) each(i, Count<N>());
  for (u64 i = whole + thread; i < count; i += threads) each(i, Count<1>());
}

// ---- Threads --------------------------------------------------------------------------------------------------------

__device__ __forceinline__ u32 lane_id() { return threadIdx.x & 31; }
__device__ __forceinline__ u32 warp_id() { return threadIdx.x >> 5; }
__device__ __forceinline__ u32 warp_count() { return blockDim.x >> 5; }
// Of the whole grid, along x.
__device__ __forceinline__ u64 global_thread() { return u64(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ __forceinline__ u64 global_threads() { return u64(gridDim.x) * blockDim.x; }

// ---- Reductions -----------------------------------------------------------------------------------------------------
//
// Of whatever `shuffle_xor` and `shuffle` know: write overloads for a struct of your own beside it. All threads of the
// warp or block call, and all get the result.

__device__ __forceinline__ float shuffle_xor(float x, u32 distance) { return __shfl_xor_sync(FULL, x, distance); }
__device__ __forceinline__ double shuffle_xor(double x, u32 distance) { return __shfl_xor_sync(FULL, x, distance); }
__device__ __forceinline__ u32 shuffle_xor(u32 x, u32 distance) { return __shfl_xor_sync(FULL, x, distance); }
__device__ __forceinline__ u64 shuffle_xor(u64 x, u32 distance) { return __shfl_xor_sync(FULL, x, distance); }
__device__ __forceinline__ float shuffle(float x, u32 lane) { return __shfl_sync(FULL, x, lane); }
__device__ __forceinline__ double shuffle(double x, u32 lane) { return __shfl_sync(FULL, x, lane); }
__device__ __forceinline__ u32 shuffle(u32 x, u32 lane) { return __shfl_sync(FULL, x, lane); }
__device__ __forceinline__ u64 shuffle(u64 x, u32 lane) { return __shfl_sync(FULL, x, lane); }

struct Add {
  template <typename V> __device__ __forceinline__ V operator()(V a, V b) const { return a + b; }
};
struct Max {
  template <typename V> __device__ __forceinline__ V operator()(V a, V b) const { return a > b ? a : b; }
};

template <typename V, typename Op> __device__ __forceinline__ V warp_reduce(V value, Op op) {
#pragma unroll
  for (u32 distance = 16; distance > 0; distance /= 2) value = op(value, shuffle_xor(value, distance));
  return value;
}

// `neutral` changes nothing: op(neutral, x) = x.
template <typename V, typename Op> __device__ V block_reduce(V value, V neutral, Op op) {
  SHARED(V, partial, [32]);
  value = warp_reduce(value, op);
  if (lane_id() == 0) partial[warp_id()] = value;
  __syncthreads();
  value = lane_id() < warp_count() ? partial[lane_id()] : neutral;
  // Each warp does the same; lane 0's is everyone's, whatever an operation makes of the other lanes' order.
  value = shuffle(warp_reduce(value, op), 0);
  __syncthreads();
  return value;
}

__device__ __forceinline__ float warp_sum(float x) { return warp_reduce(x, Add()); }
__device__ __forceinline__ float warp_max(float x) { return warp_reduce(x, Max()); }
__device__ __forceinline__ float block_sum(float x) { return block_reduce(x, 0.0f, Add()); }
__device__ __forceinline__ double block_sum(double x) { return block_reduce(x, 0.0, Add()); }
__device__ __forceinline__ float block_max(float x) { return block_reduce(x, NEG_INF, Max()); }

// ---- Tensor cores ---------------------------------------------------------------------------------------------------

// sum += a · b of one warp: a [16, 16] by rows, b [16, 8] by columns, sum [16, 8]. With g = lane / 4 and t = lane % 4,
// pairs of bf16 with the lower index in the lower half:
//   a: [g][2t], [g+8][2t], [g][2t+8], [g+8][2t+8]     (each with its neighbour in the row)
//   b: [2t][g], [2t+8][g]                             (each with its neighbour in the column)
//   sum: [g][2t], [g][2t+1], [g+8][2t], [g+8][2t+1]
__device__ __forceinline__ void mma_bf16(float (&sum)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#ifdef ARRIERO_HOST
  u32 mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  shim::Group &group = shim::meet(shim::MMA, FULL, mine, sizeof mine, __LINE__);
  u32 g = lane_id() / 4, t = lane_id() % 4;
  for (u32 i = 0; i < 4; i++) {
    u32 row = g + i / 2 * 8, column = 2 * t + i % 2;
    for (u32 k = 0; k < 16; k++) {
      u32 of_a[6], of_b[6];
      memcpy(of_a, group.data[row % 8 * 4 + k % 8 / 2], sizeof of_a);
      memcpy(of_b, group.data[column * 4 + k % 8 / 2], sizeof of_b);
      u32 pair_a = of_a[row / 8 + k / 8 * 2], pair_b = of_b[4 + k / 8];
      sum[i] += to_f32(bf16{u16(pair_a >> k % 2 * 16)}) * to_f32(bf16{u16(pair_b >> k % 2 * 16)});
    }
  }
  shim::part(group);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// ---- Copies to shared memory that go on while the thread does -------------------------------------------------------
//
// copy_async(shared, global) of 16 aligned bytes; commit_copies() ends a batch; wait_copies<N>() waits until at most N
// batches of this thread are under way. Other threads see them after a barrier. On the host a copy is made when it is
// waited for, not before.

__device__ __forceinline__ void copy_async(void *shared, const void *global) {
#ifdef ARRIERO_HOST
  shim::machine().fibres[shim::machine().current].copies.push_back({shared, global});
#else
  u32 to = u32(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
#endif
}

__device__ __forceinline__ void commit_copies() {
#ifdef ARRIERO_HOST
  shim::Fibre &fibre = shim::machine().fibres[shim::machine().current];
  size_t before = std::accumulate(fibre.batches.begin(), fibre.batches.end(), size_t(0));
  fibre.batches.push_back(fibre.copies.size() - before);
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int N> __device__ __forceinline__ void wait_copies() {
#ifdef ARRIERO_HOST
  shim::Fibre &fibre = shim::machine().fibres[shim::machine().current];
  while (fibre.batches.size() > N) {
    size_t count = fibre.batches.front();
    for (size_t i = 0; i < count; i++) memcpy(fibre.copies[i].to, fibre.copies[i].from, 16);
    fibre.copies.erase(fibre.copies.begin(), fibre.copies.begin() + count);
    fibre.batches.erase(fibre.batches.begin());
  }
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}
