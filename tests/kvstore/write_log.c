/* Loaded before libc (LD_PRELOAD): appends what reaches data.mdb to the file $WRITE_LOG.
 *
 * Record: one byte, then offset and length as uint64, then the bytes.
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

static int is_data(int fd)
{
    char link[64], path[4096] = {0};
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    return n > 8 && !strcmp(path + n - 8, "data.mdb");
}

static void record(char op, uint64_t offset, const void *bytes, uint64_t length)
{
    static int log = -1;
    if (log < 0)
        log = open(getenv("WRITE_LOG"), O_WRONLY | O_APPEND | O_CREAT, 0600);
    char *buffer = malloc(17 + length);
    buffer[0] = op;
    memcpy(buffer + 1, &offset, 8);
    memcpy(buffer + 9, &length, 8);
    memcpy(buffer + 17, bytes, length);
    if (REAL(write)(log, buffer, 17 + length) != (ssize_t)(17 + length))
        abort();
    free(buffer);
}

static char kind(int fd) { return fcntl(fd, F_GETFL) & O_DSYNC ? 'D' : 'W'; }

ssize_t pwrite(int fd, const void *bytes, size_t length, off_t offset)
{
    ssize_t done = REAL(pwrite)(fd, bytes, length, offset);
    if (done > 0 && is_data(fd))
        record(kind(fd), offset, bytes, done);
    return done;
}

ssize_t write(int fd, const void *bytes, size_t length)
{
    int data = is_data(fd);
    off_t offset = data ? lseek(fd, 0, SEEK_CUR) : 0;
    ssize_t done = REAL(write)(fd, bytes, length);
    if (done > 0 && data)
        record(kind(fd), offset, bytes, done);
    return done;
}

ssize_t writev(int fd, const struct iovec *parts, int count)
{
    int data = is_data(fd);
    off_t offset = data ? lseek(fd, 0, SEEK_CUR) : 0;
    ssize_t left = REAL(writev)(fd, parts, count), done = left;
    for (int i = 0; data && i < count && left > 0; i++) {
        size_t length = parts[i].iov_len < (size_t)left ? parts[i].iov_len : (size_t)left;
        record(kind(fd), offset, parts[i].iov_base, length);
        offset += length;
        left -= length;
    }
    return done;
}

int fdatasync(int fd)
{
    int result = REAL(fdatasync)(fd);
    if (!result && is_data(fd))
        record('S', 0, "", 0);
    return result;
}

int fsync(int fd)
{
    int result = REAL(fsync)(fd);
    if (!result && is_data(fd))
        record('S', 0, "", 0);
    return result;
}

int ftruncate(int fd, off_t length)
{
    int result = REAL(ftruncate)(fd, length);
    if (!result && is_data(fd))
        record('T', length, "", 0);
    return result;
}
