// A disk that fails on demand: loaded before the C library (LD_PRELOAD), it counts every change that a program
// makes below one folder, and at the k-th one kills the program, cuts the power, sends a signal or returns an error.
//
// What reaches the kernel past the C library (the rename inside safetensors' own writer) is not counted.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

enum { OPEN = 1, WRITE = 2, SYNC = 4, RENAME = 8, REMOVE = 16, MKDIR = 32, CHMOD = 64, RESIZE = 128, LOCK = 256 };
enum { COUNT, KILL, CUT, CUT_BACK, SIGNAL, FAIL, FAIL_ON };

#define MOST 256
#define REAL(name) ({ static __typeof__(&name) real; if (!real) real = dlsym(RTLD_NEXT, #name); real; })

static char root[PATH_MAX];
static int kinds, action, fault, trace = -1;
static long at, seen;

// What a power cut loses: what was written to a file since its last fsync, renames since that of their folder.
static struct { dev_t device; ino_t inode; int copy; off_t safe; } dirty[MOST];
static struct { char from[PATH_MAX], to[PATH_MAX]; } moved[MOST];
static int dirty_count, moved_count;

void disk_arm(const char *folder, int which, long when, int what, int error, int log)
{
    strncpy(root, folder, sizeof root - 1);
    kinds = which, at = when, action = what, fault = error, trace = log, seen = 0;
    dirty_count = moved_count = 0;
}

long disk_disarm(void)
{
    kinds = 0;
    for (int i = 0; i < dirty_count; i++)
        REAL(close)(dirty[i].copy);
    dirty_count = 0;
    return seen;
}

static int in_root(const char *full)
{
    size_t length = strlen(root);
    return !strncmp(full, root, length) && (full[length] == '/' || !full[length]);
}

// The full name of what a descriptor points at, if that is below the folder and changes count.
static int open_below(int fd, char *full)
{
    char name[64];
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    ssize_t length = kinds ? readlink(fd == AT_FDCWD ? "/proc/self/cwd" : name, full, PATH_MAX - 1) : -1;
    full[length < 0 ? 0 : length] = 0;
    return length > 0 && in_root(full);
}

// The same for a path, which may be relative to the folder of a descriptor.
static int below(int folder, const char *path, char *full)
{
    if (!kinds || !path)
        return 0;
    if (path[0] == '/') {
        snprintf(full, PATH_MAX, "%s", path);
    } else {
        if (!open_below(folder, full))
            return 0;
        size_t length = strlen(full);
        snprintf(full + length, PATH_MAX - length, "/%s", path);
    }
    return in_root(full);
}

static void cut_power(void)
{
    for (int i = 0; i < dirty_count; i++)
        if (REAL(ftruncate)(dirty[i].copy, dirty[i].safe)) {}
    while (action == CUT_BACK && moved_count-- > 0)
        REAL(rename)(moved[moved_count].to, moved[moved_count].from);
}

// Whether the change is to fail now; does not return if the program is to die.
static int hit(int kind, const char *path)
{
    static const char *names[] = {"open", "write", "sync", "rename", "remove", "mkdir", "chmod", "resize", "lock"};
    if (!(kind & kinds))
        return 0;
    long now = ++seen;
    if (trace >= 0)
        dprintf(trace, "%s %s\n", names[__builtin_ctz(kind)], path);
    if (action == COUNT || now < at || (now > at && action != FAIL_ON))
        return 0;
    if (action == SIGNAL)
        return kill(getpid(), fault);
    if (action == FAIL || action == FAIL_ON) {
        errno = fault;
        return 1;
    }
    kinds = 0;
    if (action != KILL)
        cut_power();
    kill(getpid(), SIGKILL);
    for (;;)
        pause();
}

// Whether `hit` will act: then a write is torn, half of it done.
static int about_to_hit(int kind)
{
    return (kind & kinds) && action != COUNT && seen + 1 == at;
}

static void note_written(int fd)
{
    struct stat now;
    if (fstat(fd, &now))
        return;
    for (int i = 0; i < dirty_count; i++)
        if (dirty[i].inode == now.st_ino && dirty[i].device == now.st_dev)
            return;
    if (dirty_count < MOST) {
        dirty[dirty_count].device = now.st_dev, dirty[dirty_count].inode = now.st_ino;
        dirty[dirty_count].safe = now.st_size;
        dirty[dirty_count++].copy = fcntl(fd, F_DUPFD_CLOEXEC, 500);
    }
}

static void note_synced(int fd, const char *path)
{
    struct stat now;
    char parent[PATH_MAX];
    if (fstat(fd, &now))
        return;
    for (int i = dirty_count; i-- > 0;)
        if (dirty[i].inode == now.st_ino && dirty[i].device == now.st_dev) {
            REAL(close)(dirty[i].copy);
            dirty[i] = dirty[--dirty_count];
        }
    int kept = 0;
    for (int i = 0; i < moved_count; i++) {
        snprintf(parent, sizeof parent, "%s", moved[i].to);
        *strrchr(parent, '/') = 0;
        if (strcmp(parent, path))
            moved[kept++] = moved[i];
    }
    moved_count = kept;
}

