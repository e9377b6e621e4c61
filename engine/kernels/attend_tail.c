// Attention over selected rows, and over the clusters of all tokens less those rows, in one pass.
// How it is called, and the formulas, stand in attend_tail.py.

#include "rows.h"
#include "softmax.h"

// The selected tokens of a head: ids ascend; token ids[j] is row rows[j].
typedef struct { const int64_t *ids, *rows; long n; } Selected;

// The clusters of a head: of each `size` of `length` tokens the mean key, the mean value and the variance of the keys.
typedef struct { const float *means; long by, size, length; } Clusters;

// What is kept of one part, of MOST queries: scores of its selected tokens, then their weights, block by block; logits
// of one token of its clusters; and what comes of it.
typedef struct { float (*scores)[MOST][BLOCK], (*logits)[MOST], *out, *top, *total; } Part;

INLINE const float *mean(Clusters c, long i) { return c.means + i * c.by; }

INLINE long first(Selected s, long token) {  // that is not below a token
  long low = 0, high = s.n;
  while (low < high) {
    long middle = (low + high) / 2;
    if (s.ids[middle] < token) low = middle + 1;
    else high = middle;
  }
  return low;
}

// Tokens of cluster i. Moves `j` behind those of them that are selected.
INLINE long tokens(Clusters c, long i, Selected s, long *j) {
  long stop = (i + 1) * c.size < c.length ? (i + 1) * c.size : c.length;
  while (*j < s.n && s.ids[*j] < stop) ++*j;
  return stop - i * c.size;
}

INLINE void raise(float *top, float logit) { *top = logit > *top ? logit : *top; }

// Scores of all selected tokens of a part.
INLINE void score(const float *q, Rows r, long n, int G, int D, float scale, int bf16, Part part) {
  for (long start = 0; start < n; start += BLOCK) {
    float(*block)[BLOCK] = part.scores[start / BLOCK];
    long m = n - start < BLOCK ? n - start : BLOCK;
    for (long j = 0; j < m; j += KEYS) scores(q, r, start, j, n, G, D, scale, bf16, block);
    for (int g = 0; g < G; g++) {
      for (long j = m; j < BLOCK; j++) block[g][j] = -1e30f;
      for (long j = 0; j < m; j++) raise(part.top + g, block[g][j]);
    }
  }
}

// Logits of one token of each cluster, of those that are not selected; -1e30 where there is none.
INLINE void estimate(const float *q, const float *wider, Clusters c, long from, long to, Selected s, long begin, int G,
                     int D, float scale, float widest, Part part) {
  for (long i = from, j = begin; i < to; i++) {
    long before = j, n = tokens(c, i, s, &j), left = n - (j - before);
    const float *k = mean(c, i);
    vec sum[MOST] = {};
    float dots[LANES], more = __builtin_logf(left);
    for (int b = 0; b < 8 * D && i + AHEAD < to; b += 64) __builtin_prefetch((const char *)mean(c, i + AHEAD) + b);
    for (int d = 0; d < D; d += LANES) {
      vec x = load(k + d);
      for (int g = 0; g < G; g++) sum[g] += load(q + g * D + d) * x;
    }
    sum4(sum[0], sum[1], sum[2], sum[3], dots);
    for (int g = 0; g < G; g++) {
      float all = dots[g] * scale * n, wide = wider[g] * k[2 * D];
      for (long t = before - begin; t < j - begin; t++) all -= part.scores[t / BLOCK][g][t % BLOCK];
      float logit = left ? all / left + (wide < widest ? wide : widest) : -1e30f;
      part.logits[i - from][g] = logit;
      if (left) raise(part.top + g, logit + more);
    }
  }
}

// Scores to weights: exp(score - top).
INLINE void weigh(long n, int G, Part part) {
  for (long start = 0; start < n; start += BLOCK)
    for (int g = 0; g < G; g++) part.total[g] += weights(part.scores[start / BLOCK][g], BLOCK, part.top[g]);
}

// Mean values by their weights; a selected token is taken out of its cluster by a smaller weight of its own.
INLINE void add(Clusters c, long from, long to, Selected s, long begin, int G, int D, Part part) {
  for (long i = from, j = begin; i < to; i++) {
    long before = j, n = tokens(c, i, s, &j), left = n - (j - before);
    if (!left) continue;
    const float *v = mean(c, i) + D;
    vec logits = {};
    for (int g = 0; g < G; g++) logits[g] = part.logits[i - from][g] - part.top[g];
    vec each = exponential(logits);
    for (int g = 0; g < G; g++) {
      part.total[g] += left * each[g];
      for (long t = before - begin; t < j - begin; t++) part.scores[t / BLOCK][g][t % BLOCK] -= each[g];
    }
    each *= (float)n;
    for (int d = 0; d < D; d += LANES) {
      vec x = load(v + d);
      for (int g = 0; g < G; g++) {
        vec o = load(part.out + g * D + d) + each[g] * x;
        memcpy(part.out + g * D + d, &o, sizeof o);
      }
    }
  }
}

