/* libcupti: a profiler of the card that records nothing. */
#define _GNU_SOURCE
#include "device.h"

#include <stdint.h>
#include <time.h>

enum { MAX_LIMIT_REACHED = 12 };

int cuptiGetVersion(uint32_t *version) { return *version = CUDA_VERSION / 1000 * 10000, 0; }
int cuptiGetResultString(int status, const char **text) { return (void)status, *text = "not recorded on an emulated card", 0; }
int cuptiGetErrorMessage(int status, const char **text) { return cuptiGetResultString(status, text); }
int cuptiSubscribe(void **subscriber) { return *subscriber = emu_handle(), 0; }
int cuptiActivityGetNextRecord(void *buffer, size_t size, void **record) { return (void)buffer, (void)size, *record = NULL, MAX_LIMIT_REACHED; }
int cuptiActivityGetNumDroppedRecords(void *context, uint32_t stream, size_t *dropped) { return (void)context, (void)stream, *dropped = 0, 0; }
int cuptiGetDeviceId(void *context, uint32_t *device) { return (void)context, *device = (uint32_t)emu_device(), 0; }
int cuptiGetTimestamp(uint64_t *nanoseconds) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return *nanoseconds = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec, 0;
}
