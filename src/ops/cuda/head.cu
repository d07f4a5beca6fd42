// The vocabulary head's work on a chunk of logits [R, V]: what each row says, and the gradient in its place. Products
// are cuBLAS's. And the few sums that follow: of a response's log-probabilities, and of pairs of responses.
//
// Targets lie row by row: row r has those from starts[r] up to starts[r + 1], each with its id, its log-probability and
// the slope of it. All sums have one fixed order, whatever runs first. Block sizes are multiples of 32, up to 1024.
#include "common.cuh"

// Below every logit that is finite, and a number: where there is nothing yet, differences are numbers too.
#define LOWEST (-3.402823466e38f)
#define NO_ID 0xffffffffu

// ---------------------------------------------------------------------------------------------------------------------
// Reading rows

// Sums over some elements x of a row, with e = exp(x - max). Starts below every number, not at minus infinity, so that
// a difference of two such is a number.
struct Sums {
  float max, sum, first, squares, plain;
};

__device__ __forceinline__ Sums no_sums() { return {LOWEST, 0.f, 0.f, 0.f, 0.f}; }

// The same sums by a larger maximum.
template <bool STATS>
__device__ __forceinline__ void rise(Sums &s, float max) {
  const float below = s.max - max, factor = expf(below);
  if (STATS) {
    // Where the sum is 0, its product with minus infinity is not a number.
    s.first = factor * (s.first + s.sum * fmaxf(below, -1e30f));
    s.squares *= factor * factor;
  }
  s.sum *= factor;
  s.max = max;
}

template <bool STATS>
__device__ __forceinline__ void add(Sums &s, float x) {
  const float below = x - s.max, e = expf(below);
  s.sum += e;
  if (STATS) {
    s.first += e * fmaxf(below, -100.f);
    s.squares += e * e;
    s.plain += x;
  }
}

template <bool STATS>
struct Merge {
  __device__ __forceinline__ Sums operator()(Sums a, Sums b) const {
    const float max = fmaxf(a.max, b.max);
    rise<STATS>(a, max);
    rise<STATS>(b, max);
    return {max, a.sum + b.sum, a.first + b.first, a.squares + b.squares, a.plain + b.plain};
  }
};

__device__ __forceinline__ Sums shuffle_xor(Sums s, u32 distance) {
  return {shuffle_xor(s.max, distance), shuffle_xor(s.sum, distance), shuffle_xor(s.first, distance),
          shuffle_xor(s.squares, distance), shuffle_xor(s.plain, distance)};
}
__device__ __forceinline__ Sums shuffle(Sums s, u32 lane) {
  return {shuffle(s.max, lane), shuffle(s.sum, lane), shuffle(s.first, lane), shuffle(s.squares, lane),
          shuffle(s.plain, lane)};
}

// This thread's part of a row, in one pass.
template <typename T, bool STATS>
__device__ Sums own_sums(const T *x, u64 vocab) {
  Sums s = no_sums();
  if (packs<T>(x, vocab)) {
    constexpr u32 SIZE = Pack<T>::SIZE;
    for (u64 at = threadIdx.x * SIZE; at < vocab; at += blockDim.x * SIZE) {
      const Pack<T> pack = load_pack(x + at);
      float max = s.max;
#pragma unroll
      for (u32 i = 0; i < SIZE; i++) max = fmaxf(max, to_f32(pack.at[i]));
      if (max > s.max) rise<STATS>(s, max);
#pragma unroll
      for (u32 i = 0; i < SIZE; i++) add<STATS>(s, to_f32(pack.at[i]));
    }
    return s;
  }
  for (u64 at = threadIdx.x; at < vocab; at += blockDim.x) {
    const float value = to_f32(x[at]);
    if (value > s.max) rise<STATS>(s, value);
    add<STATS>(s, value);
  }
  return s;
}

