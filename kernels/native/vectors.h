// Vectors of the widest float unit the compiler targets, and exp and tanh on them.
//
// GCC vector extensions keep this portable (AVX-512, AVX2, NEON, anything): only the bfloat16 dot product is an
// intrinsic, with a plain fallback. VL floats a vector, PANEL = 2 vectors, MR rows: the register tile of `products.h`,
// MR * 2 accumulators + 2 operands + 1 broadcast within the architecture's vector registers.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int VL = 16, MR = 14;
#elif defined(__AVX2__)
constexpr int VL = 8, MR = 6;
#else
constexpr int VL = 4, MR = 12;
#endif
constexpr int PANEL = 2 * VL;

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef float vfu __attribute__((vector_size(VL * 4), aligned(4)));

static inline vf load(const float* p) { return *reinterpret_cast<const vfu*>(p); }
static inline void store(float* p, vf v) { *reinterpret_cast<vfu*>(p) = v; }
static inline vf splat(float x) { return x - vf{}; }
static inline vf vmax(vf a, vf b) { return a > b ? a : b; }
static inline float as_float(uint32_t bits) { float f; std::memcpy(&f, &bits, 4); return f; }
static inline uint32_t as_bits(float f) { uint32_t bits; std::memcpy(&bits, &f, 4); return bits; }
static inline float widen(uint16_t bf16) { return as_float(uint32_t(bf16) << 16); }

// Round to nearest even, as torch does; NaN stays NaN.
static inline uint16_t narrow(float f) {
    uint32_t bits = as_bits(f);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
    return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef int16_t vi16 __attribute__((vector_size(VL * 2)));

static inline uint32_t largest(vu x) {
    uint32_t found = 0;
    for (int i = 0; i < VL; i++) found = found > x[i] ? found : x[i];
    return found;
}

// e^x for x <= 88, within 1.2 ulp; 0 below -87.3 (a probability under 1.2e-38), -inf included.
// Cody-Waite reduction and the minimax polynomial of Cephes' expf.
static inline vf vexp(vf x) {
    const vf magic = splat(12582912.0f);
    const vf t = x * 1.44269504088896341f + magic;
    const vf n = t - magic;
    vf r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const vi scaled = (vi)p + ((vi)t << 23);
    return x <= splat(-87.3f) ? vf{} : (vf)scaled;  // NaN stays NaN
}

// tanh within 2e-7 of 1: a Taylor polynomial near 0, where 1 - 2 / (e^2x + 1) would lose its digits.
static inline vf vtanh(vf x) {
    const vf magnitude = x < 0.0f ? -x : x;
    const vf bounded = magnitude > 20.0f ? splat(20.0f) : magnitude;
    const vf far = 1.0f - 2.0f / (vexp(bounded * 2.0f) + 1.0f);
    const vf s = x * x;
    vf near = splat(62.0f / 2835);
    near = near * s - 17.0f / 315;
    near = near * s + 2.0f / 15;
    near = near * s - 1.0f / 3;
    near = x + x * (near * s);
    return magnitude < 0.3f ? near : (x < 0.0f ? -far : far);
}
