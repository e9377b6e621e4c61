// Attention of tokens at ascending positions, each over its own past, by products of pairs in bf16 (VDPBF16PS).
// The definition, and how it is called, stand in attend_past.py.

#include "simd.h"

// Whether this processor has such products: 1, or 2 if it has those of whole matrices (AMX), too.
int has_pair_products(void) {
#if defined __AVX512BF16__ && defined __AMX_BF16__
  return 2;
#elif defined __AVX512BF16__
  return 1;
#else
  return 0;
#endif
}

#ifdef __AVX512BF16__
#include <immintrin.h>

#define BLOCK 64     // keys whose scores are held at once
#define TILE 6       // queries computed together: 4 registers of sums for each, beside 4 of what they are products with
#define NONE -1e30f  // the score of what is not seen: its weight is 0, or becomes 0 with the first that is
#define LOG2E 1.44269504f

// Queries of `group` heads that share keys and values; steps between rows, and heads, in numbers.
typedef struct {
  const uint16_t *q, *k, *v;
  uint16_t *out;                    // [group n D]
  const int64_t *at;                // positions of the queries
  long qhead, qrow, krow, vrow, n;  // n queries a head
  long window;                      // tokens that a query sees, itself among them; 0 for all
  int group, D;
  float scale, softcap;             // 0: scores are not capped
} Task;

// Pairs of a block's numbers, and of every query its sums [D], top and total [16].
typedef struct { uint32_t *k, *v; float *sums, *total, *top; } Work;

// k [D / 2][BLOCK]: pairs of neighbouring dimensions; v [BLOCK / 2][D]: of neighbouring tokens. From `stop` on 0.
static void pack(const Task *t, long start, long stop, const Work *w) {
  for (long j = 0; j < BLOCK; j++) {
    const uint16_t *k = t->k + (start + j) * t->krow;
    if (start + j < stop)
      for (int d = 0; d < t->D; d += 2) memcpy(w->k + d / 2 * BLOCK + j, k + d, 4);
    else
      for (int d = 0; d < t->D; d += 2) w->k[d / 2 * BLOCK + j] = 0;
  }
  for (long j = 0; j < BLOCK; j += 2) {
    const uint16_t *v = t->v + (start + j) * t->vrow;
    int one = start + j < stop, two = start + j + 1 < stop;
    for (int d = 0; d < t->D; d++)
      w->v[j / 2 * t->D + d] = (one ? v[d] : 0) | (uint32_t)(two ? v[t->vrow + d] : 0) << 16;
  }
}

// sums[m][16 c ...] += a[m][2 i, 2 i + 1] . b[i][16 c ...], over `count` pairs.
INLINE void product(const uint16_t *a, long arow, int rows, const uint32_t *b, long brow, int count, int cols,
                    __m512 sums[TILE][4]) {
  for (int i = 0; i < count; i++) {
    __m512bh x[4];
    for (int c = 0; c < cols; c++) x[c] = (__m512bh)_mm512_loadu_si512(b + i * brow + 16 * c);
    for (int m = 0; m < rows; m++) {
      uint32_t both;
      memcpy(&both, a + m * arow + 2 * i, 4);
      __m512bh y = (__m512bh)_mm512_set1_epi32(both);
      for (int c = 0; c < cols; c++) sums[m][c] = _mm512_dpbf16_ps(sums[m][c], y, x[c]);
    }
  }
}

// Which of a block's tokens a query at position p sees, as bits.
INLINE uint64_t seen(const Task *t, long start, long p) {
  long most = p - start + 1, least = t->window ? p - t->window + 1 - start : 0;
  uint64_t past = most <= 0 ? 0 : most >= BLOCK ? ~0ull : (1ull << most) - 1;
  return least <= 0 ? past : least >= BLOCK ? 0 : past & ~0ull << least;
}