// One block a row. Log-probabilities of its targets and the logarithm of its sum; with STATS, its RowStats as five
// numbers. A target outside the vocabulary has no log-probability: not a number.
template <typename T, bool STATS>
__device__ void read_row(const T *logits, u64 vocab, const u32 *starts, const u32 *ids, float *logps,
                         float *log_sums, float *stats) {
  const u64 row = blockIdx.x;
  const T *x = logits + row * vocab;
  const Sums s = block_reduce(own_sums<T, STATS>(x, vocab), no_sums(), Merge<STATS>());
  const float log_of_sum = logf(s.sum), log_sum = s.max + log_of_sum;
  for (u32 n = starts[row] + threadIdx.x; n < starts[row + 1]; n += blockDim.x)
    logps[n] = ids[n] < vocab ? to_f32(x[ids[n]]) - log_sum : logf(-1.f);
  if (threadIdx.x != 0) return;
  log_sums[row] = log_sum;
  if (STATS) {
    float *out = stats + row * 5;
    out[0] = log_sum;
    out[1] = s.plain / float(vocab);
    out[2] = log_of_sum - s.first / s.sum;
    out[3] = logf(s.squares) - 2.f * log_of_sum;
    out[4] = s.max - log_sum;
  }
}

KERNEL(head_logps, (const T *logits, u64 vocab, const u32 *starts, const u32 *ids, float *logps, float *log_sums),
       (logits, vocab, starts, ids, logps, log_sums)) {
  read_row<T, false>(logits, vocab, starts, ids, logps, log_sums, nullptr);
}

KERNEL(head_stats,
       (const T *logits, u64 vocab, const u32 *starts, const u32 *ids, float *logps, float *log_sums, float *stats),
       (logits, vocab, starts, ids, logps, log_sums, stats)) {
  read_row<T, true>(logits, vocab, starts, ids, logps, log_sums, stats);
}

// ---------------------------------------------------------------------------------------------------------------------
// The gradient

// Targets of rows as above, and their slopes: the gradient of
// sum_n d_logps[n] * (logp[n] + mean_logp * mean_v ln p_n(v) + squared_lse * lse_n^2).
struct Targets {
  const u32 *starts, *ids;
  const float *logps, *d_logps;
  float mean_logp, squared_lse;
};

// A divergence's part of the gradient, as head_kl leaves it; factors is null where there is none. A row's p(v) is
// multiplied by the first factor where v is among its k ids, by the second elsewhere; each id has its own addend too.
struct Divergence {
  const u32 *ids;
  const float *student, *addends, *factors;
  u32 k;
};

// The slopes of a row's targets of this id.
__device__ __forceinline__ float slope_of(const Targets &t, u64 row, u32 id, bool &found) {
  float sum = 0.f;
  for (u32 n = t.starts[row]; n < t.starts[row + 1]; n++)
    if (t.ids[n] == id) {
      sum += t.d_logps[n];
      found = true;
    }
  return sum;
}

// What an anchor takes off an element, as head_anchor leaves it; null where there is none.
template <typename T>
__device__ __forceinline__ float less_at(const T *less, u64 at) {
  return less ? to_f32(less[at]) : 0.f;
}

// p(v) times its factor, and what every element gets, less what an anchor takes off, over one part of a row. D is no wider
// than T.
template <typename T, typename D>
__device__ void scaled_softmax(const T *x, const T *less, D *out, u64 vocab, u64 start, u64 end, float log_sum,
                               float factor, float one) {
  constexpr u32 IN = Pack<T>::SIZE, OUT = Pack<D>::SIZE;
  if (packs<T>(x, vocab) && packs<D>(out, vocab)) {
    for (u64 at = start + threadIdx.x * OUT; at < end; at += blockDim.x * OUT) {
      Pack<T> in[OUT / IN];
      Pack<D> result;
#pragma unroll
      for (u32 i = 0; i < OUT / IN; i++) in[i] = load_pack(x + at + i * IN);
#pragma unroll
      for (u32 i = 0; i < OUT; i++)
        result.at[i] =
            from_f32<D>(factor * expf(to_f32(in[i / IN].at[i % IN]) - log_sum) + one - less_at(less, at + i));
      store_pack(out + at, result);
    }
    return;
  }
  for (u64 at = start + threadIdx.x; at < end; at += blockDim.x)
    out[at] = from_f32<D>(factor * expf(to_f32(x[at]) - log_sum) + one - less_at(less, at));
}

