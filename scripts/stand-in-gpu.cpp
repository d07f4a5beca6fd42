// A GPU that is not there: NVIDIA's driver, cuBLAS and cuRAND as far as the program calls them, on the host. For
// scripts/cuda-proof, which makes the three libraries of it.
//
// Memory is the host's, filled with NaN when it is given out, so that what no kernel wrote shows. Our kernels run as in
// their tests, by src/ops/cuda/host.h; those of Candle that our ops need are written out below; products are loops. A launch
// is over when it returns, so the order of two streams on the device is not tested. What the host sees of a stream is late, as it
// is on a GPU: what is copied to page-locked memory is NaN until someone waits, and page-locked memory that is written or freed
// before someone waited for its copies ends the program.
//
//   STAND_IN_KERNELS      a folder with the kernel files' libraries
//   STAND_IN_DRIVER       the CUDA release of the driver, 13000 where it is not said; older ones refuse to read the kernels
//   STAND_IN_CAPABILITY   of the GPU, 80
//   STAND_IN_MEMORY       bytes, 8 GiB
//   STAND_IN_LOG          a file to which the names of launched kernels are added
//   STAND_IN_WAITS        a file to which is added, when the program ends, how often a thread that had launched kernels waited for them
#define CUBLASAPI
#include <cublas_api.h>
#include <cuda.h>
#include <curand.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dirent.h>
#include <dlfcn.h>
#include <functional>
#include <malloc.h>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "../src/ops/cuda/launch.h"

