#include "fiber.h"

#include <pthread.h>
#include <sys/mman.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <new>

#include "sanitizers.h"

#if !defined(__x86_64__) && !defined(__aarch64__)
#error "the simulator switches stacks on x86-64 and AArch64 only; add the switch of this machine below"
#endif

// bnb_switch_stack(void** from, void* to): pushes what a call must preserve, stores the stack pointer, and
// returns to where the other stack was left. Most often that is the same place of the same functions, which
// the processor therefore predicts. bnb_start_stack: where a fresh stack begins; calls the function in one
// preserved register with another.
extern "C" {
void bnb_switch_stack(void** from, void* to) __attribute__((visibility("hidden")));
void bnb_start_stack() __attribute__((visibility("hidden")));
}

#if defined(__x86_64__)
asm(R"(
  .text
  .p2align 4
  .globl bnb_switch_stack
  .hidden bnb_switch_stack
  .type bnb_switch_stack, @function
bnb_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  retq
  .size bnb_switch_stack, .-bnb_switch_stack

  .globl bnb_start_stack
  .hidden bnb_start_stack
  .type bnb_start_stack, @function
bnb_start_stack:
  movq %r12, %rdi
  jmpq *%r13
  .size bnb_start_stack, .-bnb_start_stack
)");
#else
asm(R"(
  .text
  .p2align 4
  .globl bnb_switch_stack
  .hidden bnb_switch_stack
  .type bnb_switch_stack, %function
bnb_switch_stack:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
  .size bnb_switch_stack, .-bnb_switch_stack

  .globl bnb_start_stack
  .hidden bnb_start_stack
  .type bnb_start_stack, %function
bnb_start_stack:
  mov x30, xzr
  mov x0, x19
  br x20
  .size bnb_start_stack, .-bnb_start_stack
)");
#endif

namespace bnb::simulator {
namespace {

constexpr size_t kPage = 1 << 16;  // the largest page size in use
#if defined(BNB_SIMULATOR_ASAN) || defined(BNB_SIMULATOR_TSAN)
constexpr size_t kStackBytes = 4 * kPage;
#else
constexpr size_t kStackBytes = 2 * kPage;
#endif

// Stacks start at different offsets in their pages, or all of them would share a few sets of the cache.
size_t next_offset() {
  static std::atomic<size_t> fibers{0};
  return fibers.fetch_add(1, std::memory_order_relaxed) % 64 * 192;
}

}  // namespace

Fiber::Fiber() {
#if defined(BNB_SIMULATOR_ASAN)
  pthread_attr_t attributes;
  void* stack = nullptr;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &stack, &stack_bytes_);
  pthread_attr_destroy(&attributes);
  stack_ = static_cast<char*>(stack);
#endif
#if defined(BNB_SIMULATOR_TSAN)
  sanitizer_fiber_ = __tsan_get_current_fiber();
#endif
}

Fiber::Fiber(void (*body)(void*), void* context) : body_(body), context_(context) {
  void* mapping = mmap(nullptr, kPage + kStackBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  mapping_ = static_cast<char*>(mapping);
  mprotect(mapping_, kPage, PROT_NONE);
  stack_ = mapping_ + kPage;
  stack_bytes_ = kStackBytes - next_offset();
  prepare_stack();
#if defined(BNB_SIMULATOR_TSAN)
  sanitizer_fiber_ = __tsan_create_fiber(0);
#endif
}

Fiber::~Fiber() {
  if (!mapping_) return;
#if defined(BNB_SIMULATOR_TSAN)
  __tsan_destroy_fiber(sanitizer_fiber_);
#endif
  munmap(mapping_, kPage + kStackBytes);
}

void Fiber::prepare_stack() {
  auto** top = reinterpret_cast<void**>(stack_ + stack_bytes_);
  auto* self = static_cast<void*>(this);
  auto* start_function = reinterpret_cast<void*>(&Fiber::start);
#if defined(__x86_64__)
  // What bnb_switch_stack pops, below an empty return address.
  void** frame = top - 8;
  std::memset(static_cast<void*>(frame), 0, 8 * sizeof(void*));
  frame[2] = start_function;  // r13
  frame[3] = self;            // r12
  frame[6] = reinterpret_cast<void*>(&bnb_start_stack);
#else
  void** frame = top - 20;
  std::memset(static_cast<void*>(frame), 0, 20 * sizeof(void*));
  frame[0] = self;            // x19
  frame[1] = start_function;  // x20
  frame[11] = reinterpret_cast<void*>(&bnb_start_stack);
#endif
  stack_pointer_ = frame;
}

__attribute__((noinline)) void Fiber::switch_over(Fiber& from, Fiber& to) {
  void** left = &from.stack_pointer_;
  void* target = to.stack_pointer_;
#if defined(BNB_SIMULATOR_ASAN)
  __sanitizer_start_switch_fiber(&from.fake_stack_, to.stack_, to.stack_bytes_);
#endif
#if defined(BNB_SIMULATOR_TSAN)
  __tsan_switch_to_fiber(to.sanitizer_fiber_, __tsan_switch_to_fiber_no_sync);
#endif
  bnb_switch_stack(left, target);
#if defined(BNB_SIMULATOR_ASAN)
  __sanitizer_finish_switch_fiber(from.fake_stack_, nullptr, nullptr);
#endif
}

void Fiber::start(Fiber* self) {
#if defined(BNB_SIMULATOR_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  enter_simulator();
  self->body_(self->context_);
}

}  // namespace bnb::simulator
