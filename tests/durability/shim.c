/* A disk that can fail, lose its power, or end the process: loaded before libc by LD_PRELOAD.
 *
 * What it watches is one outbox: the file in RELAY_SHIM_FILE with its -wal, -shm, -journal and .lock, and the
 * folder they lie in. Every call that changes them is numbered. The numbers and what is to happen lie in a file
 * of 64-bit words (RELAY_SHIM_CONTROL, see shim.py for the words), which the test maps too and changes while
 * the relay runs.
 *
 * With RELAY_SHIM_DISK, a folder, it keeps what a power cut would leave: a file's bytes as of its last fsync or
 * fdatasync, under a name that is there only once the folder was synced after the file was made. Without
 * RELAY_SHIM_CONTROL it does nothing at all.
 *
 * With RELAY_SHIM_LOG every call is a line there: number, what, which file, errno, and who opened it.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { CALLS, KILL_AT, FAIL_AT, FAIL_ERRNO, PERSISTENT, FAILED, SLOW_SYNC_MS, SYNCS, MADE, GENERATION = 16, ENTRY = 24 };
enum { MAIN, WAL, SHM, JOURNAL, LOCK, SLOTS, FOLDER = SLOTS, NONE = -1 };
static const char *const SUFFIX[SLOTS] = {"", "-wal", "-shm", "-journal", ".lock"};
static const char *const KEPT[SLOTS] = {"main", "wal", NULL, "journal", NULL};

#define DESCRIPTORS 65536
static volatile int64_t *control;
static char watched[PATH_MAX], folder[PATH_MAX], disk[PATH_MAX];
static int said = -1;
static struct { int slot; int64_t generation; } open_as[DESCRIPTORS];

#define REAL(name) ((__typeof__(&name))real(#name))
static void *real(const char *name)
{
    return dlsym(RTLD_NEXT, name);
}

static int ready(void)
{
    const char *file = getenv("RELAY_SHIM_FILE"), *words = getenv("RELAY_SHIM_CONTROL");
    if (control) return 1;
    if (!file || !words) return 0;
    int at = syscall(SYS_openat, AT_FDCWD, words, O_RDWR | O_CLOEXEC);
    void *mapped = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, at, 0);
    if (at < 0 || mapped == MAP_FAILED) _exit(99);
    syscall(SYS_close, at);
    snprintf(watched, sizeof watched, "%s", file);
    snprintf(folder, sizeof folder, "%s", file);
    *strrchr(folder, '/') = 0;
    snprintf(disk, sizeof disk, "%s", getenv("RELAY_SHIM_DISK") ? getenv("RELAY_SHIM_DISK") : "");
    if (getenv("RELAY_SHIM_LOG"))
        said = syscall(SYS_openat, AT_FDCWD, getenv("RELAY_SHIM_LOG"), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    for (int each = 0; each < DESCRIPTORS; each++) open_as[each].slot = NONE;
    control = mapped;
    return 1;
}

static int slot_of(const char *path)
{
    size_t length = strlen(watched);
    if (!strcmp(path, folder)) return FOLDER;
    if (strncmp(path, watched, length)) return NONE;
    for (int slot = 0; slot < SLOTS; slot++)
        if (!strcmp(path + length, SUFFIX[slot])) return slot;
    return NONE;
}

static int slot_at(int descriptor)
{
    return control && descriptor >= 0 && descriptor < DESCRIPTORS ? open_as[descriptor].slot : NONE;
}

static void say(int64_t number, const char *call, int slot, int wrong, const char *who)
{
    char line[400];
    if (said < 0) return;
    int length = snprintf(line, sizeof line, "%lld %s %s %d %s\n", (long long)number, call,
                          slot == FOLDER ? "folder" : slot == MAIN ? "main" : SUFFIX[slot] + 1, wrong, who);
    syscall(SYS_write, said, line, length);
}

/* Number a call; return the errno it is to fail with. */
static int begin(int64_t *number)
{
    *number = __sync_add_and_fetch(&control[CALLS], 1);
    int64_t at = control[FAIL_AT];
    if (!at || (control[PERSISTENT] ? *number < at : *number != at)) return 0;
    __sync_add_and_fetch(&control[FAILED], 1);
    return control[FAIL_ERRNO];
}

