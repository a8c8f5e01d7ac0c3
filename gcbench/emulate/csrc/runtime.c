/* libcudart: the functions whose results matter. All others succeed and do nothing (gcbench/emulate/library.py).
 *
 * Declared from the documented interface: arguments of functions, numbers of errors and attributes, and where the
 * fields of structures lie, which differs between CUDA 12 and 13.
 */
#define _GNU_SOURCE
#include "device.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef int status;
enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_CONFIGURATION = 9, INVALID_DEVICE = 101, NOT_SUPPORTED = 801 };

static _Thread_local status last;
static status failed(status error) { return last = error; }

status cudaGetLastError(void) {
    status error = last;
    last = SUCCESS;
    return error;
}
status cudaPeekAtLastError(void) { return last; }
const char *cudaGetErrorName(status error) {
    switch (error) {
    case SUCCESS: return "cudaSuccess";
    case INVALID_VALUE: return "cudaErrorInvalidValue";
    case OUT_OF_MEMORY: return "cudaErrorMemoryAllocation";
    case INVALID_CONFIGURATION: return "cudaErrorInvalidConfiguration";
    case INVALID_DEVICE: return "cudaErrorInvalidDevice";
    case NOT_SUPPORTED: return "cudaErrorNotSupported";
    default: return "cudaErrorUnknown";
    }
}
const char *cudaGetErrorString(status error) {
    switch (error) {
    case SUCCESS: return "no error";
    case INVALID_VALUE: return "invalid argument";
    case OUT_OF_MEMORY: return "out of memory";
    case INVALID_CONFIGURATION: return "invalid configuration argument";
    case INVALID_DEVICE: return "invalid device ordinal";
    case NOT_SUPPORTED: return "operation not supported on an emulated card";
    default: return "unknown error of an emulated card";
    }
}

/* Cards */

status cudaGetDeviceCount(int *count) { return *count = emu_card()->num_cards, SUCCESS; }
status cudaGetDevice(int *device) { return *device = emu_device(), SUCCESS; }
status cudaSetDevice(int device) { return emu_set_device(device) == 0 ? SUCCESS : failed(INVALID_DEVICE); }
status cudaInitDevice(int device, unsigned flags, unsigned more) { return (void)flags, (void)more, cudaSetDevice(device); }
status cudaRuntimeGetVersion(int *version) { return *version = CUDA_VERSION, SUCCESS; }
status cudaDriverGetVersion(int *version) { return *version = CUDA_VERSION, SUCCESS; }
status cudaDeviceCanAccessPeer(int *can, int device, int peer) { return *can = device != peer, SUCCESS; }
status cudaDeviceGetP2PAttribute(int *value, int attribute, int from, int to) { return (void)attribute, (void)from, (void)to, *value = 0, SUCCESS; }
status cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { return *least = 0, *greatest = -5, SUCCESS; }
status cudaDeviceGetPCIBusId(char *text, int room, int device) { return emu_bus_id(device, text, (size_t)room), SUCCESS; }
status cudaDeviceGetByPCIBusId(int *device, const char *text) {
    for (int i = 0; i < emu_card()->num_cards; i++) {
        char own[32];
        emu_bus_id(i, own, sizeof own);
        if (strcmp(own + 4, text) == 0 || strcmp(own, text) == 0) return *device = i, SUCCESS;
    }
    return failed(INVALID_DEVICE);
}
status cudaDeviceGetAttribute(int *value, int attribute, int device) { return (void)device, *value = emu_attribute(attribute), SUCCESS; }
status cudaDeviceGetLimit(size_t *value, int limit) { return (void)limit, *value = 1024, SUCCESS; }

#if CUDA_VERSION >= 13000
enum { PROPERTIES_SIZE = 1008, SMS = 384, MAPS_HOST = 392, SURFACE = 552, CONCURRENT = 560, ECC = 564, BUS_ID = 568, ENGINES = 584,
       UNIFIED = 588, BUS_BITS = 592, L2 = 596, L2_PERSISTING = 600, THREADS_PER_SM = 604, PRIORITIES = 608, L1 = 612, L1_LOCAL = 616,
       SHARED_PER_SM = 624, REGISTERS_PER_SM = 632, MANAGED = 636, MANAGED_CONCURRENT = 656, PREEMPTION = 660, HOST_POINTERS = 664,
       COOPERATIVE = 668, SHARED_OPTIN = 672, BLOCKS_PER_SM = 688, SHARED_RESERVED = 696, REGISTERS_HOST = 704, POOLS = 720, CLUSTERS = 748 };
