// Rotary position embedding of rows. The torch definition, and how it is called, stand in rotate.py.

#pragma GCC optimize("fp-contract=off")  // products are rounded before they are summed, as torch's
#pragma STDC FP_CONTRACT OFF

#include "simd.h"

enum { MOST = 512 };  // dimensions of a row

// a, b: the two halves of a row, or its even and its odd places.
INLINE void turn(const float *a, const float *b, const float *cos, const float *sin, long half, float *c, float *d) {
  for (long i = 0; i < half; i++) {
    c[i] = a[i] * cos[i] - b[i] * sin[i];
    d[i] = b[i] * cos[i] + a[i] * sin[i];
  }
}

INLINE void row(const void *x, const float *cos, const float *sin, long half, int pairs, int bf16, void *y) {
  float in[MOST], out[MOST], a[MOST / 2], b[MOST / 2], c[MOST / 2], d[MOST / 2];
  widen(x, 2 * half, bf16, in);
  if (pairs) {
    for (long i = 0; i < half; i++) a[i] = in[2 * i], b[i] = in[2 * i + 1];
    turn(a, b, cos, sin, half, c, d);
    for (long i = 0; i < half; i++) out[2 * i] = c[i], out[2 * i + 1] = d[i];
  } else {
    turn(in, in + half, cos, sin, half, out, out + half);
  }
  narrow(out, 2 * half, bf16, y);
}

// x, y [heads tokens dim], bf16 or fp32; heads, tokens and, of x, runs of `run` tokens lie so many bytes apart. Of each
// row the first 2 half values turn. cos, sin [tokens half], fp32. pairs: of neighbours, not of halves.
void rotate(const char *x, long x_head, long x_run, long x_token, long run, const float *cos, const float *sin,
            long heads, long tokens, long dim, long half, int pairs, int bf16, int threads, char *y, long y_head,
            long y_token) {
  long bytes = bf16 ? 2 : 4, turned = 2 * half * bytes, left = dim * bytes - turned;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads) if (threads > 1)
  for (long h = 0; h < heads; h++)
    for (long t = 0; t < tokens; t++) {
      const char *from = x + h * x_head + t / run * x_run + t % run * x_token;
      char *to = y + h * y_head + t * y_token;
      const float *at_cos = cos + t * half, *at_sin = sin + t * half;
      if (half == 64 && !pairs && bf16) row(from, at_cos, at_sin, 64, 0, 1, to);
      else if (half == 32 && !pairs && bf16) row(from, at_cos, at_sin, 32, 0, 1, to);
      else row(from, at_cos, at_sin, half, pairs, bf16, to);
      if (left) memcpy(to + turned, from + turned, left);
    }
}
