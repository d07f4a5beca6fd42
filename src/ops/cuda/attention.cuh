// What kernels of attention share: products of a warp, the walk over pieces of keys, and the softmax that goes with it.
//
// A block has four warps, a warp sixteen rows of the block's own tile. A warp's products have the rows of its own tile
// for rows, and keep the form in which `mma_bf16` has its sums: with g = lane / 4 and t = lane % 4,
//   x[n][0], x[n][1]: row g, columns 8 n + 2 t and the next;  x[n][2], x[n][3]: row g + 8.
#pragma once
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

// Copies `count` rows, each from where `row(index)` says, to a tile of ROWS, whose other rows become zeros.
template <typename O, u32 ROWS, typename Row>
__device__ __forceinline__ void load_rows(typename O::T *to, u32 count, Row row) {
  typedef typename O::T T;
  constexpr u32 PACKS = O::E / Pack<T>::SIZE;
#pragma unroll
  for (u32 i = threadIdx.x; i < ROWS * PACKS; i += THREADS) {
    u32 index = i / PACKS, column = i % PACKS * Pack<T>::SIZE;
    T *slot = to + index * O::ROW + column;
    if (index < count)
      copy_async(slot, row(index) + column);
    else
      store_pack(slot, Pack<T>{});
  }
}

// Copies `count` rows from row `first` on to a tile of ROWS, whose other rows become zeros.
template <typename O, u32 ROWS>
__device__ __forceinline__ void load_tile(typename O::T *to, Lines<O, const typename O::T> from, u32 first, u32 count) {
  u32 at = first / from.share.by, head = first % from.share.by;
  load_rows<O, ROWS>(to, count, [&](u32 row) { return from.row(at, head, row); });
}

template <typename T> struct alignas(2 * sizeof(T)) Pair { T low, high; };

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

// Loads each piece into its stage, and calls `body(piece, stage)` once all threads see it. With two stages the next
// piece is on its way meanwhile.
template <u32 STAGES, typename Pieces, typename Load, typename Body>
__device__ __forceinline__ void walk(Pieces pieces, Load load, Body body) {
  auto piece = pieces.next();
  load(piece, 0);
  commit_copies();
  for (u32 stage = 0; piece.count != 0; stage ^= STAGES - 1) {
    wait_copies<0>();
    __syncthreads();  // The copies of all have come; with two stages, all have left the other stage.
    auto after = pieces.next();
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

// How many of `count` keys from position `first` on a query at `position` sees.
__device__ __forceinline__ u32 visible(u32 first, u32 count, u32 position) {
  return position < first ? 0 : min(count, position - first + 1);
}

// What the queries of a warp have seen so far: the mix of values, relative to the largest score.
template <typename O> struct Mix {
  float sum[O::E / 8][4] = {}, most[2] = {NEG_INF, NEG_INF}, total[2] = {0, 0};

  // A piece of keys and values, of which the lane's two queries see the first ones.
  __device__ __forceinline__ void add(const typename O::T *queries, const typename O::T *keys,
                                      const typename O::T *values, const u32 (&seen)[2], float scale) {
    typedef typename O::T T;
    float p[O::WALK / 8][4], before[2] = {most[0], most[1]};
    product_of_rows<O>(p, queries, keys);
#pragma unroll
    for (u32 n = 0; n < O::WALK / 8; n++)
#pragma unroll
      for (u32 i = 0; i < 4; i++) {
        u32 column = n * 8 + lane_id() % 4 * 2 + i % 2;
        p[n][i] = column < seen[i / 2] ? p[n][i] * scale : NEG_INF;
        most[i / 2] = max(most[i / 2], p[n][i]);
      }
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
      most[half] = row_reduce(most[half], Max());
      // Before a query has seen any key, nothing is there that could be scaled.
      float factor = most[half] == NEG_INF ? 1 : exponential<T>(before[half] - most[half]);
      total[half] *= factor;
#pragma unroll
      for (u32 n = 0; n < O::E / 8; n++) sum[n][half * 2] *= factor, sum[n][half * 2 + 1] *= factor;
    }
#pragma unroll
    for (u32 n = 0; n < O::WALK / 8; n++)
#pragma unroll
      for (u32 i = 0; i < 4; i++) {
        p[n][i] = most[i / 2] == NEG_INF ? 0 : exponential<T>(p[n][i] - most[i / 2]);
        total[i / 2] += p[n][i];
      }
    add_product<O>(sum, p, values);
  }
};

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