#else
enum { PROPERTIES_SIZE = 1032, SMS = 388, MAPS_HOST = 400, SURFACE = 568, CONCURRENT = 576, ECC = 580, BUS_ID = 584, ENGINES = 600,
       UNIFIED = 604, BUS_BITS = 612, L2 = 616, L2_PERSISTING = 620, THREADS_PER_SM = 624, PRIORITIES = 628, L1 = 632, L1_LOCAL = 636,
       SHARED_PER_SM = 640, REGISTERS_PER_SM = 648, MANAGED = 652, MANAGED_CONCURRENT = 676, PREEMPTION = 680, HOST_POINTERS = 684,
       COOPERATIVE = 688, SHARED_OPTIN = 696, BLOCKS_PER_SM = 712, SHARED_RESERVED = 720, REGISTERS_HOST = 728, POOLS = 744, CLUSTERS = 772 };
#endif

status cudaGetDeviceProperties(char *properties, int device) {
    const struct card *card = emu_card();
    if (device < 0 || device >= card->num_cards) return failed(INVALID_DEVICE);
    memset(properties, 0, PROPERTIES_SIZE);
#define INT(at, value) (*(int *)(properties + (at)) = (int)(value))
#define SIZE(at, value) (*(size_t *)(properties + (at)) = (size_t)(value))
    snprintf(properties, 256, "%s", card->name);
    emu_uuid(device, (unsigned char *)properties + 256);
    SIZE(288, card->memory);
    SIZE(296, 48 * KIB); /* shared memory of a block */
    INT(304, 65536);     /* registers of a block */
    INT(308, 32);        /* warp */
    SIZE(312, 2147483647);
    INT(320, 1024); /* threads of a block; in x, y and z */
    INT(324, 1024), INT(328, 1024), INT(332, 64);
    INT(336, 2147483647), INT(340, 65535), INT(344, 65535); /* blocks of a grid */
    SIZE(352, 65536);
    INT(360, card->major), INT(364, card->minor);
    SIZE(368, 512), SIZE(SURFACE, 512);
    INT(SMS, card->sms);
    INT(MAPS_HOST, 1), INT(CONCURRENT, 1), INT(UNIFIED, 1), INT(MANAGED, 1), INT(PRIORITIES, 1), INT(L1, 1), INT(L1_LOCAL, 1);
    INT(MANAGED_CONCURRENT, 1), INT(PREEMPTION, 1), INT(HOST_POINTERS, 1), INT(COOPERATIVE, 1), INT(REGISTERS_HOST, 1), INT(POOLS, 1);
    INT(ECC, card->ecc);
    INT(BUS_ID, device + 1);
    INT(ENGINES, 3);
    INT(BUS_BITS, card->bus_bits);
    INT(L2, card->l2), INT(L2_PERSISTING, card->l2 / 8 * 5);
    INT(THREADS_PER_SM, card->threads_per_sm), INT(BLOCKS_PER_SM, card->blocks_per_sm), INT(REGISTERS_PER_SM, 65536);
    SIZE(SHARED_PER_SM, card->shared_per_sm), SIZE(SHARED_OPTIN, card->shared_per_block);
    SIZE(SHARED_RESERVED, card->major >= 8 ? 1024 : 0);
    INT(CLUSTERS, card->major >= 9);
    return SUCCESS;
}
status cudaGetDeviceProperties_v2(char *properties, int device) { return cudaGetDeviceProperties(properties, device); }

/* Memory */

