// Gives a program a wall clock of its own: as many seconds ahead as a file says that may change at any moment.
// CLOCK_REALTIME is the one clock for which Linux has no namespace.
#define _GNU_SOURCE
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile long long *ahead;

__attribute__((constructor)) static void load(void) {
    int fd = open("/run/clock-step", O_RDONLY | O_CLOEXEC);
    if (fd < 0) return;
    void *page = mmap(0, 4096, PROT_READ, MAP_SHARED, fd, 0);
    close(fd);
    if (page != MAP_FAILED) ahead = page;
}

int clock_gettime(clockid_t id, struct timespec *to) {
    int failed = syscall(SYS_clock_gettime, id, to);
    if (!failed && ahead && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) to->tv_sec += *ahead;
    return failed;
}

int gettimeofday(struct timeval *to, void *zone) {
    struct timespec now;
    int failed = clock_gettime(CLOCK_REALTIME, &now);
    (void)zone;
    if (!failed) to->tv_sec = now.tv_sec, to->tv_usec = now.tv_nsec / 1000;
    return failed;
}

time_t time(time_t *to) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (to) *to = now.tv_sec;
    return now.tv_sec;
}