namespace {

long setting(const char *name, long otherwise) {
  const char *text = getenv(name);
  return text ? atol(text) : otherwise;
}

// ---- Candle's kernels -----------------------------------------------------------------------------------------------

struct bf16 {
  uint16_t bits;
  bf16() = default;
  bf16(float x) {
    uint32_t all;
    memcpy(&all, &x, 4);
    bits = (all & 0x7fffffff) > 0x7f800000 ? 0x7fff : uint16_t((all + 0x7fff + (all >> 16 & 1)) >> 16);
  }
  operator float() const {
    uint32_t all = uint32_t(bits) << 16;
    float x;
    memcpy(&x, &all, 4);
    return x;
  }
};

template <typename T> T of(void *argument) { return *static_cast<T *>(argument); }

using Kernel = std::function<void(void **)>;

// Where element `index` of a tensor of these dimensions is.
size_t place(size_t index, size_t count, const size_t *dims, const size_t *strides) {
  size_t at = 0;
  for (size_t d = count; d-- > 0; index /= dims[d]) at += index % dims[d] * strides[d];
  return at;
}

// (count, dimensions, [dims, strides], input, output)
template <typename From, typename To, typename Each> Kernel unary(Each each) {
  return [each](void **a) {
    size_t count = of<size_t>(a[0]), dims = of<size_t>(a[1]);
    const size_t *info = of<const size_t *>(a[2]);
    const From *in = of<const From *>(a[3]);
    To *out = of<To *>(a[4]);
    for (size_t i = 0; i < count; i++) out[i] = each(in[info ? place(i, dims, info, info + dims) : i], a);
  };
}

// (count, dimensions, [dims, strides, strides], left, right, output)
template <typename T, typename Each> Kernel binary(Each each) {
  return [each](void **a) {
    size_t count = of<size_t>(a[0]), dims = of<size_t>(a[1]);
    const size_t *info = of<const size_t *>(a[2]);
    const T *left = of<const T *>(a[3]), *right = of<const T *>(a[4]);
    T *out = of<T *>(a[5]);
    for (size_t i = 0; i < count; i++) {
      size_t l = info ? place(i, dims, info, info + dims) : i, r = info ? place(i, dims, info, info + 2 * dims) : i;
      out[i] = each(left[l], right[r]);
    }
  };
}

// (input, output, rows, columns, elements between rows of either)
template <typename T> void copy2d(void **a) {
  const T *in = of<const T *>(a[0]);
  T *out = of<T *>(a[1]);
  size_t rows = of<uint32_t>(a[2]), columns = of<uint32_t>(a[3]), from = of<uint32_t>(a[4]), to = of<uint32_t>(a[5]);
  for (size_t row = 0; row < rows; row++) memcpy(out + row * to, in + row * from, columns * sizeof(T));
}

// (count, numbers of a result, dimensions, [dims, strides], input, output): the last of the dimensions are those reduced.
// The count is that of the input, or where results are few in numbers that of the output.
template <typename T, typename Each> Kernel reduction(float start, bool of_outputs, Each each) {
  return [start, of_outputs, each](void **a) {
    size_t one = of<size_t>(a[1]), count = of<size_t>(a[0]) * (of_outputs ? one : 1), dims = of<size_t>(a[2]);
    const size_t *info = of<const size_t *>(a[3]);
    const T *in = of<const T *>(a[4]);
    for (size_t i = 0; i < count; i += one) {
      float result = start;
      for (size_t j = i; j < i + one; j++) result = each(result, float(in[info ? place(j, dims, info, info + dims) : j]));
      of<T *>(a[5])[i / one] = result;
    }
  };
}

// (count, dimensions, [dims, strides of the three], mask, where it is set, elsewhere, output)
template <typename T> void where(void **a) {
  size_t count = of<size_t>(a[0]), dims = of<size_t>(a[1]);
  const size_t *info = of<const size_t *>(a[2]);
  for (size_t i = 0; i < count; i++) {
    size_t at[3];
    for (size_t k = 0; k < 3; k++) at[k] = place(i, dims, info, info + (k + 1) * dims);
    of<T *>(a[6])[i] = of<const uint8_t *>(a[3])[at[0]] ? of<const T *>(a[4])[at[1]] : of<const T *>(a[5])[at[2]];
  }
}

// (count, dimensions, the ids' dims and strides, ids, input, output, left, rows, ids' number, right), without gaps
template <typename T> void index_select(void **a) {
  size_t count = of<size_t>(a[0]);
  const uint32_t *ids = of<const uint32_t *>(a[3]);
  const T *in = of<const T *>(a[4]);
  T *out = of<T *>(a[5]);
  size_t rows = of<size_t>(a[7]), chosen = of<size_t>(a[8]), right = of<size_t>(a[9]);
  for (size_t i = 0; i < count; i++) {
    size_t from = (i / (chosen * right) * rows + ids[i / right % chosen]) * right + i % right;
    out[i] = in[from];
  }
}

// (ids, their number, input, output, left, input's rows, output's rows, right)
void index_add(void **a) {
  const uint32_t *ids = of<const uint32_t *>(a[0]);
  size_t chosen = of<size_t>(a[1]), left = of<size_t>(a[4]), rows = of<size_t>(a[6]), right = of<size_t>(a[7]);
  const float *in = of<const float *>(a[2]);
  float *out = of<float *>(a[3]);
  for (size_t i = 0; i < left * chosen * right; i++)
    out[(i / (chosen * right) * rows + ids[i / right % chosen]) * right + i % right] += in[i];
}

template <typename T> void add_typed(std::map<std::string, Kernel> &all, const std::string &type) {
  auto same = [](T x, void **) { return x; };
  all["ucopy_" + type] = unary<T, T>(same);
  all["affine_" + type] = unary<T, T>([](T x, void **a) { return T(x * of<T>(a[5]) + of<T>(a[6])); });
  all["badd_" + type] = binary<T>([](T x, T y) { return T(x + y); });
  all["bsub_" + type] = binary<T>([](T x, T y) { return T(x - y); });
  all["bmul_" + type] = binary<T>([](T x, T y) { return T(x * y); });
  all["bdiv_" + type] = binary<T>([](T x, T y) { return T(x / y); });
  all["uneg_" + type] = unary<T, T>([](T x, void **) { return T(-x); });
  all["uexp_" + type] = unary<T, T>([](T x, void **) { return T(std::exp(float(x))); });
  all["usqrt_" + type] = unary<T, T>([](T x, void **) { return T(std::sqrt(float(x))); });
  auto sum = [](float x, float y) { return x + y; };
  all["fast_sum_" + type] = reduction<T>(0, false, sum);
  all["fast_sum_small_" + type] = reduction<T>(0, true, sum);
  all["fast_max_" + type] = reduction<T>(-INFINITY, false, [](float x, float y) { return std::max(x, y); });
  all["where_u8_" + type] = where<T>;
  all["copy2d_" + type] = copy2d<T>;
  all["is_u32_" + type] = index_select<T>;
  // (count, dimensions, [dims, strides], number, output)
  all["const_set_" + type] = [](void **a) {
    size_t dims = of<size_t>(a[1]);
    const size_t *info = of<const size_t *>(a[2]);
    for (size_t i = 0; i < of<size_t>(a[0]); i++) of<T *>(a[4])[info ? place(i, dims, info, info + dims) : i] = of<T>(a[3]);
  };
  // (output, number, count)
  all["fill_" + type] = [](void **a) {
    for (size_t i = 0; i < of<size_t>(a[2]); i++) of<T *>(a[0])[i] = of<T>(a[1]);
  };
}

const std::map<std::string, Kernel> &of_candle() {
  static const std::map<std::string, Kernel> all = [] {
    std::map<std::string, Kernel> all;
    add_typed<float>(all, "f32");
    add_typed<bf16>(all, "bf16");
    add_typed<uint32_t>(all, "u32");
    all["cast_f32_bf16"] = unary<float, bf16>([](float x, void **) { return x; });
    all["cast_bf16_f32"] = unary<bf16, float>([](float x, void **) { return x; });
    all["ia_u32_f32"] = index_add;
    return all;
  }();
  return all;
}

// ---- Ours -----------------------------------------------------------------------------------------------------------

typedef int (*Entry)(const shim::Launch *, void *const *, const size_t *, size_t);
typedef const char *(*Message)();

const std::vector<void *> &libraries() {
  static const std::vector<void *> all = [] {
    std::vector<void *> all;
    const char *folder = getenv("STAND_IN_KERNELS");
    DIR *open = folder ? opendir(folder) : nullptr;
    for (dirent *file; open && (file = readdir(open));)
      if (strstr(file->d_name, ".so"))
        if (void *one = dlopen((std::string(folder) + "/" + file->d_name).c_str(), RTLD_NOW | RTLD_LOCAL)) all.push_back(one);
    return all;
  }();
  return all;
}

struct Function {
  std::string name;
  Entry entry = nullptr;
  void *library = nullptr;
  const Kernel *candles = nullptr;
  size_t shared = 48 << 10;  // the most that a launch may ask for, until someone asks for more
};

std::mutex one_at_a_time;

// ---- Memory ---------------------------------------------------------------------------------------------------------

std::mutex counting;
size_t taken = 0;

size_t memory() { return setting("STAND_IN_MEMORY", 8L << 30); }

CUresult give(CUdeviceptr *out, size_t bytes) {
  std::lock_guard<std::mutex> lock(counting);
  if (taken + bytes > memory()) return CUDA_ERROR_OUT_OF_MEMORY;
  void *data = aligned_alloc(256, (bytes + 255) / 256 * 256);
  if (!data) return CUDA_ERROR_OUT_OF_MEMORY;
  memset(data, 0xff, bytes);
  taken += malloc_usable_size(data);
  *out = CUdeviceptr(data);
  return CUDA_SUCCESS;
}

CUresult take(CUdeviceptr data) {
  std::lock_guard<std::mutex> lock(counting);
  taken -= malloc_usable_size(reinterpret_cast<void *>(data));
  free(reinterpret_cast<void *>(data));
  return CUDA_SUCCESS;
}

CUresult copy(void *to, const void *from, size_t bytes) {
  memcpy(to, from, bytes);
  return CUDA_SUCCESS;
}

// ---- What the host sees late ----------------------------------------------------------------------------------------

// Page-locked memory, and what is under way there: until a stream is behind a copy, the host's bytes must stay `now`; then they
// are `then`. A stream is a thread's own.
struct UnderWay {
  std::thread::id stream;
  unsigned long long number;
  char *at;
  std::vector<char> now, then;
};
std::mutex late;
std::map<char *, size_t> locked_memory;
std::vector<UnderWay> under_way;
unsigned long long numbers = 0;

// What a stream had done when it was recorded.
struct Mark { std::thread::id stream; unsigned long long number = 0; };

bool is_locked(const void *at) {
  auto after = locked_memory.upper_bound(static_cast<char *>(const_cast<void *>(at)));
  return after != locked_memory.begin() && at < std::prev(after)->first + std::prev(after)->second;
}

void check(const UnderWay &one) {
  if (!memcmp(one.at, one.now.data(), one.now.size())) return;
  fprintf(stderr, "stand-in GPU: %zu bytes of page-locked memory were written while a copy of them was under way\n", one.now.size());
  abort();
}

// A stream is behind its first `number` copies, or all, and the host has waited for that.
void behind(std::thread::id stream, unsigned long long number) {
  auto is_done = [&](UnderWay &one) {
    if (one.stream != stream || one.number > number) return false;
    check(one);
    memcpy(one.at, one.then.data(), one.then.size());
    return true;
  };
  under_way.erase(std::remove_if(under_way.begin(), under_way.end(), is_done), under_way.end());
}

// Memory that this stream uses next: what itself did there before is done by then.
void follows(char *at, size_t bytes) {
  auto is_before = [&](UnderWay &one) {
    if (at >= one.at + one.now.size() || one.at >= at + bytes) return false;
    if (one.stream != std::this_thread::get_id()) {
      fprintf(stderr, "stand-in GPU: a stream uses page-locked memory before it is behind another's copy\n");
      abort();
    }
    check(one);
    memcpy(one.at, one.then.data(), one.then.size());
    return true;
  };
  under_way.erase(std::remove_if(under_way.begin(), under_way.end(), is_before), under_way.end());
}

void is_under_way(char *at, std::vector<char> now, std::vector<char> then) {
  under_way.push_back({std::this_thread::get_id(), ++numbers, at, std::move(now), std::move(then)});
}

template <typename T> CUresult handle(T *out) {
  *out = reinterpret_cast<T>(malloc(1));
  return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

// ---- The driver -----------------------------------------------------------------------------------------------------

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { return *version = setting("STAND_IN_DRIVER", 13000), CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { return *count = 1, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int index) { return *device = 0, index ? CUDA_ERROR_INVALID_DEVICE : CUDA_SUCCESS; }
CUresult cuDeviceGetName(char *name, int length, CUdevice) { return snprintf(name, length, "Stand-in"), CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice) {
  int capability = setting("STAND_IN_CAPABILITY", 80);
  *value = which == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR   ? capability / 10
           : which == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR ? capability % 10
                                                                   : 1;
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice) { return handle(context); }
CUresult cuDevicePrimaryCtxRelease_v2(CUdevice) { return CUDA_SUCCESS; }
static thread_local CUcontext current;
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = current, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return current = context, CUDA_SUCCESS; }
// How often a thread stood still behind kernels of its own; of waits that follow each other without a launch the first counts.
static thread_local bool has_launched;
static struct Waits {
  std::atomic<unsigned long> all;
  void count() {
    if (has_launched) all++;
    has_launched = false;
  }
  ~Waits() {
    if (const char *log = getenv("STAND_IN_WAITS"))
      if (FILE *file = fopen(log, "a")) fprintf(file, "%lu\n", all.load()), fclose(file);
  }
} waits;
static Mark *mark(CUevent event) { return reinterpret_cast<Mark *>(event); }
CUresult cuEventCreate(CUevent *event, unsigned) { return *event = reinterpret_cast<CUevent>(new Mark), CUDA_SUCCESS; }
CUresult cuEventDestroy_v2(CUevent event) { return delete mark(event), CUDA_SUCCESS; }
CUresult cuEventRecord(CUevent event, CUstream) {
  std::lock_guard<std::mutex> lock(late);
  return *mark(event) = {std::this_thread::get_id(), numbers}, CUDA_SUCCESS;
}
CUresult cuEventSynchronize(CUevent event) {
  std::lock_guard<std::mutex> lock(late);
  waits.count();
  return behind(mark(event)->stream, mark(event)->number), CUDA_SUCCESS;
}
// One that was recorded is done as soon as nothing of it is under way: nobody who asks gets there by asking.
CUresult cuEventQuery(CUevent event) {
  std::lock_guard<std::mutex> lock(late);
  for (const UnderWay &one : under_way)
    if (one.stream == mark(event)->stream && one.number <= mark(event)->number) return CUDA_ERROR_NOT_READY;
  return CUDA_SUCCESS;
}
CUresult cuStreamSynchronize(CUstream) {
  std::lock_guard<std::mutex> lock(late);
  waits.count();
  return behind(std::this_thread::get_id(), numbers), CUDA_SUCCESS;
}
CUresult cuStreamWaitEvent(CUstream, CUevent event, unsigned) {
  std::lock_guard<std::mutex> lock(late);
  for (UnderWay &one : under_way)
    if (one.stream == mark(event)->stream && one.number <= mark(event)->number) one.stream = std::this_thread::get_id();
  return CUDA_SUCCESS;
}
// On a thread that is none of the program's, as the driver has it. By then all copies before it are done.
CUresult cuLaunchHostFunc(CUstream, CUhostFn call, void *data) {
  {
    std::lock_guard<std::mutex> lock(late);
    for (UnderWay &one : under_way)
      if (one.stream == std::this_thread::get_id()) check(one), memcpy(one.at, one.then.data(), one.then.size()), one.now = one.then;
  }
  return std::thread(call, data).join(), CUDA_SUCCESS;
}
CUresult cuStreamDestroy_v2(CUstream) { return CUDA_SUCCESS; }
CUresult cuStreamIsCapturing(CUstream, CUstreamCaptureStatus *status) {
  return *status = CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}
CUresult cuMemGetInfo_v2(size_t *free, size_t *total) {
  *total = memory();
  *free = *total - taken;
  return CUDA_SUCCESS;
}
// No pool: what is freed is the host's again.
CUresult cuDeviceGetDefaultMemPool(CUmemoryPool *pool, CUdevice) { return *pool = nullptr, CUDA_SUCCESS; }
CUresult cuMemPoolSetAttribute(CUmemoryPool, CUmemPool_attribute, void *) { return CUDA_SUCCESS; }
CUresult cuMemPoolGetAttribute(CUmemoryPool, CUmemPool_attribute, void *value) {
  return *static_cast<uint64_t *>(value) = 0, CUDA_SUCCESS;
}
CUresult cuMemAlloc_v2(CUdeviceptr *out, size_t bytes) { return give(out, bytes); }
CUresult cuMemAllocAsync(CUdeviceptr *out, size_t bytes, CUstream) { return give(out, bytes); }
// The streams of threads are theirs of a context.
CUresult cuMemFree_v2(CUdeviceptr data) { return current ? take(data) : CUDA_ERROR_INVALID_CONTEXT; }
CUresult cuMemFreeAsync(CUdeviceptr data, CUstream) { return cuMemFree_v2(data); }
CUresult cuMemHostAlloc(void **out, size_t bytes, unsigned) {
  *out = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  std::lock_guard<std::mutex> lock(late);
  if (*out) locked_memory[static_cast<char *>(*out)] = bytes;
  return *out ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}
CUresult cuMemFreeHost(void *data) {
  std::lock_guard<std::mutex> lock(late);
  char *at = static_cast<char *>(data);
  for (const UnderWay &one : under_way)
    if (one.at >= at && one.at < at + locked_memory[at]) {
      fprintf(stderr, "stand-in GPU: page-locked memory is freed while a copy of it is under way\n");
      abort();
    }
  locked_memory.erase(at);
  return free(data), CUDA_SUCCESS;
}
// What is not page-locked is read before the call returns, and written before it returns.
CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t bytes, CUstream) {
  std::lock_guard<std::mutex> lock(late);
  if (is_locked(from)) {
    char *at = static_cast<char *>(const_cast<void *>(from));
    follows(at, bytes);
    is_under_way(at, {at, at + bytes}, {at, at + bytes});
  }
  return copy(reinterpret_cast<void *>(to), from, bytes);
}
CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t bytes, CUstream) {
  std::lock_guard<std::mutex> lock(late);
  if (!is_locked(to)) {
    waits.count();
    behind(std::this_thread::get_id(), numbers);
    return copy(to, reinterpret_cast<void *>(from), bytes);
  }
  char *at = static_cast<char *>(to), *source = reinterpret_cast<char *>(from);
  follows(at, bytes);
  memset(at, 0xff, bytes);
  is_under_way(at, std::vector<char>(bytes, char(0xff)), {source, source + bytes});
  return CUDA_SUCCESS;
}
CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream) {
  return copy(reinterpret_cast<void *>(to), reinterpret_cast<void *>(from), bytes);
}
CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t bytes, CUstream) {
  return memset(reinterpret_cast<void *>(to), value, bytes), CUDA_SUCCESS;
}