// 2^x, within 2 ulp: a polynomial on [-1/2, 1/2]. NaN stays NaN.
INLINE __m512 power(__m512 x) {
  __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = _mm512_sub_ps(x, n);
  __m512 p = _mm512_set1_ps(1.326472690e-3f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.671512661e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.550733744e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.402224208e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.931469776e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

// Products times LOG2E: of the scale, or capped. tanh(x) = 1 - 2 / (1 + 2^(2 LOG2E x)).
INLINE __m512 scores(const Task *t, __m512 x) {
  if (!t->softcap) return _mm512_mul_ps(x, _mm512_set1_ps(t->scale * LOG2E));
  __m512 e = power(_mm512_mul_ps(x, _mm512_set1_ps(2 * LOG2E * t->scale / t->softcap))), one = _mm512_set1_ps(1.0f);
  __m512 rest = _mm512_div_ps(_mm512_set1_ps(2.0f), _mm512_add_ps(e, one));
  return _mm512_mul_ps(_mm512_sub_ps(one, rest), _mm512_set1_ps(t->softcap * LOG2E));
}

// Weights of one query's products, rounded to bf16, and by how much what was summed before them shrinks: the softmax
// is online (Milakov & Gimelshein 2018).
INLINE __m512 weigh(const Task *t, const __m512 *products, uint64_t mask, float *top, float *total, uint16_t *weight) {
  __m512 s[4], none = _mm512_set1_ps(NONE), before = _mm512_set1_ps(*top), high = before;
  for (int c = 0; c < 4; c++) {
    s[c] = _mm512_mask_mov_ps(none, (__mmask16)(mask >> 16 * c), scores(t, products[c]));
    high = _mm512_max_ps(high, s[c]);
  }
  *top = _mm512_reduce_max_ps(high), high = _mm512_set1_ps(*top);
  __m512 shrink = power(_mm512_sub_ps(before, high)), sum = _mm512_mul_ps(_mm512_loadu_ps(total), shrink);
  for (int c = 0; c < 4; c++) {
    __m512 e = power(_mm512_sub_ps(s[c], high));
    sum = _mm512_add_ps(sum, e);
    _mm256_storeu_si256((__m256i *)(weight + 16 * c), (__m256i)_mm512_cvtneps_pbh(e));
  }
  _mm512_storeu_ps(total, sum);
  return shrink;
}

// out[m] = out[m] * shrink[m] + weight[m] . values of the block, for the dimensions of `cols` registers from d on.
INLINE void gather(const Task *t, const Work *w, const uint16_t *weight, const __m512 *shrink, int rows, int d,
                   int cols, float *out) {
  __m512 sums[TILE][4];
  for (int m = 0; m < rows; m++)
    for (int c = 0; c < cols; c++)
      sums[m][c] = _mm512_mul_ps(_mm512_loadu_ps(out + m * t->D + d + 16 * c), shrink[m]);
  product(weight, BLOCK, rows, w->v + d, t->D, BLOCK / 2, cols, sums);
  for (int m = 0; m < rows; m++)
    for (int c = 0; c < cols; c++) _mm512_storeu_ps(out + m * t->D + d + 16 * c, sums[m][c]);
}

// `rows` queries of one head over one block; `row` is the first of them in `w`.
INLINE void tile(const Task *t, const Work *w, const uint16_t *q, const int64_t *at, long row, long start, int rows) {
  uint16_t weight[TILE][BLOCK];
  __m512 products[TILE][4] = {}, shrink[TILE];
  product(q, t->qrow, rows, w->k, BLOCK, t->D / 2, 4, products);
  for (int m = 0; m < rows; m++)
    shrink[m] = weigh(t, products[m], seen(t, start, at[m]), w->top + row + m, w->total + 16 * (row + m), weight[m]);
  int d = 0;
  for (; d + 64 <= t->D; d += 64) gather(t, w, weight[0], shrink, rows, d, 4, w->sums + row * t->D);
  for (; d < t->D; d += 16) gather(t, w, weight[0], shrink, rows, d, 1, w->sums + row * t->D);
}

// Sums stay in registers where the number of rows is known to the compiler.
static void tiles(const Task *t, const Work *w, const uint16_t *q, const int64_t *at, long row, long start, int rows) {
#define ROWS(r) if (rows == r) { tile(t, w, q, at, row, start, r); return; }
  ROWS(6) ROWS(5) ROWS(4) ROWS(3) ROWS(2) ROWS(1)
}

// Queries [first, stop) over all that any of them sees, block by block from a multiple of BLOCK on: what a query sees
// is summed in the same order, whichever others come with it.
static void attend(const Task *t, long first, long stop, const Work *w) {
  long each = stop - first, rows = each * t->group, last = t->at[stop - 1];
  long unseen = t->window ? t->at[first] - t->window + 1 : 0;
  for (long r = 0; r < rows; r++) w->top[r] = NONE;
  memset(w->total, 0, sizeof(float) * rows * 16), memset(w->sums, 0, sizeof(float) * rows * t->D);
  for (long start = unseen > 0 ? unseen / BLOCK * BLOCK : 0; start <= last; start += BLOCK) {
    pack(t, start, last + 1, w);
    for (long i = 0; i < each; i += TILE) {
      int m = each - i < TILE ? each - i : TILE;
      const int64_t *at = t->at + first + i;
      if (at[m - 1] < start || (t->window && at[0] - t->window + 1 >= start + BLOCK)) continue;
      for (int g = 0; g < t->group; g++)
        tiles(t, w, t->q + g * t->qhead + (first + i) * t->qrow, at, g * each + i, start, m);
    }
  }
  for (int g = 0; g < t->group; g++)
    for (long i = 0; i < each; i++) {
      float *sum = w->sums + (g * each + i) * t->D;
      float share = 1 / _mm512_reduce_add_ps(_mm512_loadu_ps(w->total + 16 * (g * each + i)));
      for (int d = 0; d < t->D; d++) sum[d] *= share;
      narrow(sum, t->D, 1, t->out + (g * t->n + first + i) * t->D);
    }
}

// q [Hk G n D], k and v [Hk S D], out [Hk G n D], all bf16, the last contiguous; at [n], ascending, below S. A task has
// `each` queries of a head; work holds `size` floats for each thread: BLOCK * D and each * G * (D + 17) of them are used.
void attend_past(const uint16_t *q, const uint16_t *k, const uint16_t *v, const int64_t *at, long qhead, long qrow,
                 long khead, long krow, long vhead, long vrow, long n, int Hk, int G, int D, float scale, float softcap,
                 long window, long each, int threads, long size, float *work, uint16_t *out) {
  long parts = (n + each - 1) / each, next = 0;
#pragma omp parallel num_threads(threads)
  {
    long own;
#pragma omp atomic capture
    own = next++;
    float *mine = work + own * size, *sums = mine + BLOCK * D, *total = sums + each * G * D;
    Work w = {(uint32_t *)mine, (uint32_t *)mine + BLOCK / 2 * D, sums, total, total + each * G * 16};
#pragma omp for collapse(2) schedule(dynamic)
    for (long part = parts - 1; part >= 0; part--)  // the longest pasts first
      for (int h = 0; h < Hk; h++) {
        long first = part * each, stop = first + each < n ? first + each : n;
        Task t = {q + h * G * qhead, k + h * khead, v + h * vhead, out + h * G * n * D, at, qhead, qrow, krow, vrow,
                  n, window, G, D, scale, softcap};
        attend(&t, first, stop, &w);
      }
  }
}
#endif