// Blocks (row, part): elements from part * span on, at most span of them; a span is a multiple of 8. D may be T and its
// memory that of the logits: each element is read before it is written, by the same thread.
template <typename T, typename D>
__device__ void grad_row(const T *logits, D *d_logits, u64 vocab, u64 span, const float *log_sums,
                         const Targets &t, const Divergence &d, const T *anchor) {
  const u64 row = blockIdx.x, start = blockIdx.y * span;
  const u64 end = start + span < vocab ? start + span : vocab;
  D *out = d_logits + row * vocab;
  const T *less = anchor ? anchor + row * vocab : nullptr;
  const float log_sum = log_sums[row];
  const u32 first = t.starts[row], last = t.starts[row + 1];
  float total = 0.f;
  for (u32 n = first; n < last; n++) total += t.d_logps[n];
  const float own = total * (-1.f - t.mean_logp + 2.f * t.squared_lse * log_sum);
  const float one = total * t.mean_logp / float(vocab);
  const float inner = d.factors ? own + d.factors[row * 2] : own;
  const float outer = d.factors ? own + d.factors[row * 2 + 1] : own;
  scaled_softmax<T, D>(logits + row * vocab, less, out, vocab, start, end, log_sum, outer, one);
  // The few elements with addends are written once more, whole, so that they are rounded once. Targets of one id write
  // the same number.
  __syncthreads();
  for (u32 n = first + threadIdx.x; n < last; n += blockDim.x) {
    const u32 id = t.ids[n];
    if (id < start || id >= end) continue;
    bool found = false;
    float factor = outer, sum = slope_of(t, row, id, found);
    for (u64 at = row * d.k; at < (row + 1) * d.k; at++)
      if (d.ids[at] == id) {
        factor = inner;
        sum += d.addends[at];
      }
    out[id] = from_f32<D>(factor * expf(t.logps[n]) + one + sum - less_at(less, id));
  }
  for (u64 at = row * d.k + threadIdx.x; at < (row + 1) * d.k; at += blockDim.x) {
    const u32 id = d.ids[at];
    if (id < start || id >= end) continue;
    bool found = false;
    slope_of(t, row, id, found);
    if (!found) out[id] = from_f32<D>(inner * expf(d.student[at]) + one + d.addends[at] - less_at(less, id));
  }
}

// Of the logits' own type, in their place or beside them.
KERNEL(head_grad,
       (const T *logits, T *d_logits, u64 vocab, u64 span, const float *log_sums, const u32 *starts, const u32 *ids,
        const float *logps, const float *d_logps, float mean_logp, float squared_lse, const u32 *teacher_ids,
        const float *student, const float *addends, const float *factors, u32 k, const T *anchor),
       (logits, d_logits, vocab, span, log_sums, starts, ids, logps, d_logps, mean_logp, squared_lse, teacher_ids,
        student, addends, factors, k, anchor)) {
  grad_row<T, T>(logits, d_logits, vocab, span, log_sums, {starts, ids, logps, d_logps, mean_logp, squared_lse},
                 {teacher_ids, student, addends, factors, k}, anchor);
}