/* After a call: the process may end here, as by kill -9. */
static void end(int64_t number)
{
    if (!control[KILL_AT] || number < control[KILL_AT]) return;
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

#define FAIL_OR_GO_ON(call, slot, who)                  \
    int64_t number;                                     \
    int wrong = begin(&number);                         \
    say(number, call, slot, wrong, who);                \
    if (wrong) { end(number); errno = wrong; return -1; }

static void kept_name(char *into, int slot, int64_t generation)
{
    snprintf(into, PATH_MAX + 64, "%s/%s.%lld", disk, KEPT[slot], (long long)generation);
}

/* Copy a file's bytes to where they outlive the power. In place: a cut in the middle tears only what is new. */
static void keep(int descriptor)
{
    static __thread char buffer[1 << 16];
    char name[PATH_MAX + 64];
    int64_t offset = 0, got;
    int slot = open_as[descriptor].slot;
    if (!*disk || !KEPT[slot]) return;
    kept_name(name, slot, open_as[descriptor].generation);
    int to = syscall(SYS_openat, AT_FDCWD, name, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    while ((got = syscall(SYS_pread64, descriptor, buffer, sizeof buffer, offset)) > 0) {
        syscall(SYS_pwrite64, to, buffer, got, offset);
        offset += got;
    }
    if (got < 0 || to < 0) _exit(98); /* a test that keeps too little proves nothing */
    syscall(SYS_ftruncate, to, offset);
    syscall(SYS_close, to);
}

/* Make the folder's names outlive the power. */
static void keep_names(void)
{
    char name[PATH_MAX + 64];
    for (int slot = 0; slot < SLOTS; slot++) {
        if (!KEPT[slot]) continue;
        snprintf(name, sizeof name, "%s%s", watched, SUFFIX[slot]);
        control[ENTRY + slot] = access(name, F_OK) ? 0 : control[GENERATION + slot] + 1;
    }
}

static const char *module(void *address)
{
    Dl_info found;
    if (!dladdr(address, &found) || !found.dli_fname) return "?";
    const char *slash = strrchr(found.dli_fname, '/');
    return slash ? slash + 1 : found.dli_fname;
}

static int opened(const char *path, int flags, mode_t mode, void *caller)
{
    int slot = ready() ? slot_of(path) : NONE;
    if (slot == NONE) return syscall(SYS_openat, AT_FDCWD, path, flags, mode);
    int made = slot != FOLDER && (flags & O_CREAT) && access(path, F_OK);
    FAIL_OR_GO_ON("open", slot, module(caller));
    int descriptor = syscall(SYS_openat, AT_FDCWD, path, flags, mode);
    if (descriptor >= 0 && descriptor < DESCRIPTORS) {
        if (made) control[GENERATION + slot] = ++control[MADE];
        open_as[descriptor].slot = slot;
        open_as[descriptor].generation = slot < SLOTS ? control[GENERATION + slot] : 0;
    }
    end(number);
    return descriptor;
}

#define OPEN(name)                                                                  \
    int name(const char *path, int flags, ...)                                      \
    {                                                                               \
        mode_t mode = 0;                                                            \
        if (flags & (O_CREAT | __O_TMPFILE)) {                                      \
            va_list more;                                                           \
            va_start(more, flags);                                                  \
            mode = va_arg(more, mode_t);                                            \
            va_end(more);                                                           \
        }                                                                           \
        return opened(path, flags, mode, __builtin_return_address(0));              \
    }
OPEN(open)
OPEN(open64)
int __open_2(const char *path, int flags) { return opened(path, flags, 0, __builtin_return_address(0)); }
int __open64_2(const char *path, int flags) { return opened(path, flags, 0, __builtin_return_address(0)); }

int close(int descriptor)
{
    static int (*closes)(int);
    if (!closes) closes = REAL(close);
    if (slot_at(descriptor) != NONE) open_as[descriptor].slot = NONE;
    return closes(descriptor);
}

/* Threads wait here and may be cancelled in libc's own; SQLite's calls need neither. */
#define CHANGE(name, arguments, call, ...)                                          \
    {                                                                               \
        int slot = slot_at(descriptor);                                             \
        if (slot == NONE) return REAL(name) arguments;                              \
        FAIL_OR_GO_ON(call, slot, "");                                              \
        __typeof__(name arguments) result = REAL(name) arguments;                   \
        end(number);                                                                \
        return result;                                                              \
    }
ssize_t pwrite(int descriptor, const void *bytes, size_t size, off_t at)
    CHANGE(pwrite, (descriptor, bytes, size, at), "write")
ssize_t pwrite64(int descriptor, const void *bytes, size_t size, off64_t at)
    CHANGE(pwrite64, (descriptor, bytes, size, at), "write")
int ftruncate(int descriptor, off_t size) CHANGE(ftruncate, (descriptor, size), "truncate")
int ftruncate64(int descriptor, off64_t size) CHANGE(ftruncate64, (descriptor, size), "truncate")

ssize_t write(int descriptor, const void *bytes, size_t size)
{
    static ssize_t (*writes)(int, const void *, size_t);
    if (!writes) writes = REAL(write);
    int slot = slot_at(descriptor);
    if (slot == NONE) return writes(descriptor, bytes, size);
    FAIL_OR_GO_ON("write", slot, "");
    ssize_t result = writes(descriptor, bytes, size);
    end(number);
    return result;
}

static int synced(int descriptor, int (*syncs)(int))
{
    int slot = slot_at(descriptor);
    if (slot == NONE) return syncs(descriptor);
    FAIL_OR_GO_ON("sync", slot, "");
    int64_t slow = control[SLOW_SYNC_MS];
    struct timespec pause = {slow / 1000, slow % 1000 * 1000000};
    if (slow) nanosleep(&pause, NULL);
    int result = syncs(descriptor);
    if (!result && slot == FOLDER && *disk) keep_names();
    if (!result && slot != FOLDER) keep(descriptor);
    __sync_add_and_fetch(&control[SYNCS], 1);
    end(number);
    return result;
}
int fsync(int descriptor) { return synced(descriptor, REAL(fsync)); }
int fdatasync(int descriptor) { return synced(descriptor, REAL(fdatasync)); }

int unlink(const char *path)
{
    int slot = ready() ? slot_of(path) : NONE;
    if (slot == NONE) return REAL(unlink)(path);
    FAIL_OR_GO_ON("unlink", slot, "");
    int result = REAL(unlink)(path);
    end(number);
    return result;
}