// Clusters [from, to) of one head and what is selected of them. q: in its own order, and in that of the rows.
INLINE void run(const float *q, const float *query, const float *wider, Clusters c, long from, long to, Selected s,
                Rows r, int G, int D, float scale, float widest, int bf16, Part part) {
  long begin = first(s, from * c.size), n = first(s, to * c.size) - begin;
  float out[MOST * D] __attribute__((aligned(64)));
  r.ids = s.rows + begin;
  for (int g = 0; g < G; g++) part.top[g] = -1e30f, part.total[g] = 0;
  memset(part.out, 0, sizeof(float) * G * D), memset(out, 0, sizeof(float) * G * D);
  score(query, r, n, G, D, scale, bf16, part);
  estimate(q, wider, c, from, to, s, begin, G, D, scale, widest, part);
  weigh(n, G, part);
  add(c, from, to, s, begin, G, D, part);
  for (long start = 0; start < n; start += BLOCK) {
    long m = n - start < BLOCK ? n - start : BLOCK;
    for (long j = 0; j < m; j += KEYS) gather(r, start, j, n, G, D, bf16, part.scores[start / BLOCK], out);
  }
  for (int g = 0; g < G; g++) {
    joined(out + g * D, D, bf16);
    for (int d = 0; d < D; d++) part.out[g * D + d] += out[g * D + d];
  }
}

// The common sizes are compiled with their sizes known.
static void some(const float *q, const float *query, const float *wider, Clusters c, long from, long to, Selected s,
                 Rows r, int G, int D, float scale, float widest, int bf16, Part part) {
#define CASE(g, d, b) \
  if (G == g && D == d && bf16 == b) { run(q, query, wider, c, from, to, s, r, g, d, scale, widest, b, part); return; }
#define CASES(g) CASE(g, 64, 0) CASE(g, 64, 1) CASE(g, 128, 0) CASE(g, 128, 1)
  CASES(1) CASES(2) CASES(3) CASES(4)
  run(q, query, wider, c, from, to, s, r, G, D, scale, widest, bf16, part);
}

// q [Hk G D] and out, of its shape: bf16 if `half`, else fp32. ids and rows [Hk n]: the selected tokens, ascending, and
// the rows of their keys and values, `row` bytes apart from k and v on. means [Hk C 2D+1]: of clusters of `size` of
// `length` tokens; heads `by_head` numbers apart, clusters `by`. lse [Hk G]. Each head's clusters are cut into `parts`;
// work holds Hk * G * (2 D + 1 + parts * (D + 2)) + Hk * (G / 4 + 1) * (256 * (n / 64 + parts + 1) + 4 * (C + parts))
// floats.
void attend_tail(const void *q, const int64_t *ids, const int64_t *rows, const char *k, const char *v,
                 const float *means, long row, long n, long length, long by_head, long by, int size, int Hk, int G,
                 int D, float scale, float widest, int bf16, int half, int parts, int threads, float *work, void *out,
                 float *lse) {
  long heads = (long)Hk * G, all = heads * parts, C = (length + size - 1) / size, each = (C + parts - 1) / parts;
  long blocks = n / BLOCK + parts + 1, teams = (G + MOST - 1) / MOST;
  float *plain = work, *query = plain + heads * D, *wider = query + heads * D, *sums = wider + heads;
  float *top = sums + all * D, *total = top + all, *scores = total + all;
  float *logits = scores + Hk * teams * blocks * MOST * BLOCK;
  widen(q, heads * D, half, plain);
  for (long i = 0; i < heads; i++) {
    split(plain + i * D, query + i * D, D, bf16);
    wider[i] = 0;
    for (int d = 0; d < D; d++) wider[i] += plain[i * D + d] * plain[i * D + d] * scale * scale / 2;
  }
#pragma omp parallel for collapse(3) schedule(dynamic) num_threads(threads)
  for (int h = 0; h < Hk; h++)
    for (int p = 0; p < parts; p++)
      for (int team = 0; team < teams; team++) {
        long from = p * each < C ? p * each : C, to = from + each < C ? from + each : C, g = team * MOST;
        long i = ((long)h * parts + p) * G + g, at = (long)h * G + g, own = (long)h * teams + team;
        Selected s = {ids + h * n, rows + h * n, n};
        Clusters c = {means + h * by_head, by, size, length};
        Rows r = {k, v, row, 0};
        // parts begin in blocks of their own: the p-th at p more than those that are full before it
        Part part = {(void *)(scores + (own * blocks + first(s, from * size) / BLOCK + p) * MOST * BLOCK),
                     (void *)(logits + (own * C + from) * MOST), sums + i * D, top + i, total + i};
        some(plain + at * D, query + at * D, wider + at, c, from, to, s, r, G - g < MOST ? G - g : MOST, D, scale,
             widest, bf16, part);
      }
  merge(sums, top, total, Hk, G, D, parts, plain, lse);
  narrow(plain, heads * D, half, out);
}
