// A read of a map behind the end of its file, or of a sector that cannot be read, ends a process
// (SIGBUS). In guarded maps of LMDB files it finds a blank page there instead, and is counted.
//
// Blank is what LMDB takes for a leaf without nodes, and in the place of its first two pages for two
// empty databases: of zeros, its assertions end the process as well (lmdb 0.9, 64 bit).
// What a signal handler looks at cannot belong to an object: hence the static table.

#define _GNU_SOURCE
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

enum { MAPS = 256, METAS = 2, LEAF = 0x02 };

typedef struct {
    uint64_t number;
    uint16_t pad, flags, lower, upper;
} header;

typedef struct {
    header start;
    uint32_t magic, version;
    uint64_t address, size;
    struct {
        uint64_t counts[5], root;
    } tables[2];
} meta;

typedef struct {
    _Atomic uintptr_t start, end;  // of a map; 0 if the place is free
    _Atomic uint64_t faults;       // blank pages put there, ever
} guarded;

static guarded maps[MAPS];
static struct sigaction before;
static uintptr_t page;

static int blank(uintptr_t at, uint64_t number) {
    int kind = MAP_PRIVATE | MAP_ANONYMOUS, fixed = MREMAP_MAYMOVE | MREMAP_FIXED;
    void *made = mmap(0, page, PROT_READ | PROT_WRITE, kind, -1, 0);
    if (made == MAP_FAILED) return 0;
    meta *empty = made;
    empty->start = (header){number, 0, LEAF, sizeof(header), (uint16_t)page};
    if (number < METAS) empty->tables[0].root = empty->tables[1].root = UINT64_MAX;
    mprotect(made, page, PROT_READ);
    return mremap(made, page, page, fixed, (void *)at) != MAP_FAILED;  // whole at once
}

static int covered(uintptr_t at) {
    for (int i = 0; i < MAPS; i++) {
        uintptr_t start = maps[i].start, first = at & ~(page - 1);
        if (at < start || at >= maps[i].end) continue;
        maps[i].faults++;  // before anybody can see the page
        return blank(first, (first - start) / page);
    }
    return 0;
}

static void on_bus_error(int number, siginfo_t *info, void *context) {
    if (info->si_code > 0 && covered((uintptr_t)info->si_addr)) return;
    if (before.sa_flags & SA_SIGINFO) {
        before.sa_sigaction(number, info, context);
    } else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) {
        before.sa_handler(number);
    } else {
        sigaction(number, &before, 0);
        raise(number);  // delivered on return
    }
}

// Answers for SIGBUS from now on; passes on what is none of its business. 0, or -1.
int guard_install(void) {
    struct sigaction now, ours = {.sa_sigaction = on_bus_error, .sa_flags = SA_SIGINFO | SA_NODEFER};
    page = sysconf(_SC_PAGESIZE);
    sigemptyset(&ours.sa_mask);
    if (sigaction(SIGBUS, 0, &now)) return -1;
    if ((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == on_bus_error) return 0;
    before = now;
    return sigaction(SIGBUS, &ours, 0);
}

// Guards a map. Its place in the table, -1 if that is full.
int guard_add(uintptr_t start, uintptr_t end) {
    for (int i = 0; i < MAPS; i++) {
        uintptr_t free = 0;
        if (!atomic_compare_exchange_strong(&maps[i].start, &free, start)) continue;
        maps[i].faults = 0;
        maps[i].end = end;
        return i;
    }
    return -1;
}

void guard_drop(int place) {
    maps[place].end = 0;
    maps[place].start = 0;
}

// Where the count of a guarded map is.
uintptr_t guard_count(int place) { return (uintptr_t)&maps[place].faults; }

// Maps the file there again, in place of blank pages. 0, or -1.
int guard_renew(int place, int file) {
    uintptr_t start = maps[place].start, size = maps[place].end - start;
    void *at = mmap((void *)start, size, PROT_READ, MAP_SHARED | MAP_FIXED, file, 0);
    return at == MAP_FAILED ? -1 : 0;
}
