// Attention of one token over the keys and values of its KV heads, each read once.
// The torch definition, and how it is called, stand in attend_token.py.

#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#define BLOCK 64  // keys whose scores are held at once; their K and V stay in the L1 cache
#define MOST 4    // queries computed together: their sums stay in registers

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef uint32_t words __attribute__((vector_size(LANES * 4)));
typedef int32_t ints __attribute__((vector_size(LANES * 4)));
typedef uint16_t halves __attribute__((vector_size(LANES * 2)));
#define INLINE static inline __attribute__((always_inline))

INLINE vec load(const float *at) { vec x; memcpy(&x, at, sizeof x); return x; }

// LANES values at `i`, as fp32: bf16 is the upper half of fp32.
INLINE vec widened(const void *from, long i, int bf16) {
  if (!bf16) return load((const float *)from + i);
  halves h;
  memcpy(&h, (const uint16_t *)from + i, sizeof h);
  words w = __builtin_convertvector(h, words) << 16;
  vec x;
  memcpy(&x, &w, sizeof x);
  return x;
}

INLINE float sum(vec x) {
#if LANES == 16
  x += __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  x += __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
  x += __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  x += __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
#else
  x += __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3);
  x += __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5);
  x += __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6);
#endif
  return x[0];
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

// score[g][j] = scale * q[g] . k[j], two keys at a time so that every load of q serves both. Asks for
// the values of this block and the keys of the next: 32k tokens take a third less time with that.
INLINE void scores(const float *q, const void *k, const void *v, long m, int G, int D, float scale, int bf16,
                   float score[MOST][BLOCK]) {
  long row = (long)D * (bf16 ? 2 : 4);
  for (long j = 0; j < m; j += 2) {
    long other = j + 1 < m ? j + 1 : j;
    vec a[MOST] = {}, b[MOST] = {};
    for (long line = j * row; line < (j + 2) * row; line += 64) {
      __builtin_prefetch((const char *)v + line);
      __builtin_prefetch((const char *)k + BLOCK * row + line);
    }
    for (int d = 0; d < D; d += LANES) {
      vec ka = widened(k, j * D + d, bf16), kb = widened(k, other * D + d, bf16);
      for (int g = 0; g < G; g++) {
        vec x = load(q + g * D + d);
        a[g] += x * ka;
        b[g] += x * kb;
      }
    }
    for (int g = 0; g < G; g++) score[g][other] = sum(b[g]) * scale, score[g][j] = sum(a[g]) * scale;
  }
}

// out[g] += sum over j of p[g][j] * v[j], `wide` registers of every head at a time: the sums of few
// heads would wait for each other.
INLINE void gather_some(const void *v, long m, int G, int D, int d, int wide, int bf16, float p[MOST][BLOCK], float *out) {
  vec o[MOST][2];
  for (int g = 0; g < G; g++)
    for (int w = 0; w < wide; w++) o[g][w] = load(out + g * D + d + w * LANES);
  for (long j = 0; j < m; j++)
    for (int w = 0; w < wide; w++) {
      vec x = widened(v, j * D + d + w * LANES, bf16);
      for (int g = 0; g < G; g++) o[g][w] += p[g][j] * x;
    }
  for (int g = 0; g < G; g++)
    for (int w = 0; w < wide; w++) memcpy(out + g * D + d + w * LANES, &o[g][w], sizeof(vec));
}

INLINE void gather(const void *v, long m, int G, int D, int bf16, float p[MOST][BLOCK], float *out) {
  int d = 0;
  for (; d + 2 * LANES <= D; d += 2 * LANES) gather_some(v, m, G, D, d, 2, bf16, p, out);
  for (; d < D; d += LANES) gather_some(v, m, G, D, d, 1, bf16, p, out);
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
  *total = *total * shrink + sum(s);
  *top = best;
  for (int d = 0; d < D; d++) out[d] *= shrink;
}

INLINE void run(const float *q, const char *k, const char *v, long n, int G, int D, float scale,
                int bf16, float *out, float *top, float *total) {
  float score[MOST][BLOCK] __attribute__((aligned(64)));
  long row = (long)D * (bf16 ? 2 : 4);
  for (int g = 0; g < G; g++) top[g] = -1e30f, total[g] = 0;
  memset(out, 0, sizeof(float) * G * D);
  for (long at = 0; at < n; at += BLOCK) {
    long m = n - at < BLOCK ? n - at : BLOCK;
    scores(q, k + at * row, v + at * row, m, G, D, scale, bf16, score);
    for (int g = 0; g < G; g++) weigh(m, D, score[g], out + g * D, top + g, total + g);
    gather(v + at * row, m, G, D, bf16, score, out);
  }
}

// The common sizes are compiled with their sizes known.
static void some(const float *q, const char *k, const char *v, long n, int G, int D, float scale,
                 int bf16, float *out, float *top, float *total) {
#define CASE(g, d, b) \
  if (G == g && D == d && bf16 == b) { run(q, k, v, n, g, d, scale, b, out, top, total); return; }
#define CASES(g) CASE(g, 64, 0) CASE(g, 64, 1) CASE(g, 128, 0) CASE(g, 128, 1)
  CASES(1) CASES(2) CASES(3) CASES(4)
  run(q, k, v, n, G, D, scale, bf16, out, top, total);
}

// q [Hk G D] fp32; k, v [Hk n D] with rows D apart and heads `kstride`, `vstride` bytes apart; out [Hk G D].
// Each head's keys are cut into `parts`; work holds parts * Hk * G * (D + 2) floats.
void attend_token(const float *q, const char *k, const char *v, long kstride, long vstride, long n, int Hk,
                  int G, int D, float scale, int bf16, int parts, int threads, float *work, float *out) {
  long rows = (long)Hk * parts * G, each = (n + parts - 1) / parts, row = (long)D * (bf16 ? 2 : 4);
  float *top = work + rows * D, *total = top + rows;
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads)
  for (int h = 0; h < Hk; h++)
    for (int p = 0; p < parts; p++)
      for (int g = 0; g < G; g += MOST) {
        long start = p * each < n ? p * each : n, stop = start + each < n ? start + each : n;
        long i = ((long)h * parts + p) * G + g;
        some(q + ((long)h * G + g) * D, k + h * kstride + start * row, v + h * vstride + start * row,
             stop - start, G - g < MOST ? G - g : MOST, D, scale, bf16, work + i * D, top + i, total + i);
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
    }
}
