// Forest attention: a token sees its own segment up to itself, and every ancestor segment. Scores exist for one tile at
// a time, in registers.
//
// Shapes: q, out [T, H, E], k, v [T, G, E]; `share` = H / G query heads read the same keys. The queries of a group are
// one list: query m is head m % share of the group at token m / share, so a tile holds all heads of some tokens.
//
// The host gives each block a tile of its own and the ranges of tokens that the tile meets, in order, as AttentionPlan
// has them: for queries the keys they see, for keys the tokens that see them. Parents lie before their children, so
// within those ranges "no key after the query" is the whole rule. A range is walked in pieces from its start: what a
// query adds up, and in which order, depends on its path alone, not on its neighbours in the row or in the tile.
#include "attention.cuh"

// A tile: rows [first, first + count), and its ranges [begin, end) in the list of ranges.
struct Tile { u32 first, count, begin, end; };
struct Range { u32 first, count; };

// ---- Rows in memory -------------------------------------------------------------------------------------------------

// Writes the rows of a warp that the tile has, each times its factor.
template <typename O>
__device__ __forceinline__ void store_rows(Lines<O, typename O::T> to, Tile tile, const float (&x)[O::E / 8][4],
                                           const float (&factor)[2]) {
  typedef typename O::T T;
  u32 at = tile.first / to.share.by, head = tile.first % to.share.by;
#pragma unroll
  for (u32 half = 0; half < 2; half++) {
    u32 row = warp_id() * 16 + lane_id() / 4 + half * 8;
    if (row >= tile.count) continue;
    T *line = to.row(at, head, row) + lane_id() % 4 * 2;
#pragma unroll
    for (u32 n = 0; n < O::E / 8; n++) {
      float low = x[n][half * 2] * factor[half], high = x[n][half * 2 + 1] * factor[half];
      *reinterpret_cast<Pair<T> *>(line + n * 8) = {from_f32<T>(low), from_f32<T>(high)};
    }
  }
}

// The ranges of a tile in pieces of at most `step` rows, `share` rows to a token. The last piece is empty.
struct Pieces {
  const Range *at, *end;
  u32 share, step, first = 0, left = 0;

  __device__ __forceinline__ Range next() {
    while (left == 0) {
      if (at == end) return {0, 0};
      first = at->first * share, left = at->count * share;
      at++;
    }
    Range piece{first, min(left, step)};
    first += piece.count, left -= piece.count;
    return piece;
  }
};

// ---- Forward --------------------------------------------------------------------------------------------------------

// Grid: (tiles of queries, G). Writes the output and, [G, T * share], the log-sum-exp of each query's scaled scores.
// Shared: OWN + 4 WALK rows.
ATTENTION(attention_forward,
          (const T *q, const T *k, const T *v, T *out, float *log_sums, const Tile *tiles, const Range *ranges,
           u32 tokens, u32 share, float scale),
          (q, k, v, out, log_sums, tiles, ranges, tokens, share, scale)) {
  constexpr u32 PIECE = O::WALK * O::ROW;
  DYNAMIC_SHARED(T, queries);
  T *stages = queries + OWN * O::ROW;
  Tile tile = tiles[blockIdx.x];
  Lines<O, const T> keys(k, 1), values(v, 1);
  load_tile<O, OWN>(queries, Lines<O, const T>(q, share), tile.first, tile.count);

  u32 own = warp_id() * 16, row = own + lane_id() / 4;
  u32 token[2] = {(tile.first + row) / share, (tile.first + row + 8) / share};
  u32 last = (tile.first + own + 15) / share;
  Mix<O> mix;
  auto load = [&](Range piece, u32 stage) {
    load_tile<O, O::WALK>(stages + stage * 2 * PIECE, keys, piece.first, piece.count);
    load_tile<O, O::WALK>(stages + (stage * 2 + 1) * PIECE, values, piece.first, piece.count);
  };
  walk<2>(Pieces{ranges + tile.begin, ranges + tile.end, 1, O::WALK}, load, [&](Range piece, u32 stage) {
    if (own >= tile.count || last < piece.first) return;
    u32 seen[2] = {visible(piece.first, piece.count, token[0]), visible(piece.first, piece.count, token[1])};
    const T *k_rows = stages + stage * 2 * PIECE;
    mix.add(queries + own * O::ROW, k_rows, k_rows + PIECE, seen, scale);
  });

  if (own >= tile.count) return;
  float factor[2];
#pragma unroll
  for (u32 half = 0; half < 2; half++) {
    float total = row_reduce(mix.total[half], Add());
    factor[half] = 1 / total;
    if (lane_id() % 4 == 0 && row + half * 8 < tile.count)
      log_sums[i64(blockIdx.y) * tokens * share + tile.first + row + half * 8] = mix.most[half] + logf(total);
  }
  store_rows<O>(Lines<O, T>(out, share), tile, mix.sum, factor);
}

