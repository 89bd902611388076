// A flow of control with a stack of its own; switching to another one costs some twenty instructions.
#pragma once

#include <cstddef>

namespace bnb::simulator {

class Fiber {
 public:
  // The flow of the calling OS thread itself.
  Fiber();
  // A new one, which runs body(context) once it is switched to; body never returns.
  Fiber(void (*body)(void*), void* context);
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Leaves `from`, which is running, and goes on with `to`, on the same OS thread.
  static void switch_over(Fiber& from, Fiber& to);

 private:
  static void start(Fiber* self);
  void prepare_stack();

  void (*body_)(void*) = nullptr;
  void* context_ = nullptr;
  void* stack_pointer_ = nullptr;
  char* mapping_ = nullptr;  // guard page and stack, null for an OS thread
  char* stack_ = nullptr;
  size_t stack_bytes_ = 0;
  [[maybe_unused]] void* sanitizer_fiber_ = nullptr;
  [[maybe_unused]] void* fake_stack_ = nullptr;
};

}  // namespace bnb::simulator
