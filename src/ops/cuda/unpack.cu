// Frozen matrices in blocks of few bits, unpacked for the moment of a product. The same numbers as the CPU's, to the bit.
#include "common.cuh"

// Numbers that a thread unpacks at once.
constexpr u32 EIGHT = 8;

// Writes what a thread has of `count` numbers from `at` on: a pack where there are eight and `packed` allows it.
template <typename T>
__device__ __forceinline__ void write(T *out, u64 at, u64 count, bool packed, const float (&values)[EIGHT]) {
  Pack<T, EIGHT> pack;
#pragma unroll
  for (u32 i = 0; i < EIGHT; i++) pack.at[i] = from_f32<T>(values[i]);
  if (packed && at + EIGHT <= count) {
    store_pack(out + at, pack);
  } else {
    for (u32 i = 0; i < EIGHT && at + i < count; i++) out[at + i] = pack.at[i];
  }
}

// 4-bit NormalFloat with double quantisation (Dettmers et al., 2023): 64 numbers share a scale, 256 scales share one.
//   levels: [count / 2], two a byte, the first in the high half; scales: [count / 64]; scale_of_scales: [count / 64 / 256];
//   tables: what a byte of `scales` means, [256], and what a level means, [16]  ->  out: [count]
KERNEL(unpack_nf4,
       (const u8 *levels, const u8 *scales, const float *scale_of_scales, float offset, const float *tables, T *out,
        u64 count),
       (levels, scales, scale_of_scales, offset, tables, out, count)) {
  SHARED(float, table, [256 + 16]);
  for (u32 i = threadIdx.x; i < 256 + 16; i += blockDim.x) table[i] = tables[i];
  __syncthreads();
  const bool packed = packs<EIGHT>(out, 0);
  for (u64 at = global_thread() * EIGHT; at < count; at += global_threads() * EIGHT) {
    const u64 block = at / 64;
    const float scale = fmaf(table[scales[block]], scale_of_scales[block / 256], offset);
    float values[EIGHT] = {};
#pragma unroll
    for (u32 i = 0; i < EIGHT; i++) {
      if (at + i >= count) break;
      const u32 pair = levels[(at + i) / 2];
      values[i] = __fmul_rn(scale, table[256 + (i % 2 ? pair & 15 : pair >> 4)]);
    }
    write(out, at, count, packed, values);
  }
}

// What a number in half precision means.
__device__ __forceinline__ float of_half(u16 bits) {
#ifdef ARRIERO_HOST
  const u32 sign = u32(bits & 0x8000) << 16, rest = bits & 0x7fff;
  // Below the smallest normal number they are multiples of 2^-24.
  if (rest < 0x400) return __uint_as_float(sign | __float_as_uint(float(rest) * 5.9604644775390625e-8f));
  return __uint_as_float(sign | (rest << 13) + (rest < 0x7c00 ? 0x38000000u : 0x70000000u));
#else
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
#endif
}

// Blocks of llama.cpp: 32 numbers with a scale in half precision, where `minimum` is not 0 a minimum in half precision, and
// integers of `bits` bits: of 4, less 8 where there is no minimum, the first sixteen in the low halves of the bytes; or of 8,
// with sign. Blocks begin at even addresses.
//   blocks: [count / 32, 2 + 2 (with a minimum) + 4 · bits]  ->  out: [count], whole blocks
KERNEL(unpack_blocks, (const u8 *blocks, u32 bits, u32 minimum, T *out, u64 count), (blocks, bits, minimum, out, count)) {
  const u32 head = minimum ? 2 : 1, size = 2 * head + 4 * bits;
  const bool packed = packs<EIGHT>(out, 0);
  for (u64 at = global_thread() * EIGHT; at < count; at += global_threads() * EIGHT) {
    const u16 *block = reinterpret_cast<const u16 *>(blocks + at / 32 * size);
    const u32 part = at % 32 / EIGHT;
    const float scale = of_half(block[0]), least = minimum ? of_half(block[1]) : 0.f;
    float values[EIGHT];
#pragma unroll
    for (u32 i = 0; i < EIGHT; i++) {
      const u32 place = bits == 8 ? part * EIGHT + i : part % 2 * EIGHT + i;
      const u32 byte = block[head + place / 2] >> place % 2 * 8 & 255;
      const i32 number = bits == 8 ? i32(byte << 24) >> 24 : i32(byte >> part / 2 * 4 & 15) - (minimum ? 0 : 8);
      // Exact: an integer of so few bits times a number in half precision; the sum is rounded once.
      values[i] = minimum ? fmaf(float(number), scale, least) : float(number) * scale;
    }
    write(out, at, count, packed, values);
  }
}