status cudaMalloc(void **address, size_t size) {
    *address = size == 0 ? NULL : emu_alloc(emu_device(), size);
    return *address == NULL && size > 0 ? failed(OUT_OF_MEMORY) : SUCCESS;
}
status cudaFree(void *address) { return address == NULL || emu_free(address) == 0 ? SUCCESS : failed(INVALID_VALUE); }
status cudaMallocAsync(void **address, size_t size, void *stream) { return (void)stream, cudaMalloc(address, size); }
status cudaMallocFromPoolAsync(void **address, size_t size, void *pool, void *stream) { return (void)pool, (void)stream, cudaMalloc(address, size); }
status cudaFreeAsync(void *address, void *stream) { return (void)stream, cudaFree(address); }
status cudaMallocManaged(void **address, size_t size, unsigned flags) { return (void)flags, *address = emu_managed_alloc(size), *address ? SUCCESS : failed(OUT_OF_MEMORY); }
status cudaMallocPitch(void **address, size_t *pitch, size_t width, size_t height) { return *pitch = (width + 511) / 512 * 512, cudaMalloc(address, *pitch * height); }
status cudaMemGetInfo(size_t *unused, size_t *total) { return *total = emu_card()->memory, *unused = *total - emu_used(emu_device()), SUCCESS; }
status cudaDeviceGetDefaultMemPool(void **pool, int device) {
    static char pools[MAX_CARDS];
    return *pool = &pools[device], SUCCESS;
}
status cudaDeviceGetMemPool(void **pool, int device) { return cudaDeviceGetDefaultMemPool(pool, device); }
status cudaMemPoolCreate(void **pool, const void *properties) { return (void)properties, *pool = emu_handle(), SUCCESS; }
status cudaMemPoolGetAttribute(void *pool, int attribute, unsigned long long *value) { return (void)pool, (void)attribute, *value = emu_own_used(emu_device()) - emu_card()->context, SUCCESS; }
status cudaHostAlloc(void **address, size_t size, unsigned flags) { return (void)flags, *address = emu_host_alloc(size), *address ? SUCCESS : failed(OUT_OF_MEMORY); }
status cudaMallocHost(void **address, size_t size) { return cudaHostAlloc(address, size, 0); }
status cudaFreeHost(void *address) { return address == NULL || emu_host_free(address) == 0 ? SUCCESS : failed(INVALID_VALUE); }
status cudaHostRegister(void *address, size_t size, unsigned flags) { return (void)flags, emu_host_register(address, size), SUCCESS; }
status cudaHostUnregister(void *address) { return emu_host_unregister(address), SUCCESS; }
status cudaHostGetDevicePointer(void **device, void *host, unsigned flags) { return (void)flags, *device = host, SUCCESS; }
status cudaHostGetFlags(unsigned *flags, void *host) { return (void)host, *flags = 0, SUCCESS; }

struct pointer_attributes {
    int type, device;
    void *device_pointer, *host_pointer;
#if CUDA_VERSION >= 13000
    long reserved[8];
#endif
};
status cudaPointerGetAttributes(struct pointer_attributes *attributes, const void *address) {
    int device;
    enum memory_kind kind = emu_kind(address, &device, NULL, NULL);
    memset(attributes, 0, sizeof *attributes);
    attributes->type = kind == MEMORY_DEVICE ? 2 : kind == MEMORY_HOST ? 1 : kind == MEMORY_MANAGED ? 3 : 0;
    attributes->device = kind == MEMORY_UNKNOWN ? -2 : device < 0 ? 0 : device;
    attributes->device_pointer = kind == MEMORY_UNKNOWN ? NULL : (void *)address;
    attributes->host_pointer = kind == MEMORY_HOST || kind == MEMORY_MANAGED ? (void *)address : NULL;
    return SUCCESS;
}
status cudaGetSymbolAddress(void **address, const void *symbol) {
    static void *constants;
    (void)symbol;
    if (constants == NULL) constants = emu_reserve(emu_device(), 64 * KIB);
    return *address = constants, SUCCESS;
}
status cudaGetSymbolSize(size_t *size, const void *symbol) { return (void)symbol, *size = 8, SUCCESS; }
status cudaIpcGetMemHandle(char *handle, void *address) { return memset(handle, 0, 64), memcpy(handle, &address, sizeof address), SUCCESS; }
status cudaIpcOpenMemHandle(void **address, long a, long b, long c, long d) { return (void)address, (void)a, (void)b, (void)c, (void)d, failed((int)emu_refuse("cudaIpcOpenMemHandle", NOT_SUPPORTED)); }

status cudaMemcpy(void *to, const void *from, size_t size, int kind) { return emu_copied(to, from, size, (enum copy_kind)kind), SUCCESS; }
status cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) { return (void)stream, cudaMemcpy(to, from, size, kind); }
status cudaMemcpy2D(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height, int kind) {
    for (size_t row = 0; row < height; row++) emu_copied((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width, (enum copy_kind)kind);
    return SUCCESS;
}
status cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height, int kind, void *stream) { return (void)stream, cudaMemcpy2D(to, to_pitch, from, from_pitch, width, height, kind); }
status cudaMemcpyFromSymbol(void *to, const void *symbol, size_t size, size_t offset, int kind) { return (void)symbol, (void)offset, (void)kind, memset(to, 0, size), SUCCESS; }

