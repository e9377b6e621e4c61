// y = x Wᵀ for few rows of x and weights in bf16, each of which is read once.
// The definition, and how it is called, stand in project.py.

#include "simd.h"

#define OUT 4   // outputs computed together: their rows of W are read at once
#define ROWS 4  // rows of x computed together

// sums[n][o] = x[n] . w[o] for `rows` rows of x, which is in the order of `pair`. Asks for weights `ahead` bytes on.
INLINE void some(const float *x, const char *const *w, long D, int rows, long ahead, float sums[ROWS][OUT]) {
  vec sum[ROWS][OUT] = {};
  long d = 0;
  for (; d + 2 * LANES <= D; d += 2 * LANES) {
    vec a[OUT], b[OUT];
    for (int o = 0; o < OUT; o++) __builtin_prefetch(w[o] + 2 * d + ahead), pair(w[o], d, 1, a + o, b + o);
    for (int n = 0; n < rows; n++) {
      vec p = load(x + n * D + d), q = load(x + n * D + d + LANES);
      for (int o = 0; o < OUT; o++) sum[n][o] += p * a[o];
      for (int o = 0; o < OUT; o++) sum[n][o] += q * b[o];
    }
  }
  for (; d + LANES <= D; d += LANES)
    for (int n = 0; n < rows; n++)
      for (int o = 0; o < OUT; o++) sum[n][o] += load(x + n * D + d) * widened(w[o], d, 1);
  for (int n = 0; n < rows; n++) sum4(sum[n][0], sum[n][1], sum[n][2], sum[n][3], sums[n]);
}

// x [N D], w [outs D], y [N outs], all bf16. work holds (N + 1) D + N outs floats.
void project(const void *x, const char *w, long N, long D, long outs, int threads, float *work, void *y) {
  long row = 2 * D, ahead = row <= 16384 ? OUT * row : 4096;  // the same place of the next rows, if that is near
  float *plain = work, *ordered = work + D, *out = ordered + N * D;
  for (long n = 0; n < N; n++) {
    widen((const uint16_t *)x + n * D, D, 1, plain);
    split(plain, ordered + n * D, D, 1);
  }
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long o = 0; o < outs; o += OUT) {
    const char *at[OUT];
    int most = outs - o < OUT ? outs - o : OUT;
    for (int i = 0; i < OUT; i++) at[i] = w + (o + (i < most ? i : 0)) * row;
    for (long n = 0; n < N; n += ROWS) {
      float sums[ROWS][OUT];
      int left = N - n < ROWS ? N - n : ROWS;
#define CASE(r) if (left == r) some(ordered + n * D, at, D, r, ahead, sums);
      CASE(1) CASE(2) CASE(3) CASE(4)
      for (int r = 0; r < left; r++) memcpy(out + (n + r) * outs + o, sums[r], sizeof(float) * most);
    }
  }
  narrow(out, N * outs, 1, y);
}
