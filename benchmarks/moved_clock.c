/* A machine's wall clock that jumps, for the processes of one command: benchmarks/full_size.py.

   cc -shared -fPIC -o moved_clock.so moved_clock.c -ldl
   MOVED_CLOCK=FILE LD_PRELOAD=moved_clock.so COMMAND

   FILE holds eight bytes, by how many seconds the wall clock is ahead; whoever writes them moves it
   while the command runs. Moments to wait for are moved back, as the kernel's own clock goes on:
   the waits of a machine whose clock was set do not change either. The times of files are not
   moved. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long (*kernel)(long, ...);
static volatile const int64_t *ahead;

__attribute__((constructor)) static void begin(void) {
    if (kernel)
        return;
    kernel = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
    const char *path = getenv("MOVED_CLOCK");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    void *at = file < 0 ? MAP_FAILED : mmap(NULL, 8, PROT_READ, MAP_SHARED, file, 0);
    if (file >= 0)
        close(file);
    ahead = at == MAP_FAILED ? NULL : at;
}

static int64_t moved(void) {
    begin();
    return ahead ? *ahead : 0;
}

/* What the kernel's clock will say. Below 30 years it is a moment of the clock since boot. */
static struct timespec true_moment(const struct timespec *moment) {
    struct timespec result = *moment;
    if (result.tv_sec > 1000000000)
        result.tv_sec -= moved();
    return result;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int64_t seconds = moved();
    int failed = (int)kernel(SYS_clock_gettime, (long)clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        now->tv_sec += seconds;
    return failed;
}

int gettimeofday(struct timeval *now, void *zone) {
    struct timespec moment;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &moment);
    now->tv_sec = moment.tv_sec;
    now->tv_usec = moment.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *seconds) {
    struct timespec moment;
    clock_gettime(CLOCK_REALTIME, &moment);
    if (seconds)
        *seconds = moment.tv_sec;
    return moment.tv_sec;
}

int pthread_cond_timedwait(pthread_cond_t *cond, pthread_mutex_t *mutex,
                           const struct timespec *until) {
    static int (*wait)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
    struct timespec moment = true_moment(until);
    if (!wait) { /* x86-64 has an older one, for other condition variables. */
        void *found = dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2");
        *(void **)&wait = found ? found : dlsym(RTLD_NEXT, "pthread_cond_timedwait");
    }
    return wait(cond, mutex, &moment);
}

int pthread_mutex_timedlock(pthread_mutex_t *mutex, const struct timespec *until) {
    static int (*lock)(pthread_mutex_t *, const struct timespec *);
    struct timespec moment = true_moment(until);
    if (!lock)
        *(void **)&lock = dlsym(RTLD_NEXT, "pthread_mutex_timedlock");
    return lock(mutex, &moment);
}

int sem_timedwait(sem_t *semaphore, const struct timespec *until) {
    static int (*wait)(sem_t *, const struct timespec *);
    struct timespec moment = true_moment(until);
    if (!wait)
        *(void **)&wait = dlsym(RTLD_NEXT, "sem_timedwait");
    return wait(semaphore, &moment);
}

/* Of the calls that programs make by their numbers, the wait for a moment. */
long syscall(long number, ...) {
    long a[6];
    va_list rest;
    va_start(rest, number);
    for (int i = 0; i < 6; i++)
        a[i] = va_arg(rest, long);
    va_end(rest);
    begin();
    struct timespec moment;
    if (number == SYS_futex && (a[1] & FUTEX_CLOCK_REALTIME) && a[3]) {
        moment = true_moment((const struct timespec *)a[3]);
        a[3] = (long)&moment;
    }
    return kernel(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
