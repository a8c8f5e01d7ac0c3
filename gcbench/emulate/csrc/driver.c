/* libcuda: the driver's functions that PyTorch and Triton look up. All others succeed and do nothing. */
#define _GNU_SOURCE
#include "device.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int status;
typedef unsigned long long address;
enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_DEVICE = 101, NOT_FOUND = 500, NOT_SUPPORTED = 801 };

static char contexts[MAX_CARDS]; /* a context is the address of its card's place */

status cuInit(unsigned flags) { return (void)flags, SUCCESS; }
status cuDriverGetVersion(int *version) { return *version = CUDA_VERSION, SUCCESS; }
status cuDeviceGet(int *device, int ordinal) { return *device = ordinal, ordinal >= 0 && ordinal < emu_card()->num_cards ? SUCCESS : INVALID_DEVICE; }
status cuDeviceGetCount(int *count) { return *count = emu_card()->num_cards, SUCCESS; }
status cuDeviceGetName(char *name, int length, int device) { return (void)device, snprintf(name, (size_t)length, "%s", emu_card()->name), SUCCESS; }
status cuDeviceTotalMem_v2(size_t *bytes, int device) { return (void)device, *bytes = emu_card()->memory, SUCCESS; }
status cuDeviceGetUuid_v2(unsigned char *uuid, int device) { return emu_uuid(device, uuid), SUCCESS; }
status cuDeviceGetPCIBusId(char *text, int length, int device) { return emu_bus_id(device, text, (size_t)length), SUCCESS; }
status cuDeviceComputeCapability(int *major, int *minor, int device) { return (void)device, *major = emu_card()->major, *minor = emu_card()->minor, SUCCESS; }
status cuDeviceGetAttribute(int *value, int attribute, int device) { return (void)device, *value = emu_attribute(attribute), SUCCESS; }
status cuDeviceCanAccessPeer(int *can, int device, int peer) { return *can = device != peer, SUCCESS; }
status cuDeviceGetP2PAttribute(int *value, int attribute, int from, int to) { return (void)attribute, (void)from, (void)to, *value = 0, SUCCESS; }
status cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *is_active) { return (void)device, *flags = 0, *is_active = 1, SUCCESS; }
status cuDevicePrimaryCtxRetain(void **context, int device) { return *context = &contexts[device], SUCCESS; }
status cuCtxGetCurrent(void **context) { return *context = &contexts[emu_device()], SUCCESS; }
status cuCtxGetDevice(int *device) { return *device = emu_device(), SUCCESS; }
status cuCtxSetCurrent(char *context) {
    if (context >= contexts && context < contexts + MAX_CARDS) emu_set_device((int)(context - contexts));
    return SUCCESS;
}
status cuCtxPushCurrent_v2(char *context) { return cuCtxSetCurrent(context); }
status cuCtxPopCurrent_v2(void **context) { return context != NULL ? cuCtxGetCurrent(context) : SUCCESS; }
status cuCtxGetApiVersion(void *context, unsigned *version) { return (void)context, *version = CUDA_VERSION, SUCCESS; }
status cuGetErrorString(status error, const char **text) { return *text = error == OUT_OF_MEMORY ? "out of memory" : error == NOT_SUPPORTED ? "operation not supported on an emulated card" : "error of an emulated card", SUCCESS; }
status cuGetErrorName(status error, const char **text) { return *text = error == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : error == NOT_SUPPORTED ? "CUDA_ERROR_NOT_SUPPORTED" : "CUDA_ERROR_UNKNOWN", SUCCESS; }

/* Memory, and the virtual memory that expandable segments use */

struct physical {
    int device;
    size_t size;
};

