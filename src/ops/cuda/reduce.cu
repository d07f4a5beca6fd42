// Sums over whole tensors in f64, in an order that depends on their length and the block's alone, and what the
// optimizer makes of them, without the host: the global norm, the factor that clips it, and whether all is finite.
#include "common.cuh"

// Elements of one partial sum, as on the CPU.
constexpr u64 CHUNK = 1 << 16;

// One block a chunk.
//   x: [count] -> partials: [ceil(count / CHUNK)]
KERNEL(square_sum, (const T *x, double *partials, u64 count), (x, partials, count)) {
  u64 first = blockIdx.x * CHUNK, length = count - first < CHUNK ? count - first : CHUNK;
  x += first;
  double sum = 0.0;
  // In packs of four whatever the address: the order of a sum must not depend on where a tensor lies.
  bool aligned = packs<4>(x, 0);
  for (u64 i = u64(threadIdx.x) * 4; i < length; i += u64(blockDim.x) * 4) {
    Pack<T, 4> values{};
    if (aligned && i + 4 <= length) {
      values = load_pack<4>(x + i);
    } else {
      for (u32 j = 0; j < 4 && i + j < length; j++) values.at[j] = x[i + j];
    }
    for (u32 j = 0; j < 4; j++) {
      double value = to_f32(values.at[j]);
      sum += value * value;
    }
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// One block. With `add`, to what `out` holds.
//   partials: [count] -> out: one number
KERNEL_ONE(sum_partials, (const double *partials, double *out, u64 count, u32 add), (partials, out, count, add)) {
  double sum = 0.0;
  for (u64 i = threadIdx.x; i < count; i += blockDim.x) sum += partials[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *out = add ? *out + sum : sum;
}

// From each parameter's sum of squares to the norm of all, and to what gradients are multiplied with: 1, or less where
// the norm is above `max_norm` > 0, or NaN where the norm is not finite. One block.
//   squares: [count] -> norm, factor: one number each
KERNEL_ONE(clip, (const double *squares, double *norm, float *factor, u64 count, double max_norm),
           (squares, norm, factor, count, max_norm)) {
  double sum = 0.0;
  for (u64 i = threadIdx.x; i < count; i += blockDim.x) sum += squares[i];
  sum = block_sum(sum);
  if (threadIdx.x != 0) return;
  double length = sqrt(sum), scale = 1.0;
  if (max_norm > 0.0 && max_norm < length + 1e-6) scale = max_norm / (length + 1e-6);
  *norm = length;
  *factor = sum - sum == 0.0 ? float(scale) : __int_as_float(0x7fffffff);
}

struct Min {
  __device__ __forceinline__ u64 operator()(u64 a, u64 b) const { return a < b ? a : b; }
};
constexpr u64 NONE = ~u64(0);

// The index of the first element that is not finite, of each chunk; all ones where there is none. One block a chunk.
//   x: [count] -> partials: [ceil(count / CHUNK)]
KERNEL(first_not_finite, (const T *x, u64 *partials, u64 count), (x, partials, count)) {
  u64 first = blockIdx.x * CHUNK, end = count - first < CHUNK ? count : first + CHUNK;
  u64 found = NONE;
  for (u64 i = first + threadIdx.x; i < end && found == NONE; i += blockDim.x) {
    float value = to_f32(x[i]);
    if (value - value != 0.0f) found = i;
  }
  found = block_reduce(found, NONE, Min());
  if (threadIdx.x == 0) partials[blockIdx.x] = found;
}

// One block.
//   partials: [count] -> out: one number
KERNEL_ONE(minimum, (const u64 *partials, u64 *out, u64 count), (partials, out, count)) {
  u64 found = NONE;
  for (u64 i = threadIdx.x; i < count; i += blockDim.x) found = Min()(found, partials[i]);
  found = block_reduce(found, NONE, Min());
  if (threadIdx.x == 0) *out = found;
}

// A gradient more. Elementwise, over all threads of the grid.
//   sum, grad -> sum: [count]
KERNEL(accumulate, (float *sum, const T *grad, u64 count), (sum, grad, count)) {
  bool packed = packs<4>(sum, 0) && packs<4>(grad, 0);
  each_pack<4>(count, packed, global_thread(), global_threads(), [&](u64 i, auto number) {
    constexpr u32 N = decltype(number)::SIZE;
    auto sums = load_pack<N>(sum + i);
    auto more = load_pack<N>(grad + i);
    for (u32 j = 0; j < N; j++) sums.at[j] += to_f32(more.at[j]);
    store_pack(sum + i, sums);
  });
}
