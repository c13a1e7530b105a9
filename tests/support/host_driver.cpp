// A libcuda whose device is the host's memory: enough of the driver for pycuda and cuda-bindings to run what the project
// puts on a GPU without TensorRT. Work happens when it is enqueued; captured work when its graph is launched.
// The kernel of `trt.cuda.kernels` is compiled in, with a loop in place of the grid.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <vector>

// --- the kernel, as C++ ------------------------------------------------------------------------------------------------

struct uint4 { unsigned int x, y, z, w; };
struct Place { int x, y; };
static thread_local Place blockIdx, threadIdx, blockDim, gridDim;
#define __device__ static
#define __global__
#include "copy_rows.cu"
#undef __device__
#undef __global__

template <typename Vector>
static void run_grid(void (*kernel)(const Vector *, Vector *, const int *, const int *, int, int), const char *buffer)
{
    uint64_t address[4];
    int number[2];
    memcpy(address, buffer, sizeof address);
    memcpy(number, buffer + sizeof address, sizeof number);
    for (blockIdx.y = 0; blockIdx.y < gridDim.y; blockIdx.y++)
        for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x++)
            for (threadIdx.x = 0; threadIdx.x < blockDim.x; threadIdx.x++)
                kernel((const Vector *)address[0], (Vector *)address[1], (const int *)address[2],
                       (const int *)address[3], number[0], number[1]);
}

// --- the driver --------------------------------------------------------------------------------------------------------

enum Result { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_CONTEXT = 201, NOT_FOUND = 500,
              CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901 };
using Work = std::function<void()>;
struct Graph { std::vector<Work> works; };
struct Stream { bool capturing = false, invalid = false; Graph captured; };
struct Event { double recorded_at = 0; };

static const size_t MEMORY_BYTES = 1u << 30;
static size_t allocated_bytes = 0;
static std::map<void *, size_t> sizes;
static std::mutex guard;
static thread_local std::vector<void *> contexts;
static int the_context;

static Result put(void *stream, Work work)
{
    if (contexts.empty())
        return INVALID_CONTEXT;
    auto *on = (Stream *)stream;
    if (on && on->capturing)
        on->captured.works.push_back(work);
    else
        work();
    return SUCCESS;
}

static Result wait_for(void *stream)
{
    auto *on = (Stream *)stream;
    if (!on || !on->capturing)
        return SUCCESS;
    on->invalid = true;
    return CAPTURE_UNSUPPORTED;
}

#define API extern "C" Result
API cuInit(unsigned) { return SUCCESS; }
API cuDriverGetVersion(int *version) { *version = 13000; return SUCCESS; }
API cuGetErrorString(int code, const char **text)
{
    *text = code == OUT_OF_MEMORY ? "out of memory" : code >= CAPTURE_UNSUPPORTED ? "not while capturing" : "error";
    return SUCCESS;
}
API cuGetErrorName(int code, const char **text) { return cuGetErrorString(code, text); }
API cuDeviceGetCount(int *count) { *count = 1; return SUCCESS; }
API cuDeviceGet(int *device, int) { *device = 0; return SUCCESS; }
API cuDeviceGetName(char *name, int, int) { strcpy(name, "Host"); return SUCCESS; }
API cuDeviceComputeCapability(int *major, int *minor, int) { *major = 9; *minor = 0; return SUCCESS; }
API cuDevicePrimaryCtxRetain(void **context, int) { *context = &the_context; return SUCCESS; }
API cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
API cuCtxGetDevice(int *device) { *device = 0; return contexts.empty() ? INVALID_CONTEXT : SUCCESS; }
API cuCtxGetApiVersion(void *, unsigned *version) { *version = 13000; return SUCCESS; }
API cuCtxPushCurrent_v2(void *context) { contexts.push_back(context); return SUCCESS; }
API cuCtxPopCurrent_v2(void **context)
{
    if (contexts.empty())
        return INVALID_CONTEXT;
    if (context)
        *context = contexts.back();
    contexts.pop_back();
    return SUCCESS;
}

API cuMemAlloc_v2(void **memory, size_t num_bytes)
{
    std::lock_guard<std::mutex> lock(guard);
    if (num_bytes == 0)
        return INVALID_VALUE;
    if (contexts.empty())
        return INVALID_CONTEXT;
    if (allocated_bytes + num_bytes > MEMORY_BYTES || posix_memalign(memory, 256, num_bytes))
        return OUT_OF_MEMORY;
    memset(*memory, 0xA5, num_bytes);
    allocated_bytes += sizes[*memory] = num_bytes;
    return SUCCESS;
}
API cuMemFree_v2(void *memory)
{
    std::lock_guard<std::mutex> lock(guard);
    auto found = sizes.find(memory);
    if (found == sizes.end())
        return INVALID_VALUE;
    allocated_bytes -= found->second;
    sizes.erase(found);
    free(memory);
    return SUCCESS;
}
API cuMemHostAlloc(void **memory, size_t num_bytes, unsigned) { return cuMemAlloc_v2(memory, num_bytes); }
API cuMemFreeHost(void *memory) { return cuMemFree_v2(memory); }
API cuMemHostGetDevicePointer_v2(void **there, void *here, unsigned) { *there = here; return SUCCESS; }
API cuMemsetD8_v2(void *memory, unsigned char value, size_t n) { memset(memory, value, n); return SUCCESS; }
API cuMemcpyDtoH_v2(void *to, void *from, size_t n) { memcpy(to, from, n); return SUCCESS; }
API cuMemcpyHtoDAsync_v2(void *to, const void *from, size_t n, void *stream)
{
    return put(stream, [=] { memcpy(to, from, n); });
}
API cuMemcpyDtoHAsync_v2(void *to, void *from, size_t n, void *stream) { return cuMemcpyHtoDAsync_v2(to, from, n, stream); }
API cuMemcpyDtoDAsync_v2(void *to, void *from, size_t n, void *stream) { return cuMemcpyHtoDAsync_v2(to, from, n, stream); }

