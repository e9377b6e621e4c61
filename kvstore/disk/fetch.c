// Copies records out of a file and hashes what came, several in one call, without Python's lock.
//
// What is in the page cache is copied out of the map and hashed in one pass; the rest is read around
// the cache (O_DIRECT) and hashed while the next is read: to where it belongs if that begins a page,
// else to scratch memory, and from there in one pass, too.
//
// The hash is XXH3 with 128 bits, seed 0 and the default secret (Collet 2021, specification 0.2),
// for inputs above 240 bytes: eight lanes of 64 bits, which a compiler turns into vectors.

#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "this hash reads little-endian words"
#endif

enum { STRIPE = 64, SECRET = 192, STRIPES = (SECRET - STRIPE) / 8, BLOCK = STRIPES * STRIPE, SHORT = -1 };
enum { CACHESTAT = 451 };  // a system call since Linux 6.5, by this number everywhere

static const uint64_t P32_1 = 0x9E3779B1u, P32_2 = 0x85EBCA77u, P32_3 = 0xC2B2AE3Du;
static const uint64_t P64_1 = 0x9E3779B185EBCA87u, P64_2 = 0xC2B2AE3D27D4EB4Fu,
                      P64_3 = 0x165667B19E3779F9u, P64_4 = 0x85EBCA77C2B2AE63u,
                      P64_5 = 0x27D4EB2F165667C5u, AVALANCHE = 0x165667919E3779F9u;

static const uint8_t secret[SECRET] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e};

typedef uint64_t lanes __attribute__((vector_size(STRIPE)));

static inline lanes load(const uint8_t *from) {
    lanes value;
    memcpy(&value, from, sizeof value);
    return value;
}

static inline uint64_t word(const uint8_t *from) {
    uint64_t value;
    memcpy(&value, from, sizeof value);
    return value;
}

// The low half of each lane times its high half: compilers take a slow 64-bit product for it.
static inline lanes product(lanes mixed) {
    lanes high = mixed >> 32;
#if defined(__AVX512F__)
    return (lanes)_mm512_mul_epu32((__m512i)mixed, (__m512i)high);
#else
    return (mixed & 0xFFFFFFFFu) * high;
#endif
}

static inline lanes accumulate(lanes sums, lanes value, const uint8_t *key) {
    lanes mixed = value ^ load(key);
    lanes swapped = __builtin_shufflevector(value, value, 1, 0, 3, 2, 5, 4, 7, 6);
    return sums + swapped + product(mixed);
}

static uint64_t merged(lanes sums, const uint8_t *key, uint64_t hash) {
    for (int i = 0; i < 8; i += 2) {
        unsigned __int128 product = (unsigned __int128)(sums[i] ^ word(key + 8 * i)) *
                                    (sums[i + 1] ^ word(key + 8 * i + 8));
        hash += (uint64_t)product ^ (uint64_t)(product >> 64);
    }
    hash = (hash ^ (hash >> 37)) * AVALANCHE;
    return hash ^ (hash >> 32);
}

static void put(uint8_t *to, uint64_t value) {  // most significant byte first
    for (int i = 0; i < 8; i++) to[i] = (uint8_t)(value >> (56 - 8 * i));
}

// A stripe of data, which is also written to `to` unless that is 0.
static inline lanes stripe(const uint8_t *data, uint8_t *to, uint64_t at) {
    lanes value = load(data + at);
    if (to) memcpy(to + at, &value, sizeof value);
    return value;
}

// The canonical 16 bytes of the hash of `size` > 240 bytes, which are also copied to `to`, if any.
static inline __attribute__((always_inline)) void pass(const uint8_t *restrict data, uint64_t size,
                                                       uint8_t *digest, uint8_t *restrict to) {
    lanes sums = {P32_3, P64_1, P64_2, P64_3, P64_4, P32_2, P64_5, P32_1};
    uint64_t at = 0, last = size - 1;
    for (; last - at >= BLOCK; at += BLOCK) {
        for (int i = 0; i < STRIPES; i++)
            sums = accumulate(sums, stripe(data, to, at + i * STRIPE), secret + 8 * i);
        sums = (sums ^ (sums >> 47) ^ load(secret + SECRET - STRIPE)) * P32_1;
    }
    for (int i = 0; last - at >= STRIPE; i++, at += STRIPE)
        sums = accumulate(sums, stripe(data, to, at), secret + 8 * i);
    sums = accumulate(sums, stripe(data, to, size - STRIPE), secret + SECRET - STRIPE - 7);
    put(digest, merged(sums, secret + SECRET - STRIPE - 11, ~(size * P64_2)));
    put(digest + 8, merged(sums, secret + 11, size * P64_1));
}

