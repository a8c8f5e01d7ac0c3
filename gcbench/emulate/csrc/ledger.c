/* A file that processes share: what each uses of each card. One slot a process, claimed at its first allocation. */
#define _GNU_SOURCE
#include "device.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define NUM_SLOTS 256

struct slot { /* gcbench/emulate/smi.py reads it too */
    _Atomic int pid;
    int unused;
    _Atomic size_t used[MAX_CARDS];
};

static struct slot *slots, *own;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void forget(void) { own = NULL; } /* a forked child has a slot of its own, or none */

static void open_ledger(void) {
    const char *path = getenv("GCBENCH_EMULATED_LEDGER");
    pthread_atfork(NULL, NULL, forget);
    if (path == NULL) return;
    int file = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (file < 0) return;
    if (ftruncate(file, NUM_SLOTS * sizeof *slots) == 0) {
        void *mapped = mmap(NULL, NUM_SLOTS * sizeof *slots, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        if (mapped != MAP_FAILED) slots = mapped;
    }
    close(file);
}

static int is_alive(int pid) { return pid > 0 && (kill(pid, 0) == 0 || errno == EPERM); }

void ledger_note(int device, size_t used) {
    pthread_once(&once, open_ledger);
    if (slots == NULL) return;
    for (int i = 0; own == NULL && i < NUM_SLOTS; i++) {
        int pid = atomic_load(&slots[i].pid);
        if ((pid == 0 || !is_alive(pid)) && atomic_compare_exchange_strong(&slots[i].pid, &pid, (int)getpid())) {
            own = &slots[i];
            for (int j = 0; j < MAX_CARDS; j++) atomic_store(&own->used[j], 0);
        }
    }
    if (own != NULL) atomic_store(&own->used[device], used);
}

size_t ledger_others(int device) {
    pthread_once(&once, open_ledger);
    size_t sum = 0;
    for (int i = 0; slots != NULL && i < NUM_SLOTS; i++) {
        int pid = atomic_load(&slots[i].pid);
        if (&slots[i] != own && pid != 0 && pid != (int)getpid() && is_alive(pid)) sum += atomic_load(&slots[i].used[device]);
    }
    return sum;
}

int ledger_processes(int device, int *pids, size_t *used, int room) {
    int count = 0;
    pthread_once(&once, open_ledger);
    if (slots == NULL) {
        if (emu_own_used(device) > 0 && room > 0) pids[count] = (int)getpid(), used[count++] = emu_own_used(device);
        return count;
    }
    for (int i = 0; i < NUM_SLOTS && count < room; i++) {
        int pid = atomic_load(&slots[i].pid);
        size_t bytes = atomic_load(&slots[i].used[device]);
        if (bytes > 0 && is_alive(pid)) pids[count] = pid, used[count++] = bytes;
    }
    return count;
}
