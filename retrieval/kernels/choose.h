// The k largest of many values: a bound from maxima, what reaches it, and an exact choice among those.
#pragma once

#include "simd.h"

#define WIDE 128.0f  // log2-probabilities further below the largest are not told apart at first

// Integers in the order of floats.
INLINE uint32_t ordered(float x) {
  uint32_t w;
  memcpy(&w, &x, sizeof w);
  return w ^ (w >> 31 ? 0xffffffffu : 0x80000000u);
}

// The k-th largest of n keys, which are moved about, by histograms of 11, 11 and 10 bits. *k becomes how many of
// those that equal it belong to the k largest, *equal how many there are.
static uint32_t kth(uint32_t *key, long n, long *k, long *equal) {
  uint32_t found = 0;
  for (int low = 21;; low = low > 10 ? low - 11 : 0) {
    uint32_t width = low == 0 ? 1023 : 2047, count[2048] = {0}, b = width;
    for (long i = 0; i < n; i++) count[key[i] >> low & width]++;
    while (*k > count[b]) *k -= count[b--];
    found |= b << low, *equal = count[b];
    if (low == 0) return found;
    long kept = 0;
    for (long i = 0; i < n; i++) key[kept] = key[i], kept += (key[i] >> low & width) == b;
    n = kept;
  }
}

// A value that at least k of n reach, and few more than k: of sets of tokens, about four to each of k, the k-th
// largest maximum, by one histogram of where it lies below the largest.
static float reached(const float *value, long n, long k, float *top) {
  long run = n / LANES / (4 * k / LANES + 1), sets = 0;
  vec high = (vec){} - INFINITY, low = (vec){} + INFINITY;
  for (long i = 0; i + LANES <= n; sets += LANES) {
    vec best = load(value + i);
    i += LANES;
    for (long r = 1; r < run && i + LANES <= n; r++, i += LANES) best = larger(load(value + i), best);
    memcpy(top + sets, &best, sizeof best);
    high = larger(best, high), low = -larger(-best, -low);
  }
  float most = high[0], least = low[0];
  for (int l = 1; l < LANES; l++) most = high[l] > most ? high[l] : most, least = low[l] < least ? low[l] : least;
  if (sets < k || !isfinite(least) || most <= least) return -INFINITY;
  least = least > most - WIDE ? least : most - WIDE;
  uint32_t count[2048] = {0}, b = 2047;
  float fine = 2047 / (most - least);
  for (long i = 0; i < sets; i += LANES) {
    ints at = __builtin_convertvector(larger((load(top + i) - least) * fine, (vec){}), ints);
    for (int l = 0; l < LANES; l++) count[at[l]]++;
  }
  while (k > count[b]) k -= count[b--];
  vec last = (vec){} + INFINITY;
  for (long i = 0; i < sets; i += LANES) {
    vec x = load(top + i), at = larger((x - least) * fine, (vec){});
    last = -larger(-pick(at >= (float)b, x, last), -last);
  }
  for (int l = 1; l < LANES; l++) last[0] = last[l] < last[0] ? last[l] : last[0];
  return last[0];
}

// Ids of those of n values that reach `least`.
static long collect(const float *value, long n, float least, int32_t *id) {
  long count = 0, i = 0;
  for (; i + LANES <= n; i += LANES) {
    unsigned below = above((vec){} + least, load(value + i));
#if defined(__AVX512F__)
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m512i found = _mm512_maskz_compress_epi32(~below, _mm512_add_epi32(lane, _mm512_set1_epi32(i)));
    _mm512_storeu_si512(id + count, found);
    count += LANES - __builtin_popcount(below);
#else
    for (unsigned set = ~below & ((1u << LANES) - 1); set; set &= set - 1) id[count++] = i + __builtin_ctz(set);
#endif
  }
  for (; i < n; i++)
    if (value[i] >= least) id[count++] = i;
  return count;
}

// The ids of the k largest of n values, ascending; of equal ones the later. `room` is for 2n numbers.
static void choose(float *value, long n, long k, long sinks, long window, void *room, int64_t *out) {
  int32_t *id = room;
  uint32_t *key = (uint32_t *)room + n;
  float least = reached(value, n, k, room);
  for (long i = 0; i < sinks && i < n; i++) value[i] = INFINITY;
  for (long i = n > window ? n - window : 0; i < n; i++) value[i] = INFINITY;
  long count = collect(value, n, least, id), equal;
  for (long i = 0; i < count; i++) key[i] = ordered(value[id[i]]);
  uint32_t last = kth(key, count, &k, &equal);
  long skipped = equal - k;
  for (long i = 0; i < count; i++) {
    uint32_t x = ordered(value[id[i]]);
    if (x > last || (x == last && skipped-- <= 0)) *out++ = id[i];
  }
}
