// One row of logits to one token, as src/generate/sampler.rs draws it: temperature, then top-k, top-p and min-p.
//
// What is the CPU's, bit for bit: the random number (ChaCha8 of the request's key at the index of the draw), every
// token's weight, and the draw itself: of all tokens, and of up to LIST tokens that were kept. What is not: sums of
// weights in f64 that decide how many tokens top-p keeps, and the draw from more than LIST kept tokens, are added in
// another order. Their last bits, some 1e-13 of the whole, could decide a draw that falls on the very boundary between
// two tokens. Log-probabilities agree to rounding. Penalties and biases are not here.
#include "common.cuh"

// Settings of a row; the same struct in Rust.
struct Settings {
  double top_p;       // 1 keeps all
  u64 draw;           // how many f64 the request has drawn before this one
  float temperature;  // 0 takes the likeliest
  float min_p;        // 0 keeps all
  u32 top_k;          // 0 keeps all
  u32 unused;
  u32 key[8];  // of the request's generator: its seed, as little-endian words
};

enum Status : u32 { DRAWN = 0, NOT_FINITE = 1, NOTHING_ALLOWED = 2 };

struct Draw {
  u32 id, status;
  float logprob, sample_logprob;  // under the model alone, and under what it was drawn from
};

constexpr u32 PIECE = 256;  // weights that one thread adds up, in order
constexpr u32 LIST = 4096;  // kept tokens that are drawn from in the CPU's order

// ---- Randomness -----------------------------------------------------------------------------------------------------

__device__ __forceinline__ u32 rotate_left(u32 x, u32 by) { return x << by | x >> (32 - by); }
__device__ __forceinline__ void quarter(u32 &a, u32 &b, u32 &c, u32 &d) {
  a += b, d = rotate_left(d ^ a, 16);
  c += d, b = rotate_left(b ^ c, 12);
  a += b, d = rotate_left(d ^ a, 8);
  c += d, b = rotate_left(b ^ c, 7);
}

// Draw `index` of a ChaCha8 generator, where each takes two words: uniform in [0, 1), with 53 bits.
__device__ double chacha8(const u32 *key, u64 index) {
  u64 block = index / 8;
  u32 s[16] = {0x61707865, 0x3320646e, 0x79622d32, 0x6b206574, key[0], key[1], key[2],     key[3],
               key[4],     key[5],     key[6],     key[7],     u32(block), u32(block >> 32), 0, 0};
  u32 start[16];
  for (u32 i = 0; i < 16; i++) start[i] = s[i];
  for (u32 round = 0; round < 8; round += 2) {
    for (u32 i = 0; i < 4; i++) quarter(s[i], s[4 + i], s[8 + i], s[12 + i]);
    quarter(s[0], s[5], s[10], s[15]);
    quarter(s[1], s[6], s[11], s[12]);
    quarter(s[2], s[7], s[8], s[13]);
    quarter(s[3], s[4], s[9], s[14]);
  }
  u64 bits = 0;
  // A choice of constants, so that the state stays in registers.
  for (u32 i = 0; i < 8; i++)
    if (i == index % 8) bits = u64(s[2 * i] + start[2 * i]) | u64(s[2 * i + 1] + start[2 * i + 1]) << 32;
  return double(bits >> 11) * (1.0 / 9007199254740992.0);
}

// ---- Weights --------------------------------------------------------------------------------------------------------

// `simd::exp` of the CPU, operation by operation.
__device__ __forceinline__ float cpu_exp(float x) {
  x = x < -87.3f ? -87.3f : x > 88.0f ? 88.0f : x;  // NaN stays
  float n = rintf(__fmul_rn(x, 1.44269504f));
  float r = fmaf(n, -0.6933594f, x);
  r = fmaf(n, 2.1219444e-4f, r);
  float p = 1.9875691e-4f;
  p = fmaf(p, r, 1.3982e-3f);
  p = fmaf(p, r, 8.333452e-3f);
  p = fmaf(p, r, 4.1665796e-2f);
  p = fmaf(p, r, 1.6666665e-1f);
  p = fmaf(p, r, 0.5f);
  p = __fadd_rn(fmaf(p, __fmul_rn(r, r), r), 1.0f);
  return __fmul_rn(p, __uint_as_float(u32(i32(n) + 127) << 23));
}

// A row as the block sees it.
struct Row {
  float *weights;  // of all tokens; the likeliest has 1
  u32 vocab;
  u64 cutoff;  // the key of the last token that is kept
  float floor;
};

// Orders tokens: likelier first, then the smaller id. Weights are not negative, so their bits are in their order.
__device__ __forceinline__ u64 key_of(float weight, u32 id) { return u64(__float_as_uint(weight)) << 32 | (FULL - id); }
__device__ __forceinline__ bool keeps(const Row &row, float weight, u32 id) {
  return key_of(weight, id) >= row.cutoff && weight >= row.floor;
}

