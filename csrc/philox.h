// Normals named by a counter: Philox4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011) and
// Box-Muller, the same on host and device. avfast/ops/diffuse_patches.py says what counter, key and words mean.
//
// Scalar functions without branches or calls, so that a compiler makes vector code of a loop over them. The logarithm,
// sine and cosine are polynomials of their own (relative errors 2e-7, 3e-9, 3e-8): those of C libraries do not vectorise
// everywhere, and the fast ones of a GPU lose all digits of log(u) where u is nearly 1. The Triton kernel in
// kernels/diffuse_patches.py holds the same coefficients.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define AVFAST_INLINE __host__ __device__ __forceinline__
#else
#define AVFAST_INLINE inline __attribute__((always_inline))
#endif

namespace avfast {

AVFAST_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

AVFAST_INLINE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// Ten rounds; c becomes the four random words.
AVFAST_INLINE void philox(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(c0) * 0xD2511F53u, b = uint64_t(c2) * 0xCD9E8D57u;
    c0 = uint32_t(b >> 32) ^ c1 ^ k0;
    c1 = uint32_t(b);
    c2 = uint32_t(a >> 32) ^ c3 ^ k1;
    c3 = uint32_t(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// -2 log u of u = ((x >> 8) + 1) 2^-24, in (0, 1].
AVFAST_INLINE float minus_two_log(uint32_t x) {
  const uint32_t bits = bits_of(float(int32_t(x >> 8) + 1));
  const int32_t exponent = int32_t(bits - 0x3F3504F3u) >> 23;  // of u 2^24 = m 2^exponent, m from sqrt(1/2) to sqrt(2)
  const float f = float_of(bits - (uint32_t(exponent) << 23)) - 1.0f;
  float p = 0.20213785767555237f;
  p = p * f - 0.32445159554481506f;
  p = p * f + 0.34501659870147705f;
  p = p * f - 0.39800330996513367f;
  p = p * f + 0.4993981719017029f;
  p = p * f - 0.6667011976242065f;
  p = p * f + 1.0000072717666626f;
  p = p * f - 1.9999998807907104f;
  return float(24 - exponent) * 1.3862943611198906f + f * p;
}

// Cosine and sine of 2 pi x / 2^32: the two bits on top of x + 2^29 are the nearest quarter turn, exactly, the other
// 30 what is left of it, -1 to 1 in units of pi / 4.
AVFAST_INLINE void turn(uint32_t x, float& cosine, float& sine) {
  const uint32_t quarter = x + 0x20000000u;
  const float y = float(int32_t(x << 2)) * 4.656612873077393e-10f, w = y * y;
  float s = -3.5954507e-05f;
  s = s * w + 2.49000713e-03f;
  s = s * w - 8.07454348e-02f;
  s = s * w + 7.85398161e-01f;
  s = s * y;
  float c = -3.18880508e-04f;
  c = c * w + 1.58499153e-02f;
  c = c * w - 3.08424254e-01f;
  c = c * w + 9.99999972e-01f;
  const bool swap = (quarter & 0x40000000u) != 0;
  cosine = float_of(bits_of(swap ? s : c) ^ ((quarter + 0x40000000u) & 0x80000000u));
  sine = float_of(bits_of(swap ? c : s) ^ (quarter & 0x80000000u));
}

// Two independent standard normals.
AVFAST_INLINE void normal_pair(uint32_t x, uint32_t y, float& a, float& b) {
  const float radius = sqrtf(minus_two_log(x));
  float cosine, sine;
  turn(y, cosine, sine);
  a = radius * cosine;
  b = radius * sine;
}

}  // namespace avfast
