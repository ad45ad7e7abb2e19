// What the Python side asks of the library itself (parlance_kernels/library.py).

#include "device.h"

// A digest of all sources, from build.py: the Python side refuses a library that others have overtaken.
extern "C" const char* parlance_sources() { return PARLANCE_SOURCES; }

#ifdef __CUDACC__
extern "C" const char* parlance_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
extern "C" int parlance_use_device(int64_t device) { return cudaSetDevice(static_cast<int>(device)); }
#else
extern "C" const char* parlance_error(int code) { return code == INVALID_VALUE ? "invalid argument" : simt::failure.c_str(); }
extern "C" int parlance_use_device(int64_t) { return 0; }
#endif
