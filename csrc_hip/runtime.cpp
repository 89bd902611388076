// AMD's HIP runtime, found when it is first needed. None is linked: its file is named for ROCm's major
// version, torch's builds for ROCm bring one of their own, and two in a process do not know each other's
// streams.
//
// The functions here bear the runtime's names, so that the kernels and what the compiler adds to them call
// these; runtime.map hides them in the module. Kernels are registered as the module is loaded, which is kept
// for the runtime, so that a module can be loaded where there is none.
//
// One build serves ROCm 5.1 to 7. Symbols are looked up without the versions that they have (hip_4.2, ...),
// and what is called here has had the same signature, structs and constants in all of them. Where AMD changed
// a struct, it gave the function that takes it a new name (hipGetDevicePropertiesR0600) and left the old one
// as it was. hipDeviceProp_t and hipPointerAttribute_t have changed: use hipDeviceGetAttribute.
#include <dlfcn.h>
#include <hip/hip_runtime_api.h>
#include <link.h>

#include <list>
#include <string>
#include <tuple>
#include <vector>

#include "../csrc_shared/gpu_platform.h"

namespace bnb {
namespace {

// CALL(name, parameters, arguments) of what the kernels call, as far as it gives an error.
#define BNB_HIP_CALLS(CALL)                                                                              \
  CALL(hipDeviceGetAttribute, (int* value, hipDeviceAttribute_t attribute, int device),                  \
       (value, attribute, device))                                                                       \
  CALL(hipDriverGetVersion, (int* version), (version))                                                   \
  CALL(hipFree, (void* data), (data))                                                                    \
  CALL(hipFreeAsync, (void* data, hipStream_t stream), (data, stream))                                   \
  CALL(hipFuncSetAttribute, (const void* kernel, hipFuncAttribute attribute, int value),                 \
       (kernel, attribute, value))                                                                       \
  CALL(hipGetDevice, (int* device), (device))                                                            \
  CALL(hipGetLastError, (), ())                                                                          \
  CALL(hipLaunchKernel,                                                                                  \
       (const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared, hipStream_t stream), \
       (kernel, grid, block, arguments, shared, stream))                                                 \
  CALL(hipMallocFromPoolAsync, (void** data, size_t bytes, hipMemPool_t pool, hipStream_t stream),       \
       (data, bytes, pool, stream))                                                                      \
  CALL(hipMallocManaged, (void** data, size_t bytes, unsigned flags), (data, bytes, flags))              \
  CALL(hipMemGetInfo, (size_t* free, size_t* total), (free, total))                                      \
  CALL(hipMemPoolCreate, (hipMemPool_t * pool, const hipMemPoolProps* properties), (pool, properties))   \
  CALL(hipMemPoolSetAttribute, (hipMemPool_t pool, hipMemPoolAttr attribute, void* value),               \
       (pool, attribute, value))                                                                         \
  CALL(hipMemPrefetchAsync, (const void* data, size_t bytes, int device, hipStream_t stream),            \
       (data, bytes, device, stream))                                                                    \
  CALL(hipMemsetAsync, (void* data, int value, size_t bytes, hipStream_t stream),                        \
       (data, value, bytes, stream))                                                                     \
  CALL(hipRuntimeGetVersion, (int* version), (version))                                                  \
  CALL(hipThreadExchangeStreamCaptureMode, (hipStreamCaptureMode * mode), (mode))                        \
  CALL(__hipPushCallConfiguration, (dim3 grid, dim3 block, size_t shared, hipStream_t stream),           \
       (grid, block, shared, stream))                                                                    \
  CALL(__hipPopCallConfiguration, (dim3 * grid, dim3 * block, size_t* shared, hipStream_t* stream),      \
       (grid, block, shared, stream))

struct Runtime {
  std::string path;
  std::string missing;  // what there is not; empty where all is there

#define BNB_POINTER(name, parameters, arguments) hipError_t(*name) parameters = nullptr;
  BNB_HIP_CALLS(BNB_POINTER)
  const char* (*error_string)(hipError_t) = nullptr;
  void** (*register_fat_binary)(const void*) = nullptr;
  void (*register_function)(void** binary, const void* kernel, char*, const char* name, unsigned, void*,
                            void*, void*, void*, int*) = nullptr;
};

// Device code, and the kernels in it with what else the compiler says of each.
struct FatBinary {
  const void* data;
  std::vector<std::tuple<const void*, char*, const char*, unsigned, void*, void*, void*, void*, int*>>
      kernels;
};

// Neither these nor the runtime are ever destroyed: the compiler's code calls until the process has ended.
std::list<FatBinary>& fat_binaries() {
  static auto& binaries = *new std::list<FatBinary>;
  return binaries;
}

constexpr char kName[] = "libamdhip64";
constexpr const char* kFiles[] = {"libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so.5",
                                  "libamdhip64.so"};

int has_runtimes_name(dl_phdr_info* library, size_t, void* found) {
  const std::string path = library->dlpi_name;
  if (path.compare(path.rfind('/') + 1, sizeof(kName) - 1, kName) != 0) return 0;
  *static_cast<std::string*>(found) = path;
  return 1;
}

// The first that the process has loaded, whatever comes after its name: packages rename it.
void* loaded_runtime() {
  std::string path;
  dl_iterate_phdr(has_runtimes_name, &path);
  return path.empty() ? nullptr : dlopen(path.c_str(), RTLD_NOLOAD | RTLD_LAZY);
}

// A runtime of the system, or null with the reasons why those that are there could not be loaded.
void* installed_runtime(std::string& reasons) {
  for (const std::string file : kFiles) {
    if (void* const library = dlopen(file.c_str(), RTLD_LAZY)) return library;
    const std::string reason = dlerror();
    const bool is_absent = reason.compare(0, file.size() + 1, file + ":") == 0;
    if (!is_absent) reasons += " (" + file + ": " + reason + ")";
  }
  return nullptr;
}

std::string path_of(void* symbol) {
  Dl_info info{};
  return dladdr(symbol, &info) && info.dli_fname ? info.dli_fname : "";
}

template <class Function>
void look_up(void* library, const char* name, Function*& function, std::string& missing) {
  void* const symbol = dlsym(library, name);
  if (!symbol) missing += missing.empty() ? name : std::string(", ") + name;
  function = reinterpret_cast<Function*>(symbol);
}

void look_up_all(void* library, Runtime& runtime) {
  std::string missing;
#define BNB_LOOK_UP(name, parameters, arguments) look_up(library, #name, runtime.name, missing);
  BNB_HIP_CALLS(BNB_LOOK_UP)
  look_up(library, "hipGetErrorString", runtime.error_string, missing);
  look_up(library, "__hipRegisterFatBinary", runtime.register_fat_binary, missing);
  look_up(library, "__hipRegisterFunction", runtime.register_function, missing);
  runtime.path = path_of(reinterpret_cast<void*>(runtime.register_fat_binary));
  if (!missing.empty())
    runtime.missing = "the HIP runtime " + runtime.path + " has no " + missing + "; ROCm 5.1 and newer have";
}

Runtime find_runtime() {
  Runtime runtime;
  std::string reasons;
  void* library = loaded_runtime();
  if (!library) library = installed_runtime(reasons);
  if (!library) {
    runtime.missing =
        "there is no HIP runtime: this process has loaded no libamdhip64, and none of libamdhip64.so.7, "
        ".so.6, .so.5 and libamdhip64.so could be loaded" +
        reasons + "; install a torch that is built for ROCm, which brings one, or ROCm";
    return runtime;
  }
  look_up_all(library, runtime);
  if (!runtime.missing.empty()) return runtime;
  for (const FatBinary& binary : fat_binaries()) {
    void** const registered = runtime.register_fat_binary(binary.data);
    const auto add = [&](auto... kernel) { runtime.register_function(registered, kernel...); };
    for (const auto& kernel : binary.kernels) std::apply(add, kernel);
  }
  return runtime;
}

const Runtime& runtime() {
  static const Runtime& found = *new Runtime(find_runtime());
  return found;
}

// What every call gives where there is no runtime; hipGetErrorString tells the rest.
constexpr hipError_t kMissing = hipErrorSharedObjectInitFailed;

}  // namespace

const char* missing_runtime() { return runtime().missing.empty() ? nullptr : runtime().missing.c_str(); }
const char* runtime_path() { return runtime().path.c_str(); }

}  // namespace bnb

extern "C" {

#define BNB_FORWARD(name, parameters, arguments)                         \
  hipError_t name parameters {                                           \
    const bnb::Runtime& found = bnb::runtime();                          \
    return found.missing.empty() ? found.name arguments : bnb::kMissing; \
  }
BNB_HIP_CALLS(BNB_FORWARD)

const char* hipGetErrorString(hipError_t error) {
  const bnb::Runtime& found = bnb::runtime();
  return found.missing.empty() ? found.error_string(error) : found.missing.c_str();
}

void** __hipRegisterFatBinary(const void* data) {
  bnb::fat_binaries().push_back({data, {}});
  return reinterpret_cast<void**>(&bnb::fat_binaries().back());
}

void __hipRegisterFunction(void** binary, const void* kernel, char* device_name, const char* name,
                           unsigned thread_limit, void* thread, void* block, void* block_size,
                           void* grid_size, int* wave_size) {
  reinterpret_cast<bnb::FatBinary*>(binary)->kernels.emplace_back(
      kernel, device_name, name, thread_limit, thread, block, block_size, grid_size, wave_size);
}

// Called as the process ends, when the runtime may have ended before; the module is never unloaded (-z
// nodelete).
void __hipUnregisterFatBinary(void**) {}
}