// How many tokens have a key of at least `key`, and their weight.
struct Mass { u64 count; double weight; };
__device__ __forceinline__ Mass operator+(Mass a, Mass b) { return {a.count + b.count, a.weight + b.weight}; }
__device__ __forceinline__ Mass shuffle_xor(Mass x, u32 distance) {
  return {shuffle_xor(x.count, distance), shuffle_xor(x.weight, distance)};
}
__device__ __forceinline__ Mass shuffle(Mass x, u32 lane) { return {shuffle(x.count, lane), shuffle(x.weight, lane)}; }
__device__ Mass mass_from(const Row &row, u64 key) {
  Mass mass = {0, 0.0};
  for (u32 id = threadIdx.x; id < row.vocab; id += blockDim.x) {
    float weight = row.weights[id];
    if (key_of(weight, id) >= key) mass.count++, mass.weight += weight;
  }
  return block_reduce(mass, Mass{0, 0.0}, Add());
}

// The largest key down to which the tokens reach what is asked: a number of them, or a weight. Bit by bit, from above.
template <typename Reaches> __device__ u64 last_key(const Row &row, Reaches reaches) {
  u64 key = 0;
  for (u64 bit = u64(1) << 63; bit > 0; bit >>= 1) {
    // No weight is above 1, and the upper bits of all ids are set.
    if (bit >> 62 || (bit < u64(1) << 32 && bit > row.vocab)) {
      if (bit < u64(1) << 32) key |= bit;
      continue;
    }
    if (reaches(mass_from(row, key | bit))) key |= bit;
  }
  return key;
}

__device__ void keep_likely(Row &row, const Settings &how) {
  row.cutoff = 0, row.floor = how.min_p;
  bool has_top_k = how.top_k > 0 && how.top_k < row.vocab;
  if (has_top_k) row.cutoff = last_key(row, [&](Mass mass) { return mass.count >= how.top_k; });
  if (how.top_p < 1.0) {
    double needed = how.top_p * mass_from(row, row.cutoff).weight;
    u64 cutoff = last_key(row, [&](Mass mass) { return mass.weight >= needed; });
    if (cutoff > row.cutoff) row.cutoff = cutoff;
  }
}

// ---- The draw -------------------------------------------------------------------------------------------------------

// What a thread found for the block.
struct Found { u32 id; double total; };

// Inverts the cumulative distribution at `chance`: whole pieces are passed over by their sums, each the work of one
// thread. `share` is what a token counts for. `sums` has room for each piece.
template <typename Share>
__device__ void draw_by_pieces(const Row &row, double chance, double *sums, Found &found, Share share) {
  u32 pieces = (row.vocab + PIECE - 1) / PIECE;
  for (u32 piece = threadIdx.x; piece < pieces; piece += blockDim.x) {
    u32 first = piece * PIECE, end = min(first + PIECE, row.vocab);
    double sum = 0.0;
    for (u32 id = first; id < end; id++) sum += share(id);
    sums[piece] = sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    double total = 0.0;
    u32 last = 0;
    for (u32 piece = 0; piece < pieces; piece++) {
      total += sums[piece];
      // Rounding must not lead past the last piece that has any weight.
      if (sums[piece] > 0.0) last = piece;
    }
    double left = __dmul_rn(chance, total);
    u32 piece = 0;
    while (piece < last && left >= sums[piece]) left -= sums[piece++];
    u32 first = piece * PIECE, end = min(first + PIECE, row.vocab), chosen = first;
    for (u32 id = first; id < end; id++) {
      double weight = share(id);
      if (weight > 0.0) {
        chosen = id;
        if (left < weight) break;
      }
      left -= weight;
    }
    found = {chosen, total};
  }
  __syncthreads();
}

// Lists the kept tokens in order of their ids and draws from the list, token by token as the CPU does. False where they
// are more than LIST.
__device__ bool draw_from_list(const Row &row, double chance, u32 *list, Found &found) {
  SHARED(u32, counts, [32]);
  SHARED(u32, listed, [1]);
  if (threadIdx.x == 0) listed[0] = 0;
  __syncthreads();
  // As many tokens at a time as there are threads. What goes before a token is counted in its warp and those before.
  for (u32 base = 0; base < row.vocab; base += blockDim.x) {
    u32 id = base + threadIdx.x, before = listed[0];
    bool kept = id < row.vocab && keeps(row, row.weights[id], id);
    u32 votes = __ballot_sync(FULL, kept);
    if (lane_id() == 0) counts[warp_id()] = __popc(votes);
    __syncthreads();
    u32 place = before + __popc(votes & ((1u << lane_id()) - 1)), after = before;
    for (u32 warp = 0; warp < warp_count(); warp++) {
      if (warp < warp_id()) place += counts[warp];
      after += counts[warp];
    }
    if (after > LIST) return false;  // every thread has the same sum
    if (kept) list[place] = id;
    __syncthreads();
    if (threadIdx.x == 0) listed[0] = after;
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    double total = 0.0;
    for (u32 i = 0; i < listed[0]; i++) total += row.weights[list[i]];
    double left = __dmul_rn(chance, total);
    u32 chosen = 0;
    for (u32 i = 0; i < listed[0]; i++) {
      double weight = row.weights[list[i]];
      if (weight > 0.0) {
        chosen = list[i];
        if (left < weight) break;
      }
      left -= weight;
    }
    found = {chosen, total};
  }
  __syncthreads();
  return true;
}

