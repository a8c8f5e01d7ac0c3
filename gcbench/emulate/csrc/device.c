/* Properties of the emulated cards, and addresses that nobody can touch, counted against each card's memory. */
#define _GNU_SOURCE
#include "device.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* Properties */

static struct card card;
static pthread_once_t card_once = PTHREAD_ONCE_INIT;

static void read_properties(void) {
    const char *text = getenv("GCBENCH_EMULATED_PROPERTIES");
    char *copy = text == NULL ? NULL : strdup(text), *rest = copy;
    card = (struct card){.num_cards = 1, .name = "emulated card", .driver = "0", .major = 8, .binary = 80, .sms = 108,
                         .memory = 80 * KIB * MIB, .shared_per_sm = 164 * KIB, .shared_per_block = 163 * KIB,
                         .l2 = 40 * MIB, .threads_per_sm = 2048, .blocks_per_sm = 32, .bus_bits = 5120};
    for (char *entry; rest != NULL && (entry = strsep(&rest, "|")) != NULL;) {
        char *value = strchr(entry, '=');
        if (value == NULL) continue;
        *value++ = 0;
        long long number = atoll(value);
        if (strcmp(entry, "name") == 0) snprintf(card.name, sizeof card.name, "%s", value);
        else if (strcmp(entry, "driver") == 0) snprintf(card.driver, sizeof card.driver, "%s", value);
        else if (strcmp(entry, "num_cards") == 0) card.num_cards = (int)(number > MAX_CARDS ? MAX_CARDS : number);
        else if (strcmp(entry, "major") == 0) card.major = (int)number;
        else if (strcmp(entry, "minor") == 0) card.minor = (int)number;
        else if (strcmp(entry, "binary") == 0) card.binary = (int)number;
        else if (strcmp(entry, "num_sms") == 0) card.sms = (int)number;
        else if (strcmp(entry, "memory_bytes") == 0) card.memory = (size_t)number;
        else if (strcmp(entry, "context_bytes") == 0) card.context = (size_t)number;
        else if (strcmp(entry, "shared_bytes_per_sm") == 0) card.shared_per_sm = (size_t)number;
        else if (strcmp(entry, "shared_bytes_per_block") == 0) card.shared_per_block = (size_t)number;
        else if (strcmp(entry, "l2_bytes") == 0) card.l2 = (size_t)number;
        else if (strcmp(entry, "threads_per_sm") == 0) card.threads_per_sm = (int)number;
        else if (strcmp(entry, "blocks_per_sm") == 0) card.blocks_per_sm = (int)number;
        else if (strcmp(entry, "bus_bits") == 0) card.bus_bits = (int)number;
        else if (strcmp(entry, "ecc") == 0) card.ecc = (int)number;
    }
    free(copy);
}

const struct card *emu_card(void) {
    pthread_once(&card_once, read_properties);
    return &card;
}

void emu_uuid(int device, unsigned char uuid[16]) {
    memset(uuid, 0x6c, 16);
    uuid[15] = (unsigned char)device;
}

void emu_bus_id(int device, char *text, size_t room) { snprintf(text, room, "00000000:%02X:00.0", device + 1); }

int emu_attribute(int attribute) {
    const struct card *c = emu_card();
    switch (attribute) {
    case 1: case 2: case 3: return 1024;                  /* threads of a block; in x and y */
    case 4: return 64;                                    /* in z */
    case 5: return 2147483647;                            /* blocks of a grid in x */
    case 6: case 7: return 65535;                         /* in y and z */
    case 8: return 48 * 1024;                             /* shared memory of a block */
    case 9: return 65536;                                 /* constant memory */
    case 10: return 32;                                   /* warp */
    case 11: return 2147483647;                           /* pitch */
    case 12: case 82: return 65536;                       /* registers of a block, of a multiprocessor */
    case 13: return 1980000;                              /* clock, kHz */
    case 14: return 512;                                  /* alignment of textures */
    case 16: return c->sms;
    case 19: case 31: case 41: case 78: case 83: case 89: /* mapped host memory, concurrent kernels, unified addresses, */
    case 90: case 91: case 95: case 99: case 115:         /* priorities, managed memory, cooperative launch, pools … */
    case 102: case 103: return 1;                         /* virtual memory, handles as file descriptors */
    case 32: return c->ecc;
    case 33: return 1;                                    /* PCI bus */
    case 36: return 2619000;                              /* memory clock, kHz */
    case 37: return c->bus_bits;
    case 38: return (int)c->l2;
    case 39: return c->threads_per_sm;
    case 40: return 3;                                    /* copy engines */
    case 75: return c->major;
    case 76: return c->minor;
    case 81: return (int)c->shared_per_sm;
    case 97: return (int)c->shared_per_block;
    case 106: return c->blocks_per_sm;
    case 111: return c->major >= 8 ? 1024 : 0;            /* shared memory reserved of a block */
    case 120: return c->major >= 9;                       /* clusters */
    default: return 0;
    }
}

