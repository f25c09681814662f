// Sixteen lanes: what the kernels need of a processor's vector instructions, once for AVX-512 and once for AVX2.
//
// A *line* is 64 bytes = 16 lanes of 4 bytes: 16 floats, 16 pairs of bfloat16, or 16 groups of four bytes. Packed
// matrices and cache pages are made of lines, so one kernel serves every format: it loads a line, broadcasts 4 bytes
// of the other operand, and adds 16 dot products of length 1, 2 or 4 to its sums. Sums of integers are exact; sums of
// floats are added in the same order in both versions, whatever the number of tokens.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace oz {

using bf16 = uint16_t;

inline float to_float(bf16 x) {
    uint32_t bits = uint32_t(x) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Round to nearest, ties to even; `to_bf16_number` for what is known to be a number.
inline bf16 to_bf16_number(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bf16((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline bf16 to_bf16(float x) { return x == x ? to_bf16_number(x) : bf16(0x7fc0); }

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__) && defined(__AVX512VNNI__)
#define OZ_AVX512 1

struct Floats { __m512 v; };
struct Ints { __m512i v; };
struct Line { __m512i v; };

inline __mmask16 first(int n) { return __mmask16((1u << n) - 1u); }
inline Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Floats load_first(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x.v); }
inline void store_first(float* p, Floats x, int n) { _mm512_mask_storeu_ps(p, first(n), x.v); }
inline Floats all(float x) { return {_mm512_set1_ps(x)}; }
inline Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Floats load_floats(const bf16* p) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
}
inline Floats larger(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Floats smaller(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Floats rounded(Floats x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Floats power_of_two(Floats n) {
    __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23))};
}
inline __m256 halves(Floats x) {
    return _mm256_add_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
}
inline __m256 larger_half(Floats x) {
    return _mm256_max_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
}

// Lanes from `begin` on and before `end` (any numbers) as they are, the others `other`.
inline Floats only(Floats x, int64_t begin, int64_t end, float other) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __mmask16 inside = _mm512_cmpge_epi32_mask(lane, _mm512_set1_epi32(int(begin))) &
                             _mm512_cmplt_epi32_mask(lane, _mm512_set1_epi32(int(end)));
    return {_mm512_mask_blend_ps(inside, _mm512_set1_ps(other), x.v)};
}
// What is below `bound` as 0.
inline Floats at_least(Floats x, float bound) {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, _mm512_set1_ps(bound), _CMP_GE_OQ), x.v)};
}
// Rounded to integers of 8 bits, which must be large enough.
inline void store_bytes(void* p, Floats x) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x.v))); }

inline Ints all_ints(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline Floats to_floats(Ints x) { return {_mm512_cvtepi32_ps(x.v)}; }
inline Ints load_ints(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
inline Ints operator+(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Line line(const void* p) { return {_mm512_loadu_si512(p)}; }
inline Line line_first(const void* p, int bytes) { return {_mm512_maskz_loadu_epi8(bytes >= 64 ? ~0ull : (1ull << bytes) - 1, p)}; }
inline Line broadcast4(const void* p) {
    int32_t word;
    std::memcpy(&word, p, 4);
    return {_mm512_set1_epi32(word)};
}
inline Line low_nibbles(Line x) { return {_mm512_and_si512(x.v, _mm512_set1_epi8(15))}; }
inline Line high_nibbles(Line x) { return {_mm512_and_si512(_mm512_srli_epi16(x.v, 4), _mm512_set1_epi8(15))}; }
inline void store_line(void* p, Line x) { _mm512_storeu_si512(p, x.v); }

// Sums of four products of unsigned and signed bytes.
inline Ints dot_bytes(Ints sum, Line u, Line s) { return {_mm512_dpbusd_epi32(sum.v, u.v, s.v)}; }
inline Ints dot_small_bytes(Ints sum, Line u, Line s) { return dot_bytes(sum, u, s); }

inline Floats dot_floats(Floats sum, Line a, Line b) {
    return {_mm512_fmadd_ps(_mm512_castsi512_ps(a.v), _mm512_castsi512_ps(b.v), sum.v)};
}

inline Floats dot_pairs(Floats sum, Line a, Line b) {
#if defined(__AVX512BF16__)
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)a.v, (__m512bh)b.v)};
#else
    const __m512i high = _mm512_set1_epi32(int(0xffff0000));
    auto odd = [&](Line x) { return _mm512_castsi512_ps(_mm512_and_si512(x.v, high)); };
    auto even = [](Line x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x.v, 16)); };
    return {_mm512_fmadd_ps(odd(a), odd(b), _mm512_fmadd_ps(even(a), even(b), sum.v))};
#endif
}

#else  // AVX2 and FMA: two halves of eight lanes.

struct Floats { __m256 a, b; };
struct Ints { __m256i a, b; };
struct Line { __m256i a, b; };

