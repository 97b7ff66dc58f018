// One task of sync_mask: one head and up to kLanes * kVectors words of one sample, against all its keys.
//
// Vectors run over words: lane l of vector t is word t * kLanes + l of the task. So the softmax over keys needs nothing
// across lanes, keys are read in place, and only queries are transposed. A task with fewer words repeats the last one
// (its weight in patch scores is 0), which cannot make a number of NaN or a NaN of a number.

#include "simd.h"

constexpr int kVectors = kLanes == 16 ? 4 : kLanes == 8 ? 3 : 2;  // of words in a task
constexpr int kSums = kLanes == 16 ? 24 : kLanes == 8 ? 12 : 8;   // that fit the registers

// Lane i of the result: the sum or the maximum over the lanes of x[i], in one tree for every i.
template <bool kMaximum>
INLINE Lanes reduce(Lanes (&x)[kLanes]) {
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < half; ++i) {
      Lanes low, high;
      interleave(x[i], x[i + half], low, high);
      x[i] = kMaximum ? higher(low, high) : low + high;
    }
  }
  return x[0];
}

// to[c][l] = element c of the query of word l.
template <int V>
INLINE void pack_queries(const Task& task, Scratch& scratch) {
  for (int group = 0; group < V; ++group) {
    const float* query[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      const int64_t i = group * kLanes + l;
      const int64_t word = task.words[i < task.count ? i : task.count - 1];
      query[l] = read_rows(task.q, word, 1, scratch.rows.data() + l * task.q.columns).data;
    }
    float* to = scratch.queries.data() + group * kLanes;
    interleave_rows(query, task.q.columns, V * kLanes, to);
  }
}

// to[i][w] = scale * sum over r < terms of a(i, r) * b[r][w] for kRows rows i and V vectors of
// words w; raises top[w] to the maximum of those.
// Three arguments for a, not one Factor: passed on the stack it made the whole operator 7 % slower.
template <int kRows, int V>
__attribute__((noinline)) void product(const float* a, int64_t a_row, int64_t a_term, const float* b, int64_t terms,
                                       float scale, float* to, Lanes* top) {
  Lanes sum[kRows][V];
  multiply<kRows, V>({a, a_row, a_term}, b, V * kLanes, terms, sum);
#pragma GCC unroll 32
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 32
    for (int t = 0; t < V; ++t) {
      const Lanes x = sum[i][t] * scale;
      store(to + (i * V + t) * kLanes, x);
      top[t] = higher(x, top[t]);
    }
  }
}

// Logits of keys from `key` on: kRows at a time, then the rest with fewer.
template <int kRows, int V>
INLINE void logits(const Task& task, Scratch& scratch, int64_t key, Lanes* top) {
  for (; key + kRows <= task.k.rows; key += kRows) {
    const Rows keys = read_rows(task.k, key, kRows, scratch.rows.data());
    float* to = scratch.weights.data() + key * V * kLanes;
    product<kRows, V>(keys.data, keys.stride, 1, scratch.queries.data(), task.k.columns, task.scale, to, top);
  }
  if constexpr (kRows > 1) logits<kRows / 2, V>(task, scratch, key, top);
}

// outputs[c][w] = sum over keys j of weight[j][w] * v[j][c].
template <int kRows, int V>
INLINE void outputs(const Rows& values, const Task& task, Scratch& scratch, int64_t column) {
  for (; column + kRows <= task.v.columns; column += kRows) {
    Lanes unused[V] = {};
    float* to = scratch.outputs.data() + column * V * kLanes;
    product<kRows, V>(values.data + column, 1, values.stride, scratch.weights.data(), task.v.rows, 1.0f, to, unused);
  }
  if constexpr (kRows > 1) outputs<kRows / 2, V>(values, task, scratch, column);
}

// Turns the logits of a key into exp(logit - top); adds them to sum, raises peak to them.
template <int V>
INLINE void exponentials_of(float* logits, const Lanes* top, Lanes* sum, Lanes* peak) {
#pragma GCC unroll 32
  for (int t = 0; t < V; ++t) {
    const Lanes x = exp_of_negative(load(logits + t * kLanes) - top[t]);
    store(logits + t * kLanes, x);
    sum[t] += x;
    peak[t] = higher(x, peak[t]);
  }
}

