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
//
// A block has four warps, a warp sixteen rows of the block's own tile. A warp's products have the rows of its own tile
// for rows, and keep the form in which `mma_bf16` has its sums: with g = lane / 4 and t = lane % 4,
//   x[n][0], x[n][1]: row g, columns 8 n + 2 t and the next;  x[n][2], x[n][3]: row g + 8.
#include "common.cuh"

constexpr u32 THREADS = 128;
// Rows of a block's own tile; the host knows it too.
constexpr u32 OWN = 64;

// What is fixed when a kernel is compiled. WALK: rows of a piece. ROW: from one row in shared memory to the next; the
// sixteen bytes on top let eight rows, read at the same column, lie in different banks.
template <typename T_, u32 E_> struct Of {
  typedef T_ T;
  static constexpr u32 E = E_, WALK = sizeof(T) == 2 ? 32 : 16, ROW = E + Pack<T>::SIZE;
};

// A tile: rows [first, first + count), and its ranges [begin, end) in the list of ranges.
struct Tile { u32 first, count, begin, end; };
struct Range { u32 first, count; };

// ---- Rows in memory -------------------------------------------------------------------------------------------------

// Division of numbers below a thousand by one below a thousand.
struct Divisor {
  u32 by, inverse;
  __device__ explicit Divisor(u32 by) : by(by), inverse((1 << 20) / by + 1) {}
  __device__ __forceinline__ u32 quotient(u32 x) const { return x * inverse >> 20; }
};

// One group's rows of x [T, groups * share, E].
template <typename O, typename T> struct Lines {
  T *base;
  i64 token;
  Divisor share;

  __device__ Lines(T *x, u32 share)
      : base(x + i64(blockIdx.y) * share * O::E), token(i64(gridDim.y) * share * O::E), share(share) {}

  // Row `first + row`, where `first` is head `head` of the group at token `at`.
  __device__ __forceinline__ T *row(u32 at, u32 head, u32 row) const {
    u32 ahead = share.quotient(head + row);
    return base + (at + ahead) * token + (head + row - ahead * share.by) * O::E;
  }
};

// Copies `count` rows from row `first` on to a tile of ROWS, whose other rows become zeros.
template <typename O, u32 ROWS>
__device__ __forceinline__ void load_tile(typename O::T *to, Lines<O, const typename O::T> from, u32 first, u32 count) {
  typedef typename O::T T;
  constexpr u32 PACKS = O::E / Pack<T>::SIZE;
  u32 at = first / from.share.by, head = first % from.share.by;
#pragma unroll
  for (u32 i = threadIdx.x; i < ROWS * PACKS; i += THREADS) {
    u32 row = i / PACKS, column = i % PACKS * Pack<T>::SIZE;
    T *slot = to + row * O::ROW + column;
    if (row < count)
      copy_async(slot, from.row(at, head, row) + column);
    else
      store_pack(slot, Pack<T>{});
  }
}

template <typename T> struct alignas(2 * sizeof(T)) Pair { T low, high; };

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

// ---- Products of a warp ---------------------------------------------------------------------------------------------

// Four 8 x 8 matrices of bf16, whose rows lie where the lanes say: lane 8 i + r names row r of matrix i. Of each matrix
// a lane gets columns 2 (lane % 4) and the next of row lane / 4, or, turned, those rows of that column.
template <bool TURNED> __device__ __forceinline__ void load_matrices(u32 (&out)[4], const bf16 *row) {
#ifdef ARRIERO_HOST
  shim::Group &group = shim::meet(shim::MATRIX, FULL, row, 16, __LINE__);
  for (u32 i = 0; i < 4; i++) {
    out[i] = 0;
    for (u32 half = 0; half < 2; half++) {
      u32 own = lane_id() / 4, pair = lane_id() % 4 * 2 + half;
      u16 bits;
      memcpy(&bits, group.data[8 * i + (TURNED ? pair : own)] + 2 * (TURNED ? own : pair), 2);
      out[i] |= u32(bits) << 16 * half;
    }
  }
  shim::part(group);
#else
  u32 from = u32(__cvta_generic_to_shared(row));
  if (TURNED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(from) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(from) : "memory");
#endif
}

