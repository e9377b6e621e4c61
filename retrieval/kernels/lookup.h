// Sums of table entries by 4-bit codes: for AVX-512 with VBMI and VNNI, for AVX2, and for any processor.
#pragma once

#include "simd.h"

#define BLOCK 32   // tokens packed together: byte i of a sub-space holds token i and, above, token i + 16
#define MOST 8     // queries computed together: their sums stay in registers

// word[g][i] = the sum over m of table[g][m][code of token i], and that of token i + 16 in its upper half.
#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__)
// Four sub-spaces of a token side by side: 6 bits choose among their 64 entries, and one instruction adds all four.
INLINE void add4(const uint8_t *code, const uint8_t *table, long stride, __mmask64 known, int G, __m512i sum[MOST][2]) {
  const __m512i count = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i which = _mm512_set1_epi32(0x30201000), nibble = _mm512_set1_epi8(15), one = _mm512_set1_epi8(1);
  __m512i turn = _mm512_add_epi32(which, _mm512_mullo_epi32(count, _mm512_set1_epi32(0x01010101)));
  __m512i c = _mm512_permutexvar_epi8(turn, _mm512_maskz_loadu_epi8(known, code));
  __m512i low = _mm512_ternarylogic_epi32(c, nibble, which, 0xEA);  // (c & nibble) | which
  __m512i high = _mm512_ternarylogic_epi32(_mm512_srli_epi16(c, 4), nibble, which, 0xEA);
  for (int g = 0; g < G; g++) {
    __m512i t = _mm512_maskz_loadu_epi8(known, table + g * stride);
    sum[g][0] = _mm512_dpbusd_epi32(sum[g][0], _mm512_permutexvar_epi8(low, t), one);
    sum[g][1] = _mm512_dpbusd_epi32(sum[g][1], _mm512_permutexvar_epi8(high, t), one);
  }
}

INLINE void sums(const uint8_t *code, const uint8_t *table, int M, int G, uint32_t (*word)[16]) {
  __m512i sum[MOST][2];
  int m = 0;
  for (int g = 0; g < G; g++) sum[g][0] = sum[g][1] = _mm512_setzero_si512();
  for (; m + 4 <= M; m += 4) add4(code + m * 16, table + m * 16, M * 16L, ~(__mmask64)0, G, sum);
  if (m < M) add4(code + m * 16, table + m * 16, M * 16L, ((__mmask64)1 << 16 * (M - m)) - 1, G, sum);
  for (int g = 0; g < G; g++)
    _mm512_storeu_si512(word[g], _mm512_or_si512(sum[g][0], _mm512_slli_epi32(sum[g][1], 16)));
}
#elif defined(__AVX2__)
// Two sub-spaces to a register. Bytes are added in pairs as 16 bits, and their upper halves once more: what those
// come to is what the pairs have too much (Quicker ADC, André et al. 2019, does it with saturation).
INLINE void add2(__m256i code, const uint8_t *table, long stride, int both, int G, __m256i sum[MOST][4]) {
  const __m256i nibble = _mm256_set1_epi8(15);
  __m256i half[2] = {_mm256_and_si256(code, nibble), _mm256_and_si256(_mm256_srli_epi16(code, 4), nibble)};
  for (int g = 0; g < G; g++) {
    __m256i t = both ? _mm256_loadu_si256((const __m256i *)(table + g * stride))
                     : _mm256_zextsi128_si256(_mm_loadu_si128((const __m128i *)(table + g * stride)));
    for (int i = 0; i < 2; i++) {
      __m256i x = _mm256_shuffle_epi8(t, half[i]);
      sum[g][i] = _mm256_add_epi16(sum[g][i], x);
      sum[g][2 + i] = _mm256_add_epi16(sum[g][2 + i], _mm256_srli_epi16(x, 8));
    }
  }
}

INLINE void sums(const uint8_t *code, const uint8_t *table, int M, int G, uint32_t (*word)[16]) {
  __m256i sum[MOST][4];
  int m = 0;
  memset(sum, 0, sizeof *sum * G);
  for (; m + 2 <= M; m += 2) add2(_mm256_loadu_si256((const __m256i *)(code + m * 16)), table + m * 16, M * 16L, 1, G, sum);
  if (m < M) add2(_mm256_zextsi128_si256(_mm_loadu_si128((const __m128i *)(code + m * 16))), table + m * 16, M * 16L, 0, G, sum);
  for (int g = 0; g < G; g++) {
    __m128i x[4], *out = (__m128i *)word[g];  // x: even tokens, those + 16, odd tokens, those + 16
    for (int i = 0; i < 2; i++) sum[g][i] = _mm256_sub_epi16(sum[g][i], _mm256_slli_epi16(sum[g][2 + i], 8));
    for (int i = 0; i < 4; i++) x[i] = _mm_add_epi16(_mm256_castsi256_si128(sum[g][i]), _mm256_extracti128_si256(sum[g][i], 1));
    __m128i even = _mm_unpacklo_epi16(x[0], x[1]), odd = _mm_unpacklo_epi16(x[2], x[3]);
    _mm_storeu_si128(out, _mm_unpacklo_epi32(even, odd)), _mm_storeu_si128(out + 1, _mm_unpackhi_epi32(even, odd));
    even = _mm_unpackhi_epi16(x[0], x[1]), odd = _mm_unpackhi_epi16(x[2], x[3]);
    _mm_storeu_si128(out + 2, _mm_unpacklo_epi32(even, odd)), _mm_storeu_si128(out + 3, _mm_unpackhi_epi32(even, odd));
  }
}
#else
INLINE void sums(const uint8_t *code, const uint8_t *table, int M, int G, uint32_t (*word)[16]) {
  for (int g = 0; g < G; g++) {
    memset(word[g], 0, sizeof word[g]);
    for (int m = 0; m < M; m++) {
      const uint8_t *c = code + m * 16, *t = table + ((long)g * M + m) * 16;
      for (int i = 0; i < 16; i++) word[g][i] += t[c[i] & 15] | (uint32_t)t[c[i] >> 4] << 16;
    }
  }
}
#endif