// ---- Backward -------------------------------------------------------------------------------------------------------
//
// With p = exp(score - log_sum) and delta = out · d_out of a query: d_p = d_out · v, d_score = p (d_p - delta), and
// d_q, d_k and d_v are the sums of d_score scale k, d_score scale q and p d_out.

// deltas [G, T * share] of out, d_out [T, H, E]; one warp a row, any block and grid.
KERNEL(attention_delta, (const T *out, const T *d_out, float *deltas, u32 tokens, u32 groups, u32 share, u32 width),
       (out, d_out, deltas, tokens, groups, share, width)) {
  u64 rows = u64(tokens) * groups * share;
  for (u64 row = global_thread() / 32; row < rows; row += global_threads() / 32) {
    float sum = 0;
    for (u32 i = lane_id(); i < width; i += 32) sum += to_f32(out[row * width + i]) * to_f32(d_out[row * width + i]);
    sum = warp_sum(sum);
    u64 line = row / share, group = line % groups;
    if (lane_id() == 0) deltas[(group * tokens + line / groups) * share + row % share] = sum;
  }
}

// Grid: (tiles of keys, G). Here the tile's own rows are keys, and the walk goes over the queries that see them, in
// their order, all heads of the group: nobody else adds to these keys. Shared: 2 OWN + 2 WALK rows a stage, and two
// numbers for each of a stage's queries.
ATTENTION(attention_backward_keys,
          (const T *q, const T *k, const T *v, const T *d_out, const float *log_sums, const float *deltas, T *d_k, T *d_v,
           const Tile *tiles, const Range *ranges, u32 tokens, u32 share, float scale),
          (q, k, v, d_out, log_sums, deltas, d_k, d_v, tiles, ranges, tokens, share, scale)) {
  constexpr u32 PIECE = O::WALK * O::ROW, STAGES = sizeof(T) == 2 ? 2 : 1;
  DYNAMIC_SHARED(T, keys);
  T *values = keys + OWN * O::ROW, *stages = values + OWN * O::ROW;
  float *numbers = reinterpret_cast<float *>(stages + STAGES * 2 * PIECE);
  Tile tile = tiles[blockIdx.x];
  i64 group = i64(blockIdx.y) * tokens * share;
  Lines<O, const T> queries(q, share), d_outs(d_out, share);
  load_tile<O, OWN>(keys, Lines<O, const T>(k, 1), tile.first, tile.count);
  load_tile<O, OWN>(values, Lines<O, const T>(v, 1), tile.first, tile.count);

  u32 own = warp_id() * 16, key = tile.first + own + lane_id() / 4;
  float sum_k[O::E / 8][4] = {}, sum_v[O::E / 8][4] = {};
  auto load = [&](Range piece, u32 stage) {
    load_tile<O, O::WALK>(stages + stage * 2 * PIECE, queries, piece.first, piece.count);
    load_tile<O, O::WALK>(stages + (stage * 2 + 1) * PIECE, d_outs, piece.first, piece.count);
    // A query that is not there has a d_out of 0 as well, and adds nothing.
    u32 at = threadIdx.x;
    if (at < O::WALK) {
      bool there = at < piece.count;
      numbers[stage * 2 * O::WALK + at] = there ? log_sums[group + piece.first + at] : 0;
      numbers[(stage * 2 + 1) * O::WALK + at] = there ? deltas[group + piece.first + at] : 0;
    }
  };
  walk<STAGES>(Pieces{ranges + tile.begin, ranges + tile.end, share, O::WALK}, load, [&](Range piece, u32 stage) {
    // The warp's first key has no query in the piece: nor have the others.
    if (own >= tile.count || piece.first + piece.count <= (tile.first + own) * share) return;
    const T *q_rows = stages + stage * 2 * PIECE, *d_rows = q_rows + PIECE;
    const float *sums = numbers + stage * 2 * O::WALK, *of_deltas = sums + O::WALK;
    float p[O::WALK / 8][4], d[O::WALK / 8][4];
    product_of_rows<O>(p, keys + own * O::ROW, q_rows);
    product_of_rows<O>(d, values + own * O::ROW, d_rows);
#pragma unroll
    for (u32 n = 0; n < O::WALK / 8; n++)
#pragma unroll
      for (u32 i = 0; i < 4; i++) {
        u32 column = n * 8 + lane_id() % 4 * 2 + i % 2;
        bool sees = piece.first + column >= (key + i / 2 * 8) * share;
        p[n][i] = sees ? exponential<T>(p[n][i] * scale - sums[column]) : 0;
        d[n][i] = p[n][i] * (d[n][i] - of_deltas[column]);
      }
    add_product<O>(sum_v, p, d_rows);
    add_product<O>(sum_k, d, q_rows);
  });

  store_rows<O>(Lines<O, T>(d_k, 1), tile, sum_k, {scale, scale});
  store_rows<O>(Lines<O, T>(d_v, 1), tile, sum_v, {1, 1});
}

