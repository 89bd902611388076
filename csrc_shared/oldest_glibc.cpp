// Functions of which glibc has a younger version than manylinux_2_28 allows (PEP 600), in their oldest one.
// The linker turns every call of them, those of static libraries too, into a call of these (setup.py:
// --wrap). The younger versions compute the same: they tell of another library to find them in, or leave
// errno alone.

#if defined(__x86_64__)
#define BNB_OLDEST "GLIBC_2.2.5"
#elif defined(__aarch64__)
#define BNB_OLDEST "GLIBC_2.17"
#endif

#define BNB_OLDEST_VERSION(name, result, parameters, arguments)                      \
  extern "C" result oldest_##name parameters;                                        \
  __asm__(".symver oldest_" #name "," #name "@" BNB_OLDEST);                         \
  extern "C" __attribute__((visibility("hidden"))) result __wrap_##name parameters { \
    return oldest_##name arguments;                                                  \
  }

BNB_OLDEST_VERSION(dlopen, void*, (const char* path, int mode), (path, mode))
BNB_OLDEST_VERSION(dlsym, void*, (void* library, const char* name), (library, name))
BNB_OLDEST_VERSION(dlerror, char*, (), ())
BNB_OLDEST_VERSION(dladdr, int, (const void* address, void* info), (address, info))
BNB_OLDEST_VERSION(log, double, (double x), (x))
