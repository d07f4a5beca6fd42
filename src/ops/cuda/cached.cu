// Attention of new tokens over keys and values in pages, for generation.
//
// A page [L, PAGE, 2, G, E] has keys, then values, of some successive positions of a sequence in all layers. What a
// sequence sees is a list of spans: so many positions of a page from an address on. Sequences that share a beginning
// name the same pages.
//
// Queries q [M, H, E] are one list a group, as in attention.cu: query m is head m % share at token m / share. A block
// has a tile of one sequence's queries and a part of its positions; `attention_combine` adds up the parts. Parts begin
// at fixed positions, so what a query adds up, and in which order, does not depend on what is computed beside it.
#include "attention.cuh"

// Queries [first, first + count), where the query of token t has position t + shift. They meet the spans [begin, end),
// and their sums are rows of scratch from `out` on.
struct Part { u32 first, count, shift, begin, end, out; };
// `keys`: where the first position's keys in the first layer are.
struct Span { u64 keys; u32 position, count; };
// Queries [first, first + count), whose sums are rows of scratch from `out` on, `parts` times.
struct Whole { u32 first, count, out, parts; };

// Pieces of at most `step` positions. The last piece is empty.
template <typename T> struct Piece { const T *keys; u32 position, count; };
template <typename T> struct Spans {
  const Span *at, *end;
  u64 offset;  // from the first layer and group to the kernel's
  u32 line, step;
  Piece<T> left = {nullptr, 0, 0};

  __device__ __forceinline__ Piece<T> next() {
    if (left.count == 0) {
      if (at == end) return {nullptr, 0, 0};
      left = {reinterpret_cast<const T *>(at->keys) + offset, at->position, at->count};
      at++;
    }
    Piece<T> piece = {left.keys, left.position, min(left.count, step)};
    left = {left.keys + u64(piece.count) * line, left.position + piece.count, left.count - piece.count};
    return piece;
  }
};

// Grid: (parts, G). `layer`: elements of a page before the layer. Writes to scratch, [G, rows, E], each query's values
// mixed by weights relative to its largest score, and, [G, rows, 2], that score and the sum of the weights: minus
// infinity and 0 where the part has no position for it. Shared: OWN + 4 WALK rows.
ATTENTION(attention_cached,
          (const T *q, const Part *parts, const Span *spans, float *sums, float *numbers, u64 layer, u32 rows, u32 share,
           float scale),
          (q, parts, spans, sums, numbers, layer, rows, share, scale)) {
  constexpr u32 PIECE = O::WALK * O::ROW;
  DYNAMIC_SHARED(T, queries);
  T *stages = queries + OWN * O::ROW;
  Part part = parts[blockIdx.x];
  load_tile<O, OWN>(queries, Lines<O, const T>(q, share), part.first, part.count);

  u32 own = warp_id() * 16, row = own + lane_id() / 4, values = gridDim.y * O::E;
  u32 position[2] = {(part.first + row) / share + part.shift, (part.first + row + 8) / share + part.shift};
  Mix<O> mix;
  auto load = [&](Piece<T> piece, u32 stage) {
    T *to = stages + stage * 2 * PIECE;
    load_rows<O, O::WALK>(to, piece.count, [&](u32 key) { return piece.keys + u64(key) * values * 2; });
    load_rows<O, O::WALK>(to + PIECE, piece.count, [&](u32 key) { return piece.keys + u64(key) * values * 2 + values; });
  };
  Spans<T> pieces{spans + part.begin, spans + part.end, layer + blockIdx.y * O::E, values * 2, O::WALK};
  walk<2>(pieces, load, [&](Piece<T> piece, u32 stage) {
    if (own >= part.count) return;
    u32 seen[2] = {visible(piece.position, piece.count, position[0]), visible(piece.position, piece.count, position[1])};
    const T *k_rows = stages + stage * 2 * PIECE;
    mix.add(queries + own * O::ROW, k_rows, k_rows + PIECE, seen, scale);
  });

#pragma unroll
  for (u32 half = 0; half < 2; half++) {
    float total = row_reduce(mix.total[half], Add());
    if (row + half * 8 >= part.count) continue;
    u64 at = u64(blockIdx.y) * rows + part.out + row + half * 8;
    if (lane_id() % 4 == 0) numbers[at * 2] = mix.most[half], numbers[at * 2 + 1] = total;
    float *line = sums + at * O::E + lane_id() % 4 * 2;
#pragma unroll
    for (u32 n = 0; n < O::E / 8; n++)
      *reinterpret_cast<Pair<float> *>(line + n * 8) = {mix.sum[n][half * 2], mix.sum[n][half * 2 + 1]};
  }
}

// Grid: (wholes, G), any block. Adds up the parts of each query, in their order, to out [M, H, E]; one warp a query.
KERNEL(attention_combine,
       (const float *sums, const float *numbers, const Whole *wholes, T *out, u32 rows, u32 share, u32 width),
       (sums, numbers, wholes, out, rows, share, width)) {
  Whole whole = wholes[blockIdx.x];
  for (u32 row = warp_id(); row < whole.count; row += warp_count()) {
    u64 first = u64(blockIdx.y) * rows + whole.out + row;
    float most = NEG_INF, total = 0;
    for (u32 part = 0; part < whole.parts; part++) most = fmaxf(most, numbers[(first + u64(part) * whole.count) * 2]);
    for (u32 part = 0; part < whole.parts; part++) {
      u64 at = (first + u64(part) * whole.count) * 2;
      total += numbers[at + 1] * expf(numbers[at] - most);
    }
    u32 query = whole.first + row;
    T *line = out + ((u64(query / share) * gridDim.y + blockIdx.y) * share + query % share) * width;
    for (u32 column = lane_id(); column < width; column += 32) {
      float sum = 0;
      for (u32 part = 0; part < whole.parts; part++) {
        u64 at = first + u64(part) * whole.count;
        sum += sums[at * width + column] * expf(numbers[at * 2] - most);
      }
      line[column] = from_f32<T>(sum / total);
    }
  }
}

// Copies k and v, [M, width] both, to where each token's keys in the first layer are, `layer` elements further on. Grid:
// M blocks of any size.
KERNEL(cache_store, (const T *k, const T *v, const u64 *places, u64 layer, u32 width), (k, v, places, layer, width)) {
  constexpr u32 N = Pack<T>::SIZE;
  T *to = reinterpret_cast<T *>(places[blockIdx.x]) + layer;
  k += u64(blockIdx.x) * width, v += u64(blockIdx.x) * width;
  // Pages begin where a pack may, and places lie whole rows further on.
  bool packed = packs(k, width) && packs(v, width);
  each_pack<N>(width, packed, threadIdx.x, blockDim.x, [&](u64 i, auto count) {
    constexpr u32 C = decltype(count)::SIZE;
    store_pack(to + i, load_pack<C>(k + i));
    store_pack(to + width + i, load_pack<C>(v + i));
  });
}