static void hashed(const uint8_t *data, uint64_t size, uint8_t *digest) { pass(data, size, digest, 0); }

enum { CACHED, DIRECT, MAPPED };  // ways to a record
enum { PAGE = 4096 };  // a header begins one, and its payload the next: see values.py

typedef struct {
    int64_t cached, direct;  // descriptors of the file: through the page cache, and around it or -1
    const uint8_t *map;      // of its first `mapped` bytes, or 0
    uint64_t mapped;         // may be more than the file has
    uint8_t *scratch;        // aligned to pages: twice `room`
    uint64_t room;           // whole pages, at least as many as the largest record takes
    uint64_t header;         // bytes
} source;

typedef struct {
    int64_t at;  // in the file: a page
    uint64_t size;
    uint8_t *header, *payload;
    uint8_t digest[16];  // of the payload; zeros if the file ends before it does
    int64_t error;       // errno of a read that failed, else 0
    int64_t way;         // CACHED: not around the cache; becomes the one that was taken
} job;

static uint64_t whole_pages(uint64_t size) { return (size + PAGE - 1) & -(uint64_t)PAGE; }

// 1 if all of a record is in the page cache, 0 if not, -1 if the system does not tell.
static int resident(const source *from, const job *work) {
    struct { uint64_t at, size; } range = {work->at, PAGE + work->size};
    struct { uint64_t cached, dirty, writeback, evicted, recently; } found = {0};
#if defined(__linux__)
    if (syscall(CACHESTAT, (int)from->cached, &range, &found, 0)) return -1;
#else
    return -1;
#endif
    return found.cached >= 1 + whole_pages(work->size) / PAGE;
}

// Fills the parts with what follows `at`, up to `end` at least. What is read in part is read on from
// there, if that is a multiple of `step`; else the file ends there.
static int64_t filled(int file, struct iovec *parts, int count, off_t at, off_t end, off_t step) {
    while (at < end) {
        ssize_t done = preadv(file, parts, count, at);
        if (done < 0 && errno == EINTR) continue;
        if (done <= 0) return done < 0 ? errno : SHORT;
        at += done;
        if (at < end && at % step) return SHORT;
        for (; count && (size_t)done >= parts->iov_len; parts++, count--) done -= parts->iov_len;
        if (count) {
            parts->iov_base = (uint8_t *)parts->iov_base + done;
            parts->iov_len -= done;
        }
    }
    return 0;
}

static off_t end_of(const job *work) { return work->at + PAGE + work->size; }

static int64_t cached(const source *from, const job *work) {
    uint8_t first[PAGE];
    struct iovec parts[] = {{first, PAGE}, {work->payload, work->size}};
    int64_t failed = filled(from->cached, parts, 2, work->at, end_of(work), 1);
    if (!failed) memcpy(work->header, first, from->header);
    return failed;
}

// How much of a payload a disk can write to where it belongs. Since Linux 6.3, older than the call
// that leads here, such a page stays with this process even if it forks meanwhile.
static uint64_t in_place(const job *work) {
    return (uintptr_t)work->payload % PAGE ? 0 : work->size & -(uint64_t)PAGE;
}

static int64_t direct(const source *from, const job *work, uint8_t *to) {
    uint64_t there = in_place(work), rest = whole_pages(work->size - there);
    struct iovec parts[3] = {{to, PAGE}};
    int count = 1;  // none is empty: its address would have to be aligned, too
    if (there) parts[count++] = (struct iovec){work->payload, there};
    if (rest) parts[count++] = (struct iovec){to + PAGE, rest};
    return filled(from->direct, parts, count, work->at, end_of(work), PAGE);
}