inline __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline Floats load_first(const float* p, int n) {
    return {_mm256_maskload_ps(p, first(n)), _mm256_maskload_ps(p + 8, first(n - 8))};
}
inline void store(float* p, Floats x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
inline void store_first(float* p, Floats x, int n) {
    _mm256_maskstore_ps(p, first(n), x.a), _mm256_maskstore_ps(p + 8, first(n - 8), x.b);
}
inline Floats all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Floats operator+(Floats x, Floats y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Floats operator*(Floats x, Floats y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline Floats operator/(Floats x, Floats y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline Floats fma(Floats x, Floats y, Floats z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline Floats load_floats(const bf16* p) {
    auto half = [](const bf16* q) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)q)), 16));
    };
    return {half(p), half(p + 8)};
}
inline Floats larger(Floats x, Floats y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline Floats smaller(Floats x, Floats y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline Floats rounded(Floats x) {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.a, nearest), _mm256_round_ps(x.b, nearest)};
}
inline Floats power_of_two(Floats n) {
    auto half = [](__m256 x) {
        __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(x), _mm256_set1_epi32(127));
        return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
    };
    return {half(n.a), half(n.b)};
}
inline __m256 halves(Floats x) { return _mm256_add_ps(x.a, x.b); }
inline __m256 larger_half(Floats x) { return _mm256_max_ps(x.a, x.b); }

inline Floats only(Floats x, int64_t begin, int64_t end, float other) {
    auto half = [&](__m256 v, int shift) {
        const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        const __m256i before = _mm256_cmpgt_epi32(_mm256_set1_epi32(int(begin) - shift), lane);
        const __m256i inside = _mm256_andnot_si256(before, _mm256_cmpgt_epi32(_mm256_set1_epi32(int(end) - shift), lane));
        return _mm256_blendv_ps(_mm256_set1_ps(other), v, _mm256_castsi256_ps(inside));
    };
    return {half(x.a, 0), half(x.b, 8)};
}
inline Floats at_least(Floats x, float bound) {
    auto half = [&](__m256 v) { return _mm256_and_ps(v, _mm256_cmp_ps(v, _mm256_set1_ps(bound), _CMP_GE_OQ)); };
    return {half(x.a), half(x.b)};
}
inline void store_bytes(void* p, Floats x) {
    alignas(32) float numbers[16];
    store(numbers, x);
    for (int i = 0; i < 16; i++) ((uint8_t*)p)[i] = uint8_t(int32_t(__builtin_rintf(numbers[i])));
}

inline Ints all_ints(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Ints operator+(Ints x, Ints y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline Floats to_floats(Ints x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline Line line(const void* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}
inline Line line_first(const void* p, int bytes) {
    if (bytes >= 64) return line(p);
    alignas(32) uint8_t copy[64] = {};
    std::memcpy(copy, p, size_t(bytes));
    return line(copy);
}
inline Line broadcast4(const void* p) {
    int32_t word;
    std::memcpy(&word, p, 4);
    return {_mm256_set1_epi32(word), _mm256_set1_epi32(word)};
}
inline Line low_nibbles(Line x) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
inline Line high_nibbles(Line x) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(_mm256_srli_epi16(x.a, 4), mask), _mm256_and_si256(_mm256_srli_epi16(x.b, 4), mask)};
}
inline void store_line(void* p, Line x) {
    _mm256_storeu_si256((__m256i*)p, x.a), _mm256_storeu_si256((__m256i*)p + 1, x.b);
}

// Unsigned bytes up to 127 fit: two products of at most 127 * 127 do not reach the limit of 16 bits.
inline Ints dot_small_bytes(Ints sum, Line u, Line s) {
    const __m256i ones = _mm256_set1_epi16(1);
    auto half = [&](__m256i x, __m256i p, __m256i q) {
        return _mm256_add_epi32(x, _mm256_madd_epi16(_mm256_maddubs_epi16(p, q), ones));
    };
    return {half(sum.a, u.a, s.a), half(sum.b, u.b, s.b)};
}
// Others in two parts: the low seven bits, and the top bit's 128.
inline Ints dot_bytes(Ints sum, Line u, Line s) {
    const __m256i low = _mm256_set1_epi8(127), one = _mm256_set1_epi8(1), ones = _mm256_set1_epi16(1);
    auto half = [&](__m256i x, __m256i p, __m256i q) {
        __m256i bottom = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_and_si256(p, low), q), ones);
        __m256i bit = _mm256_and_si256(_mm256_srli_epi16(p, 7), one);
        __m256i top = _mm256_madd_epi16(_mm256_maddubs_epi16(bit, q), ones);
        return _mm256_add_epi32(x, _mm256_add_epi32(bottom, _mm256_slli_epi32(top, 7)));
    };
    return {half(sum.a, u.a, s.a), half(sum.b, u.b, s.b)};
}