// Of f32 logits, rounded for products of bf16.
KERNEL_ONE(head_grad_f32_to_bf16,
           (const float *logits, bf16 *d_logits, u64 vocab, u64 span, const float *log_sums, const u32 *starts,
            const u32 *ids, const float *logps, const float *d_logps, float mean_logp, float squared_lse,
            const u32 *teacher_ids, const float *student, const float *addends, const float *factors, u32 k,
            const float *anchor),
           (logits, d_logits, vocab, span, log_sums, starts, ids, logps, d_logps, mean_logp, squared_lse, teacher_ids,
            student, addends, factors, k, anchor)) {
  grad_row<float, bf16>(logits, d_logits, vocab, span, log_sums, {starts, ids, logps, d_logps, mean_logp, squared_lse},
                        {teacher_ids, student, addends, factors, k}, anchor);
}

// ---------------------------------------------------------------------------------------------------------------------
// The divergence from an anchor: a frozen model of the same vocabulary

// One block a row. With q the anchor's probabilities and p the model's: sum q (ln q - ln p), and its gradient by the logits
// p - q. What of it grad_row adds, times the sum of the row's slopes, is left where it looks for it: of p in factors, of q in
// place of the anchor's logits. Slopes are null where the divergence is only read.
KERNEL(head_anchor,
       (const T *logits, T *anchor, u64 vocab, const u32 *starts, const float *log_sums, const float *slopes,
        float *divergences, float *factors),
       (logits, anchor, vocab, starts, log_sums, slopes, divergences, factors)) {
  const u64 row = blockIdx.x;
  const T *x = logits + row * vocab;
  T *a = anchor + row * vocab;
  const Sums s = block_reduce(own_sums<T, false>(a, vocab), no_sums(), Merge<false>());
  const float log_p = log_sums[row], log_q = s.max + logf(s.sum);
  float slope = 0.f;
  if (slopes)
    for (u32 n = starts[row]; n < starts[row + 1]; n++) slope += slopes[n];
  float sum = 0.f;
  for (u64 at = threadIdx.x; at < vocab; at += blockDim.x) {
    const float logq = to_f32(a[at]) - log_q, q = expf(logq);
    sum += q * (logq - (to_f32(x[at]) - log_p));
    a[at] = from_f32<T>(slope * q);
  }
  sum = block_sum(sum);
  if (threadIdx.x != 0) return;
  divergences[row] = sum;
  factors[row * 2] = slope;
  factors[row * 2 + 1] = slope;
}

// ---------------------------------------------------------------------------------------------------------------------
// The divergence from a teacher that is known by its k likeliest tokens

// Whether an id is among k that ascend.
__device__ __forceinline__ bool among(const u32 *ids, u32 k, u32 id) {
  u32 low = 0, high = k;
  while (low < high) {
    const u32 middle = (low + high) / 2;
    if (ids[middle] < id) low = middle + 1;
    else high = middle;
  }
  return low < k && ids[low] == id;
}

