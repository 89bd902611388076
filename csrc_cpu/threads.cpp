#include "threads.h"

#include <dlfcn.h>

#include <algorithm>
#include <stdexcept>
#include <string>

namespace bnb {
namespace {

struct OpenMP {
  void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
  int (*max_threads)();
  int (*thread)();
  int (*threads)();
  int (*in_parallel)();
  std::string path;
};

OpenMP openmp{};

template <class Function>
void* find(void* library, const char* name, Function*& function) {
  void* symbol = dlsym(library, name);
  if (!symbol) {
    throw std::runtime_error(std::string("the OpenMP runtime of torch has no ") + name +
                             "; bnb_core needs a torch build with OpenMP");
  }
  function = reinterpret_cast<Function*>(symbol);
  return symbol;
}

struct Job {
  int64_t n;
  RangeBody body;
  void* context;
};

void run_part(void* data) {
  const Job& job = *static_cast<const Job*>(data);
  const int64_t threads = openmp.threads();
  const int64_t thread = openmp.thread();
  const int64_t part = job.n / threads;
  const int64_t longer = job.n % threads;
  const int64_t begin = thread * part + std::min(thread, longer);
  const int64_t end = begin + part + (thread < longer);
  if (begin < end) job.body(job.context, begin, end);
}

}  // namespace

void set_openmp(const char* path) {
  void* library = dlopen(path, RTLD_NOLOAD | RTLD_LAZY);
  if (!library || !dlsym(library, "GOMP_parallel")) library = RTLD_DEFAULT;
  OpenMP found{};
  void* symbol = find(library, "GOMP_parallel", found.parallel);
  find(library, "omp_get_max_threads", found.max_threads);
  find(library, "omp_get_thread_num", found.thread);
  find(library, "omp_get_num_threads", found.threads);
  find(library, "omp_in_parallel", found.in_parallel);
  Dl_info info{};
  if (dladdr(symbol, &info) && info.dli_fname) found.path = info.dli_fname;
  openmp = found;
}

const char* openmp_path() { return openmp.parallel ? openmp.path.c_str() : nullptr; }

void parallel_range(int64_t n, int64_t grain, RangeBody body, void* context) {
  if (n <= 0) return;
  const int64_t parts = (n - 1) / std::max<int64_t>(grain, 1) + 1;
  const bool serial = parts == 1 || !openmp.parallel || openmp.in_parallel();
  const int64_t threads = serial ? 1 : std::min<int64_t>(openmp.max_threads(), parts);
  if (threads <= 1) return body(context, 0, n);
  Job job{n, body, context};
  openmp.parallel(run_part, &job, static_cast<unsigned>(threads), 0);
}

}  // namespace bnb
