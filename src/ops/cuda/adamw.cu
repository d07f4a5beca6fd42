// AdamW in one pass over a parameter: its f32 master, both moments, and the copy that the model computes with. The
// formulas and constants are those of src/ops/cpu/adamw.rs.
#include "common.cuh"

// The same fields in the same order as `Update` in Rust.
struct Update { float beta1, beta2, grad_scale, shrink, step_size, root_correction, eps; };

// Philox-4x32-10 (Salmon et al., 2011): four random words of a counter under a key.
__device__ __forceinline__ void philox(const u32 (&counter)[4], const u32 (&key)[2], u32 (&out)[4]) {
  u32 a = counter[0], b = counter[1], c = counter[2], d = counter[3], left = key[0], right = key[1];
#pragma unroll
  for (u32 round = 0; round < 10; round++) {
    u32 high_a = __umulhi(0xd2511f53u, a), low_a = 0xd2511f53u * a;
    u32 high_c = __umulhi(0xcd9e8d57u, c), low_c = 0xcd9e8d57u * c;
    a = high_c ^ b ^ left, b = low_c, c = high_a ^ d ^ right, d = low_a;
    left += 0x9e3779b9u, right += 0xbb67ae85u;
  }
  out[0] = a, out[1] = b, out[2] = c, out[3] = d;
}

// Rounds up with the probability of what is cut off: on average nothing is lost. Only to bf16; not what is not finite.
__device__ __forceinline__ bf16 by_chance(float x, u32 random) {
  u32 bits = __float_as_uint(x);
  if ((bits & 0x7f800000) == 0x7f800000) return from_f32<bf16>(x);
  return bf16{u16((bits + (random >> 16)) >> 16)};
}
template <typename T> __device__ __forceinline__ T rounded(float x, bool stochastic, u32 random) {
  if constexpr (sizeof(T) == 2) {
    if (stochastic) return by_chance(x, random);
  }
  return from_f32<T>(x);
}

// `copy` may be null. The gradient is multiplied by grad_scale and, where `clip` is given, by *clip, which a kernel
// before this one wrote: NaN there means that gradients are not finite, and nothing moves. With `stochastic` the copy
// is rounded by chance; element i draws word i % 4 of counter (i / 4, stream) under the key `seed`.
//   param, first, second, grad, copy: [count]
KERNEL(adamw,
       (float *param, float *first, float *second, const float *grad, T *copy, const float *clip, u64 count,
        Update update, u32 stochastic, u64 seed, u64 stream),
       (param, first, second, grad, copy, clip, count, update, stochastic, seed, stream)) {
  float grad_scale = update.grad_scale;
  if (clip) grad_scale *= *clip;
  if (grad_scale != grad_scale) return;
  bool packed = packs<4>(param, 0) && packs<4>(first, 0) && packs<4>(second, 0) && packs<4>(grad, 0) &&
                (!copy || packs<4>(copy, 0));
  each_pack<4>(count, packed, global_thread(), global_threads(), [&](u64 i, auto number) {
    constexpr u32 N = decltype(number)::SIZE;
    auto params = load_pack<N>(param + i);
    auto firsts = load_pack<N>(first + i);
    auto seconds = load_pack<N>(second + i);
    auto grads = load_pack<N>(grad + i);
    for (u32 j = 0; j < N; j++) {
      float g = grads.at[j] * grad_scale;
      float m = firsts.at[j] = update.beta1 * firsts.at[j] + (1.0f - update.beta1) * g;
      float v = seconds.at[j] = update.beta2 * seconds.at[j] + (1.0f - update.beta2) * (g * g);
      float root = sqrtf(v) / update.root_correction + update.eps;
      params.at[j] = params.at[j] * update.shrink - update.step_size * m / root;
    }
    store_pack(param + i, params);
    store_pack(first + i, firsts);
    store_pack(second + i, seconds);
    if (!copy) return;
    u32 random[4] = {};
    if (stochastic) {
      philox({u32(i / 4), u32(i / 4 >> 32), u32(stream), u32(stream >> 32)}, {u32(seed), u32(seed >> 32)}, random);
    }
    Pack<T, N> copies;
    for (u32 j = 0; j < N; j++) {
      u32 word = N == 4 ? j : u32(i % 4);
      // No index that is known only at run time: the words stay in registers.
      u32 chance = word < 2 ? (word == 0 ? random[0] : random[1]) : (word == 2 ? random[2] : random[3]);
      copies.at[j] = rounded<T>(params.at[j], stochastic, chance);
    }
    store_pack(copy + i, copies);
  });
}

// The generator alone, for tests: `out[4t …]` are the words of counter (t, stream) under the key `seed`.
KERNEL_ONE(philox_words, (u32 *out, u64 count, u64 seed, u64 stream), (out, count, seed, stream)) {
  u64 t = global_thread();
  if (t >= count) return;
  u32 words[4];
  philox({u32(t), u32(t >> 32), u32(stream), u32(stream >> 32)}, {u32(seed), u32(seed >> 32)}, words);
  for (u32 j = 0; j < 4; j++) out[4 * t + j] = words[j];
}
