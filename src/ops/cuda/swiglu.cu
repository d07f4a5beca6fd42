// SwiGLU: out = silu(gate) · up, with silu(x) = x / (1 + e^-x). Elementwise, over all threads of the grid.
#include "common.cuh"

//   gate, up -> out: [count]
KERNEL(swiglu_forward, (const T *gate, const T *up, T *out, u64 count), (gate, up, out, count)) {
  constexpr u32 WIDE = Pack<T>::SIZE;
  bool packed = packs<WIDE>(gate, 0) && packs<WIDE>(up, 0) && packs<WIDE>(out, 0);
  each_pack<WIDE>(count, packed, global_thread(), global_threads(), [&](u64 i, auto number) {
    constexpr u32 N = decltype(number)::SIZE;
    auto gates = load_pack<N>(gate + i);
    auto ups = load_pack<N>(up + i);
    for (u32 j = 0; j < N; j++) {
      float x = to_f32(gates.at[j]);
      gates.at[j] = from_f32<T>(x / (1.0f + expf(-x)) * to_f32(ups.at[j]));
    }
    store_pack(out + i, gates);
  });
}

template <typename T, typename D>
__device__ __forceinline__ void swiglu_gradients(const T *gate, const T *up, const D *d_out, T *d_gate, T *d_up,
                                                 u64 count) {
  // As many as fit sixteen bytes of the wider type.
  constexpr u32 WIDE = Pack<T>::SIZE < Pack<D>::SIZE ? Pack<T>::SIZE : Pack<D>::SIZE;
  bool packed = packs<WIDE>(gate, 0) && packs<WIDE>(up, 0) && packs<WIDE>(d_gate, 0) && packs<WIDE>(d_up, 0);
  packed = packed && packs<WIDE>(d_out, 0);
  each_pack<WIDE>(count, packed, global_thread(), global_threads(), [&](u64 i, auto number) {
    constexpr u32 N = decltype(number)::SIZE;
    auto gates = load_pack<N>(gate + i);
    auto ups = load_pack<N>(up + i);
    auto slopes = load_pack<N>(d_out + i);
    for (u32 j = 0; j < N; j++) {
      float x = to_f32(gates.at[j]), slope = to_f32(slopes.at[j]);
      float sigmoid = 1.0f / (1.0f + expf(-x)), silu = x * sigmoid;
      gates.at[j] = from_f32<T>(slope * to_f32(ups.at[j]) * (sigmoid + silu * (1.0f - sigmoid)));
      ups.at[j] = from_f32<T>(slope * silu);
    }
    store_pack(d_gate + i, gates);
    store_pack(d_up + i, ups);
  });
}

// d_gate and d_up may be gate and up themselves.
//   gate, up, d_out -> d_gate, d_up: [count]
KERNEL(swiglu_backward, (const T *gate, const T *up, const T *d_out, T *d_gate, T *d_up, u64 count),
       (gate, up, d_out, d_gate, d_up, count)) {
  swiglu_gradients<T, T>(gate, up, d_out, d_gate, d_up, count);
}

// The same of bf16 with a gradient that came as f32, as on the CPU: one rounding less.
KERNEL_ONE(swiglu_backward_bf16_of_f32,
           (const bf16 *gate, const bf16 *up, const float *d_out, bf16 *d_gate, bf16 *d_up, u64 count),
           (gate, up, d_out, d_gate, d_up, count)) {
  swiglu_gradients<bf16, float>(gate, up, d_out, d_gate, d_up, count);
}
