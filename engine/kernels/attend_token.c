// Attention of one token over the keys and values of its KV heads, each read once.
// The torch definition, and how it is called, stand in attend_token.py.

#include "simd.h"

#define BLOCK 64          // keys whose scores are held at once
#define MOST 4            // queries computed together: their sums stay in registers
#define KEYS (LANES / 4)  // keys computed together
#define AHEAD 8           // keys, and values, that are asked for before they are needed

// Where a head's keys and values are: token j at `row` * (ids ? ids[j] : j) bytes behind k and v.
typedef struct { const char *k, *v; long row; const int64_t *ids; } Rows;

INLINE long at(Rows r, long j) { return r.row * (r.ids ? r.ids[j] : j); }

// Asks for token j of n, if there is one.
INLINE void ask(Rows r, const char *from, long j, long n, int bytes) {
  if (!r.ids || j < n)
    for (int i = 0; i < bytes; i += 64) __builtin_prefetch(from + at(r, j) + i);
}

// exp(x) for x <= 0, within 2 ulp: 2^n times a polynomial on [-ln2/2, ln2/2]. NaN stays NaN.
INLINE vec exponential(vec x) {
  vec low = (vec){} - 87.0f, t;
  ints below = x < low;
  words picked, a, b;
  memcpy(&a, &low, sizeof a), memcpy(&b, &x, sizeof b);
  picked = (a & (words)below) | (b & ~(words)below);
  memcpy(&x, &picked, sizeof x);
  t = x * 1.44269504f + 12582912.0f;  // rounds to the nearest integer in the low bits
  words n;
  memcpy(&n, &t, sizeof n);
  t -= 12582912.0f;
  vec r = x - t * 0.693359375f + t * 2.12194440e-4f;
  vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  words bits;
  memcpy(&bits, &p, sizeof bits);
  bits += n << 23;
  memcpy(&p, &bits, sizeof p);
  return p;
}

// score[g][j] = scale * q[g] . key of token start + j, for KEYS of them from j on; n tokens in all. Those that are not
// there count as the first: `weigh` leaves them out.
INLINE void scores(const float *q, Rows r, long start, long j, long n, int G, int D, float scale, int bf16,
                   float score[MOST][BLOCK]) {
  const char *k[KEYS];
  vec sum[MOST * KEYS] = {};
  for (int i = 0; i < KEYS; i++) {
    long own = start + j + i;
    k[i] = r.k + at(r, own < n ? own : start + j);
    ask(r, r.k, own + AHEAD, n, D * (bf16 ? 2 : 4));
  }
  int d = 0;
  for (; d + 2 * LANES <= D; d += 2 * LANES) {
    vec a[KEYS], b[KEYS];
    for (int i = 0; i < KEYS; i++) pair(k[i], d, bf16, a + i, b + i);
    for (int g = 0; g < G; g++) {
      vec x = load(q + g * D + d), y = load(q + g * D + d + LANES);
      for (int i = 0; i < KEYS; i++) sum[g * KEYS + i] += x * a[i];
      for (int i = 0; i < KEYS; i++) sum[g * KEYS + i] += y * b[i];
    }
  }
  for (; d < D; d += LANES)
    for (int g = 0; g < G; g++)
      for (int i = 0; i < KEYS; i++) sum[g * KEYS + i] += load(q + g * D + d) * widened(k[i], d, bf16);
  float sums[MOST * KEYS];
  for (int i = 0; i < G * KEYS; i += 4) sum4(sum[i], sum[i + 1], sum[i + 2], sum[i + 3], sums + i);
  for (int g = 0; g < G; g++)
    for (int i = 0; i < KEYS; i++) score[g][j + i] = sums[g * KEYS + i] * scale;
}

// out[g] += p[g][j] * value of token start + j, for KEYS of them from j on; of those that are not there none.
INLINE void gather(Rows r, long start, long j, long n, int G, int D, int bf16, float p[MOST][BLOCK], float *out) {
  const char *v[KEYS];
  for (int i = 0; i < KEYS; i++) {
    long own = start + j + i;
    v[i] = r.v + at(r, own < n ? own : start + j);
    ask(r, r.v, own + AHEAD, n, D * (bf16 ? 2 : 4));
  }
  int d = 0;
  for (; d + 2 * LANES <= D; d += 2 * LANES) {
    vec a[KEYS], b[KEYS];
    for (int i = 0; i < KEYS; i++) pair(v[i], d, bf16, a + i, b + i);
    for (int g = 0; g < G; g++) {
      vec x = load(out + g * D + d), y = load(out + g * D + d + LANES);
      for (int i = 0; i < KEYS; i++) x += p[g][j + i] * a[i], y += p[g][j + i] * b[i];
      memcpy(out + g * D + d, &x, sizeof x), memcpy(out + g * D + d + LANES, &y, sizeof y);
    }
  }
  for (; d < D; d += LANES)
    for (int g = 0; g < G; g++) {
      vec x = load(out + g * D + d);
      for (int i = 0; i < KEYS; i++) x += p[g][j + i] * widened(v[i], d, bf16);
      memcpy(out + g * D + d, &x, sizeof x);
    }
}