// Grid: (tiles of queries, G). Shared: 2 OWN + 2 WALK rows a stage.
ATTENTION(attention_backward_queries,
          (const T *q, const T *k, const T *v, const T *d_out, const float *log_sums, const float *deltas, T *d_q,
           const Tile *tiles, const Range *ranges, u32 tokens, u32 share, float scale),
          (q, k, v, d_out, log_sums, deltas, d_q, tiles, ranges, tokens, share, scale)) {
  constexpr u32 PIECE = O::WALK * O::ROW, STAGES = sizeof(T) == 2 ? 2 : 1;
  DYNAMIC_SHARED(T, queries);
  T *d_outs = queries + OWN * O::ROW, *stages = d_outs + OWN * O::ROW;
  Tile tile = tiles[blockIdx.x];
  Lines<O, const T> keys(k, 1), values(v, 1);
  load_tile<O, OWN>(queries, Lines<O, const T>(q, share), tile.first, tile.count);
  load_tile<O, OWN>(d_outs, Lines<O, const T>(d_out, share), tile.first, tile.count);

  u32 own = warp_id() * 16, row = own + lane_id() / 4;
  u32 token[2] = {(tile.first + row) / share, (tile.first + row + 8) / share};
  u32 last = (tile.first + own + 15) / share;
  float sum[O::E / 8][4] = {}, log_sum[2], delta[2];
#pragma unroll
  for (u32 half = 0; half < 2; half++) {
    bool there = row + half * 8 < tile.count;
    i64 at = i64(blockIdx.y) * tokens * share + tile.first + row + half * 8;
    log_sum[half] = there ? log_sums[at] : 0;
    delta[half] = there ? deltas[at] : 0;
  }
  auto load = [&](Range piece, u32 stage) {
    load_tile<O, O::WALK>(stages + stage * 2 * PIECE, keys, piece.first, piece.count);
    load_tile<O, O::WALK>(stages + (stage * 2 + 1) * PIECE, values, piece.first, piece.count);
  };
  walk<STAGES>(Pieces{ranges + tile.begin, ranges + tile.end, 1, O::WALK}, load, [&](Range piece, u32 stage) {
    if (own >= tile.count || last < piece.first) return;
    const T *k_rows = stages + stage * 2 * PIECE, *v_rows = k_rows + PIECE;
    float p[O::WALK / 8][4], d[O::WALK / 8][4];
    product_of_rows<O>(p, queries + own * O::ROW, k_rows);
    product_of_rows<O>(d, d_outs + own * O::ROW, v_rows);
    u32 seen[2] = {visible(piece.first, piece.count, token[0]), visible(piece.first, piece.count, token[1])};
#pragma unroll
    for (u32 n = 0; n < O::WALK / 8; n++)
#pragma unroll
      for (u32 i = 0; i < 4; i++) {
        bool sees = n * 8 + lane_id() % 4 * 2 + i % 2 < seen[i / 2];
        float x = sees ? exponential<T>(p[n][i] * scale - log_sum[i / 2]) : 0;
        d[n][i] = x * (d[n][i] - delta[i / 2]);
      }
    add_product<O>(sum, d, k_rows);
  });

  store_rows<O>(Lines<O, T>(d_q, share), tile, sum, {scale, scale});
}
