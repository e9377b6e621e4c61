// Copies memory around the CPU's caches. How it is called stands in around.py.

#include <stdint.h>
#include <string.h>

enum { LINE = 64, AT_ONCE = 4 * LINE };
typedef long long line __attribute__((vector_size(LINE), aligned(LINE)));

#if defined(__clang__)
#define STORE(to, value) __builtin_nontemporal_store(value, to)
#define DONE() __sync_synchronize()
#elif defined(__AVX512F__)
#include <immintrin.h>
#define STORE(to, value) _mm512_stream_si512((__m512i *)(to), (__m512i)(value))
#define DONE() _mm_sfence()
#elif defined(__SSE2__)
#include <immintrin.h>
#define STORE(to, value) store((__m128i *)(to), (const __m128i *)&(value))
#define DONE() _mm_sfence()
static inline void store(__m128i *to, const __m128i *value) {
  for (int i = 0; i < LINE / 16; i++) _mm_stream_si128(to + i, value[i]);
}
#else
#define STORE(to, value) *(to) = (value)
#define DONE() (void)0
#endif

// Memory that does not overlap. Full lines are written past the caches, which need not be read for that.
void copy_around(char *to, const char *from, long nbytes) {
  long head = -(uintptr_t)to & (LINE - 1);
  if (head > nbytes) head = nbytes;
  memcpy(to, from, head);
  to += head, from += head, nbytes -= head;
  long i = 0;
  for (; i + AT_ONCE <= nbytes; i += AT_ONCE) {
    line part[4];
    memcpy(part, from + i, sizeof part);
    for (int p = 0; p < 4; p++) STORE((line *)(to + i) + p, part[p]);
  }
  DONE();
  memcpy(to + i, from + i, nbytes - i);
}