// Of all keys; sum over all, peak over patches.
template <int V>
INLINE void exponentials(const Task& task, Scratch& scratch, const Lanes* top, Lanes* sum, Lanes* peak) {
  float* weights = scratch.weights.data();
  Lanes of_cls[V] = {};
  exponentials_of<V>(weights, top, sum, of_cls);
  for (int64_t begin = 1; begin < task.k.rows; begin += kLanes) {  // in blocks: long sums lose digits
    const int64_t end = begin + kLanes < task.k.rows ? begin + kLanes : task.k.rows;
    Lanes block[V] = {};
    for (int64_t key = begin; key < end; ++key) exponentials_of<V>(weights + key * V * kLanes, top, block, peak);
#pragma GCC unroll 32
    for (int t = 0; t < V; ++t) sum[t] += block[t];
  }
}

// patch[j] = the sum or the maximum over words w of weight[1 + j][w] * share[w]; writes whole vectors.
template <bool kMaximum, int V>
INLINE void over_words(const Task& task, Scratch& scratch, const Lanes* share, float* patch) {
  for (int64_t key = 1; key < task.k.rows; key += kLanes) {
    Lanes x[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      const float* weights = scratch.weights.data() + (key + i) * V * kLanes;
      x[i] = load(weights) * share[0];
#pragma GCC unroll 32
      for (int t = 1; t < V; ++t) {
        const Lanes y = load(weights + t * kLanes) * share[t];
        x[i] = kMaximum ? higher(y, x[i]) : x[i] + y;
      }
    }
    store(patch + key - 1, reduce<kMaximum>(x));
  }
}

template <int V>
void run(const Task& task, Scratch& scratch, float* token, float* patch) {
  constexpr float kInfinity = __builtin_inff();
  Lanes top[V], sum[V] = {}, peak[V] = {}, share[V];
  for (int t = 0; t < V; ++t) top[t] = Lanes{} - kInfinity;
  pack_queries<V>(task, scratch);
  logits<kSums / V, V>(task, scratch, 0, top);
  exponentials<V>(task, scratch, top, sum, peak);

  Lanes norm[V] = {};
  if (task.token_rule == TokenRule::kOutput) {
    const Rows values = read_rows(task.v, 0, task.v.rows, scratch.values.data());
    outputs<kSums / V, V>(values, task, scratch, 0);
    for (int64_t c = 0; c < task.v.columns; ++c) {
      for (int t = 0; t < V; ++t) {
        const Lanes x = load(scratch.outputs.data() + (c * V + t) * kLanes) / sum[t];
        norm[t] += x * x;
      }
    }
  }
  bool has_nan = false;
  for (int t = 0; t < V; ++t) {
    const Lanes first = load(scratch.weights.data() + t * kLanes) / sum[t];
    share[t] = 1.0f / sum[t];
    const Lanes peak_weight = peak[t] * share[t];
    Lanes score = peak_weight;
    if (task.token_rule == TokenRule::kMass) score = 1.0f - first;
    if (task.token_rule == TokenRule::kCls) score = first;
    if (task.token_rule == TokenRule::kOutput) score = norm[t];
    if (task.patch_rule == PatchRule::kWeighted) share[t] *= peak_weight;
    for (int l = 0; l < kLanes; ++l) {
      const float x = score[l];
      token[t * kLanes + l] = task.token_rule == TokenRule::kOutput ? __builtin_sqrtf(x) : x;
      if (t * kLanes + l >= task.count) share[t][l] = 0.0f;
      has_nan |= share[t][l] != share[t][l];
    }
  }
  const int64_t patches = task.k.rows - 1;
  if (task.patch_rule == PatchRule::kCls) {
    const float* weights = scratch.weights.data() + V * kLanes;
    for (int64_t j = 0; j < patches; ++j) patch[j] = weights[j * V * kLanes] * share[0][0];
  } else if (task.patch_rule != PatchRule::kMax) {
    over_words<false, V>(task, scratch, share, patch);
  } else if (!has_nan) {
    over_words<true, V>(task, scratch, share, patch);
  } else {  // all weights of such a word are NaN, and so is a maximum with them
    for (int64_t j = 0; j < patches; ++j) patch[j] = __builtin_nanf("");
  }
}

template <int V = kVectors>
INLINE void run_narrowest(const Task& task, Scratch& scratch, float* token, float* patch) {
  if constexpr (V > 1) {
    if (task.count <= (V - 1) * kLanes) return run_narrowest<V - 1>(task, scratch, token, patch);
  }
  run<V>(task, scratch, token, patch);
}

// token[kWidth] and patch[P rounded up to kLanes] of a task; scratch as make_scratch leaves it.
void run_task(const Task& task, Scratch& scratch, float* token, float* patch) {
  run_narrowest(task, scratch, token, patch);
}

const Kernels kernels{run_task, kLanes * kVectors, kSums};