status cuMemGetInfo_v2(size_t *unused, size_t *total) { return *total = emu_card()->memory, *unused = *total - emu_used(emu_device()), SUCCESS; }
status cuMemAlloc_v2(address *made, size_t size) { return *made = (address)emu_alloc(emu_device(), size), *made ? SUCCESS : OUT_OF_MEMORY; }
status cuMemFree_v2(address gone) { return emu_free((void *)gone) == 0 ? SUCCESS : INVALID_VALUE; }
status cuMemAllocManaged(address *made, size_t size, unsigned flags) { return (void)flags, *made = (address)emu_managed_alloc(size), *made ? SUCCESS : OUT_OF_MEMORY; }
status cuMemHostAlloc(void **made, size_t size, unsigned flags) { return (void)flags, *made = emu_host_alloc(size), *made ? SUCCESS : OUT_OF_MEMORY; }
status cuMemFreeHost(void *gone) { return emu_host_free(gone) == 0 ? SUCCESS : INVALID_VALUE; }
status cuMemGetAllocationGranularity(size_t *granularity, const void *properties, int option) { return (void)properties, (void)option, *granularity = PAGE, SUCCESS; }
status cuMemAddressReserve(address *made, size_t size, size_t alignment, address wanted, unsigned long long flags) {
    (void)alignment, (void)wanted, (void)flags;
    *made = (address)emu_reserve(emu_device(), size);
    return *made ? SUCCESS : OUT_OF_MEMORY;
}
status cuMemAddressFree(address gone, size_t size) { return (void)size, emu_unreserve((void *)gone) == 0 ? SUCCESS : INVALID_VALUE; }
status cuMemCreate(struct physical **handle, size_t size, const int *properties, unsigned long long flags) {
    (void)flags;
    int device = properties[3]; /* CUmemAllocationProp: type, handle types, kind of location, its number */
    if (device < 0 || device >= emu_card()->num_cards) return INVALID_DEVICE;
    if (emu_charge(device, size) != 0) return OUT_OF_MEMORY;
    *handle = emu_handle();
    **handle = (struct physical){device, size};
    return SUCCESS;
}
status cuMemRelease(struct physical *handle) { return emu_discharge(handle->device, handle->size), free(handle), SUCCESS; }
status cuMemGetAddressRange_v2(address *begin, size_t *size, address of) {
    char *found;
    size_t length;
    emu_kind((void *)of, NULL, &found, &length);
    if (begin != NULL) *begin = (address)found;
    if (size != NULL) *size = length;
    return found != NULL ? SUCCESS : INVALID_VALUE;
}
status cuMemExportToShareableHandle(void) { return (int)emu_refuse("cuMemExportToShareableHandle", NOT_SUPPORTED); }
status cuMemImportFromShareableHandle(void) { return (int)emu_refuse("cuMemImportFromShareableHandle", NOT_SUPPORTED); }
status cuMemRetainAllocationHandle(void) { return (int)emu_refuse("cuMemRetainAllocationHandle", NOT_SUPPORTED); }
status cuMulticastCreate(void) { return (int)emu_refuse("cuMulticastCreate", NOT_SUPPORTED); }
status cuGreenCtxCreate(void) { return (int)emu_refuse("cuGreenCtxCreate", NOT_SUPPORTED); }
status cuStreamBeginCapture_v2(void) { return (int)emu_refuse("cuStreamBeginCapture", NOT_SUPPORTED); }
status cuMemcpyDtoH_v2(void *to, address from, size_t size) { return emu_copied(to, (void *)from, size, COPY_DEVICE_TO_HOST), SUCCESS; }
status cuMemcpyDtoHAsync_v2(void *to, address from, size_t size, void *stream) { return (void)stream, cuMemcpyDtoH_v2(to, from, size); }
status cuPointerGetAttribute(void *data, int attribute, address of) {
    int device;
    enum memory_kind kind = emu_kind((void *)of, &device, NULL, NULL);
    if (kind == MEMORY_UNKNOWN) return INVALID_VALUE;
    if (device < 0) device = 0;
    switch (attribute) {
    case 1: *(void **)data = &contexts[device]; break; /* context */
    case 2: *(unsigned *)data = kind == MEMORY_DEVICE ? 2 : 1; break;
    case 3: *(address *)data = of; break; /* address on the card */
    case 7: *(unsigned long long *)data = of; break;
    default: *(int *)data = attribute == 9 ? device : 0;
    }
    return SUCCESS;
}

