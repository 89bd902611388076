// Numeric intrinsics over arrays, for ctypes: each function computes out[i] for i below n.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

extern "C" {

void float_to_half(const float* x, uint16_t* out, int n) {
  for (int i = 0; i < n; ++i) out[i] = __half_as_ushort(__float2half_rn(x[i]));
}
void double_to_half(const double* x, uint16_t* out, int n) {
  for (int i = 0; i < n; ++i) out[i] = __half_as_ushort(__double2half(x[i]));
}
void half_to_float(const uint16_t* x, float* out, int n) {
  for (int i = 0; i < n; ++i) out[i] = __half2float(__ushort_as_half(x[i]));
}
void float_to_bfloat16(const float* x, uint16_t* out, int n) {
  for (int i = 0; i < n; ++i) out[i] = __bfloat16_as_ushort(__float2bfloat16_rn(x[i]));
}
void bfloat16_to_float(const uint16_t* x, float* out, int n) {
  for (int i = 0; i < n; ++i) out[i] = __bfloat162float(__ushort_as_bfloat16(x[i]));
}
void half_product(const uint16_t* x, const uint16_t* y, uint16_t* out, int n) {
  for (int i = 0; i < n; ++i) out[i] = __half_as_ushort(__ushort_as_half(x[i]) * __ushort_as_half(y[i]));
}
void half_sum(const uint16_t* x, const uint16_t* y, uint16_t* out, int n) {
  for (int i = 0; i < n; ++i)
    out[i] = __half_as_ushort(__hadd(__ushort_as_half(x[i]), __ushort_as_half(y[i])));
}
void float_to_int(const float* x, int* out, int n) {
  for (int i = 0; i < n; ++i) out[i] = __float2int_rn(x[i]);
}
void float_to_int_down(const float* x, int* out, int n) {
  for (int i = 0; i < n; ++i) out[i] = __float2int_rd(x[i]);
}
void float_to_unsigned(const float* x, unsigned* out, int n) {
  for (int i = 0; i < n; ++i) out[i] = __float2uint_rz(x[i]);
}
void dot_of_bytes(const int* x, const int* y, int* out, int n) {
  for (int i = 0; i < n; ++i) out[i] = __dp4a(x[i], y[i], i);
}
void permuted_bytes(const unsigned* x, const unsigned* y, unsigned* out, int n) {
  for (int i = 0; i < n; ++i) out[i] = __byte_perm(x[i], y[i], static_cast<unsigned>(i));
}
void reversed_bits(const unsigned* x, unsigned* out, int n) {
  for (int i = 0; i < n; ++i) out[i] = __brev(x[i]);
}
void leading_zeros(const unsigned* x, unsigned* out, int n) {
  for (int i = 0; i < n; ++i) out[i] = static_cast<unsigned>(__clz(static_cast<int>(x[i])));
}
}
