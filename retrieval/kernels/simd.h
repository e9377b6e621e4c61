// Registers of LANES floats, and what the kernels here do with them. GNU C: gcc 12 or newer, or clang.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef uint32_t words __attribute__((vector_size(LANES * 4)));
typedef int32_t ints __attribute__((vector_size(LANES * 4)));
typedef uint16_t halves __attribute__((vector_size(LANES * 2)));

#define MERGED(mask, a, b) (((a) & (mask)) | ((b) & ~(mask)))
INLINE words bits(vec x) { words w; memcpy(&w, &x, sizeof w); return w; }
INLINE vec floats(words w) { vec x; memcpy(&x, &w, sizeof x); return x; }
INLINE vec load(const float *at) { vec x; memcpy(&x, at, sizeof x); return x; }
INLINE vec pick(ints mask, vec a, vec b) { return floats(MERGED((words)mask, bits(a), bits(b))); }

// The larger of both, and a bit for every lane in which a > b; in gcc's hands a comparison takes four instructions.
#if defined(__AVX512F__)
INLINE vec larger(vec a, vec b) { return (vec)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE unsigned above(vec a, vec b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ); }
#elif defined(__AVX2__)
INLINE vec larger(vec a, vec b) { return (vec)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE unsigned above(vec a, vec b) { return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ)); }
#else
INLINE vec larger(vec a, vec b) { return pick(a > b, a, b); }
INLINE unsigned above(vec a, vec b) {
  unsigned set = 0;
  for (int i = 0; i < LANES; i++) set |= (unsigned)(a[i] > b[i]) << i;
  return set;
}
#endif

// 2^x for x <= 0, within 3 ulp, and 2^-126 below that.
INLINE vec power(vec x) {
  x = larger(x, (vec){} - 126.0f);
  vec t = x + 12582912.0f;  // rounds to the nearest integer in the low bits
  vec r = x - (t - 12582912.0f);
  vec p = r * 1.33335581e-3f + 9.61812911e-3f;
  p = p * r + 5.55041087e-2f;
  p = p * r + 2.40226507e-1f;
  p = p * r + 6.93147181e-1f;
  p = p * r + 1.0f;
  return floats(bits(p) + (bits(t) << 23));
}

// log2(x) for x >= 1: exponent, and log2 m = 2 atanh((m - 1) / (m + 1)) / ln 2 of the mantissa.
INLINE vec logarithm(vec x) {
  words w = bits(x) - 0x3f3504f3u;  // mantissas from sqrt(1/2) to sqrt(2)
  vec e = __builtin_convertvector((ints)w >> 23, vec);
  vec m = floats((w & 0x7fffff) + 0x3f3504f3u);
  vec s = (m - 1.0f) / (m + 1.0f), z = s * s;
  return e + s * (((z * 0.41219858f + 0.57707802f) * z + 0.96179669f) * z + 2.88539008f);
}