// sum = a · bᵀ of shared rows: a [16, E], b [WALK, E].
template <typename O>
__device__ __forceinline__ void product_of_rows(float (&sum)[O::WALK / 8][4], const bf16 *a, const bf16 *b) {
  u32 lane = lane_id();
  a += lane % 16 * O::ROW + lane / 16 * 8;
  b += (lane / 16 * 8 + lane % 8) * O::ROW + lane / 8 % 2 * 8;
#pragma unroll
  for (u32 n = 0; n < O::WALK / 8; n++) sum[n][0] = sum[n][1] = sum[n][2] = sum[n][3] = 0;
#pragma unroll
  for (u32 k = 0; k < O::E; k += 16) {
    u32 left[4];
    load_matrices<false>(left, a + k);
#pragma unroll
    for (u32 n = 0; n < O::WALK / 8; n += 2) {
      u32 right[4];
      load_matrices<false>(right, b + n * 8 * O::ROW + k);
      mma_bf16(sum[n], left, {right[0], right[1]});
      mma_bf16(sum[n + 1], left, {right[2], right[3]});
    }
  }
}

template <typename O>
__device__ __forceinline__ void product_of_rows(float (&sum)[O::WALK / 8][4], const float *a, const float *b) {
  a += lane_id() / 4 * O::ROW;
  b += lane_id() % 4 * 2 * O::ROW;
#pragma unroll
  for (u32 n = 0; n < O::WALK / 8; n++) sum[n][0] = sum[n][1] = sum[n][2] = sum[n][3] = 0;
#pragma unroll 4
  for (u32 k = 0; k < O::E; k += 4) {
    Pack<float> left[2] = {load_pack(a + k), load_pack(a + 8 * O::ROW + k)};
#pragma unroll
    for (u32 n = 0; n < O::WALK / 8; n++) {
      const float *column = b + n * 8 * O::ROW + k;
      Pack<float> right[2] = {load_pack(column), load_pack(column + O::ROW)};
#pragma unroll
      for (u32 i = 0; i < 4; i++)
#pragma unroll
        for (u32 j = 0; j < 4; j++) sum[n][i] += left[i / 2].at[j] * right[i % 2].at[j];
    }
  }
}

// sum += p · b: p [16, WALK] of the warp's registers, b [WALK, E] of shared rows. In bf16, p is rounded.
template <typename O>
__device__ __forceinline__ void add_product(float (&sum)[O::E / 8][4], const float (&p)[O::WALK / 8][4], const bf16 *b) {
  u32 lane = lane_id();
  b += (lane / 8 % 2 * 8 + lane % 8) * O::ROW + lane / 16 * 8;
#pragma unroll
  for (u32 k = 0; k < O::WALK / 8; k += 2) {
    u32 left[4] = {pack_bf16(p[k][0], p[k][1]), pack_bf16(p[k][2], p[k][3]),
                   pack_bf16(p[k + 1][0], p[k + 1][1]), pack_bf16(p[k + 1][2], p[k + 1][3])};
#pragma unroll
    for (u32 n = 0; n < O::E / 8; n += 2) {
      u32 right[4];
      load_matrices<true>(right, b + k * 8 * O::ROW + n * 8);
      mma_bf16(sum[n], left, {right[0], right[1]});
      mma_bf16(sum[n + 1], left, {right[2], right[3]});
    }
  }
}

template <typename O>
__device__ __forceinline__ void add_product(float (&sum)[O::E / 8][4], const float (&p)[O::WALK / 8][4], const float *b) {
  b += lane_id() % 4 * 2;
#pragma unroll
  for (u32 k = 0; k < O::WALK; k++) {
    // Who holds column k of p.
    u32 holder = lane_id() / 4 * 4 + k % 8 / 2;
    float upper = shuffle(p[k / 8][k % 2], holder), lower = shuffle(p[k / 8][2 + k % 2], holder);
#pragma unroll
    for (u32 n = 0; n < O::E / 8; n++) {
      Pair<float> right = *reinterpret_cast<const Pair<float> *>(b + k * O::ROW + n * 8);
      sum[n][0] += upper * right.low, sum[n][1] += upper * right.high;
      sum[n][2] += lower * right.low, sum[n][3] += lower * right.high;
    }
  }
}

// ---- The walk over what a tile meets --------------------------------------------------------------------------------

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

// Loads each piece into its stage, and calls `body(piece, stage)` once all threads see it. With two stages the next
// piece is on its way meanwhile.
template <u32 STAGES, typename Load, typename Body>
__device__ __forceinline__ void walk(Pieces pieces, Load load, Body body) {
  Range piece = pieces.next();
  load(piece, 0);
  commit_copies();
  for (u32 stage = 0; piece.count != 0; stage ^= STAGES - 1) {
    wait_copies<0>();
    __syncthreads();  // The copies of all have come; with two stages, all have left the other stage.
    Range after = pieces.next();
    if (STAGES == 2 && after.count != 0) load(after, stage ^ 1);
    body(piece, stage);
    if (STAGES == 1) __syncthreads();  // All have left the stage.
    if (STAGES == 1 && after.count != 0) load(after, 0);
    commit_copies();
    piece = after;
  }
}