static _Thread_local int current;

int emu_device(void) { return current; }

int emu_set_device(int device) {
    if (device < 0 || device >= emu_card()->num_cards) return -1;
    current = device;
    return 0;
}

/* Memory */

struct range {
    char *begin;
    size_t size, charged;
    int device;
    enum memory_kind kind;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct range *ranges;
static size_t num_ranges, room;
static struct {
    size_t small, big; /* allocations below 1 MiB share pages */
    int has_context;
} accounts[MAX_CARDS];

static size_t position(const char *address) { /* of the first range that begins after address */
    size_t low = 0, high = num_ranges;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (ranges[middle].begin <= address) low = middle + 1;
        else high = middle;
    }
    return low;
}

static void insert(struct range added) {
    if (num_ranges == room) {
        room = room ? 2 * room : 256;
        ranges = realloc(ranges, room * sizeof *ranges);
        if (ranges == NULL) abort();
    }
    size_t at = position(added.begin);
    memmove(ranges + at + 1, ranges + at, (num_ranges++ - at) * sizeof *ranges);
    ranges[at] = added;
}

static struct range *containing(const char *address) {
    size_t at = position(address);
    if (at == 0 || address >= ranges[at - 1].begin + ranges[at - 1].size) return NULL;
    return &ranges[at - 1];
}

static void removed(struct range *gone) {
    memmove(gone, gone + 1, (size_t)(ranges + --num_ranges - gone) * sizeof *ranges);
}

static size_t own_used(int device) {
    if (!accounts[device].has_context) return 0;
    return emu_card()->context + accounts[device].big + (accounts[device].small + PAGE - 1) / PAGE * PAGE;
}

static int fits(int device) { return own_used(device) + ledger_others(device) <= emu_card()->memory; }

size_t emu_own_used(int device) {
    pthread_mutex_lock(&lock);
    size_t used = own_used(device);
    pthread_mutex_unlock(&lock);
    return used;
}

size_t emu_used(int device) {
    pthread_mutex_lock(&lock);
    accounts[device].has_context = 1;
    ledger_note(device, own_used(device));
    size_t used = own_used(device) + ledger_others(device);
    pthread_mutex_unlock(&lock);
    return used < emu_card()->memory ? used : emu_card()->memory;
}

static int charge(int device, size_t *account, size_t size) {
    pthread_mutex_lock(&lock);
    accounts[device].has_context = 1;
    *account += size;
    int ok = fits(device);
    if (!ok) *account -= size;
    ledger_note(device, own_used(device));
    pthread_mutex_unlock(&lock);
    return ok ? 0 : -1;
}

static void discharge(int device, size_t *account, size_t size) {
    pthread_mutex_lock(&lock);
    *account -= size;
    ledger_note(device, own_used(device));
    pthread_mutex_unlock(&lock);
}

int emu_charge(int device, size_t size) { return charge(device, &accounts[device].big, size); }
void emu_discharge(int device, size_t size) { discharge(device, &accounts[device].big, size); }

/* Above what x86-64 maps for a process, so that nothing else lies there and a touch is a fault. */
#define ARENA_BEGIN ((char *)((size_t)1 << 50))
#define ARENA_END (ARENA_BEGIN + ((size_t)1 << 47))

