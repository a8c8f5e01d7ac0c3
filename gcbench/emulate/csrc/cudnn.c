/* libcudnn: the descriptors of its graph interface. Every graph has one engine, which needs no workspace; what the real
 * engines need is not known here. */
#include "device.h"

#include <stdint.h>
#include <stdlib.h>

enum { /* cudnnBackendAttributeName_t and cudnnBackendAttributeType_t */
    ENGINEHEUR_RESULTS = 202,
    ENGINECFG_ENGINE = 300,
    TYPE_INT64 = 3,
    TYPE_INT32 = 23,
};

size_t cudnnGetVersion(void) { return CUDNN_VERSION; }
size_t cudnnGetCudartVersion(void) { return CUDA_VERSION; }
const char *cudnnGetErrorString(int status) { return status == 0 ? "CUDNN_STATUS_SUCCESS" : "CUDNN_STATUS_NOT_SUPPORTED"; }
void cudnnGetLastErrorString(char *text, size_t size) { if (size > 0) text[0] = 0; }
int cudnnGetProperty(int type, int *value) { return *value = type == 0 ? CUDNN_VERSION / 10000 : type == 1 ? CUDNN_VERSION / 100 % 100 : CUDNN_VERSION % 100, 0; }
int cudnnCreate(void **handle) { return *handle = emu_handle(), 0; }
int cudnnDestroy(void *handle) { return free(handle), 0; }
int cudnnSetStream(void **handle, void *stream) { return *handle = stream, 0; }
int cudnnGetStream(void **handle, void **stream) { return *stream = *handle, 0; }

int cudnnBackendCreateDescriptor(int type, int **made) { return *made = emu_handle(), **made = type, 0; }
int cudnnBackendDestroyDescriptor(void *made) { return free(made), 0; }
int cudnnBackendGetAttribute(void *of, int name, int type, int64_t room, int64_t *count, void *values) {
    (void)of;
    int64_t found = name == ENGINEHEUR_RESULTS || name == ENGINECFG_ENGINE || type == TYPE_INT32 || type == TYPE_INT64;
    if (name != ENGINEHEUR_RESULTS && name != ENGINECFG_ENGINE && values != NULL && room > 0) {
        if (type == TYPE_INT32) *(int32_t *)values = 0;
        else if (type == TYPE_INT64) *(int64_t *)values = 0;
    }
    if (count != NULL) *count = found;
    return 0;
}