// e to the x. In bf16 the special unit's, good to some 2^-21.
template <typename T> __device__ __forceinline__ float exponential(float x) { return sizeof(T) == 2 ? __expf(x) : expf(x); }

// Of the four lanes that share a row.
template <typename Op> __device__ __forceinline__ float row_reduce(float x, Op op) {
  x = op(x, shuffle_xor(x, 1));
  return op(x, shuffle_xor(x, 2));
}

// The columns of a piece of keys that a query at `token` sees.
__device__ __forceinline__ u32 visible(Range piece, u32 token) {
  return token < piece.first ? 0 : min(piece.count, token - piece.first + 1);
}

#define ATTENTION_ENTRY(name, type, T_, width, params, args) \
  namespace name##_of_##type##_##width {                     \
    typedef T_ T;                                            \
    typedef Of<T_, width> O;                                 \
    ENTRY(name##_##type##_##width, THREADS, params, ::name<O> args) \
  }
#define ATTENTION_WIDTH(name, width, params, args)          \
  ATTENTION_ENTRY(name, f32, float, width, params, args)    \
  ATTENTION_ENTRY(name, bf16, bf16, width, params, args)
#ifdef ARRIERO_MUTANT
// What tests break on purpose is compiled often.
#define ATTENTION_WIDTHS(name, params, args) ATTENTION_WIDTH(name, 32, params, args)
#else
#define ATTENTION_WIDTHS(name, params, args)                                            \
  ATTENTION_WIDTH(name, 32, params, args) ATTENTION_WIDTH(name, 64, params, args)       \
  ATTENTION_WIDTH(name, 96, params, args) ATTENTION_WIDTH(name, 128, params, args)
#endif
// The entries name_f32_32 ... name_bf16_128 of a kernel name<O> whose body follows.
#define ATTENTION(name, params, args)                                            \
  template <typename O, typename T = typename O::T> __device__ void name params; \
  ATTENTION_WIDTHS(name, params, args)                                           \
  template <typename O, typename T> __device__ void name params

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
  float sum[O::E / 8][4] = {}, most[2] = {NEG_INF, NEG_INF}, total[2] = {0, 0};
  auto load = [&](Range piece, u32 stage) {
    load_tile<O, O::WALK>(stages + stage * 2 * PIECE, keys, piece.first, piece.count);
    load_tile<O, O::WALK>(stages + (stage * 2 + 1) * PIECE, values, piece.first, piece.count);
  };
  walk<2>(Pieces{ranges + tile.begin, ranges + tile.end, 1, O::WALK}, load, [&](Range piece, u32 stage) {
    if (own >= tile.count || last < piece.first) return;
    float p[O::WALK / 8][4];
    product_of_rows<O>(p, queries + own * O::ROW, stages + stage * 2 * PIECE);
    u32 seen[2] = {visible(piece, token[0]), visible(piece, token[1])};
    float before[2] = {most[0], most[1]};
#pragma unroll
    for (u32 n = 0; n < O::WALK / 8; n++)
#pragma unroll
      for (u32 i = 0; i < 4; i++) {
        u32 column = n * 8 + lane_id() % 4 * 2 + i % 2;
        p[n][i] = column < seen[i / 2] ? p[n][i] * scale : NEG_INF;
        most[i / 2] = max(most[i / 2], p[n][i]);
      }
    // The first piece has a key for every query: from then on `most` is finite, and a piece without any changes nothing.
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
      most[half] = row_reduce(most[half], Max());
      float factor = exponential<T>(before[half] - most[half]);
      total[half] *= factor;
#pragma unroll
      for (u32 n = 0; n < O::E / 8; n++) sum[n][half * 2] *= factor, sum[n][half * 2 + 1] *= factor;
    }
#pragma unroll
    for (u32 n = 0; n < O::WALK / 8; n++)
#pragma unroll
      for (u32 i = 0; i < 4; i++) {
        p[n][i] = exponential<T>(p[n][i] - most[i / 2]);
        total[i / 2] += p[n][i];
      }
    add_product<O>(sum, p, stages + (stage * 2 + 1) * PIECE);
  });

  if (own >= tile.count) return;
  float factor[2];
#pragma unroll
  for (u32 half = 0; half < 2; half++) {
    total[half] = row_reduce(total[half], Add());
    factor[half] = 1 / total[half];
    if (lane_id() % 4 == 0 && row + half * 8 < tile.count)
      log_sums[i64(blockIdx.y) * tokens * share + tile.first + row + half * 8] = most[half] + logf(total[half]);
  }
  store_rows<O>(Lines<O, T>(out, share), tile, sum, factor);
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
    u32 seen[2] = {visible(piece, token[0]), visible(piece, token[1])};
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
