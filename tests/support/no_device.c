/* A libcuda on a machine without one: what the bindings of CUDA need in order to be imported, and an honest answer to
   everything else. The rest of the names are added when it is compiled. */
#define NO_DEVICE 100

int cuInit(unsigned flags) { return NO_DEVICE; }

int cuDriverGetVersion(int *version) {
    *version = 13000;
    return 0;
}

int cuGetErrorName(int code, const char **text) {
    *text = "CUDA_ERROR_NO_DEVICE";
    return 0;
}

int cuGetErrorString(int code, const char **text) {
    *text = "no CUDA-capable device is detected";
    return 0;
}
