/* libnccl: communicators that exist and exchange nothing. */
#include "device.h"

#include <stdlib.h>
#include <string.h>

struct communicator {
    int size, rank, device;
};
int ncclGetVersion(int *version) { return *version = 22900, 0; }
int ncclGetUniqueId(char *id) { return memset(id, 0, 128), 0; }
const char *ncclGetErrorString(int status) { return status == 0 ? "no error" : "error of an emulated card"; }
const char *ncclGetLastError(void *of) { return (void)of, ""; }
static int make(struct communicator **made, int size, int rank) {
    *made = emu_handle();
    **made = (struct communicator){size, rank, emu_device()};
    return 0;
}
struct unique_id {
    char bytes[128];
};
int ncclCommInitRank(struct communicator **made, int size, struct unique_id id, int rank) { return (void)id, make(made, size, rank); }
int ncclCommInitRankConfig(struct communicator **made, int size, struct unique_id id, int rank, void *config) { return (void)id, (void)config, make(made, size, rank); }
int ncclCommInitRankScalable(struct communicator **made, int size, int rank) { return make(made, size, rank); }
int ncclCommInitAll(struct communicator **made, int count, const int *devices) {
    for (int i = 0; i < count; i++) make(&made[i], count, i), made[i]->device = devices == NULL ? i : devices[i];
    return 0;
}
int ncclCommSplit(struct communicator *of, int color, int key, struct communicator **made, void *config) { return (void)color, (void)key, (void)config, make(made, of->size, of->rank); }
int ncclCommCount(const struct communicator *of, int *count) { return *count = of->size, 0; }
int ncclCommUserRank(const struct communicator *of, int *rank) { return *rank = of->rank, 0; }
int ncclCommCuDevice(const struct communicator *of, int *device) { return *device = of->device, 0; }
int ncclCommGetAsyncError(const struct communicator *of, int *error) { return (void)of, *error = 0, 0; }
int ncclCommDestroy(struct communicator *of) { return free(of), 0; }
int ncclCommAbort(struct communicator *of) { return free(of), 0; }
int ncclMemAlloc(void **address, size_t size) { return *address = emu_alloc(emu_device(), size), *address == NULL; }
int ncclMemFree(void *address) { return emu_free(address) != 0; }
