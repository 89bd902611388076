// What an OpenMP runtime of LLVM's interface has of the functions that the kernels call, and none of GNU's.
#include <cstdarg>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

constexpr int kThreads = 3;
thread_local int number = 0, team = 1;
int wanted = 1;

}  // namespace

extern "C" {

int forks = 0;

int omp_get_max_threads() { return kThreads; }
int omp_get_thread_num() { return number; }
int omp_get_num_threads() { return team; }
int omp_in_parallel() { return team > 1; }

int32_t __kmpc_global_thread_num(void*) { return number; }
void __kmpc_push_num_threads(void*, int32_t, int32_t threads) { wanted = threads; }

void __kmpc_fork_call(void*, int32_t, void (*task)(int32_t*, int32_t*, void*, void*), ...) {
  va_list arguments;
  va_start(arguments, task);
  void* const first = va_arg(arguments, void*);
  void* const second = va_arg(arguments, void*);
  va_end(arguments);
  forks++;
  const int threads = wanted;
  const auto member = [&](int32_t thread) {
    number = thread;
    team = threads;
    task(&thread, &thread, first, second);
    number = 0;
    team = 1;
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; thread++) others.emplace_back(member, thread);
  member(0);
  for (std::thread& other : others) other.join();
}
}
