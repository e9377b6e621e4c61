// Keys and values of tokens, wherever they are, and what attention does with a few of them at once.

#pragma once
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