// A module has the names of its entries.
struct CUmod_st { std::set<std::string> entries; };

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  if (setting("STAND_IN_DRIVER", 13000) < 13000) return CUDA_ERROR_UNSUPPORTED_PTX_VERSION;
  *module = new CUmod_st;
  const char *at = static_cast<const char *>(image);
  while ((at = strstr(at, ".entry "))) {
    at += strlen(".entry ");
    (*module)->entries.insert(std::string(at, strcspn(at, "( \n")));
  }
  return CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) { return delete module, CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *out, CUmodule module, const char *name) {
  if (!module->entries.count(name)) return CUDA_ERROR_NOT_FOUND;
  Function *found = new Function{name};
  auto candles = of_candle().find(name);
  if (candles != of_candle().end()) found->candles = &candles->second;
  for (void *library : libraries())
    if (void *entry = dlsym(library, ("host_" + found->name).c_str())) found->entry = Entry(entry), found->library = library;
  *out = reinterpret_cast<CUfunction>(found);
  return CUDA_SUCCESS;
}
CUresult cuModuleLoad(CUmodule *, const char *) { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult cuMemcpyPeerAsync(CUdeviceptr, CUcontext, CUdeviceptr, CUcontext, size_t, CUstream) { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult cuCtxDestroy_v2(CUcontext) { return CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute which, int value) {
  if (which == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) reinterpret_cast<Function *>(function)->shared = value;
  return CUDA_SUCCESS;
}
CUresult cuLaunchKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned x, unsigned y, unsigned z,
                        unsigned shared, CUstream, void **arguments, void **) {
  std::lock_guard<std::mutex> lock(one_at_a_time);
  has_launched = true;
  const Function &known = *reinterpret_cast<Function *>(function);
  if (const char *log = getenv("STAND_IN_LOG"))
    if (FILE *file = fopen(log, "a")) fprintf(file, "%s\n", known.name.c_str()), fclose(file);
  if (shared > known.shared) {
    fprintf(stderr, "stand-in GPU: %s: %u bytes of shared memory, and none beyond %zu were asked for\n", known.name.c_str(), shared,
            known.shared);
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (known.candles) return (*known.candles)(arguments), CUDA_SUCCESS;
  if (!known.entry) {
    fprintf(stderr, "stand-in GPU: kernel %s is not known here\n", known.name.c_str());
    return CUDA_ERROR_NOT_SUPPORTED;
  }
  shim::Launch launch{{gx, gy, gz}, {x, y, z}, shared, 0, 0, 0};
  if (known.entry(&launch, arguments, nullptr, 0) == 0) return CUDA_SUCCESS;
  fprintf(stderr, "stand-in GPU: %s: %s\n", known.name.c_str(), Message(dlsym(known.library, "host_message"))());
  return CUDA_ERROR_LAUNCH_FAILED;
}

static CUresult answer(const char **out, const char *text) { return *out = text, CUDA_SUCCESS; }
CUresult cuGetErrorName(CUresult, const char **out) { return answer(out, "an error of the stand-in GPU"); }
CUresult cuGetErrorString(CUresult, const char **out) { return answer(out, "an error of the stand-in GPU"); }

// ---- cuBLAS ---------------------------------------------------------------------------------------------------------

cublasStatus_t cublasSetMathMode(cublasHandle_t, cublasMath_t) { return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasCreate_v2(cublasHandle_t *out) { return handle(out), CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasDestroy_v2(cublasHandle_t one) { return free(one), CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasSetStream_v2(cublasHandle_t, cudaStream_t) { return CUBLAS_STATUS_SUCCESS; }

static float load(const void *data, cudaDataType type, size_t at) {
  return type == CUDA_R_32F ? static_cast<const float *>(data)[at] : float(static_cast<const bf16 *>(data)[at]);
}

cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t, cublasOperation_t of_a, cublasOperation_t of_b, int m, int n, int k,
                                          const void *alpha, const void *a, cudaDataType type_a, int lda, long long step_a,
                                          const void *b, cudaDataType type_b, int ldb, long long step_b, const void *beta,
                                          void *c, cudaDataType type_c, int ldc, long long step_c, int count,
                                          cublasComputeType_t, cublasGemmAlgo_t) {
  for (cudaDataType type : {type_a, type_b, type_c})
    if (type != CUDA_R_32F && type != CUDA_R_16BF) return CUBLAS_STATUS_NOT_SUPPORTED;
  // The product by which a GPU is measured, whose numbers nobody reads.
  if (size_t(m) * n * k > size_t(1) << 36) return CUBLAS_STATUS_SUCCESS;
  float by = *static_cast<const float *>(alpha), keep = *static_cast<const float *>(beta);
  std::vector<float> left(size_t(m) * k), right(size_t(k) * n);
  for (long long one = 0; one < count; one++) {
    for (size_t i = 0; i < size_t(m); i++)
      for (size_t l = 0; l < size_t(k); l++)
        left[i * k + l] = load(a, type_a, one * step_a + (of_a == CUBLAS_OP_N ? i + l * lda : l + i * lda));
    for (size_t j = 0; j < size_t(n); j++)
      for (size_t l = 0; l < size_t(k); l++)
        right[j * k + l] = load(b, type_b, one * step_b + (of_b == CUBLAS_OP_N ? l + j * ldb : j + l * ldb));
    for (size_t j = 0; j < size_t(n); j++)
      for (size_t i = 0; i < size_t(m); i++) {
        float sum = 0;
        for (size_t l = 0; l < size_t(k); l++) sum += left[i * k + l] * right[j * k + l];
        size_t at = one * step_c + i + j * ldc;
        // What is multiplied with 0 need not be a number.
        float value = by * sum + (keep != 0 ? keep * load(c, type_c, at) : 0);
        if (type_c == CUDA_R_32F) static_cast<float *>(c)[at] = value;
        else static_cast<bf16 *>(c)[at] = value;
      }
  }
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGemmEx(cublasHandle_t one, cublasOperation_t of_a, cublasOperation_t of_b, int m, int n, int k,
                            const void *alpha, const void *a, cudaDataType type_a, int lda, const void *b, cudaDataType type_b,
                            int ldb, const void *beta, void *c, cudaDataType type_c, int ldc, cublasComputeType_t compute,
                            cublasGemmAlgo_t algorithm) {
  return cublasGemmStridedBatchedEx(one, of_a, of_b, m, n, k, alpha, a, type_a, lda, 0, b, type_b, ldb, 0, beta, c, type_c, ldc,
                                    0, 1, compute, algorithm);
}

cublasStatus_t cublasDgemmStridedBatched(cublasHandle_t, cublasOperation_t, cublasOperation_t, int, int, int, const double *,
                                         const double *, int, long long, const double *, int, long long, const double *, double *,
                                         int, long long, int) {
  return CUBLAS_STATUS_NOT_SUPPORTED;
}

// ---- cuRAND, of which nothing is drawn ------------------------------------------------------------------------------

curandStatus_t curandCreateGenerator(curandGenerator_t *out, curandRngType_t) { return handle(out), CURAND_STATUS_SUCCESS; }
curandStatus_t curandDestroyGenerator(curandGenerator_t one) { return free(one), CURAND_STATUS_SUCCESS; }
curandStatus_t curandSetPseudoRandomGeneratorSeed(curandGenerator_t, unsigned long long) { return CURAND_STATUS_SUCCESS; }
curandStatus_t curandSetStream(curandGenerator_t, cudaStream_t) { return CURAND_STATUS_SUCCESS; }

}  // extern "C"