/* Kernels that are compiled at run time */

status cuModuleLoadData(void **module, const void *image) { return (void)image, *module = emu_handle(), SUCCESS; }
status cuModuleLoadDataEx(void **module, const void *image, unsigned n, void *options, void **values) { return (void)n, (void)options, (void)values, cuModuleLoadData(module, image); }
status cuModuleLoad(void **module, const char *path) { return cuModuleLoadData(module, path); }
status cuLibraryLoadData(void **library, const void *image) { return cuModuleLoadData(library, image); }
status cuModuleGetFunction(void **function, void *module, const char *name) { return (void)module, *function = emu_handle(), emu_register_kernel(*function, strdup(name)), SUCCESS; }
status cuLibraryGetKernel(void **function, void *library, const char *name) { return cuModuleGetFunction(function, library, name); }
status cuLibraryGetModule(void **module, void *library) { return *module = library, SUCCESS; }
status cuKernelGetFunction(void **function, void *kernel) { return *function = kernel, SUCCESS; }
status cuModuleGetGlobal_v2(address *made, size_t *size, void *module, const char *name) {
    (void)module, (void)name;
    if (made != NULL) *made = (address)emu_reserve(emu_device(), 64 * KIB);
    if (size != NULL) *size = 64 * KIB;
    return SUCCESS;
}
status cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, void *stream, void **arguments, void **extra) {
    (void)stream, (void)arguments, (void)extra;
    return emu_launch(function, (unsigned[]){gx, gy, gz}, (unsigned[]){bx, by, bz}, shared) == 0 ? SUCCESS : INVALID_VALUE;
}
status cuLaunchCooperativeKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, void *stream, void **arguments) { return cuLaunchKernel(function, gx, gy, gz, bx, by, bz, shared, stream, arguments, NULL); }
status cuLaunchKernelEx(const unsigned *config, void *function, void **arguments, void **extra) { return cuLaunchKernel(function, config[0], config[1], config[2], config[3], config[4], config[5], config[6], NULL, arguments, extra); }
status cuFuncGetAttribute(int *value, int attribute, void *function) { return (void)function, *value = attribute == 0 ? 1024 : attribute == 4 ? 32 : attribute == 5 || attribute == 6 ? emu_card()->binary : 0, SUCCESS; }
status cuKernelGetAttribute(int *value, int attribute, void *kernel, int device) { return (void)device, cuFuncGetAttribute(value, attribute, kernel); }
status cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, void *function, int threads, size_t shared) {
    (void)function, (void)shared;
    int fit = emu_card()->threads_per_sm / (threads > 0 ? threads : 1);
    return *blocks = fit < 1 ? 1 : fit > emu_card()->blocks_per_sm ? emu_card()->blocks_per_sm : fit, SUCCESS;
}
status cuOccupancyMaxActiveClusters(int *clusters, void *function, const void *config) { return (void)function, (void)config, *clusters = emu_card()->sms / 2, SUCCESS; }
status cuEventCreate(void **event, unsigned flags) { return (void)flags, *event = emu_handle(), SUCCESS; }
status cuStreamCreate(void **stream, unsigned flags) { return (void)flags, *stream = emu_handle(), SUCCESS; }
status cuStreamIsCapturing(void *stream, int *capturing) { return (void)stream, *capturing = 0, SUCCESS; }
status cuStreamGetCtx(void *stream, void **context) { return (void)stream, cuCtxGetCurrent(context); }

status cuGetProcAddress_v2(const char *symbol, void **function, int version, unsigned long long flags, int *found) {
    (void)version, (void)flags;
    *function = emu_driver_symbol(symbol);
    if (found != NULL) *found = *function != NULL ? 0 : 1;
    return *function != NULL ? SUCCESS : NOT_FOUND;
}
status cuGetProcAddress(const char *symbol, void **function, int version, unsigned long long flags) { return cuGetProcAddress_v2(symbol, function, version, flags, NULL); }
