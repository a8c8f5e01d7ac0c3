/* libnvrtc, where it is not installed: compiling succeeds, with a program of one byte. */
#include "device.h"

#include <stdlib.h>

int nvrtcVersion(int *major, int *minor) { return *major = CUDA_VERSION / 1000, *minor = CUDA_VERSION % 1000 / 10, 0; }
int nvrtcCreateProgram(void **program) { return *program = emu_handle(), 0; }
int nvrtcDestroyProgram(void **program) { return free(*program), 0; }
int nvrtcGetPTXSize(void *program, size_t *size) { return (void)program, *size = 1, 0; }
int nvrtcGetCUBINSize(void *program, size_t *size) { return (void)program, *size = 1, 0; }
int nvrtcGetProgramLogSize(void *program, size_t *size) { return (void)program, *size = 1, 0; }
int nvrtcGetPTX(void *program, char *text) { return (void)program, *text = 0, 0; }
int nvrtcGetCUBIN(void *program, char *text) { return (void)program, *text = 0, 0; }
int nvrtcGetProgramLog(void *program, char *text) { return (void)program, *text = 0, 0; }
int nvrtcGetLoweredName(void *program, const char *name, const char **lowered) { return (void)program, *lowered = name, 0; }
const char *nvrtcGetErrorString(int status) { return status == 0 ? "NVRTC_SUCCESS" : "NVRTC_ERROR"; }