/* Streams and events: everything has happened when it is queried. Times are those of the host. */

struct stream {
    int priority, device;
};
status cudaStreamCreateWithPriority(struct stream **stream, unsigned flags, int priority) {
    (void)flags;
    *stream = emu_handle();
    (*stream)->priority = priority;
    (*stream)->device = emu_device();
    return SUCCESS;
}
status cudaStreamCreateWithFlags(struct stream **stream, unsigned flags) { return cudaStreamCreateWithPriority(stream, flags, 0); }
status cudaStreamCreate(struct stream **stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
status cudaStreamDestroy(struct stream *stream) { return free(stream), SUCCESS; }
status cudaStreamGetPriority(struct stream *stream, int *priority) { return *priority = (size_t)stream < 4096 ? 0 : stream->priority, SUCCESS; }
status cudaStreamGetDevice(struct stream *stream, int *device) { return *device = (size_t)stream < 4096 ? emu_device() : stream->device, SUCCESS; }
status cudaStreamGetFlags(struct stream *stream, unsigned *flags) { return (void)stream, *flags = 0, SUCCESS; }
status cudaStreamGetId(struct stream *stream, unsigned long long *id) { return *id = (unsigned long long)(size_t)stream, SUCCESS; }
status cudaStreamIsCapturing(void *stream, int *capturing) { return (void)stream, *capturing = 0, SUCCESS; }
status cudaStreamGetCaptureInfo(void *stream, int *capturing) { return (void)stream, *capturing = 0, SUCCESS; } /* what else it writes is not read then */
status cudaStreamGetCaptureInfo_v2(void *stream, int *capturing) { return cudaStreamGetCaptureInfo(stream, capturing); }
status cudaStreamGetCaptureInfo_v3(void *stream, int *capturing) { return cudaStreamGetCaptureInfo(stream, capturing); }
status cudaStreamBeginCapture(void *stream, int mode) { return (void)stream, (void)mode, failed((int)emu_refuse("cudaStreamBeginCapture", NOT_SUPPORTED)); }
status cudaStreamBeginCaptureToGraph(void *stream) { return cudaStreamBeginCapture(stream, 0); }
status cudaLaunchHostFunc(void *stream, void (*function)(void *), void *data) { return (void)stream, function(data), SUCCESS; }
status cudaStreamAddCallback(void *stream, void (*function)(void *, int, void *), void *data, unsigned flags) { return (void)flags, function(stream, SUCCESS, data), SUCCESS; }
status cudaEventCreateWithFlags(struct timespec **event, unsigned flags) { return (void)flags, *event = emu_handle(), SUCCESS; }
status cudaEventCreate(struct timespec **event) { return cudaEventCreateWithFlags(event, 0); }
status cudaEventDestroy(struct timespec *event) { return free(event), SUCCESS; }
status cudaEventRecord(struct timespec *event, void *stream) { return (void)stream, clock_gettime(CLOCK_MONOTONIC, event), SUCCESS; }
status cudaEventRecordWithFlags(struct timespec *event, void *stream, unsigned flags) { return (void)flags, cudaEventRecord(event, stream); }
status cudaEventElapsedTime(float *ms, const struct timespec *start, const struct timespec *end) {
    double passed = (double)(end->tv_sec - start->tv_sec) * 1e3 + (double)(end->tv_nsec - start->tv_nsec) / 1e6;
    return *ms = (float)(passed > 1e-3 ? passed : 1e-3), SUCCESS;
}
status cudaEventElapsedTime_v2(float *ms, const struct timespec *start, const struct timespec *end) { return cudaEventElapsedTime(ms, start, end); }

/* Kernels */

struct dim3 {
    unsigned x, y, z;
};
struct launch_config {
    struct dim3 grid, block;
    size_t shared;
};
static _Thread_local struct {
    struct launch_config config;
    void *stream;
} pushed;

void **__cudaRegisterFatBinary(void *binary) { return (void)binary, emu_handle(); }
void __cudaRegisterFunction(void **handle, const char *host, char *device, const char *name, int limit, void *tid, void *bid, void *block, void *grid, int *warp) {
    (void)handle, (void)device, (void)limit, (void)tid, (void)bid, (void)block, (void)grid, (void)warp;
    emu_register_kernel(host, name);
}
unsigned __cudaPushCallConfiguration(struct dim3 grid, struct dim3 block, size_t shared, void *stream) {
    pushed.config = (struct launch_config){grid, block, shared};
    pushed.stream = stream;
    return 0;
}
status __cudaPopCallConfiguration(struct dim3 *grid, struct dim3 *block, size_t *shared, void **stream) {
    *grid = pushed.config.grid, *block = pushed.config.block, *shared = pushed.config.shared, *stream = pushed.stream;
    return SUCCESS;
}
static status launch(const void *function, struct dim3 grid, struct dim3 block, size_t shared) {
    int code = emu_launch(function, (unsigned[]){grid.x, grid.y, grid.z}, (unsigned[]){block.x, block.y, block.z}, shared);
    return code == 0 ? SUCCESS : failed(INVALID_CONFIGURATION);
}
status cudaLaunchKernel(const void *function, struct dim3 grid, struct dim3 block, void **arguments, size_t shared, void *stream) { return (void)arguments, (void)stream, launch(function, grid, block, shared); }
status cudaLaunchCooperativeKernel(const void *function, struct dim3 grid, struct dim3 block, void **arguments, size_t shared, void *stream) { return cudaLaunchKernel(function, grid, block, arguments, shared, stream); }
status cudaLaunchKernelExC(const struct launch_config *config, const void *function, void **arguments) { return (void)arguments, launch(function, config->grid, config->block, config->shared); }
status __cudaGetKernel(const void **kernel, const void *function) { return *kernel = function, SUCCESS; }
status __cudaLaunchKernel(void *kernel, struct dim3 grid, struct dim3 block, void **arguments, size_t shared, void *stream) { return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream); }
status cudaGetFuncBySymbol(const void **function, const void *symbol) { return *function = symbol, SUCCESS; }
status cudaFuncGetAttributes(char *attributes, const void *function) {
    (void)function;
    memset(attributes, 0, 144);
    *(int *)(attributes + 24) = 1024; /* threads of a block */
    *(int *)(attributes + 28) = 32;   /* registers */
    *(int *)(attributes + 32) = *(int *)(attributes + 36) = emu_card()->binary; /* of PTX and of the binary */
    *(int *)(attributes + 44) = (int)emu_card()->shared_per_block;
    return SUCCESS;
}
status cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int threads, size_t shared, unsigned flags) {
    const struct card *card = emu_card();
    (void)function, (void)flags;
    int fit = card->threads_per_sm / (threads > 0 ? threads : 1);
    if (shared > 0 && (int)(card->shared_per_sm / (shared + KIB)) < fit) fit = (int)(card->shared_per_sm / (shared + KIB));
    return *blocks = fit < 1 ? 1 : fit > card->blocks_per_sm ? card->blocks_per_sm : fit, SUCCESS;
}
status cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *function, int threads, size_t shared) { return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared, 0); }
status cudaOccupancyMaxActiveClusters(int *clusters, const void *function, const void *config) { return (void)function, (void)config, *clusters = emu_card()->sms / 2, SUCCESS; }
status cudaOccupancyMaxPotentialClusterSize(int *size, const void *function, const void *config) { return (void)function, (void)config, *size = 8, SUCCESS; }
status cudaOccupancyAvailableDynamicSMemPerBlock(size_t *size, const void *function, int blocks, int threads) { return (void)function, (void)threads, *size = emu_card()->shared_per_sm / (size_t)(blocks > 0 ? blocks : 1), SUCCESS; }

/* The driver, for those who ask the runtime for it */

status cudaGetDriverEntryPointByVersion(const char *symbol, void **function, unsigned version, unsigned long long flags, int *found) {
    (void)version, (void)flags;
    *function = emu_driver_symbol(symbol);
    if (found != NULL) *found = *function != NULL ? 0 : 1;
    return SUCCESS;
}
status cudaGetDriverEntryPoint(const char *symbol, void **function, unsigned long long flags, int *found) { return cudaGetDriverEntryPointByVersion(symbol, function, 0, flags, found); }
