// Functions that NVIDIA's static runtime calls and that glibc 2.34 took from its other libraries into libc,
// in their oldest version: as in oldest_glibc.cpp, but a call goes on with the arguments it has. On an older
// glibc they are found where torch's libraries have loaded them: in libpthread, librt and libdl.

#if defined(__x86_64__)
#define BNB_OLDEST "GLIBC_2.2.5"
#define BNB_OLDEST_DLMOPEN "GLIBC_2.3.4"
#define BNB_GO_ON_WITH(name) "jmp " name "@PLT"
#elif defined(__aarch64__)
#define BNB_OLDEST "GLIBC_2.17"
#define BNB_OLDEST_DLMOPEN "GLIBC_2.17"
#define BNB_GO_ON_WITH(name) "b " name
#endif

#define BNB_OLDEST_VERSION(name, version)               \
  __asm__(".symver oldest_" #name "," #name "@" version \
          "\n"                                          \
          ".text\n"                                     \
          ".globl __wrap_" #name                        \
          "\n"                                          \
          ".hidden __wrap_" #name                       \
          "\n"                                          \
          ".type __wrap_" #name                         \
          ", %function\n"                               \
          "__wrap_" #name ":\n" BNB_GO_ON_WITH("oldest_" #name));

BNB_OLDEST_VERSION(dlclose, BNB_OLDEST)
BNB_OLDEST_VERSION(dlmopen, BNB_OLDEST_DLMOPEN)
BNB_OLDEST_VERSION(dlvsym, BNB_OLDEST)
BNB_OLDEST_VERSION(pthread_condattr_setpshared, BNB_OLDEST)
BNB_OLDEST_VERSION(pthread_create, BNB_OLDEST)
BNB_OLDEST_VERSION(pthread_detach, BNB_OLDEST)
BNB_OLDEST_VERSION(pthread_getspecific, BNB_OLDEST)
BNB_OLDEST_VERSION(pthread_join, BNB_OLDEST)
BNB_OLDEST_VERSION(pthread_key_create, BNB_OLDEST)
BNB_OLDEST_VERSION(pthread_key_delete, BNB_OLDEST)
BNB_OLDEST_VERSION(pthread_kill, BNB_OLDEST)
BNB_OLDEST_VERSION(pthread_mutex_trylock, BNB_OLDEST)
BNB_OLDEST_VERSION(pthread_mutexattr_destroy, BNB_OLDEST)
BNB_OLDEST_VERSION(pthread_mutexattr_init, BNB_OLDEST)
BNB_OLDEST_VERSION(pthread_mutexattr_setpshared, BNB_OLDEST)
BNB_OLDEST_VERSION(pthread_mutexattr_settype, BNB_OLDEST)
BNB_OLDEST_VERSION(pthread_once, BNB_OLDEST)
BNB_OLDEST_VERSION(pthread_rwlock_destroy, BNB_OLDEST)
BNB_OLDEST_VERSION(pthread_rwlock_init, BNB_OLDEST)
BNB_OLDEST_VERSION(pthread_rwlock_rdlock, BNB_OLDEST)
BNB_OLDEST_VERSION(pthread_rwlock_timedrdlock, BNB_OLDEST)
BNB_OLDEST_VERSION(pthread_rwlock_timedwrlock, BNB_OLDEST)
BNB_OLDEST_VERSION(pthread_rwlock_tryrdlock, BNB_OLDEST)
BNB_OLDEST_VERSION(pthread_rwlock_trywrlock, BNB_OLDEST)
BNB_OLDEST_VERSION(pthread_rwlock_unlock, BNB_OLDEST)
BNB_OLDEST_VERSION(pthread_rwlock_wrlock, BNB_OLDEST)
BNB_OLDEST_VERSION(pthread_rwlockattr_destroy, BNB_OLDEST)
BNB_OLDEST_VERSION(pthread_rwlockattr_init, BNB_OLDEST)
BNB_OLDEST_VERSION(pthread_rwlockattr_setpshared, BNB_OLDEST)
BNB_OLDEST_VERSION(pthread_setspecific, BNB_OLDEST)
BNB_OLDEST_VERSION(pthread_spin_destroy, BNB_OLDEST)
BNB_OLDEST_VERSION(pthread_spin_init, BNB_OLDEST)
BNB_OLDEST_VERSION(pthread_spin_lock, BNB_OLDEST)
BNB_OLDEST_VERSION(pthread_spin_trylock, BNB_OLDEST)
BNB_OLDEST_VERSION(pthread_spin_unlock, BNB_OLDEST)
BNB_OLDEST_VERSION(sem_destroy, BNB_OLDEST)
BNB_OLDEST_VERSION(sem_init, BNB_OLDEST)
BNB_OLDEST_VERSION(sem_post, BNB_OLDEST)
BNB_OLDEST_VERSION(sem_timedwait, BNB_OLDEST)
BNB_OLDEST_VERSION(sem_trywait, BNB_OLDEST)
BNB_OLDEST_VERSION(sem_wait, BNB_OLDEST)
BNB_OLDEST_VERSION(shm_open, BNB_OLDEST)
BNB_OLDEST_VERSION(shm_unlink, BNB_OLDEST)
