/* Kills the process at the Nth system call that changes a file.

What lives here: the calls, which are counted from `crash_arm` on if the file's name begins with the one given. What must
not: any choice of when. It is put before the C library by LD_PRELOAD. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

enum moment { BEFORE, DURING, AFTER };

static char prefix[PATH_MAX];
static long fatal;
static enum moment fatal_moment;
static int trace = -1;
static atomic_long seen;

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

static ssize_t real_write(int file, const void *data, size_t size) {
    REAL(ssize_t, "write", int, const void *, size_t);
    return real(file, data, size);
}

/* Count calls on files whose names begin with `path`, and write their names to the file `trace_file`. The one numbered
   `at`, from 1, kills the process: before it, in the middle of a write, or after it. */
void crash_arm(const char *path, long at, int moment, int trace_file) {
    fatal = at;
    fatal_moment = (enum moment)moment;
    trace = trace_file;
    atomic_store(&seen, 0);
    snprintf(prefix, sizeof prefix, "%s", path);
}

static void die(void) {
    usleep(50000); /* an answer that has been given too early is told meanwhile */
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

/* The number of this call, or 0 if it does not count. */
static long number_of(const char *call, const char *path) {
    char line[PATH_MAX + 32];
    if (!prefix[0] || strncmp(path, prefix, strlen(prefix)) != 0) return 0;
    int length = snprintf(line, sizeof line, "%s %s\n", call, path + strlen(prefix));
    real_write(trace, line, (size_t)length);
    return atomic_fetch_add(&seen, 1) + 1;
}

static long number_on(const char *call, int file) {
    char link[64], path[PATH_MAX];
    if (!prefix[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return number_of(call, path);
}

static int is_fatal(long number, enum moment moment) {
    return number && number == fatal && moment == fatal_moment;
}

#define AROUND(number, type, call, half) \
    do { \
        long this_one = number; \
        if (is_fatal(this_one, BEFORE)) die(); \
        if (is_fatal(this_one, DURING)) { half; die(); } \
        type result = call; \
        if (is_fatal(this_one, AFTER)) die(); \
        return result; \
    } while (0)

ssize_t write(int file, const void *data, size_t size) {
    AROUND(number_on("write", file), ssize_t, real_write(file, data, size), real_write(file, data, size / 2));
}

ssize_t pwrite(int file, const void *data, size_t size, off_t place) {
    REAL(ssize_t, "pwrite", int, const void *, size_t, off_t);
    AROUND(number_on("pwrite", file), ssize_t, real(file, data, size, place), real(file, data, size / 2, place));
}

ssize_t pwrite64(int file, const void *data, size_t size, off64_t place) {
    REAL(ssize_t, "pwrite64", int, const void *, size_t, off64_t);
    AROUND(number_on("pwrite64", file), ssize_t, real(file, data, size, place), real(file, data, size / 2, place));
}

int fsync(int file) {
    REAL(int, "fsync", int);
    AROUND(number_on("fsync", file), int, real(file), );
}

int fdatasync(int file) {
    REAL(int, "fdatasync", int);
    AROUND(number_on("fdatasync", file), int, real(file), );
}

int ftruncate(int file, off_t size) {
    REAL(int, "ftruncate", int, off_t);
    AROUND(number_on("ftruncate", file), int, real(file, size), );
}

int ftruncate64(int file, off64_t size) {
    REAL(int, "ftruncate64", int, off64_t);
    AROUND(number_on("ftruncate64", file), int, real(file, size), );
}

int unlink(const char *path) {
    REAL(int, "unlink", const char *);
    AROUND(number_of("unlink", path), int, real(path), );
}
