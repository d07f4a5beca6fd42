// RMSNorm: y = x · s · w with s = 1 / sqrt(mean(x²) + eps). The residual stream x, the weight and all gradients that
// are sums are f32, as on the CPU; T is the type of y, or of the gradient that comes back.
#include "common.cuh"

// One block a row. Where `add` is given, x + add is normed and written to `sum`, which may be x itself.
//   x, add, sum: [rows, width], weight: [width] -> y: [rows, width]
KERNEL(rms_norm_forward,
       (const float *x, const float *add, float *sum, const float *weight, T *y, u64 width, float eps),
       (x, add, sum, weight, y, width, eps)) {
  u64 row = u64(blockIdx.x) * width;
  x += row, y += row;
  bool packed = packs<4>(x, width) && packs<4>(weight, width) && packs<4>(y, width);
  if (add) {
    add += row, sum += row;
    packed = packed && packs<4>(add, width) && packs<4>(sum, width);
  }
  float squares = 0.0f;
  each_pack<4>(width, packed, threadIdx.x, blockDim.x, [&](u64 i, auto count) {
    constexpr u32 N = decltype(count)::SIZE;
    auto values = load_pack<N>(x + i);
    if (add) {
      auto more = load_pack<N>(add + i);
      for (u32 j = 0; j < N; j++) values.at[j] += more.at[j];
      store_pack(sum + i, values);
    }
    for (u32 j = 0; j < N; j++) squares += values.at[j] * values.at[j];
  });
  float scale = 1.0f / sqrtf(block_sum(squares) / width + eps);
  // Each thread reads back what it wrote itself.
  const float *normed = add ? sum : x;
  each_pack<4>(width, packed, threadIdx.x, blockDim.x, [&](u64 i, auto count) {
    constexpr u32 N = decltype(count)::SIZE;
    auto values = load_pack<N>(normed + i);
    auto weights = load_pack<N>(weight + i);
    Pack<T, N> out;
    for (u32 j = 0; j < N; j++) out.at[j] = from_f32<T>(values.at[j] * scale * weights.at[j]);
    store_pack(y + i, out);
  });
}

// With x̂ = x·s and g = dy·w: dx = s·(g − x̂·mean(g·x̂)), plus `past`, the gradient that passes the norm by, where it
// is given; it may be dx itself. dw = Σ dy·x̂: block b sums rows [b·part, (b + 1)·part), in order, into row b of
// `partials`, by way of `width` floats of dynamic shared memory where `in_shared` says that the launch asked for them.
//   x, d_y, past: [rows, width], weight: [width] -> d_x: [rows, width], partials: [ceil(rows / part), width]
KERNEL(rms_norm_backward,
       (const float *x, const float *weight, const T *d_y, const float *past, float *d_x, float *partials, u64 rows,
        u64 width, u32 part, u32 in_shared, float eps),
       (x, weight, d_y, past, d_x, partials, rows, width, part, in_shared, eps)) {
  DYNAMIC_SHARED(float, scratch);
  partials += u64(blockIdx.x) * width;
  float *sums = in_shared ? scratch : partials;
  // A thread has the same columns in every row, so no one waits for anyone's sums.
  bool packed = packs<4>(x, width) && packs<4>(weight, width) && packs<4>(d_y, width) && packs<4>(d_x, width) &&
                packs<4>(sums, width) && packs<4>(partials, width) && (!past || packs<4>(past, width));
  each_pack<4>(width, packed, threadIdx.x, blockDim.x, [&](u64 i, auto count) {
    store_pack(sums + i, Pack<float, decltype(count)::SIZE>{});
  });
  u64 first = u64(blockIdx.x) * part, end = first + part < rows ? first + part : rows;
  for (u64 row = first; row < end; row++) {
    const float *x_row = x + row * width;
    const T *d_row = d_y + row * width;
    float squares = 0.0f, dot = 0.0f;
    each_pack<4>(width, packed, threadIdx.x, blockDim.x, [&](u64 i, auto count) {
      constexpr u32 N = decltype(count)::SIZE;
      auto values = load_pack<N>(x_row + i);
      auto slopes = load_pack<N>(d_row + i);
      auto weights = load_pack<N>(weight + i);
      for (u32 j = 0; j < N; j++) {
        squares += values.at[j] * values.at[j];
        dot += to_f32(slopes.at[j]) * weights.at[j] * values.at[j];
      }
    });
    float scale = 1.0f / sqrtf(block_sum(squares) / width + eps);
    float mean = block_sum(dot) * scale / width;
    each_pack<4>(width, packed, threadIdx.x, blockDim.x, [&](u64 i, auto count) {
      constexpr u32 N = decltype(count)::SIZE;
      auto values = load_pack<N>(x_row + i);
      auto slopes = load_pack<N>(d_row + i);
      auto weights = load_pack<N>(weight + i);
      auto so_far = load_pack<N>(sums + i);
      Pack<float, N> out{};
      if (past) out = load_pack<N>(past + row * width + i);
      for (u32 j = 0; j < N; j++) {
        float slope = to_f32(slopes.at[j]), normed = values.at[j] * scale;
        so_far.at[j] += slope * normed;
        out.at[j] += scale * (slope * weights.at[j] - normed * mean);
      }
      store_pack(sums + i, so_far);
      store_pack(d_x + row * width + i, out);
    });
  }
  if (in_shared) {
    each_pack<4>(width, packed, threadIdx.x, blockDim.x, [&](u64 i, auto count) {
      store_pack(partials + i, load_pack<decltype(count)::SIZE>(sums + i));
    });
  }
}

// Adds rows in order; a thread a column. With `add`, to what `out` holds.
//   partials: [parts, width] -> out: [width]
KERNEL_ONE(column_sum, (const float *partials, float *out, u64 parts, u64 width, u32 add),
           (partials, out, parts, width, add)) {
  u64 column = global_thread();
  if (column >= width) return;
  float sum = 0.0f;
  for (u64 part = 0; part < parts; part++) sum += partials[part * width + column];
  out[column] = add ? out[column] + sum : sum;
}
