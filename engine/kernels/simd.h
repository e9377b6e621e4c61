// Registers of LANES floats, and what the kernels here do with them. GNU C: gcc 12 or newer, or clang.

#pragma once
#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif

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

// The 2 LANES values at `i` as fp32, in the order of `split`: one shift and one mask, where widening them in
// their own order takes a shuffle each. fp32 stays in order.
INLINE void pair(const void *from, long i, int bf16, vec *a, vec *b) {
  if (!bf16) { *a = load((const float *)from + i), *b = load((const float *)from + i + LANES); return; }
  words w, even, odd;
  memcpy(&w, (const uint16_t *)from + i, sizeof w);
  even = w << 16, odd = w & 0xffff0000u;
  memcpy(a, &even, sizeof even), memcpy(b, &odd, sizeof odd);
}

// x in the order of `pair`: of every 2 LANES values those at even places, then those at odd ones. What is left
// over at the end, fewer than 2 LANES, stays as it is.
INLINE void split(const float *x, float *y, long n, int bf16) {
  long i = 0;
  if (bf16)
    for (; i + 2 * LANES <= n; i += 2 * LANES)
      for (int l = 0; l < LANES; l++) y[i + l] = x[i + 2 * l], y[i + LANES + l] = x[i + 2 * l + 1];
  memcpy(y + i, x + i, sizeof(float) * (n - i));
}

// The inverse of `split`, in place.
INLINE void joined(float *x, long n, int bf16) {
  if (bf16)
    for (long i = 0; i + 2 * LANES <= n; i += 2 * LANES) {
      float t[2 * LANES];
      memcpy(t, x + i, sizeof t);
      for (int l = 0; l < LANES; l++) x[i + 2 * l] = t[l], x[i + 2 * l + 1] = t[LANES + l];
    }
}

// n values, bf16 or fp32, as fp32.
INLINE void widen(const void *x, long n, int bf16, float *y) {
  if (!bf16) { memcpy(y, x, sizeof(float) * n); return; }
  for (long i = 0; i < n; i++) {
    uint32_t bits = (uint32_t)((const uint16_t *)x)[i] << 16;
    memcpy(y + i, &bits, sizeof bits);
  }
}

// The inverse of `widen`: bf16 is rounded to nearest, ties to even; NaN stays NaN.
INLINE void narrow(const float *x, long n, int bf16, void *y) {
  if (!bf16) { memcpy(y, x, sizeof(float) * n); return; }
  for (long i = 0; i < n; i++) {
    uint32_t bits;
    memcpy(&bits, x + i, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    ((uint16_t *)y)[i] = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;
  }
}

// The sums of four registers, at once.
INLINE void sum4(vec a, vec b, vec c, vec d, float *out) {
#if LANES == 16
#define LOW(x, y) __builtin_shufflevector(x, y, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29)
#define HIGH(x, y) __builtin_shufflevector(x, y, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31)
  vec t = LOW(a, b) + HIGH(a, b), u = LOW(c, d) + HIGH(c, d);
  vec w = __builtin_shufflevector(t, u, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
          __builtin_shufflevector(t, u, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  w += __builtin_shufflevector(w, w, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  w += __builtin_shufflevector(w, w, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
#else
#define LOW(x, y) __builtin_shufflevector(x, y, 0, 8, 1, 9, 4, 12, 5, 13)
#define HIGH(x, y) __builtin_shufflevector(x, y, 2, 10, 3, 11, 6, 14, 7, 15)
  vec t = LOW(a, b) + HIGH(a, b), u = LOW(c, d) + HIGH(c, d);
  vec w = __builtin_shufflevector(t, u, 0, 1, 8, 9, 4, 5, 12, 13) +
          __builtin_shufflevector(t, u, 2, 3, 10, 11, 6, 7, 14, 15);
  w += __builtin_shufflevector(w, w, 4, 5, 6, 7, 0, 1, 2, 3);
#endif
#undef LOW
#undef HIGH
  memcpy(out, &w, 4 * sizeof(float));
}