// One block a row. The teacher's k ids ascend; those outside the vocabulary, at the end, are none. With q the teacher's
// probabilities and p the student's over these events, and with tail over one more event, everything else:
//   forward   sum q (ln q - ln p)      p(v) g(v) = -q(v)
//   reverse   sum p (ln p - ln q)      p(v) g(v) = p(v) (ln p(v) - ln q(v) + 1)
// The gradient by logit v is p(v) (g(v's event) - mean), the mean being sum p g. What of it grad_row adds is left in
// addends and factors, times the row's slope; what the student says of each id in student.
KERNEL(head_kl,
       (const T *logits, u64 vocab, u32 k, u32 reverse, u32 tail, const u32 *teacher_ids, const float *teacher_logps,
        const float *log_sums, const float *slopes, float *divergences, float *student, float *addends, float *factors),
       (logits, vocab, k, reverse, tail, teacher_ids, teacher_logps, log_sums, slopes, divergences, student, addends,
        factors)) {
  const u64 row = blockIdx.x;
  const T *x = logits + row * vocab;
  const u32 *ids = teacher_ids + row * k;
  const float *logqs = teacher_logps + row * k;
  const float log_sum = log_sums[row], slope = slopes[row];
  float value = 0.f, mean = 0.f, given = 0.f;
  for (u32 i = threadIdx.x; i < k; i += blockDim.x) {
    const bool real = ids[i] < vocab;
    const float logq = logqs[i], logp = real ? to_f32(x[ids[i]]) - log_sum : LOWEST;
    const float q = real ? expf(logq) : 0.f, p = expf(logp);
    student[row * k + i] = logp;
    given += q;
    float weighed = -q;
    if (reverse) {
      value += p > 0.f ? p * (logp - logq) : 0.f;
      weighed = p > 0.f ? p * (logp - logq + 1.f) : 0.f;
    } else if (q > 0.f) {
      value += q * (logq - logp);
    }
    mean += weighed;
    addends[row * k + i] = slope * (reverse ? weighed : -q);
  }
  value = block_sum(value);
  mean = block_sum(mean);
  float rest = 0.f;
  if (tail) {
    given = block_sum(given);
    float mass = 0.f;
    for (u64 at = threadIdx.x; at < vocab; at += blockDim.x)
      if (!among(ids, k, u32(at))) mass += expf(to_f32(x[at]) - log_sum);
    // One less the teacher's mass is known to about 1e-7; the student's is a sum of its own.
    const float p = fmaxf(block_sum(mass), 1.175494351e-38f), q = fmaxf(1.f - given, 1e-7f);
    const float logp = logf(p), logq = logf(q);
    value += reverse ? p * (logp - logq) : q * (logq - logp);
    rest = reverse ? logp - logq + 1.f : -q / p;
    mean += reverse ? p * rest : -q;
  }
  if (threadIdx.x != 0) return;
  divergences[row] = value;
  factors[row * 2] = -slope * mean;
  factors[row * 2 + 1] = slope * (rest - mean);
}

// ---------------------------------------------------------------------------------------------------------------------
// The likeliest tokens

struct Best {
  float value;
  u32 id;
};

// Of equal values the smaller id comes first.
__device__ __forceinline__ bool before(Best a, Best b) {
  return a.value > b.value || (a.value == b.value && a.id < b.id);
}

struct First {
  __device__ __forceinline__ Best operator()(Best a, Best b) const { return before(a, b) ? a : b; }
};
__device__ __forceinline__ Best shuffle_xor(Best b, u32 distance) {
  return {shuffle_xor(b.value, distance), shuffle_xor(b.id, distance)};
}
__device__ __forceinline__ Best shuffle(Best b, u32 lane) { return {shuffle(b.value, lane), shuffle(b.id, lane)}; }

