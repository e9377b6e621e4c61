// What kernels share that attend to parts of a context: sums of values by weights exp(score - top), and their merging.

#pragma once
#include "simd.h"

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

// n scores, rounded up to LANES, to softcap tanh(score / softcap): tanh(x) = (1 - e^-2x) / (1 + e^-2x), of x >= 0.
INLINE void cap(float *score, long n, float softcap) {
  for (long j = 0; j < n; j += LANES) {
    vec x = load(score + j) / softcap, size;
    words bits, sign;
    memcpy(&bits, &x, sizeof bits);
    sign = bits & 0x80000000u, bits ^= sign;
    memcpy(&size, &bits, sizeof size);
    vec e = exponential(size * -2.0f), t = (1.0f - e) / (1.0f + e) * softcap;
    memcpy(&bits, &t, sizeof bits);
    bits |= sign;
    memcpy(score + j, &bits, sizeof bits);
  }
}

// n scores, a multiple of LANES, to weights exp(score - top). Returns their sum.
INLINE float weights(float *score, int n, float top) {
  float four[4];
  vec s = {};
  for (int j = 0; j < n; j += LANES) {
    vec e = exponential(load(score + j) - top);
    memcpy(score + j, &e, sizeof e);
    s += e;
  }
  sum4(s, s, s, s, four);
  return four[0];
}

// sums [Hk parts G D], with top and total [Hk parts G], as one: out [Hk G D] and lse [Hk G], the logarithm of the sum of
// exponentials. Parts in which nothing was attended to have a total of 0; where all do, out is 0 and lse -inf.
static void merge(const float *sums, const float *top, const float *total, int Hk, int G, int D, int parts, float *out,
                  float *lse) {
  for (int h = 0; h < Hk; h++)
    for (int g = 0; g < G; g++) {
      float best = -1e30f, all = 0, *o = out + ((long)h * G + g) * D;
      memset(o, 0, sizeof(float) * D);
      for (int p = 0; p < parts; p++) {
        float own = top[((long)h * parts + p) * G + g];
        best = own > best ? own : best;
      }
      for (int p = 0; p < parts; p++) {
        long i = ((long)h * parts + p) * G + g;
        float w = exponential((vec){} + (top[i] - best))[0];
        all += w * total[i];
        for (int d = 0; d < D; d++) o[d] += w * sums[i * D + d];
      }
      for (int d = 0; d < D && all; d++) o[d] /= all;
      lse[(long)h * G + g] = best + __builtin_logf(all);
    }
}
