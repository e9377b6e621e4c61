// Scores of packed 4-bit codes, and the best tokens by them, each byte of code read once for all queries of
// its KV head. The torch definitions, and how this is called, stand in scan.py. GNU C: gcc 12 or newer, or clang.

#ifdef _OPENMP
#include <omp.h>
#else
#define omp_get_thread_num() 0
#endif

#include "choose.h"
#include "lookup.h"

#define LEAST 3.4e38f

// What every query of every KV head is scored by.
typedef struct {
  const uint8_t *packed, *table;  // [Hk] `head_bytes` apart [blocks M 16]; [Hk G M 16]
  const uint16_t *scales;         // fp16, [Hk] `head_tokens` apart [length], or NULL
  const float *step, *bias;       // [Hk G]
  long length, head_bytes, head_tokens;
  int Hk, G, M;
} search_in;

// The scales of a block's tokens; 0 behind the last. fp16 that is finite and not negative: shifted into the place
// of fp32's bits its exponent lacks 112.
INLINE void block_scales(const search_in *in, int h, long b, vec out[BLOCK / LANES]) {
  uint16_t tail[BLOCK] = {0};
  const uint16_t *at = in->scales + h * in->head_tokens + b * BLOCK;
  if ((b + 1) * BLOCK > in->length && in->scales) at = memcpy(tail, at, sizeof *at * (in->length - b * BLOCK));
  for (int v = 0; v < BLOCK / LANES; v++) {
    out[v] = (vec){} + 1.0f;
    if (!in->scales) continue;
    halves x;
    memcpy(&x, at + v * LANES, sizeof x);
    out[v] = floats(__builtin_convertvector(x, words) << 13) * 0x1p112f;
  }
}

// The scores of the v-th LANES tokens of a block.
INLINE vec score(const uint32_t word[16], int v, float step, float bias, vec scale) {
  words w;
  memcpy(&w, word + v * LANES % 16, sizeof w);
  w = v * LANES < 16 ? w & 0xffff : w >> 16;
  return (__builtin_convertvector((ints)w, vec) * step + bias) * scale;
}

// x, but `other` for tokens behind the last.
INLINE vec cut(vec x, long left, float other) {
  ints at;
  for (int i = 0; i < LANES; i++) at[i] = i;
  return pick(at < (int)left, x, (vec){} + other);
}

// Scores of blocks [first, last) for queries [i, i + G) of all: out[Hq][length].
INLINE void write_scores(const search_in *in, int h, int i, int G, long first, long last, float *out) {
  uint32_t word[MOST][16];
  vec scale[BLOCK / LANES];
  for (long b = first; b < last; b++) {
    sums(in->packed + h * in->head_bytes + b * in->M * 16, in->table + (long)i * in->M * 16, in->M, G, word);
    block_scales(in, h, b, scale);
    for (int g = 0; g < G; g++) {
      float all[BLOCK];
      for (int v = 0; v < BLOCK / LANES; v++) {
        vec x = score(word[g], v, in->step[i + g], in->bias[i + g], scale[v]);
        memcpy(all + v * LANES, &x, sizeof x);
      }
      long n = in->length - b * BLOCK < BLOCK ? in->length - b * BLOCK : BLOCK;
      memcpy(out + (i + g) * in->length + b * BLOCK, all, n * sizeof(float));
    }
  }
}

// Sums of blocks [first, last) into word[block][in->G][16], and the log2 of the sum of 2^score into lse[G]: every
// lane keeps its own maximum (online softmax, Milakov 2018). Steps and biases hold scale * log2(e) already.
INLINE void weigh(const search_in *in, int h, int i, int G, long first, long last, uint32_t (*word)[16], float *lse) {
  vec top[MOST], total[MOST], scale[BLOCK / LANES];
  for (int g = 0; g < G; g++) top[g] = (vec){} - LEAST, total[g] = (vec){};
  for (long b = first; b < last; b++) {
    uint32_t (*w)[16] = word + b * in->G;
    sums(in->packed + h * in->head_bytes + b * in->M * 16, in->table + (long)i * in->M * 16, in->M, G, w);
    block_scales(in, h, b, scale);
    for (int v = 0; v < BLOCK / LANES; v++) {
      long left = in->length - b * BLOCK - v * LANES;
      for (int g = 0; g < G; g++) {
        vec z = score(w[g], v, in->step[i + g], in->bias[i + g], scale[v]);
        if (left < LANES) z = cut(z, left, -LEAST);
        if (above(z, top[g])) {
          vec best = larger(z, top[g]);
          total[g] *= power(top[g] - best);
          top[g] = best;
        }
        total[g] += power(z - top[g]);
      }
    }
  }
  for (int g = 0; g < G; g++) {
    float best = -LEAST, all = 0;
    for (int l = 0; l < LANES; l++) best = top[g][l] > best ? top[g][l] : best;
    for (int l = 0; l < LANES; l++) all += total[g][l] * exp2f(top[g][l] - best);
    lse[g] = best + log2f(all);
  }
}