// Online softmax: what was summed shrinks when a block brings a larger score (Milakov 2018).
INLINE void weigh(long m, int D, float *score, float *out, float *top, float *total) {
  float best = *top;
  for (long j = 0; j < m; j++) best = score[j] > best ? score[j] : best;
  for (long j = m; j < BLOCK; j++) score[j] = -1e30f;
  float shrink = exponential((vec){} + (*top - best))[0];
  vec s = {};
  for (int j = 0; j < BLOCK; j += LANES) {
    vec e = exponential(load(score + j) - best);
    memcpy(score + j, &e, sizeof e);
    s += e;
  }
  float four[4];
  sum4(s, s, s, s, four);
  *total = *total * shrink + four[0];
  *top = best;
  for (int d = 0; d < D; d++) out[d] *= shrink;
}

// While values of a block are summed, scores of the next are computed, a few tokens of each in turn: so memory never
// rests, and both streams move on evenly.
INLINE void run(const float *q, Rows r, long n, int G, int D, float scale, int bf16, float *out, float *top,
                float *total) {
  float both[2][MOST][BLOCK] __attribute__((aligned(64)));
  for (int g = 0; g < G; g++) top[g] = -1e30f, total[g] = 0;
  memset(out, 0, sizeof(float) * G * D);
  for (long start = -BLOCK; start < n; start += BLOCK) {
    long next = start + BLOCK, m = start < 0 ? 0 : n - start < BLOCK ? n - start : BLOCK;
    float(*p)[BLOCK] = both[(next / BLOCK) & 1], (*score)[BLOCK] = both[(start / BLOCK) & 1];
    if (m)
      for (int g = 0; g < G; g++) weigh(m, D, p[g], out + g * D, top + g, total + g);
    for (long j = 0; j < BLOCK; j += KEYS) {
      if (next + j < n) scores(q, r, next, j, n, G, D, scale, bf16, score);
      if (j < m) gather(r, start, j, n, G, D, bf16, p, out);
    }
  }
}

// The common sizes are compiled with their sizes known.
static void some(const float *q, Rows r, long n, int G, int D, float scale, int bf16, float *out, float *top,
                 float *total) {
#define CASE(g, d, b) \
  if (G == g && D == d && bf16 == b) { run(q, r, n, g, d, scale, b, out, top, total); return; }
#define CASES(g) CASE(g, 64, 0) CASE(g, 64, 1) CASE(g, 128, 0) CASE(g, 128, 1)
  CASES(1) CASES(2) CASES(3) CASES(4)
  run(q, r, n, G, D, scale, bf16, out, top, total);
}

// q [Hk G D] and out, of its shape: bf16 if `half`, else fp32. k, v [Hk n D]: rows `row` bytes apart, heads `kstride`,
// `vstride` bytes apart; with ids [Hk n], token j of head h is row ids[h][j]. lse [Hk G]: logarithm of the sum of
// exp(scores). Each head's keys are cut into `parts`; work holds Hk * G * (2 D + parts * (D + 2)) floats.
void attend_token(const void *q, const char *k, const char *v, const int64_t *ids, long kstride, long vstride, long row,
                  long n, int Hk, int G, int D, float scale, int bf16, int half, int parts, int threads, float *work,
                  void *out, float *lse) {
  long heads = (long)Hk * G, rows = heads * parts, each = (n + parts - 1) / parts;
  float *plain = work, *query = work + heads * D, *sums = query + heads * D, *top = sums + rows * D, *total = top + rows;
  widen(q, heads * D, half, plain);
  for (long i = 0; i < heads; i++) split(plain + i * D, query + i * D, D, bf16);
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads)
  for (int h = 0; h < Hk; h++)
    for (int p = 0; p < parts; p++)
      for (int g = 0; g < G; g += MOST) {
        long start = p * each < n ? p * each : n, stop = start + each < n ? start + each : n;
        long i = ((long)h * parts + p) * G + g, skip = ids ? 0 : start * row;
        Rows r = {k + h * kstride + skip, v + h * vstride + skip, row, ids ? ids + h * n + start : 0};
        some(query + ((long)h * G + g) * D, r, stop - start, G - g < MOST ? G - g : MOST, D, scale, bf16, sums + i * D,
             top + i, total + i);
      }
  for (int h = 0; h < Hk; h++)
    for (int g = 0; g < G; g++) {
      float best = -1e30f, all = 0, *o = plain + ((long)h * G + g) * D;
      memset(o, 0, sizeof(float) * D);
      for (int p = 0; p < parts; p++) best = top[((long)h * parts + p) * G + g] > best ? top[((long)h * parts + p) * G + g] : best;
      for (int p = 0; p < parts; p++) {
        long i = ((long)h * parts + p) * G + g;
        float w = exponential((vec){} + (top[i] - best))[0];
        all += w * total[i];
        for (int d = 0; d < D; d++) o[d] += w * sums[i * D + d];
      }
      for (int d = 0; d < D; d++) o[d] /= all;
      joined(o, D, bf16);
      lse[(long)h * G + g] = best + __builtin_logf(all);
    }
  narrow(plain, heads * D, half, out);
}