// Records on their way around the cache, in order: one is read while the one before it is hashed.
typedef struct {
    const source *from;
    job *jobs, *end;
    pthread_t thread;
    int threaded;        // or each is read when it is asked for
    sem_t empty, full;   // halves of the scratch
    int64_t failed[2];   // errno of what is in each
    uint64_t taken;
} stream;

static uint8_t *half(const stream *in, uint64_t number) { return in->from->scratch + number % 2 * in->from->room; }

static void await(sem_t *count) {
    while (sem_wait(count)) continue;  // EINTR
}

static void *read_ahead(void *given) {
    stream *in = given;
    uint64_t number = 0;
    for (job *work = in->jobs; work < in->end; work++) {
        if (work->way != DIRECT) continue;
        await(&in->empty);
        in->failed[number % 2] = direct(in->from, work, half(in, number));
        number++;
        sem_post(&in->full);
    }
    return 0;
}

static void begin(stream *in, uint64_t count) {
    sigset_t all, before;
    sem_init(&in->empty, 0, 2);
    sem_init(&in->full, 0, 0);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are for others
    in->threaded = count > 1 && !pthread_create(&in->thread, 0, read_ahead, in);
    pthread_sigmask(SIG_SETMASK, &before, 0);
}

static void end(stream *in) {
    if (in->threaded) pthread_join(in->thread, 0);
    sem_destroy(&in->empty);
    sem_destroy(&in->full);
}

// Copies and hashes a record that is in memory.
static void landed(const source *from, job *work, const uint8_t *record) {
    memcpy(work->header, record, from->header);
    pass(record + PAGE, work->size, work->digest, work->payload);
}

// The same of one that came around the cache.
static void arrived(const source *from, job *work, const uint8_t *scratch) {
    uint64_t there = in_place(work);
    if (!there) {
        landed(from, work, scratch);
        return;
    }
    memcpy(work->header, scratch, from->header);
    memcpy(work->payload + there, scratch + PAGE, work->size - there);
    hashed(work->payload, work->size, work->digest);
}

// The next record of the stream, which is `work`.
static int64_t streamed(stream *in, job *work) {
    uint64_t number = in->taken++;
    uint8_t *at = half(in, number);
    if (in->threaded) await(&in->full);
    int64_t failed = in->threaded ? in->failed[number % 2] : direct(in->from, work, at);
    if (!failed) arrived(in->from, work, at);
    if (in->threaded) sem_post(&in->empty);
    return failed;
}

static int64_t way(const source *from, const job *work) {
    int there = from->map || from->direct >= 0 ? resident(from, work) : -1;
    int in_map = from->map && (uint64_t)end_of(work) <= from->mapped;
    if (there == 1 && in_map) return MAPPED;
    return there == 0 && from->direct >= 0 && work->way != CACHED ? DIRECT : CACHED;
}

static int64_t fetched(stream *in, job *work) {
    if (work->size <= 240) return EINVAL;
    if (work->way == MAPPED) {
        landed(in->from, work, in->from->map + work->at);
        return 0;
    }
    if (work->way == DIRECT) {
        int64_t failed = streamed(in, work);  // EFAULT: of memory that only a processor can write to
        if (failed != EINVAL && failed != EOPNOTSUPP && failed != EFAULT) return failed;
        work->way = CACHED;
    }
    int64_t failed = cached(in->from, work);
    if (!failed) hashed(work->payload, work->size, work->digest);
    return failed;
}

// Does each job: header and payload from the file, and the payload's hash.
void copy_records(const source *from, job *jobs, uint64_t count) {
    stream in = {.from = from, .jobs = jobs, .end = jobs + count};
    uint64_t around = 0;
    for (job *work = jobs; work < in.end; work++) {
        work->way = work->size > 240 ? way(from, work) : CACHED;
        around += work->way == DIRECT;
    }
    begin(&in, around);
    for (job *work = jobs; work < in.end; work++) {
        int64_t failed = fetched(&in, work);
        work->error = failed == SHORT ? 0 : failed;
    }
    end(&in);
}