// What the queries of a KV head think of blocks [first, last): the largest of their log2-probabilities, or the
// log2 of their sum; -infinity throughout where a query has no distribution (it is not finite).
static void agree(const search_in *in, int h, long first, long last, int add, uint32_t (*word)[16], const float *lse,
                  float *value) {
  const float *step = in->step + h * in->G, *bias = in->bias + h * in->G;
  int proper = 1;
  for (int g = 0; g < in->G; g++) proper &= isfinite(lse[g]);
  for (long b = first; b < last; b++) {
    vec scale[BLOCK / LANES];
    block_scales(in, h, b, scale);
    for (int v = 0; v < BLOCK / LANES; v++) {
      uint32_t (*w)[16] = word + b * in->G;
      vec best = (vec){} - INFINITY, all = {};
      for (int g = 0; g < in->G && proper; g++) best = larger(score(w[g], v, step[g], bias[g], scale[v]) - lse[g], best);
      for (int g = 0; g < in->G && proper && add; g++)
        all += power(score(w[g], v, step[g], bias[g], scale[v]) - lse[g] - best);
      if (proper && add) best += logarithm(all);
      memcpy(value + b * BLOCK + v * LANES, &best, sizeof best);
    }
  }
}

// The common sizes of groups are compiled with their size known.
#define CASE(g) case g: DO(g); break;
#define CASES switch (G) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) }

static void scan_part(const search_in *in, int h, long first, long last, float *out) {
  for (int at = 0; at < in->G; at += MOST) {
    int G = in->G - at < MOST ? in->G - at : MOST, i = h * in->G + at;
#define DO(g) write_scores(in, h, i, g, first, last, out)
    CASES
#undef DO
  }
}

static void weigh_part(const search_in *in, int h, long first, long last, uint32_t (*word)[16], float *lse) {
  for (int at = 0; at < in->G; at += MOST) {
    int G = in->G - at < MOST ? in->G - at : MOST, i = h * in->G + at;
#define DO(g) weigh(in, h, i, g, first, last, word + at, lse + at)
    CASES
#undef DO
  }
  for (int g = 0; g < in->G; g++)
    if (!isfinite(in->step[h * in->G + g] + in->bias[h * in->G + g])) lse[g] = NAN;
}

// out[g] = log2 of the sum of 2^lse[p][g] over parts.
static void merge(const float *lse, int parts, int G, float *out) {
  for (int g = 0; g < G; g++) {
    float best = -LEAST, all = 0;
    for (int p = 0; p < parts; p++) best = lse[p * G + g] > best ? lse[p * G + g] : best;
    for (int p = 0; p < parts; p++) all += exp2f(lse[p * G + g] - best);
    out[g] = best + log2f(all);
  }
}

#define PACKED const uint8_t *packed, const uint16_t *scales, const uint8_t *table, const float *step, \
    const float *bias, long length, long head_bytes, long head_tokens, int Hk, int G, int M
#define IN {packed, table, scales, step, bias, length, head_bytes, head_tokens, Hk, G, M}

// out[Hk G][length]: scores of all tokens.
void scan(PACKED, int parts, int threads, float *out) {
  search_in in = IN;
  long blocks = (length + BLOCK - 1) / BLOCK;
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads)
  for (int h = 0; h < Hk; h++)
    for (int p = 0; p < parts; p++) scan_part(&in, h, blocks * p / parts, blocks * (p + 1) / parts, out);
}

// out[Hk][k]: the best tokens, k < length. With one part a thread does a head from its codes to its ids, whose sums
// stay in its cache; with several, all threads share every head. `work` holds blocks * (16 max(G, 4) + 32) words
// for every thread, or for every head; `lse` Hk * (parts + 1) * G floats.
void search(PACKED, long k, long sinks, long window, int add, int parts, int threads, uint32_t *work, float *lse,
            int64_t *out) {
  search_in in = IN;
  long blocks = (length + BLOCK - 1) / BLOCK, sums = blocks * 16 * (G > 4 ? G : 4), each = sums + blocks * BLOCK;
#define WORD(i) ((uint32_t (*)[16])(work + (i) * each))
#define VALUE(i) ((float *)(work + (i) * each + sums))
#define LSE(h) (lse + (long)(h) * (parts + 1) * G)
#pragma omp parallel num_threads(threads)
  {
    if (parts == 1) {
#pragma omp for schedule(dynamic)
      for (int h = 0; h < Hk; h++) {
        int i = omp_get_thread_num();
        weigh_part(&in, h, 0, blocks, WORD(i), LSE(h));
        agree(&in, h, 0, blocks, add, WORD(i), LSE(h), VALUE(i));
        choose(VALUE(i), length, k, sinks, window, WORD(i), out + h * k);
      }
    } else {
#pragma omp for collapse(2) schedule(static)
      for (int h = 0; h < Hk; h++)
        for (int p = 0; p < parts; p++)
          weigh_part(&in, h, blocks * p / parts, blocks * (p + 1) / parts, WORD(h), LSE(h) + (p + 1) * G);
#pragma omp for schedule(static)
      for (int h = 0; h < Hk; h++) merge(LSE(h) + G, parts, G, LSE(h));
#pragma omp for collapse(2) schedule(static)
      for (int h = 0; h < Hk; h++)
        for (int p = 0; p < parts; p++)
          agree(&in, h, blocks * p / parts, blocks * (p + 1) / parts, add, WORD(h), LSE(h), VALUE(h));
#pragma omp for schedule(dynamic)
      for (int h = 0; h < Hk; h++) choose(VALUE(h), length, k, sinks, window, WORD(h), out + h * k);
    }
  }
}