API cuModuleLoadDataEx(void **module, const void *code, unsigned, void *, void *)
{
    *module = &the_context;
    return memcmp(code, "\x7f" "ELF", 4) ? INVALID_VALUE : SUCCESS;
}
API cuModuleLoadData(void **module, const void *code) { return cuModuleLoadDataEx(module, code, 0, nullptr, nullptr); }
API cuModuleUnload(void *) { return SUCCESS; }
API cuModuleGetFunction(void **function, void *, const char *name)
{
    *function = !strcmp(name, "copy_rows_16") ? (void *)copy_rows_16
                : !strcmp(name, "copy_rows_4") ? (void *)copy_rows_4
                : !strcmp(name, "copy_rows_1") ? (void *)copy_rows_1 : nullptr;
    return *function ? SUCCESS : NOT_FOUND;
}
API cuFuncSetBlockShape(void *, int, int, int) { return SUCCESS; }
API cuLaunchKernel(void *function, unsigned grid_x, unsigned grid_y, unsigned, unsigned block_x, unsigned, unsigned,
                   unsigned, void *stream, void **, void **extra)
{
    std::vector<char> arguments;
    for (; *extra != (void *)0; extra += 2)
        if (*extra == (void *)1)
            arguments.assign((char *)extra[1], (char *)extra[1] + 40);
    return put(stream, [=] {
        gridDim = {(int)grid_x, (int)grid_y};
        blockDim = {(int)block_x, 1};
        if (function == (void *)copy_rows_16)
            run_grid(copy_rows_16, arguments.data());
        else if (function == (void *)copy_rows_4)
            run_grid(copy_rows_4, arguments.data());
        else
            run_grid(copy_rows_1, arguments.data());
    });
}

API cuStreamCreate(void **stream, unsigned) { *stream = new Stream; return SUCCESS; }
API cuStreamDestroy_v2(void *stream) { delete (Stream *)stream; return SUCCESS; }
API cuStreamSynchronize(void *stream) { return wait_for(stream); }
API cuCtxSynchronize() { return SUCCESS; }
API cuStreamWaitEvent(void *, void *, unsigned) { return SUCCESS; }
static double now_ms() { static double clock = 0; return clock += 0.25; }
API cuEventCreate(void **event, unsigned) { *event = new Event; return SUCCESS; }
API cuEventDestroy_v2(void *event) { delete (Event *)event; return SUCCESS; }
API cuEventRecord(void *event, void *stream) { return put(stream, [=] { ((Event *)event)->recorded_at = now_ms(); }); }
API cuEventSynchronize(void *) { return SUCCESS; }
API cuEventElapsedTime_v2(float *ms, void *from, void *to)
{
    *ms = ((Event *)to)->recorded_at - ((Event *)from)->recorded_at;
    return SUCCESS;
}

API cuStreamBeginCapture_v2(void *stream, int)
{
    ((Stream *)stream)->captured.works.clear();
    ((Stream *)stream)->capturing = true;
    return SUCCESS;
}
API cuStreamEndCapture(void *stream, void **graph)
{
    auto *on = (Stream *)stream;
    bool invalid = on->invalid;
    on->capturing = on->invalid = false;
    *graph = invalid ? nullptr : new Graph(on->captured);
    return invalid ? CAPTURE_INVALIDATED : SUCCESS;
}
API cuGraphInstantiateWithFlags(void **executable, void *graph, unsigned long long)
{
    *executable = new Graph(*(Graph *)graph);
    return SUCCESS;
}
API cuGraphDestroy(void *graph) { delete (Graph *)graph; return SUCCESS; }
API cuGraphLaunch(void *executable, void *)
{
    for (auto &work : ((Graph *)executable)->works)
        work();
    return SUCCESS;
}

API cuGetExportTable(const void **, const void *) { return NOT_FOUND; }  // which NVRTC asks for and can do without
API cuGetProcAddress_v2(const char *symbol, void **function, int, uint64_t, int *)
{
    static void *self = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    *function = nullptr;
    for (const char *version : {"_v2", "WithFlags", ""}) {
        char name[200];
        snprintf(name, sizeof name, "%s%s", symbol, version);
        if ((*function = dlsym(self, name)))
            return SUCCESS;
    }
    return NOT_FOUND;
}
