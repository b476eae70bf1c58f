// What a machine can do to a node, put under it with LD_PRELOAD. The file that WALFERRY_TEST_MACHINE names is shared with the test.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

struct machine {
    // For so long it was suspended: CLOCK_MONOTONIC stood still, CLOCK_BOOTTIME did not.
    volatile long long suspended_ns;
    // The next flush of one of these files fails; 0 for none, else its number from 1.
    volatile long long flush_fails;
};

static const char *const files[] = {"/durable", "/cluster.redb"};

static struct machine *machine;

__attribute__((constructor)) static void init(void) {
    const char *path = getenv("WALFERRY_TEST_MACHINE");
    int fd = path ? open(path, O_RDWR) : -1;
    if (fd < 0)
        return;
    void *shared = mmap(NULL, sizeof *machine, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    machine = shared == MAP_FAILED ? NULL : shared;
    close(fd);
}

int clock_gettime(clockid_t clock, struct timespec *time) {
    if (syscall(SYS_clock_gettime, clock, time) != 0)
        return -1;
    if (machine && (clock == CLOCK_MONOTONIC || clock == CLOCK_MONOTONIC_COARSE || clock == CLOCK_MONOTONIC_RAW)) {
        long long ns = time->tv_sec * 1000000000LL + time->tv_nsec - machine->suspended_ns;
        time->tv_sec = ns / 1000000000LL;
        time->tv_nsec = ns % 1000000000LL;
    }
    return 0;
}

int fdatasync(int fd) {
    if (machine && machine->flush_fails) {
        char link[64], path[4096];
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        ssize_t length = readlink(link, path, sizeof path - 1);
        path[length < 0 ? 0 : length] = 0;
        const char *file = files[machine->flush_fails - 1], *name = strrchr(path, '/');
        if (name && strcmp(name, file) == 0) {
            machine->flush_fails = 0;
            errno = EIO;
            return -1;
        }
    }
    return syscall(SYS_fdatasync, fd);
}
