/* Loaded before libc (LD_PRELOAD): appends what reaches a store's files to the file $WRITE_LOG.
 *
 * Record: one byte, the file's name (data.mdb or values-*) in 23, then offset and length as uint64,
 * then the bytes.
 *   W written   D written through an O_DSYNC descriptor   S synced   T truncated to `offset`
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

enum { NAME = 23, HEAD = 1 + NAME + 16 };

/* Whether an open file is one of a store's, and its name. */
static int is_data(int fd, char name[NAME])
{
    char link[64], path[4096] = {0};
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    const char *last = n > 0 ? strrchr(path, '/') : 0;
    if (!last || (strcmp(last, "/data.mdb") && strncmp(last, "/values-", 8)))
        return 0;
    memset(name, 0, NAME);
    memcpy(name, last + 1, strnlen(last + 1, NAME));
    return 1;
}

static void record(char op, const char name[NAME], uint64_t offset, const void *bytes, uint64_t length)
{
    static int log = -1;
    if (log < 0)
        log = open(getenv("WRITE_LOG"), O_WRONLY | O_APPEND | O_CREAT, 0600);
    char *buffer = malloc(HEAD + length);
    buffer[0] = op;
    memcpy(buffer + 1, name, NAME);
    memcpy(buffer + 1 + NAME, &offset, 8);
    memcpy(buffer + 1 + NAME + 8, &length, 8);
    memcpy(buffer + HEAD, bytes, length);
    if (REAL(write)(log, buffer, HEAD + length) != (ssize_t)(HEAD + length)) /* whole, of threads, too */
        abort();
    free(buffer);
}

static char kind(int fd) { return fcntl(fd, F_GETFL) & O_DSYNC ? 'D' : 'W'; }

static ssize_t wrote(int fd, const struct iovec *parts, int count, off_t offset, ssize_t done)
{
    char name[NAME];
    if (done <= 0 || !is_data(fd, name))
        return done;
    ssize_t left = done;
    for (int i = 0; i < count && left > 0; i++) {
        size_t length = parts[i].iov_len < (size_t)left ? parts[i].iov_len : (size_t)left;
        record(kind(fd), name, offset, parts[i].iov_base, length);
        offset += length;
        left -= length;
    }
    return done;
}

static int did(char op, int fd, off_t length, int result)
{
    char name[NAME];
    if (!result && is_data(fd, name))
        record(op, name, length, "", 0);
    return result;
}

#define ONE (&(struct iovec){(void *)bytes, length}), 1

#define PWRITE(name)                                                                     \
    ssize_t name(int fd, const void *bytes, size_t length, off_t offset)                 \
    {                                                                                    \
        return wrote(fd, ONE, offset, REAL(name)(fd, bytes, length, offset));            \
    }
PWRITE(pwrite)
PWRITE(pwrite64)

#define PWRITEV(name)                                                                    \
    ssize_t name(int fd, const struct iovec *parts, int count, off_t offset)             \
    {                                                                                    \
        return wrote(fd, parts, count, offset, REAL(name)(fd, parts, count, offset));    \
    }
PWRITEV(pwritev)
PWRITEV(pwritev64)

#define PWRITEV2(name)                                                                   \
    ssize_t name(int fd, const struct iovec *parts, int count, off_t offset, int flags)  \
    {                                                                                    \
        return wrote(fd, parts, count, offset, REAL(name)(fd, parts, count, offset, flags)); \
    }
PWRITEV2(pwritev2)
PWRITEV2(pwritev64v2)

ssize_t write(int fd, const void *bytes, size_t length)
{
    off_t offset = lseek(fd, 0, SEEK_CUR);
    return wrote(fd, ONE, offset, REAL(write)(fd, bytes, length));
}

ssize_t writev(int fd, const struct iovec *parts, int count)
{
    off_t offset = lseek(fd, 0, SEEK_CUR);
    return wrote(fd, parts, count, offset, REAL(writev)(fd, parts, count));
}

int fdatasync(int fd) { return did('S', fd, 0, REAL(fdatasync)(fd)); }

int fsync(int fd) { return did('S', fd, 0, REAL(fsync)(fd)); }

int ftruncate(int fd, off_t length) { return did('T', fd, length, REAL(ftruncate)(fd, length)); }

int ftruncate64(int fd, off_t length) { return did('T', fd, length, REAL(ftruncate64)(fd, length)); }