inline Floats dot_floats(Floats sum, Line x, Line y) {
    return {_mm256_fmadd_ps(_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(y.a), sum.a),
            _mm256_fmadd_ps(_mm256_castsi256_ps(x.b), _mm256_castsi256_ps(y.b), sum.b)};
}
inline Floats dot_pairs(Floats sum, Line x, Line y) {
    const __m256i high = _mm256_set1_epi32(int(0xffff0000));
    auto half = [&](__m256 s, __m256i p, __m256i q) {
        auto odd = [&](__m256i t) { return _mm256_castsi256_ps(_mm256_and_si256(t, high)); };
        auto even = [](__m256i t) { return _mm256_castsi256_ps(_mm256_slli_epi32(t, 16)); };
        return _mm256_fmadd_ps(odd(p), odd(q), _mm256_fmadd_ps(even(p), even(q), s));
    };
    return {half(sum.a, x.a, y.a), half(sum.b, x.b, y.b)};
}
#endif

// Numbers of ordinary size or zero.
inline void store_bf16(bf16* p, Floats x) {
#if defined(OZ_AVX512) && defined(__AVX512BF16__)
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x.v));
#else
    alignas(64) float numbers[16];
    store(numbers, x);
    for (int i = 0; i < 16; i++) p[i] = to_bf16_number(numbers[i]);
#endif
}

inline float sum(Floats x) {
    __m256 eight = halves(x);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// The sums of R vectors, side by side; each is added in the order of `sum`.
template <int R>
inline void store_sums(float* to, const Floats (&x)[R]) {
#ifdef OZ_AVX512
    if constexpr (R == 4) {
        constexpr int low = 0x44, high = 0xEE;
        auto joined = [](__m512 a, __m512 b) {
            return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, low), _mm512_shuffle_f32x4(a, b, high));
        };
        // In quarters of a line: two sums take two each, four sums one each.
        const __m512 first_two = joined(x[0].v, x[1].v), last_two = joined(x[2].v, x[3].v);
        const __m512 four = _mm512_add_ps(_mm512_shuffle_f32x4(first_two, last_two, 0x88),
                                          _mm512_shuffle_f32x4(first_two, last_two, 0xDD));
        const __m512 pairs = _mm512_add_ps(four, _mm512_permute_ps(four, 0x4E));
        const __m512 ones = _mm512_add_ps(pairs, _mm512_permute_ps(pairs, 0xB1));
        _mm_storeu_ps(to, _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, ones)));
        return;
    }
#endif
    for (int r = 0; r < R; r++) to[r] = sum(x[r]);
}

inline float largest(Floats x) {
    __m256 eight = larger_half(x);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

// The function below for sixteen numbers.
inline Floats exponentials(Floats x) {
    x = smaller(larger(x, all(-87.0f)), all(88.0f));
    const Floats n = rounded(x * all(1.442695041f));
    const Floats r = fma(n, all(2.121944401e-4f), fma(n, all(-0.693359375f), x));
    Floats p = all(1.0f / 5040.0f);
    p = fma(p, r, all(1.0f / 720.0f));
    p = fma(p, r, all(1.0f / 120.0f));
    p = fma(p, r, all(1.0f / 24.0f));
    p = fma(p, r, all(1.0f / 6.0f));
    p = fma(p, r, all(0.5f));
    p = fma(p * r, r, r + all(1.0f));
    return p * power_of_two(n);
}

// e^x to about one unit in the last place: 2^n times the exponential series of the rest, which is at most ln(2)/2.
// Plain code, which the compiler turns into vector instructions inside loops.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
    float n = __builtin_rintf(x * 1.442695041f);
    float r = x - n * 0.693359375f + n * 2.121944401e-4f;  // ln(2) in two parts, the first exact in few bits
    float p = 1.0f / 5040.0f;
    p = p * r + 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    int32_t bits = (int32_t(n) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, 4);
    return p * scale;
}

// erf(x) to 2e-7: an odd polynomial up to 1, behind it 1 - e^(a polynomial); both fitted to erf and log(erfc).
inline float error_function(float x) {
    const float t = __builtin_fabsf(x), s = x * x, u = t > 4.0f ? 4.0f : t;
    float near = -5.696591567e-4f;
    near = near * s + 4.934489407e-3f;
    near = near * s - 2.672696437e-2f;
    near = near * s + 1.128078803e-1f;
    near = near * s - 3.761241459e-1f;
    near = near * s + 1.128379150f;
    near = near * t;
    float far = 1.322880489e-4f;
    far = far * u - 2.375225869e-3f;
    far = far * u + 1.937957990e-2f;
    far = far * u - 9.762150888e-2f;
    far = far * u - 6.448528480e-1f;
    far = far * u - 1.122823127f;
    far = far * u - 1.444821423e-3f;
    far = 1.0f - exponential(far);
    return __builtin_copysignf(t < 1.0f ? near : far, x);
}

}  // namespace oz
