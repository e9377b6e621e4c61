// Attention of one token over the keys and values of its KV heads, each read once.
// The torch definition, and how it is called, stand in attend_token.py.

#include "rows.h"
#include "softmax.h"

// Online softmax: what was summed shrinks when a block brings a larger score (Milakov 2018).
INLINE void weigh(long m, int D, float *score, float *out, float *top, float *total) {
  float best = *top;
  for (long j = 0; j < m; j++) best = score[j] > best ? score[j] : best;
  for (long j = m; j < BLOCK; j++) score[j] = -1e30f;
  float shrink = exponential((vec){} + (*top - best))[0];
  *total = *total * shrink + weights(score, BLOCK, best);
  *top = best;
  for (int d = 0; d < D; d++) out[d] *= shrink;
}

// While values of a block are summed, scores of the next are computed, a few tokens of each in turn: so memory never
// rests, and both streams move on evenly.
INLINE void run(const float *q, Rows r, long n, int G, int D, float scale, float softcap, int bf16, float *out,
                float *top, float *total) {
  float both[2][MOST][BLOCK] __attribute__((aligned(64)));
  for (int g = 0; g < G; g++) top[g] = -1e30f, total[g] = 0;
  memset(out, 0, sizeof(float) * G * D);
  for (long start = -BLOCK; start < n; start += BLOCK) {
    long next = start + BLOCK, m = start < 0 ? 0 : n - start < BLOCK ? n - start : BLOCK;
    float(*p)[BLOCK] = both[(next / BLOCK) & 1], (*score)[BLOCK] = both[(start / BLOCK) & 1];
    for (int g = 0; g < G && m; g++) {
      if (softcap) cap(p[g], m, softcap);
      weigh(m, D, p[g], out + g * D, top + g, total + g);
    }
    for (long j = 0; j < BLOCK; j += KEYS) {
      if (next + j < n) scores(q, r, next, j, n, G, D, scale, bf16, score);
      if (j < m) gather(r, start, j, n, G, D, bf16, p, out);
    }
  }
}

// The common sizes are compiled with their sizes known.
static void some(const float *q, Rows r, long n, int G, int D, float scale, float softcap, int bf16, float *out,
                 float *top, float *total) {
#define CASE(g, d, b) \
  if (G == g && D == d && bf16 == b) { run(q, r, n, g, d, scale, softcap, b, out, top, total); return; }
#define CASES(g) CASE(g, 64, 0) CASE(g, 64, 1) CASE(g, 128, 0) CASE(g, 128, 1)
  CASES(1) CASES(2) CASES(3) CASES(4)
  run(q, r, n, G, D, scale, softcap, bf16, out, top, total);
}

// q [Hk G D] and out, of its shape: bf16 if `half`, else fp32. k, v [Hk n D]: rows `row` bytes apart, heads `kstride`,
// `vstride` bytes apart; with ids [Hk n], token j of head h is row ids[h][j]. lse [Hk G]: logarithm of the sum of
// exp(scores). With a softcap, not 0, scores are capped. Each head's keys are cut into `parts`; work holds
// Hk * G * (2 D + parts * (D + 2)) floats.
void attend_token(const void *q, const char *k, const char *v, const int64_t *ids, long kstride, long vstride, long row,
                  long n, int Hk, int G, int D, float scale, float softcap, int bf16, int half, int parts, int threads,
                  float *work, void *out, float *lse) {
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
        some(query + ((long)h * G + g) * D, r, stop - start, G - g < MOST ? G - g : MOST, D, scale, softcap, bf16,
             sums + i * D, top + i, total + i);
      }
  merge(sums, top, total, Hk, G, D, parts, plain, lse);
  for (long i = 0; i < heads; i++) joined(plain + i * D, D, bf16);
  narrow(plain, heads * D, half, out);
}
