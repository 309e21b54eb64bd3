/* Kill this process, or let the disk fail, at an operation that changes files below a folder.

   Preloaded (LD_PRELOAD), so that it sees what every library does: Python, SQLite, safetensors, tokenizers. Nothing
   happens before file_faults_begin is called. Flushes are counted too: what follows a flush relies on it. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sendfile.h>
#include <sys/uio.h>
#include <unistd.h>

static const char *root;
static long count, first;
static int fault; /* 0 counts only; -1 kills; else the error (errno) of the disk */

void file_faults_begin(const char *folder, long operation, int error) {
    count = 0, first = operation, fault = error, root = strdup(folder);
}

long file_faults_end(void) {
    root = NULL;
    return count;
}

/* What an operation needs: a full disk refuses only what needs room, a read-only disk refuses all. */
enum needs { ROOM, NO_ROOM };

static int below(const char *path) {
    size_t length = strlen(root);
    return !strncmp(path, root, length) && (path[length] == '/' || !path[length]);
}

static int below_at(int folder, const char *path) {
    char name[64], found[PATH_MAX];
    if (!root || !path) return 0;
    if (*path == '/') return below(path);
    if (folder == AT_FDCWD) strcpy(name, "/proc/self/cwd");
    else snprintf(name, sizeof name, "/proc/self/fd/%d", folder);
    ssize_t length = readlink(name, found, sizeof found - 1);
    if (length < 0) return 0;
    found[length] = 0;
    return below(found);
}

static int below_fd(int fd) { return below_at(fd, ""); }

/* Count an operation; return whether it fails. */
static int fails(enum needs needs) {
    if (fault == ENOSPC && needs == NO_ROOM) return 0;
    if (++count < first || !fault) return 0;
    if (fault == -1) kill(getpid(), SIGKILL);
    errno = fault;
    return 1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define REPLACE(result, name, parameters, inside, needs, arguments)            \
    result name parameters {                                                   \
        if ((inside) && fails(needs)) return -1;                               \
        return REAL(name) arguments;                                           \
    }
#define OF_FD(name, parameters, needs, arguments) REPLACE(int, name, parameters, below_fd(fd), needs, arguments)
#define OF_PATH(name, parameters, needs, arguments)                            \
    REPLACE(int, name, parameters, below_at(AT_FDCWD, path), needs, arguments)

static int opening_fails(int folder, const char *path, int flags) {
    if (!below_at(folder, path) || !(flags & (O_WRONLY | O_RDWR | O_CREAT))) return 0;
    int creates = (flags & O_CREAT) && faccessat(folder, path, F_OK, 0);
    return fails(creates ? ROOM : NO_ROOM);
}

#define OPEN(name)                                                             \
    int name(const char *path, int flags, ...) {                               \
        va_list rest;                                                          \
        va_start(rest, flags);                                                 \
        mode_t mode = va_arg(rest, mode_t);                                    \
        va_end(rest);                                                          \
        if (opening_fails(AT_FDCWD, path, flags)) return -1;                   \
        return REAL(name)(path, flags, mode);                                  \
    }
#define OPENAT(name)                                                           \
    int name(int fd, const char *path, int flags, ...) {                       \
        va_list rest;                                                          \
        va_start(rest, flags);                                                 \
        mode_t mode = va_arg(rest, mode_t);                                    \
        va_end(rest);                                                          \
        if (opening_fails(fd, path, flags)) return -1;                         \
        return REAL(name)(fd, path, flags, mode);                              \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

REPLACE(ssize_t, write, (int fd, const void *data, size_t size), below_fd(fd), ROOM, (fd, data, size))
REPLACE(ssize_t, pwrite, (int fd, const void *data, size_t size, off_t at), below_fd(fd), ROOM, (fd, data, size, at))
REPLACE(ssize_t, pwrite64, (int fd, const void *data, size_t size, off64_t at), below_fd(fd), ROOM, (fd, data, size, at))
REPLACE(ssize_t, writev, (int fd, const struct iovec *parts, int number), below_fd(fd), ROOM, (fd, parts, number))
REPLACE(ssize_t, sendfile, (int fd, int from, off_t *at, size_t size), below_fd(fd), ROOM, (fd, from, at, size))
REPLACE(ssize_t, sendfile64, (int fd, int from, off64_t *at, size_t size), below_fd(fd), ROOM, (fd, from, at, size))
REPLACE(ssize_t, copy_file_range, (int from, off64_t *from_at, int fd, off64_t *at, size_t size, unsigned flags),
        below_fd(fd), ROOM, (from, from_at, fd, at, size, flags))

OF_FD(ftruncate, (int fd, off_t size), ROOM, (fd, size))
OF_FD(ftruncate64, (int fd, off64_t size), ROOM, (fd, size))
OF_FD(fallocate, (int fd, int mode, off_t at, off_t size), ROOM, (fd, mode, at, size))
OF_FD(fsync, (int fd), ROOM, (fd))
OF_FD(fdatasync, (int fd), ROOM, (fd))
OF_FD(fchmod, (int fd, mode_t mode), NO_ROOM, (fd, mode))

OF_PATH(mkdir, (const char *path, mode_t mode), ROOM, (path, mode))
OF_PATH(unlink, (const char *path), NO_ROOM, (path))
OF_PATH(rmdir, (const char *path), NO_ROOM, (path))
OF_PATH(chmod, (const char *path, mode_t mode), NO_ROOM, (path, mode))
OF_PATH(rename, (const char *path, const char *to), ROOM, (path, to))
OF_PATH(link, (const char *path, const char *to), ROOM, (path, to))
REPLACE(int, unlinkat, (int fd, const char *path, int flags), below_at(fd, path), NO_ROOM, (fd, path, flags))
REPLACE(int, mkdirat, (int fd, const char *path, mode_t mode), below_at(fd, path), ROOM, (fd, path, mode))
REPLACE(int, fchmodat, (int fd, const char *path, mode_t mode, int flags), below_at(fd, path), NO_ROOM,
        (fd, path, mode, flags))
REPLACE(int, symlink, (const char *path, const char *to), below_at(AT_FDCWD, to), ROOM, (path, to))
REPLACE(int, renameat, (int fd, const char *path, int other, const char *to), below_at(fd, path), ROOM,
        (fd, path, other, to))
REPLACE(int, renameat2, (int fd, const char *path, int other, const char *to, unsigned flags), below_at(fd, path), ROOM,
        (fd, path, other, to, flags))

/* Whether one may write is asked of a read-only disk too. */
int access(const char *path, int mode) {
    if ((mode & W_OK) && fault == EROFS && count >= first && below_at(AT_FDCWD, path)) {
        errno = EROFS;
        return -1;
    }
    return REAL(access)(path, mode);
}