// ------------------------------------------------------------------------------------------ the C library

#define CHANGES (O_CREAT | O_TRUNC | O_WRONLY | O_RDWR)
#define OPENS(NAME, FOLDER, PARAMETERS, ARGUMENTS)                                                              \
    int NAME PARAMETERS                                                                                         \
    {                                                                                                           \
        char full[PATH_MAX];                                                                                    \
        mode_t mode = 0;                                                                                        \
        if (flags & (O_CREAT | __O_TMPFILE)) {                                                                  \
            va_list rest;                                                                                       \
            va_start(rest, flags);                                                                              \
            mode = va_arg(rest, mode_t);                                                                        \
            va_end(rest);                                                                                       \
        }                                                                                                       \
        if ((flags & CHANGES) && below(FOLDER, path, full) && hit(OPEN, full))                                  \
            return -1;                                                                                          \
        return REAL(NAME) ARGUMENTS;                                                                            \
    }
OPENS(open, AT_FDCWD, (const char *path, int flags, ...), (path, flags, mode))
OPENS(open64, AT_FDCWD, (const char *path, int flags, ...), (path, flags, mode))
OPENS(openat, folder, (int folder, const char *path, int flags, ...), (folder, path, flags, mode))
OPENS(openat64, folder, (int folder, const char *path, int flags, ...), (folder, path, flags, mode))

ssize_t write(int fd, const void *data, size_t size)
{
    char full[PATH_MAX];
    if (!open_below(fd, full))
        return REAL(write)(fd, data, size);
    note_written(fd);
    if (about_to_hit(WRITE)) { // a full disk takes a part and refuses the next; a kill comes in the middle
        if (action == FAIL_ON && size > 1) {
            seen++;
            return REAL(write)(fd, data, size / 2);
        }
        if (action < SIGNAL && REAL(write)(fd, data, size / 2) < 0)
            return -1;
    }
    return hit(WRITE, full) ? -1 : REAL(write)(fd, data, size);
}

#define ON_FILE(NAME, KIND, PARAMETERS, ARGUMENTS, BEFORE)                                                      \
    int NAME PARAMETERS                                                                                         \
    {                                                                                                           \
        char full[PATH_MAX];                                                                                    \
        if (open_below(fd, full)) {                                                                             \
            BEFORE;                                                                                             \
            if (hit(KIND, full))                                                                                \
                return -1;                                                                                      \
            if (KIND == SYNC)                                                                                   \
                note_synced(fd, full);                                                                          \
        }                                                                                                       \
        return REAL(NAME) ARGUMENTS;                                                                            \
    }
ON_FILE(fsync, SYNC, (int fd), (fd), (void)0)
ON_FILE(fdatasync, SYNC, (int fd), (fd), (void)0)
ON_FILE(ftruncate, RESIZE, (int fd, off_t size), (fd, size), note_written(fd))
ON_FILE(ftruncate64, RESIZE, (int fd, off64_t size), (fd, size), note_written(fd))
ON_FILE(fchmod, CHMOD, (int fd, mode_t mode), (fd, mode), (void)0)
ON_FILE(flock, LOCK, (int fd, int how), (fd, how), (void)0)

#define ON_PATH(NAME, KIND, FOLDER, PARAMETERS, ARGUMENTS)                                                      \
    int NAME PARAMETERS                                                                                         \
    {                                                                                                           \
        char full[PATH_MAX];                                                                                    \
        if (below(FOLDER, path, full) && hit(KIND, full))                                                       \
            return -1;                                                                                          \
        return REAL(NAME) ARGUMENTS;                                                                            \
    }
ON_PATH(unlink, REMOVE, AT_FDCWD, (const char *path), (path))
ON_PATH(rmdir, REMOVE, AT_FDCWD, (const char *path), (path))
ON_PATH(unlinkat, REMOVE, folder, (int folder, const char *path, int flags), (folder, path, flags))
ON_PATH(mkdir, MKDIR, AT_FDCWD, (const char *path, mode_t mode), (path, mode))
ON_PATH(mkdirat, MKDIR, folder, (int folder, const char *path, mode_t mode), (folder, path, mode))
ON_PATH(chmod, CHMOD, AT_FDCWD, (const char *path, mode_t mode), (path, mode))
ON_PATH(fchmodat, CHMOD, folder, (int folder, const char *path, mode_t mode, int flags), (folder, path, mode, flags))

int rename(const char *from, const char *to)
{
    char full_from[PATH_MAX], full_to[PATH_MAX];
    if (!below(AT_FDCWD, to, full_to) || !below(AT_FDCWD, from, full_from))
        return REAL(rename)(from, to);
    if (hit(RENAME, full_to))
        return -1;
    int fresh = access(to, F_OK); // a file that is replaced cannot be brought back
    int result = REAL(rename)(from, to);
    if (fresh && !result && moved_count < MOST) {
        strcpy(moved[moved_count].from, full_from);
        strcpy(moved[moved_count++].to, full_to);
    }
    return result;
}
