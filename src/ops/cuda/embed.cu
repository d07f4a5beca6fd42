// Token embedding: rows of a table into the residual stream, which is f32, and the gradient back into rows of a table.
#include "common.cuh"

// One block a token. An id beyond the table has no row: it gives NaN, which no later check misses.
//   table: [vocab, width], ids: [T] -> out: [T, width]
KERNEL(embed_forward, (const T *table, const u32 *ids, float *out, u64 width, u32 vocab),
       (table, ids, out, width, vocab)) {
  u32 id = ids[blockIdx.x];
  out += u64(blockIdx.x) * width;
  bool known = id < vocab;
  table += known ? u64(id) * width : 0;
  bool packed = packs<4>(table, width) && packs<4>(out, width);
  each_pack<4>(width, packed, threadIdx.x, blockDim.x, [&](u64 i, auto count) {
    constexpr u32 N = decltype(count)::SIZE;
    Pack<float, N> row;
    for (u32 j = 0; j < N; j++) row.at[j] = __int_as_float(0x7fffffff);
    if (known) {
      auto values = load_pack<N>(table + i);
      for (u32 j = 0; j < N; j++) row.at[j] = to_f32(values.at[j]);
    }
    store_pack(out + i, row);
  });
}

// Adds to each row of d_table that has tokens the gradients of those tokens, in their order, as the CPU does: the same
// bits. A segment is one such row: `rows[s]`, with the tokens order[starts[s]] … order[starts[s + 1] − 1]. One block a
// segment and a part of the columns; grid (segments, parts of the columns).
//   d_x: [T, width], order: [T], starts: [segments + 1], rows: [segments] -> d_table: [vocab, width]
KERNEL(embed_backward,
       (const T *d_x, const u32 *order, const u32 *starts, const u32 *rows, float *d_table, u64 width),
       (d_x, order, starts, rows, d_table, width)) {
  u32 segment = blockIdx.x, first = starts[segment], end = starts[segment + 1];
  d_table += u64(rows[segment]) * width;
  bool packed = packs<4>(d_x, width) && packs<4>(d_table, width);
  u64 thread = u64(blockIdx.y) * blockDim.x + threadIdx.x, threads = u64(gridDim.y) * blockDim.x;
  each_pack<4>(width, packed, thread, threads, [&](u64 i, auto count) {
    constexpr u32 N = decltype(count)::SIZE;
    auto sums = load_pack<N>(d_table + i);
    for (u32 place = first; place < end; place++) {
      auto more = load_pack<N>(d_x + u64(order[place]) * width + i);
      for (u32 j = 0; j < N; j++) sums.at[j] += to_f32(more.at[j]);
    }
    store_pack(d_table + i, sums);
  });
}