static char *free_addresses(size_t size) { /* above all earlier ones, and from the beginning again at the end */
    static char *next = ARENA_BEGIN;
    char *const begin = ARENA_BEGIN, *const end = ARENA_END;
    size = (size + PAGE - 1) / PAGE * PAGE;
    for (int round = 0; round < 2; round++) {
        while (size <= (size_t)(end - next)) {
            size_t at = position(next);
            const struct range *before = at > 0 ? &ranges[at - 1] : NULL, *after = at < num_ranges ? &ranges[at] : NULL;
            const char *taken = NULL;
            if (before != NULL && before->begin + before->size > next) taken = before->begin + before->size;
            else if (after != NULL && after->begin < next + size) taken = after->begin + after->size;
            if (taken == NULL || taken > end) {
                char *found = next;
                next += size;
                return found;
            }
            next = (char *)(((size_t)taken + PAGE - 1) / PAGE * PAGE);
        }
        next = begin;
    }
    return NULL;
}

static void *reserve(int device, size_t size, size_t charged) {
    pthread_mutex_lock(&lock);
    char *begin = free_addresses(size);
    if (begin != NULL) insert((struct range){begin, size, charged, device, MEMORY_DEVICE});
    pthread_mutex_unlock(&lock);
    return begin;
}

void *emu_reserve(int device, size_t size) { return reserve(device, (size + 4095) / 4096 * 4096, 0); }

void *emu_alloc(int device, size_t size) {
    size_t charged = size < MIB ? (size + 511) / 512 * 512 : (size + PAGE - 1) / PAGE * PAGE;
    size_t *account = size < MIB ? &accounts[device].small : &accounts[device].big;
    if (size > emu_card()->memory || charge(device, account, charged) != 0) return NULL;
    void *address = reserve(device, charged, charged);
    if (address == NULL) discharge(device, account, charged);
    return address;
}

static int released(void *address, enum memory_kind kind, struct range *gone) {
    pthread_mutex_lock(&lock);
    struct range *found = containing(address);
    int ok = found != NULL && found->begin == (char *)address && found->kind == kind;
    if (ok) {
        *gone = *found;
        removed(found);
    }
    pthread_mutex_unlock(&lock);
    return ok ? 0 : -1;
}

int emu_unreserve(void *address) {
    struct range gone;
    return released(address, MEMORY_DEVICE, &gone);
}

int emu_free(void *address) {
    struct range gone;
    if (released(address, MEMORY_MANAGED, &gone) == 0) return munmap(gone.begin, gone.size);
    if (released(address, MEMORY_DEVICE, &gone) != 0) return -1;
    if (gone.charged > 0) {
        size_t *account = gone.charged < MIB ? &accounts[gone.device].small : &accounts[gone.device].big;
        discharge(gone.device, account, gone.charged);
    }
    return 0;
}

void emu_host_register(void *address, size_t size) {
    pthread_mutex_lock(&lock);
    insert((struct range){address, size, 0, -1, MEMORY_HOST});
    pthread_mutex_unlock(&lock);
}

int emu_host_unregister(void *address) {
    struct range gone;
    return released(address, MEMORY_HOST, &gone);
}

void *emu_host_alloc(size_t size) {
    void *memory = NULL;
    if (posix_memalign(&memory, 4096, size ? size : 1) != 0) return NULL;
    emu_host_register(memory, size ? size : 1);
    return memory;
}

int emu_host_free(void *address) {
    if (emu_host_unregister(address) != 0) return -1;
    free(address);
    return 0;
}

void *emu_managed_alloc(size_t size) { /* the host may touch it, so it is the host's */
    size = (size + 4095) / 4096 * 4096;
    void *begin = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (begin == MAP_FAILED) return NULL;
    pthread_mutex_lock(&lock);
    insert((struct range){begin, size, 0, emu_device(), MEMORY_MANAGED});
    pthread_mutex_unlock(&lock);
    return begin;
}

enum memory_kind emu_kind(const void *address, int *device, char **begin, size_t *size) {
    pthread_mutex_lock(&lock);
    const struct range *found = containing(address);
    enum memory_kind kind = found == NULL ? MEMORY_UNKNOWN : found->kind;
    if (device != NULL) *device = found == NULL ? -2 : found->device;
    if (begin != NULL) *begin = found == NULL ? NULL : found->begin;
    if (size != NULL) *size = found == NULL ? 0 : found->size;
    pthread_mutex_unlock(&lock);
    return kind;
}

__attribute__((constructor)) static void initialise(void) {
    emu_card(); /* before any thread may change the environment */
}
