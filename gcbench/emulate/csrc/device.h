/* The emulated cards: their properties, their memory, what ran on them. libcuda.so.1 holds the state, all others use it.
 *
 * Environment, set by gcbench.emulate.environment:
 *   GCBENCH_EMULATED_PROPERTIES  properties of the cards, `key=value` joined by `|` (device.c: read_properties)
 *   GCBENCH_EMULATED_LEDGER      file that processes share, so that they count against one memory (ledger.c); optional
 *   GCBENCH_EMULATED_LOG         path to which kernels, reads and calls are written at exit, with the process id; optional
 */
#pragma once
#include <stddef.h>

#define KIB ((size_t)1 << 10)
#define MIB ((size_t)1 << 20)
#define PAGE (2 * MIB) /* granularity of device memory */
#define MAX_CARDS 16

enum memory_kind { MEMORY_UNKNOWN, MEMORY_DEVICE, MEMORY_HOST, MEMORY_MANAGED };
enum copy_kind { COPY_HOST_TO_HOST, COPY_HOST_TO_DEVICE, COPY_DEVICE_TO_HOST, COPY_DEVICE_TO_DEVICE, COPY_DEFAULT };

struct card {
    int num_cards;
    char name[128], driver[32];
    int major, minor;
    int binary; /* architecture of the kernels that this card would run, of those that torch was built for; 90 for sm_90 */
    int sms;
    size_t memory;  /* totalGlobalMem */
    size_t context; /* taken by a process before its first allocation */
    size_t shared_per_sm, shared_per_block, l2;
    int threads_per_sm, blocks_per_sm, bus_bits, ecc;
};

const struct card *emu_card(void);
int emu_attribute(int attribute); /* numbers of CUdevice_attribute, which are those of cudaDeviceAttr */
void emu_uuid(int device, unsigned char uuid[16]);
void emu_bus_id(int device, char *text, size_t room);

int emu_device(void); /* current one of this thread */
int emu_set_device(int device); /* 0, or -1 if there is no such card */

void *emu_alloc(int device, size_t size); /* NULL beyond the card's memory */
int emu_free(void *address);              /* 0, or -1 for an address that was not handed out */
void *emu_reserve(int device, size_t size); /* addresses without memory behind them, aligned to PAGE */
int emu_unreserve(void *address);
int emu_charge(int device, size_t size); /* 0, or -1 if the card is full */
void emu_discharge(int device, size_t size);
size_t emu_used(int device);    /* by all processes, contexts included */
size_t emu_own_used(int device); /* by this process, context included */
void *emu_host_alloc(size_t size);
int emu_host_free(void *address);
void emu_host_register(void *address, size_t size);
int emu_host_unregister(void *address);
void *emu_managed_alloc(size_t size);
enum memory_kind emu_kind(const void *address, int *device, char **begin, size_t *size); /* pointers may be NULL */

/* Copies move data only between host addresses. What is read from a card is zero, or an answer to `bool(tensor)`. */
void emu_copied(void *to, const void *from, size_t size, enum copy_kind kind);

void *emu_handle(void); /* zeroed memory that stands for an object of a library */
void *emu_driver_symbol(const char *name);

void emu_register_kernel(const void *function, const char *name);
int emu_launch(const void *function, const unsigned grid[3], const unsigned block[3], size_t shared); /* 0, or -1 */
void emu_call(const char *name);    /* count a call of a function that nobody wrote, which succeeded */
long emu_refuse(const char *name, long status); /* count a call that this emulation refuses; returns status */

/* ledger.c */
void ledger_note(int device, size_t own); /* what this process uses now */
size_t ledger_others(int device);         /* what other living processes use */
int ledger_processes(int device, int *pids, size_t *used, int room); /* number of living processes on the card */
