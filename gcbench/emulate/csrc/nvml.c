/* libnvidia-ml: what nvidia-smi would say of the emulated cards. A handle is the number of its card, from 1. */
#define _GNU_SOURCE
#include "device.h"

#include <stdio.h>
#include <string.h>

typedef int status;
typedef size_t handle;
enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, INSUFFICIENT_SIZE = 7, MAX_PROCESSES = 256 };

static int number(handle device) { return (int)device - 1; }

status nvmlInit_v2(void) { return SUCCESS; }
status nvmlInit(void) { return SUCCESS; }
status nvmlInitWithFlags(unsigned flags) { return (void)flags, SUCCESS; }
status nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(status error) { return error == SUCCESS ? "Success" : error == NOT_SUPPORTED ? "Not Supported" : "Invalid Argument"; }
status nvmlSystemGetDriverVersion(char *text, unsigned room) { return snprintf(text, room, "%s", emu_card()->driver), SUCCESS; }
status nvmlSystemGetNVMLVersion(char *text, unsigned room) { return snprintf(text, room, "13.%s", emu_card()->driver), SUCCESS; }
status nvmlSystemGetCudaDriverVersion(int *version) { return *version = CUDA_VERSION, SUCCESS; }
status nvmlSystemGetCudaDriverVersion_v2(int *version) { return *version = CUDA_VERSION, SUCCESS; }
status nvmlDeviceGetCount_v2(unsigned *count) { return *count = (unsigned)emu_card()->num_cards, SUCCESS; }
status nvmlDeviceGetCount(unsigned *count) { return nvmlDeviceGetCount_v2(count); }
status nvmlDeviceGetHandleByIndex_v2(unsigned index, handle *device) { return *device = index + 1, (int)index < emu_card()->num_cards ? SUCCESS : INVALID_ARGUMENT; }
status nvmlDeviceGetHandleByIndex(unsigned index, handle *device) { return nvmlDeviceGetHandleByIndex_v2(index, device); }
static void uuid_text(int device, char *text, size_t room) { snprintf(text, room, "GPU-6c6c6c6c-6c6c-6c6c-6c6c-6c6c6c6c6c%02x", device); }
status nvmlDeviceGetHandleByPciBusId_v2(const char *text, handle *device) {
    for (int i = 0; i < emu_card()->num_cards; i++) {
        char own[32];
        emu_bus_id(i, own, sizeof own);
        if (strcasecmp(own, text) == 0 || strcasecmp(own + 4, text) == 0) return *device = (handle)i + 1, SUCCESS;
    }
    return INVALID_ARGUMENT;
}
status nvmlDeviceGetHandleByUUID(const char *text, handle *device) {
    for (int i = 0; i < emu_card()->num_cards; i++) {
        char own[64];
        uuid_text(i, own, sizeof own);
        if (strcmp(own, text) == 0) return *device = (handle)i + 1, SUCCESS;
    }
    return INVALID_ARGUMENT;
}
status nvmlDeviceGetIndex(handle device, unsigned *index) { return *index = (unsigned)number(device), SUCCESS; }
status nvmlDeviceGetMinorNumber(handle device, unsigned *index) { return nvmlDeviceGetIndex(device, index); }
status nvmlDeviceGetName(handle device, char *text, unsigned room) { return (void)device, snprintf(text, room, "%s", emu_card()->name), SUCCESS; }
status nvmlDeviceGetUUID(handle device, char *text, unsigned room) { return uuid_text(number(device), text, room), SUCCESS; }
status nvmlDeviceGetCudaComputeCapability(handle device, int *major, int *minor) { return (void)device, *major = emu_card()->major, *minor = emu_card()->minor, SUCCESS; }
status nvmlDeviceGetPciInfo_v3(handle device, unsigned *info) { /* legacy id, 5 numbers, id */
    memset(info, 0, 68);
    info[5] = (unsigned)device;
    emu_bus_id(number(device), (char *)info + 36, 32);
    return SUCCESS;
}
status nvmlDeviceGetUtilizationRates(handle device, unsigned *rates) { return (void)device, rates[0] = rates[1] = 0, SUCCESS; }

static size_t used(int device) { /* without making a context, as NVML does */
    int pids[MAX_PROCESSES];
    size_t bytes[MAX_PROCESSES], sum = 0;
    int count = ledger_processes(device, pids, bytes, MAX_PROCESSES);
    for (int i = 0; i < count; i++) sum += bytes[i];
    return sum < emu_card()->memory ? sum : emu_card()->memory;
}
status nvmlDeviceGetMemoryInfo(handle device, unsigned long long *info) {
    info[0] = emu_card()->memory, info[2] = used(number(device)), info[1] = info[0] - info[2];
    return SUCCESS;
}
status nvmlDeviceGetMemoryInfo_v2(handle device, unsigned long long *info) { /* version, total, reserved, free, used */
    info[1] = emu_card()->memory, info[2] = 0, info[4] = used(number(device)), info[3] = info[1] - info[4];
    return SUCCESS;
}
static status processes(handle device, unsigned *count, char *infos, size_t stride) {
    int pids[MAX_PROCESSES];
    size_t bytes[MAX_PROCESSES];
    int found = ledger_processes(number(device), pids, bytes, MAX_PROCESSES);
    if ((unsigned)found > *count) return *count = (unsigned)found, INSUFFICIENT_SIZE;
    for (int i = 0; i < found; i++) {
        memset(infos + (size_t)i * stride, 0xff, stride);
        *(unsigned *)(infos + (size_t)i * stride) = (unsigned)pids[i];
        *(unsigned long long *)(infos + (size_t)i * stride + 8) = bytes[i];
    }
    return *count = (unsigned)found, SUCCESS;
}
status nvmlDeviceGetComputeRunningProcesses(handle device, unsigned *count, void *infos) { return processes(device, count, infos, 16); }
status nvmlDeviceGetComputeRunningProcesses_v2(handle device, unsigned *count, void *infos) { return processes(device, count, infos, 24); }
status nvmlDeviceGetComputeRunningProcesses_v3(handle device, unsigned *count, void *infos) { return processes(device, count, infos, 24); }
status nvmlDeviceGetNvLinkState(void) { return NOT_SUPPORTED; }
status nvmlDeviceGetNvLinkRemoteDeviceType(void) { return NOT_SUPPORTED; }
status nvmlDeviceGetNvLinkRemotePciInfo_v2(void) { return NOT_SUPPORTED; }
status nvmlDeviceGetGpuFabricInfoV(handle device, char *info) { return (void)device, memset(info + 4, 0, 32), SUCCESS; } /* of no fabric */
