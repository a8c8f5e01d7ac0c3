/* libcublas and libcublasLt: handles, versions, and one algorithm for every product. Products succeed undone. */
#include "device.h"

#include <stdlib.h>
#include <string.h>

#ifdef BUILD_CUBLASLT
struct heuristic { /* cublasLtMatmulHeuristicResult_t */
    unsigned long long algorithm[8];
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};
int cublasLtCreate(void **handle) { return *handle = emu_handle(), 0; }
int cublasLtDestroy(void *handle) { return free(handle), 0; }
size_t cublasLtGetVersion(void) { return CUBLAS_VERSION; }
size_t cublasLtGetCudartVersion(void) { return CUDA_VERSION; }
int cublasLtMatmulDescCreate(void **made, int compute, int scale) { return (void)compute, (void)scale, *made = emu_handle(), 0; }
int cublasLtMatmulDescDestroy(void *made) { return free(made), 0; }
int cublasLtMatrixLayoutCreate(void **made, int type, unsigned long long rows, unsigned long long columns, long long leading) { return (void)type, (void)rows, (void)columns, (void)leading, *made = emu_handle(), 0; }
int cublasLtMatrixLayoutDestroy(void *made) { return free(made), 0; }
int cublasLtMatrixTransformDescCreate(void **made, int scale) { return (void)scale, *made = emu_handle(), 0; }
int cublasLtMatrixTransformDescDestroy(void *made) { return free(made), 0; }
int cublasLtMatmulPreferenceCreate(void **made) { return *made = emu_handle(), 0; }
int cublasLtMatmulPreferenceDestroy(void *made) { return free(made), 0; }
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *operation, void *a, void *b, void *c, void *d, void *preference, int wanted, struct heuristic *results, int *returned) {
    (void)handle, (void)operation, (void)a, (void)b, (void)c, (void)d, (void)preference;
    if (wanted > 0) memset(results, 0, sizeof *results);
    return *returned = wanted > 0, 0;
}
const char *cublasLtGetStatusString(int status) { return status == 0 ? "CUBLAS_STATUS_SUCCESS" : "CUBLAS_STATUS_UNKNOWN"; }
#else
struct handle {
    void *stream;
    int math, pointers, atomics;
};
int cublasCreate_v2(void **handle) { return *handle = emu_handle(), 0; }
int cublasDestroy_v2(void *handle) { return free(handle), 0; }
int cublasSetStream_v2(struct handle *handle, void *stream) { return handle->stream = stream, 0; }
int cublasGetStream_v2(struct handle *handle, void **stream) { return *stream = handle->stream, 0; }
int cublasSetMathMode(struct handle *handle, int mode) { return handle->math = mode, 0; }
int cublasGetMathMode(struct handle *handle, int *mode) { return *mode = handle->math, 0; }
int cublasSetPointerMode_v2(struct handle *handle, int mode) { return handle->pointers = mode, 0; }
int cublasGetPointerMode_v2(struct handle *handle, int *mode) { return *mode = handle->pointers, 0; }
int cublasSetAtomicsMode(struct handle *handle, int mode) { return handle->atomics = mode, 0; }
int cublasGetAtomicsMode(struct handle *handle, int *mode) { return *mode = handle->atomics, 0; }
int cublasGetVersion_v2(void *handle, int *version) { return (void)handle, *version = CUBLAS_VERSION, 0; }
int cublasGetProperty(int type, int *value) { return *value = type == 0 ? CUBLAS_VERSION / 10000 : type == 1 ? CUBLAS_VERSION / 100 % 100 : CUBLAS_VERSION % 100, 0; }
const char *cublasGetStatusString(int status) { return status == 0 ? "CUBLAS_STATUS_SUCCESS" : "CUBLAS_STATUS_UNKNOWN"; }
const char *cublasGetStatusName(int status) { return cublasGetStatusString(status); }
#endif
