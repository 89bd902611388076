#include "openmp.h"

#include <cstdint>
#include <stdexcept>

#if defined(_WIN32)
#include <windows.h>
#else
#include <dlfcn.h>
#endif

namespace bnb {
namespace {

#if defined(_WIN32)
using Library = HMODULE;

Library loaded(const char* path) { return GetModuleHandleA(path); }
// The runtime of torch's builds for Windows.
Library process() { return GetModuleHandleA("libiomp5md.dll"); }
void* look_up(Library library, const char* name) {
  return library ? reinterpret_cast<void*>(GetProcAddress(library, name)) : nullptr;
}
std::string library_of(void* symbol) {
  constexpr DWORD kFlags =
      GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS | GET_MODULE_HANDLE_EX_FLAG_UNCHANGED_REFCOUNT;
  HMODULE library = nullptr;
  char path[MAX_PATH] = "";
  if (GetModuleHandleExA(kFlags, static_cast<const char*>(symbol), &library))
    GetModuleFileNameA(library, path, MAX_PATH);
  return path;
}
#else
using Library = void*;

Library loaded(const char* path) { return dlopen(path, RTLD_NOLOAD | RTLD_LAZY); }
Library process() { return RTLD_DEFAULT; }
void* look_up(Library library, const char* name) { return dlsym(library, name); }
std::string library_of(void* symbol) {
  Dl_info info{};
  return dladdr(symbol, &info) && info.dli_fname ? info.dli_fname : "";
}
#endif

template <class Function>
void* find(Library library, const char* name, Function*& function) {
  void* symbol = look_up(library, name);
  if (!symbol) {
    throw std::runtime_error(std::string("the OpenMP runtime of torch has no ") + name +
                             "; bnb_core needs a torch build with OpenMP");
  }
  function = reinterpret_cast<Function*>(symbol);
  return symbol;
}

// GNU's interface, which LLVM's runtime has as well but on Windows.
constexpr char kGnu[] = "GOMP_parallel";
struct {
  void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
} gnu;

void parallel_by_gnu(void (*body)(void*), void* data, int threads) {
  gnu.parallel(body, data, static_cast<unsigned>(threads), 0);
}

// LLVM's interface, which Intel's runtime has (LLVM's openmp/runtime/src/kmp.h).
constexpr char kLlvm[] = "__kmpc_fork_call";
struct Location {
  int32_t reserved1, flags, reserved2, reserved3;
  const char* source;
};
constexpr int32_t kFromCompiler = 2;
Location here{0, kFromCompiler, 0, 0, ";bnb_core;parallel_range;0;0;;"};
struct {
  int32_t (*thread)(Location*);
  void (*push_threads)(Location*, int32_t thread, int32_t threads);
  void (*fork)(Location*, int32_t arguments, void (*task)(), ...);
} llvm;

void task(int32_t*, int32_t*, void* body, void* data) { reinterpret_cast<void (*)(void*)>(body)(data); }

void parallel_by_llvm(void (*body)(void*), void* data, int threads) {
  llvm.push_threads(&here, llvm.thread(&here), threads);
  llvm.fork(&here, 2, reinterpret_cast<void (*)()>(task), reinterpret_cast<void*>(body), data);
}

bool has_runtime(Library library) { return library && (look_up(library, kGnu) || look_up(library, kLlvm)); }

}  // namespace

OpenMP find_openmp(const std::string& path) {
  Library library = loaded(path.c_str());
  if (!has_runtime(library)) library = process();
  OpenMP found{};
  void* symbol = nullptr;
  if (look_up(library, kGnu) || !look_up(library, kLlvm)) {
    symbol = find(library, kGnu, gnu.parallel);
    found.parallel = parallel_by_gnu;
  } else {
    symbol = find(library, kLlvm, llvm.fork);
    find(library, "__kmpc_global_thread_num", llvm.thread);
    find(library, "__kmpc_push_num_threads", llvm.push_threads);
    found.parallel = parallel_by_llvm;
  }
  find(library, "omp_get_max_threads", found.max_threads);
  find(library, "omp_get_thread_num", found.thread);
  find(library, "omp_get_num_threads", found.threads);
  find(library, "omp_in_parallel", found.in_parallel);
  found.path = library_of(symbol);
  return found;
}

}  // namespace bnb
