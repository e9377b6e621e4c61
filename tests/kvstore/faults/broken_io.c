/* Loaded before libc (LD_PRELOAD): calls on data.mdb that fail as `break_io` says.
 *
 * Broken are the n-th call of a sort and, if it lasts, all of that sort behind it.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

enum { WRITE, SYNC, READ, SORTS };
enum { HALF = -1, TORN = -2 }; /* or errno: part of it is done, and then the process is killed */

static int broken = SORTS, first, fault, lasts;
static int calls[SORTS];

void break_io(int sort, int n, int how, int whether_it_lasts)
{
    broken = sort, first = n, fault = how, lasts = whether_it_lasts;
    memset(calls, 0, sizeof calls);
}

int io_calls(int sort) { return calls[sort]; }

static int is_data(int fd)
{
    char link[64], path[4096] = {0};
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    return n > 8 && !strcmp(path + n - 8, "data.mdb");
}

/* What is wrong with this call: 0 for nothing. */
static int wrong(int sort, int fd)
{
    if (broken == SORTS || !is_data(fd))
        return 0;
    int n = ++calls[sort];
    return sort == broken && (n == first || (lasts && n > first)) ? fault : 0;
}

static ssize_t failed(int error)
{
    errno = error;
    return -1;
}

#define BREAK(sort, fd, half)                        \
    int how = wrong(sort, fd);                       \
    if (how > 0)                                     \
        return failed(how);                          \
    if (how == HALF)                                 \
        return half;                                 \
    if (how == TORN) {                               \
        if (half < 0)                                \
            perror("half");                          \
        kill(getpid(), SIGKILL);                     \
    }

ssize_t pwrite(int fd, const void *bytes, size_t length, off_t offset)
{
    BREAK(WRITE, fd, REAL(pwrite)(fd, bytes, length / 2, offset))
    return REAL(pwrite)(fd, bytes, length, offset);
}

ssize_t write(int fd, const void *bytes, size_t length)
{
    BREAK(WRITE, fd, REAL(write)(fd, bytes, length / 2))
    return REAL(write)(fd, bytes, length);
}

ssize_t writev(int fd, const struct iovec *parts, int count)
{
    BREAK(WRITE, fd, REAL(write)(fd, parts[0].iov_base, parts[0].iov_len / 2))
    return REAL(writev)(fd, parts, count);
}

int fdatasync(int fd)
{
    BREAK(SYNC, fd, 0)
    return REAL(fdatasync)(fd);
}

int fsync(int fd)
{
    BREAK(SYNC, fd, 0)
    return REAL(fsync)(fd);
}

ssize_t pread(int fd, void *bytes, size_t length, off_t offset)
{
    BREAK(READ, fd, REAL(pread)(fd, bytes, length / 2, offset))
    return REAL(pread)(fd, bytes, length, offset);
}

ssize_t pread64(int fd, void *bytes, size_t length, off64_t offset)
{
    BREAK(READ, fd, REAL(pread)(fd, bytes, length / 2, offset))
    return REAL(pread)(fd, bytes, length, offset);
}

ssize_t preadv(int fd, const struct iovec *parts, int count, off_t offset)
{
    BREAK(READ, fd, REAL(pread)(fd, parts[0].iov_base, parts[0].iov_len / 2, offset))
    return REAL(preadv)(fd, parts, count, offset);
}

ssize_t preadv64(int fd, const struct iovec *parts, int count, off64_t offset)
{
    BREAK(READ, fd, REAL(pread)(fd, parts[0].iov_base, parts[0].iov_len / 2, offset))
    return REAL(preadv)(fd, parts, count, offset);
}
