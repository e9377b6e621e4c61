// Attention of one token over the keys and values of its KV heads, each read once.
// The torch definition, and how it is called, stand in attend_token.py.

#include "simd.h"

#define BLOCK 32  // keys whose scores are held at once; their K and V, and the next, stay in the L1 cache
#define MOST 4    // queries computed together: their sums stay in registers
#define KEYS (LANES / 4)          // keys computed together
#define PAIRS (LANES == 16 ? 2 : 1)  // pairs of registers of each output that are summed together

// Where a head's keys and values are: token j at `row` * (ids ? ids[j] : j) bytes behind k and v.
typedef struct { const char *k, *v; long row; const int64_t *ids; } Rows;

INLINE long at(Rows r, long j) { return r.row * (r.ids ? r.ids[j] : j); }

INLINE void ask(const char *line, int bytes) {
  for (int i = 0; i < bytes; i += 64) __builtin_prefetch(line + i);
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

// score[g][j] = scale * q[g] . key j of tokens [start, start + m). Asks for their values, and `gather` for the keys
// of the next block, so that memory never rests: without that, 32k tokens take 1.5 times as long.
INLINE void scores(const float *q, Rows r, long start, long m, int G, int D, float scale, int bf16,
                   float score[MOST][BLOCK]) {
  int bytes = D * (bf16 ? 2 : 4);
  for (long j = 0; j < m; j += KEYS) {
    const char *k[KEYS];
    vec sum[MOST * KEYS] = {};
    for (int i = 0; i < KEYS; i++) {
      long own = start + (j + i < m ? j + i : j);
      k[i] = r.k + at(r, own);
      ask(r.v + at(r, own), bytes);
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
}

// out[g] += sum over j of p[g][j] * value j, for tokens [start, start + m) of n, and `pairs` pairs of registers of
// every head at a time (0: one register).
INLINE void gather_some(Rows r, long start, long m, long n, int G, int D, int d, int pairs, int bf16, float p[MOST][BLOCK],
                        float *out) {
  int wide = pairs ? 2 * pairs : 1, size = bf16 ? 2 : 4;
  vec o[MOST][4];
  for (int g = 0; g < G; g++)
    for (int w = 0; w < wide; w++) o[g][w] = load(out + g * D + d + w * LANES);
  for (long j = 0; j < m; j++) {
    const char *v = r.v + at(r, start + j);
    vec x[4];
    if (start + j + BLOCK < n) ask(r.k + at(r, start + j + BLOCK) + d * size, wide * LANES * size);
    if (!pairs) x[0] = widened(v, d, bf16);
    for (int w = 0; w < pairs; w++) pair(v, d + 2 * w * LANES, bf16, x + 2 * w, x + 2 * w + 1);
    for (int g = 0; g < G; g++)
      for (int w = 0; w < wide; w++) o[g][w] += p[g][j] * x[w];
  }
  for (int g = 0; g < G; g++)
    for (int w = 0; w < wide; w++) memcpy(out + g * D + d + w * LANES, &o[g][w], sizeof(vec));
}

INLINE void gather(Rows r, long start, long m, long n, int G, int D, int bf16, float p[MOST][BLOCK], float *out) {
  int d = 0;
  for (; d + 2 * PAIRS * LANES <= D; d += 2 * PAIRS * LANES) gather_some(r, start, m, n, G, D, d, PAIRS, bf16, p, out);
  for (; d + 2 * LANES <= D; d += 2 * LANES) gather_some(r, start, m, n, G, D, d, 1, bf16, p, out);
  for (; d < D; d += LANES) gather_some(r, start, m, n, G, D, d, 0, bf16, p, out);
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

INLINE void run(const float *q, Rows r, long n, int G, int D, float scale, int bf16, float *out, float *top,
                float *total) {
  float score[MOST][BLOCK] __attribute__((aligned(64)));
  for (int g = 0; g < G; g++) top[g] = -1e30f, total[g] = 0;
  memset(out, 0, sizeof(float) * G * D);
  for (long start = 0; start < n; start += BLOCK) {
    long m = n - start < BLOCK ? n - start : BLOCK;
    scores(q, r, start, m, G, D, scale, bf16, score);
    for (int g = 0; g < G; g++) weigh(m, D, score[g], out + g * D, top + g, total + g);
    gather(r, start, m, n, G, D, bf16, score, out);
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

// q [Hk G D] fp32, overwritten; k, v [Hk n D]: rows `row` bytes apart, heads `kstride`, `vstride` bytes apart; with ids
// [Hk n], token j of head h is row ids[h][j]. out [Hk G D], lse [Hk G]: logarithm of the sum of exp(scores).
// Each head's keys are cut into `parts`; work holds parts * Hk * G * (D + 2) floats.
void attend_token(float *q, const char *k, const char *v, const int64_t *ids, long kstride, long vstride, long row,
                  long n, int Hk, int G, int D, float scale, int bf16, int parts, int threads, float *work,
                  float *out, float *lse) {
  long rows = (long)Hk * parts * G, each = (n + parts - 1) / parts;
  float *top = work + rows * D, *total = top + rows;
  for (long i = 0; i < (long)Hk * G; i++) split(q + i * D, out + i * D, D, bf16);
  memcpy(q, out, sizeof(float) * Hk * G * D);
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads)
  for (int h = 0; h < Hk; h++)
    for (int p = 0; p < parts; p++)
      for (int g = 0; g < G; g += MOST) {
        long start = p * each < n ? p * each : n, stop = start + each < n ? start + each : n;
        long i = ((long)h * parts + p) * G + g, skip = ids ? 0 : start * row;
        Rows r = {k + h * kstride + skip, v + h * vstride + skip, row, ids ? ids + h * n + start : 0};
        some(q + ((long)h * G + g) * D, r, stop - start, G - g < MOST ? G - g : MOST, D, scale, bf16, work + i * D,
             top + i, total + i);
      }
  for (int h = 0; h < Hk; h++)
    for (int g = 0; g < G; g++) {
      float best = -1e30f, all = 0, *o = out + ((long)h * G + g) * D;
      memset(o, 0, sizeof(float) * D);
      for (int p = 0; p < parts; p++) best = top[((long)h * parts + p) * G + g] > best ? top[((long)h * parts + p) * G + g] : best;
      for (int p = 0; p < parts; p++) {
        long i = ((long)h * parts + p) * G + g;
        float w = exponential((vec){} + (top[i] - best))[0];
        all += w * total[i];
        for (int d = 0; d < D; d++) o[d] += w * work[i * D + d];
      }
      for (int d = 0; d < D; d++) o[d] /= all;
      joined(o, D, bf16);
      lse[(long)h * G + g] = best + __builtin_logf(all);
    }
}