// One block for each row that `which` names, or for each row where that is null: its k likeliest tokens with their
// log-probabilities, likeliest first; where there are fewer that are finite, id 2^32 - 1 and minus infinity. Each thread
// keeps the best of its elements, and looks for its next when that was taken.
KERNEL(head_top, (const T *logits, u64 vocab, u32 k, const u32 *which, const float *log_sums, u32 *ids, float *logps),
       (logits, vocab, k, which, log_sums, ids, logps)) {
  const u64 row = which ? which[blockIdx.x] : blockIdx.x;
  const T *x = logits + row * vocab;
  Best taken = {0.f, 0}, own = {LOWEST, NO_ID};
  bool look = true, any = false;
  for (u32 i = 0; i < k; i++) {
    if (look) {
      own = {LOWEST, NO_ID};
      for (u64 at = threadIdx.x; at < vocab; at += blockDim.x) {
        const Best one = {to_f32(x[at]), u32(at)};
        if ((!any || before(taken, one)) && before(one, own)) own = one;
      }
    }
    const Best best = block_reduce(own, Best{LOWEST, NO_ID}, First());
    look = best.id != NO_ID && best.id % blockDim.x == threadIdx.x;
    if (look) {
      taken = best;
      any = true;
    }
    if (threadIdx.x == 0) {
      ids[blockIdx.x * k + i] = best.id;
      logps[blockIdx.x * k + i] = best.id == NO_ID ? NEG_INF : best.value - log_sums[row];
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Sums over sequences, and pairs of them. In double precision, as on the CPU: a margin is a small difference of large
// sums.

// One warp a sequence: the sum of weights[m] * values[m] over m = order[starts[s]] … order[starts[s + 1] - 1].
KERNEL_ONE(sequence_sums,
           (const float *values, const double *weights, const u32 *order, const u32 *starts, u32 sequences,
            double *sums),
           (values, weights, order, starts, sequences, sums)) {
  const u32 s = blockIdx.x * warp_count() + warp_id();
  if (s >= sequences) return;
  double sum = 0.0;
  for (u32 at = starts[s] + lane_id(); at < starts[s + 1]; at += 32) {
    const u32 m = order[at];
    sum += weights[m] * values[m];
  }
  sum = warp_reduce(sum, Add());
  if (lane_id() == 0) sums[s] = sum;
}

// Exact at both ends.
__device__ __forceinline__ double log_sigmoid(double x) { return fmin(x, 0.0) - log1p(exp(-fabs(x))); }
__device__ __forceinline__ double sigmoid(double x) { return exp(log_sigmoid(x)); }

// What a pair loses by its margin x: the slope.
enum Kind { SIGMOID = 0, HINGE = 1, IPO = 2 };

struct Loss {
  u32 kind;
  // Strength of the tie to the reference, and the share of wrong labels.
  double beta, smoothing;
};

__device__ __forceinline__ double margin_slope(const Loss &loss, double x) {
  if (loss.kind == HINGE) return x < 1.0 ? -1.0 : 0.0;
  if (loss.kind == IPO) return 2.0 * (x - 0.5) / (loss.beta * loss.beta);
  return loss.smoothing * sigmoid(x) - (1.0 - loss.smoothing) * sigmoid(-x);
}

// One thread a tree, whose pairs are (better, worse) sequences of its own: so each sum of slopes has one owner. The
// margin is beta * ((better - its reference) / its length - the same of the worse) - offset; null references count as
// 0, null lengths as 1. d_sums is added to. Losses themselves are the host's, which reads the log-probabilities later.
KERNEL_ONE(pair_slopes,
           (const double *sums, const double *references, const double *lengths, const u32 *pairs, const u32 *starts,
            u32 trees, u32 kind, double beta, double smoothing, double offset, double scale, double *d_sums),
           (sums, references, lengths, pairs, starts, trees, kind, beta, smoothing, offset, scale, d_sums)) {
  const Loss loss = {kind, beta, smoothing};
  const u32 tree = blockIdx.x * blockDim.x + threadIdx.x;
  if (tree >= trees) return;
  for (u32 pair = starts[tree]; pair < starts[tree + 1]; pair++) {
    const u32 better = pairs[2 * pair], worse = pairs[2 * pair + 1];
    double high = sums[better], low = sums[worse];
    if (references) {
      high -= references[better];
      low -= references[worse];
    }
    const double of_high = lengths ? lengths[better] : 1.0, of_low = lengths ? lengths[worse] : 1.0;
    const double slope = margin_slope(loss, beta * (high / of_high - low / of_low) - offset);
    d_sums[better] += scale * beta * slope / of_high;
    d_sums[worse] -= scale * beta * slope / of_low;
  }
}

// One thread a target: the slope of its sequence's sum, times its weight in it, and what is its own.
KERNEL_ONE(target_slopes,
           (const double *d_sums, const u32 *sequence, const double *weights, const double *addends, u32 targets,
            float *d_logps),
           (d_sums, sequence, weights, addends, targets, d_logps)) {
  const u32 n = blockIdx.x * blockDim.x + threadIdx.x;
  if (n < targets) d_logps[n] = float(weights[n] * d_sums[sequence[n]] + addends[n]);
}
