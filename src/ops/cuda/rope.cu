// Rotary position embedding, half-split: of each head, element i and element i + E/2 turn by the angle of the token's
// position. Angles come as tables of cosines and sines, computed on the CPU in f64: they are the same numbers there.
#include "common.cuh"

// One block a token. By the opposite angles where `sign` is -1: that is the backward. Tokens of x lie `stride` elements
// apart, so the heads may be a part of a wider row. `out` may be x itself where nothing lies between.
//   x, out: [T, heads, 2 · half], cos, sin: [T, half]
KERNEL(rope,
       (const T *x, T *out, const float *cos, const float *sin, u64 stride, u32 heads, u32 half, float sign),
       (x, out, cos, sin, stride, heads, half, sign)) {
  u64 token = blockIdx.x;
  x += token * stride, out += token * heads * 2 * half, cos += token * half, sin += token * half;
  bool packed = packs<4>(x, half) && packs<4>(out, half) && packs<4>(cos, half) && packs<4>(sin, half);
  // A row's pairs, counted through all heads. A pack lies within one head, for `half` is a multiple of it.
  each_pack<4>(u64(heads) * half, packed, threadIdx.x, blockDim.x, [&](u64 pair, auto count) {
    constexpr u32 N = decltype(count)::SIZE;
    u32 head = u32(pair) / half, i = u32(pair) % half;
    u64 low = u64(head) * 2 * half + i, high = low + half;
    auto a = load_pack<N>(x + low);
    auto b = load_pack<N>(x + high);
    auto cosines = load_pack<N>(cos + i);
    auto sines = load_pack<N>(sin + i);
    for (u32 j = 0; j < N; j++) {
      float left = to_f32(a.at[j]), right = to_f32(b.at[j]), turn = sines.at[j] * sign;
      a.at[j] = from_f32<T>(left * cosines.at[j] - right * turn);
      b.at[j] = from_f32<T>(right * cosines.at[j] + left * turn);
    }
    store_pack(out + low, a);
    store_pack(out + high, b);
  });
}
