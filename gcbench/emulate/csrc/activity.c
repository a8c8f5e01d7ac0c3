/* What ran on the cards: kernels by name, copies, reads by the host, calls that nobody wrote. Nothing is computed. */
#define _GNU_SOURCE
#include "device.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* Kernels */

struct kernel {
    const void *function;
    const char *name;
    unsigned long launches;
};
static struct kernel *kernels;
static size_t num_kernels, kernel_room;
static int is_sorted;
static unsigned long launches, invalid_launches;
static const char *last_kernel = "";

void emu_register_kernel(const void *function, const char *name) {
    pthread_mutex_lock(&lock);
    if (num_kernels == kernel_room) {
        kernel_room = kernel_room ? 2 * kernel_room : 65536;
        kernels = realloc(kernels, kernel_room * sizeof *kernels);
        if (kernels == NULL) abort();
    }
    kernels[num_kernels++] = (struct kernel){function, name, 0};
    is_sorted = 0;
    pthread_mutex_unlock(&lock);
}

static int by_function(const void *a, const void *b) {
    const struct kernel *x = a, *y = b;
    return (x->function > y->function) - (x->function < y->function);
}

int emu_launch(const void *function, const unsigned grid[3], const unsigned block[3], size_t shared) {
    const struct card *card = emu_card();
    size_t threads = (size_t)block[0] * block[1] * block[2];
    int is_valid = grid[0] > 0 && grid[1] > 0 && grid[2] > 0 && grid[0] <= 2147483647u && grid[1] <= 65535 &&
                   grid[2] <= 65535 && threads > 0 && threads <= 1024 && block[2] <= 64 && shared <= card->shared_per_block;
    pthread_mutex_lock(&lock);
    launches++;
    invalid_launches += !is_valid;
    if (!is_sorted) {
        qsort(kernels, num_kernels, sizeof *kernels, by_function);
        is_sorted = 1;
    }
    struct kernel key = {function, NULL, 0};
    struct kernel *found = bsearch(&key, kernels, num_kernels, sizeof *kernels, by_function);
    last_kernel = found == NULL ? "" : found->name;
    if (found != NULL) found->launches++;
    pthread_mutex_unlock(&lock);
    return is_valid ? 0 : -1;
}

unsigned long emu_num_launches(void) { return launches; }
unsigned long emu_num_invalid_launches(void) { return invalid_launches; }

/* Reads. `bool(tensor)` reads one byte; the answer leads down the usual path: all() is true, any() is not. */

static unsigned long num_reads;

unsigned long emu_num_reads(void) { return num_reads; }

#define RESIDENT 1 /* bit of mincore */

static void zero(char *to, size_t size) { /* without touching pages that are not there and so read as zero */
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    char *begin = (char *)(((size_t)to + page - 1) / page * page), *end = to + size;
    unsigned char is_there[256];
    if (size < 64 * KIB) {
        memset(to, 0, size);
        return;
    }
    memset(to, 0, (size_t)(begin - to));
    while (begin + page <= end) {
        size_t count = (size_t)(end - begin) / page;
        if (count > sizeof is_there) count = sizeof is_there;
        if (mincore(begin, count * page, is_there) != 0) break;
        for (size_t i = 0; i < count; i++)
            if (is_there[i] & RESIDENT) memset(begin + i * page, 0, page);
        begin += count * page;
    }
    memset(begin, 0, (size_t)(end - begin));
}

void emu_copied(void *to, const void *from, size_t size, enum copy_kind kind) {
    enum memory_kind source = emu_kind(from, NULL, NULL, NULL), target = emu_kind(to, NULL, NULL, NULL);
    int from_card = source == MEMORY_DEVICE || (source == MEMORY_UNKNOWN && (kind == COPY_DEVICE_TO_HOST || kind == COPY_DEVICE_TO_DEVICE));
    int to_card = target == MEMORY_DEVICE || (target == MEMORY_UNKNOWN && (kind == COPY_HOST_TO_DEVICE || kind == COPY_DEVICE_TO_DEVICE));
    if (to_card) return;
    if (!from_card) {
        memmove(to, from, size);
        return;
    }
    __atomic_add_fetch(&num_reads, 1, __ATOMIC_RELAXED);
    if (size == 1) *(char *)to = strstr(last_kernel, "or_kernel_cuda") == NULL || strstr(last_kernel, "xor_kernel") != NULL;
    else zero(to, size);
}

/* Handles, symbols of the driver, calls */

void *emu_handle(void) { return calloc(1, 128); }

void *emu_driver_symbol(const char *name) {
    static void *self;
    if (self == NULL) {
        Dl_info here;
        dladdr((void *)emu_driver_symbol, &here);
        self = dlopen(here.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    }
    char versioned[160];
    for (int version = 3; version >= 2; version--) { /* as the driver does: the newest of a name */
        snprintf(versioned, sizeof versioned, "%s_v%d", name, version);
        void *found = dlsym(self, versioned);
        if (found != NULL) return found;
    }
    void *found = dlsym(self, name);
    if (found == NULL) emu_refuse(strdup(name), 0);
    return found;
}

static struct call {
    const char *name;
    unsigned long count;
    int is_refused;
} calls[4096];
static size_t num_calls;

static void count(const char *name, int is_refused) {
    pthread_mutex_lock(&lock);
    size_t i = 0;
    while (i < num_calls && strcmp(calls[i].name, name) != 0) i++;
    if (i == num_calls && num_calls < sizeof calls / sizeof *calls) calls[num_calls++] = (struct call){name, 0, is_refused};
    if (i < num_calls) calls[i].count++;
    pthread_mutex_unlock(&lock);
}

void emu_call(const char *name) { count(name, 0); }

long emu_refuse(const char *name, long status) {
    count(name, 1);
    return status;
}

const char *emu_refused(size_t index) { /* the index-th function that was refused, or NULL */
    for (size_t i = 0; i < num_calls; i++)
        if (calls[i].is_refused && index-- == 0) return calls[i].name;
    return NULL;
}

void emu_write_log(const char *path) {
    FILE *log = fopen(path, "w");
    if (log == NULL) return;
    fprintf(log, "# %s: %lu launches, %lu of them invalid, %lu reads\n", emu_card()->name, launches, invalid_launches, num_reads);
    for (size_t i = 0; i < num_calls; i++)
        fprintf(log, "%s\t%lu\t%s\n", calls[i].is_refused ? "refused" : "call", calls[i].count, calls[i].name);
    for (size_t i = 0; i < num_kernels; i++)
        if (kernels[i].launches > 0) fprintf(log, "kernel\t%lu\t%s\n", kernels[i].launches, kernels[i].name);
    fclose(log);
}

__attribute__((destructor)) static void at_exit(void) {
    const char *path = getenv("GCBENCH_EMULATED_LOG");
    char own[4096];
    if (path == NULL || launches == 0) return;
    snprintf(own, sizeof own, "%s.%d", path, (int)getpid());
    emu_write_log(own);
}