// The larger value, of equals the one with the smaller id.
struct Best { float value; u32 id; };
__device__ __forceinline__ Best shuffle_xor(Best x, u32 distance) {
  return {shuffle_xor(x.value, distance), shuffle_xor(x.id, distance)};
}
__device__ __forceinline__ Best shuffle(Best x, u32 lane) { return {shuffle(x.value, lane), shuffle(x.id, lane)}; }
struct Better {
  __device__ __forceinline__ Best operator()(Best a, Best b) const {
    return a.value > b.value || (a.value == b.value && a.id < b.id) ? a : b;
  }
};

__device__ __forceinline__ bool allows(const u32 *allowed, u32 id) {
  return !allowed || (allowed[id / 32] >> id % 32 & 1);
}

// One block a row. Dynamic shared memory: ceil(vocab / PIECE) doubles, then LIST words. `allowed`, which may be null,
// has a bit for each token, ceil(vocab / 32) words a row.
//   logits, weights (scratch): [rows, vocab], settings: [rows] -> draws, log_sums: [rows]
KERNEL_ONE(sample,
           (const float *logits, const u32 *allowed, const Settings *settings, float *weights, Draw *draws,
            float *log_sums, u32 vocab),
           (logits, allowed, settings, weights, draws, log_sums, vocab)) {
  DYNAMIC_SHARED(double, sums);
  SHARED(Found, found, [1]);
  u32 *list = reinterpret_cast<u32 *>(sums + (vocab + PIECE - 1) / PIECE);
  logits += u64(blockIdx.x) * vocab;
  if (allowed) allowed += u64(blockIdx.x) * ((vocab + 31) / 32);
  Row row = {weights + u64(blockIdx.x) * vocab, vocab, 0, 0.0f};
  const Settings &how = settings[blockIdx.x];

  Best best = {NEG_INF, FULL};
  float top = NEG_INF;
  for (u32 id = threadIdx.x; id < vocab; id += blockDim.x) {
    top = fmaxf(top, logits[id]);
    if (allows(allowed, id) && logits[id] > NEG_INF) best = Better()(best, {logits[id], id});
  }
  top = block_max(top);
  best = block_reduce(best, Best{NEG_INF, FULL}, Better());
  float sum = 0.0f;
  // Not a number where a logit is none, or infinite, or all are minus infinity.
  for (u32 id = threadIdx.x; id < vocab; id += blockDim.x) sum += cpu_exp(logits[id] - top);
  float log_sum = top + logf(block_sum(sum));
  if (threadIdx.x == 0) log_sums[blockIdx.x] = log_sum;
  Draw draw = {0, DRAWN, 0.0f, 0.0f};
  if (log_sum - log_sum != 0.0f) {
    draw.status = NOT_FINITE;
  } else if (best.id == FULL) {
    draw.status = NOTHING_ALLOWED;
  }
  if (draw.status != DRAWN) {  // the same for the whole block
    if (threadIdx.x == 0) draws[blockIdx.x] = draw;
    return;
  }
  draw.id = best.id;
  if (how.temperature != 0.0f) {
    float scale = 1.0f / how.temperature;
    for (u32 id = threadIdx.x; id < vocab; id += blockDim.x) {
      float weight = cpu_exp(__fmul_rn(logits[id] - best.value, scale));
      row.weights[id] = allows(allowed, id) && logits[id] > NEG_INF ? weight : 0.0f;
    }
    __syncthreads();
    double chance = chacha8(how.key, how.draw);
    if (how.top_k == 0 && how.top_p >= 1.0 && how.min_p <= 0.0f) {
      draw_by_pieces(row, chance, sums, found[0], [&](u32 id) { return double(row.weights[id]); });
    } else {
      keep_likely(row, how);
      if (!draw_from_list(row, chance, list, found[0])) {
        __syncthreads();
        draw_by_pieces(row, chance, sums, found[0], [&](u32 id) {
          return keeps(row, row.weights[id], id) ? double(row.weights[id]) : 0.0;
        });
      }
    }
    draw.id = found[0].id;
    draw.sample_logprob = float(log(double(row.weights[draw.id]) / found[0].total));
  }
  draw.logprob = logits[draw.id] - log_sum;
  if (threadIdx.x == 0) draws[blockIdx.x] = draw;
}

// The generator alone, for tests.
//   key: [8] -> out: [count], draws first, first + 1, …
KERNEL_ONE(chacha_draws, (const u32 *key, double *out, u64 first, u64 count), (key, out, first, count)) {
  u64 i = global_thread();
  if (i < count) out[i] = chacha8(key, first + i);
}
