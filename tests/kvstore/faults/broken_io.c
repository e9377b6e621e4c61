/* Loaded before libc (LD_PRELOAD): calls on a store's files that fail as `break_io` says.
 *
 * Broken are the n-th call of a sort on one of the files and, if it lasts, all such behind it.
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
enum { TABLES, VALUES, FILES }; /* data.mdb, values-* */
enum { HALF = -1, TORN = -2 }; /* or errno: part of it is done, and then the process is killed */

static int broken = SORTS, where, first, fault, lasts;
static int calls[FILES][SORTS];

void break_io(int file, int sort, int n, int how, int whether_it_lasts)
{
    where = file, broken = sort, first = n, fault = how, lasts = whether_it_lasts;
    memset(calls, 0, sizeof calls);
}

int io_calls(int file, int sort) { return calls[file][sort]; }

static int file_of(int fd)
{
    char link[64], path[4096] = {0};
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    if (readlink(link, path, sizeof path - 1) < 0)
        return FILES;
    const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
    return !strcmp(name, "data.mdb") ? TABLES : !strncmp(name, "values-", 7) ? VALUES : FILES;
}

/* What is wrong with this call, of any thread: 0 for nothing. */
static int wrong(int sort, int fd)
{
    int file = broken == SORTS ? FILES : file_of(fd);
    if (file == FILES)
        return 0;
    int n = __atomic_add_fetch(&calls[file][sort], 1, __ATOMIC_SEQ_CST);
    return file == where && sort == broken && (n == first || (lasts && n > first)) ? fault : 0;
}

static ssize_t failed(int error)
{
    errno = error;
    return -1;
}

/* Half of all the parts that it writes; one byte at least, as of a disk. */
static ssize_t half_of(int fd, const struct iovec *parts, int count, off_t offset)
{
    size_t left = 0;
    ssize_t done = 0;
    for (int i = 0; i < count; i++)
        left += parts[i].iov_len;
    left -= left / 2;
    for (int i = 0; i < count && left; i++) {
        size_t length = parts[i].iov_len < left ? parts[i].iov_len : left;
        ssize_t n = REAL(pwrite)(fd, parts[i].iov_base, length, offset + done);
        if (n < 0)
            return n;
        done += n, left -= length;
    }
    return done;
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
    BREAK(WRITE, fd, REAL(write)(fd, bytes, length - length / 2))
    return REAL(write)(fd, bytes, length);
}

ssize_t writev(int fd, const struct iovec *parts, int count)
{
    BREAK(WRITE, fd, REAL(write)(fd, parts[0].iov_base, parts[0].iov_len / 2))
    return REAL(writev)(fd, parts, count);
}

/* Of the same call, the names with which programs are linked. */
#define WRITING(name)                                                                \
    ssize_t name(int fd, const struct iovec *parts, int count, off_t offset)         \
    {                                                                                \
        BREAK(WRITE, fd, half_of(fd, parts, count, offset))                          \
        return REAL(name)(fd, parts, count, offset);                                 \
    }
#define WRITING_2(name)                                                              \
    ssize_t name(int fd, const struct iovec *parts, int count, off_t offset, int how_to) \
    {                                                                                \
        BREAK(WRITE, fd, half_of(fd, parts, count, offset))                          \
        return REAL(name)(fd, parts, count, offset, how_to);                         \
    }
WRITING(pwritev)
WRITING(pwritev64)
WRITING_2(pwritev2)
WRITING_2(pwritev64v2)

ssize_t pwrite64(int fd, const void *bytes, size_t length, off64_t offset)
{
    BREAK(WRITE, fd, REAL(pwrite)(fd, bytes, length / 2, offset))
    return REAL(pwrite)(fd, bytes, length, offset);
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

#define READING(name)                                                                \
    ssize_t name(int fd, const struct iovec *parts, int count, off_t offset)         \
    {                                                                                \
        BREAK(READ, fd, REAL(pread)(fd, parts[0].iov_base, parts[0].iov_len / 2, offset)) \
        return REAL(name)(fd, parts, count, offset);                                 \
    }
#define READING_2(name)                                                              \
    ssize_t name(int fd, const struct iovec *parts, int count, off_t offset, int how_to) \
    {                                                                                \
        BREAK(READ, fd, REAL(pread)(fd, parts[0].iov_base, parts[0].iov_len / 2, offset)) \
        return REAL(name)(fd, parts, count, offset, how_to);                         \
    }
READING(preadv)
READING(preadv64)
READING_2(preadv2)
READING_2(preadv64v2)
