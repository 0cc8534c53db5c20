// Intel and AMD: AVX2, and AVX-512 with VNNI.

#pragma once

#include <immintrin.h>

#include <cstring>

#include "cpu_types.h"

namespace dbf_rows {

// --- AVX-512 with VNNI: four products of bytes in one instruction ------------------------------------------------

#define DBF_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))

namespace avx512_vnni {

using Lanes = __m512i;
using Codes = __m512i;
using Floats = __m512;
constexpr int64_t kDigitBytes = kStep;

DBF_TARGET inline Lanes load(const uint32_t* words) { return _mm512_loadu_si512(words); }
DBF_TARGET inline Lanes same(int32_t value) { return _mm512_set1_epi32(value); }
DBF_TARGET inline Lanes both(Lanes a, Lanes b) { return _mm512_and_si512(a, b); }
DBF_TARGET inline Lanes either(Lanes a, Lanes b) { return _mm512_or_si512(a, b); }
template <int bits>
DBF_TARGET inline Lanes down(Lanes a) {
  return _mm512_srli_epi32(a, bits);
}
template <int bits>
DBF_TARGET inline Lanes up(Lanes a) {
  return _mm512_slli_epi32(a, bits);
}
template <int bits>
DBF_TARGET inline Codes codes_of(Lanes bytes) {
  return bytes;
}
DBF_TARGET inline Lanes add_products(Lanes sum, Codes codes, const int8_t* x) {
  int32_t word;
  std::memcpy(&word, x, sizeof word);
  return _mm512_dpbusd_epi32(sum, codes, _mm512_set1_epi32(word));
}
DBF_TARGET inline Floats to_float(Lanes a) { return _mm512_cvtepi32_ps(a); }
DBF_TARGET inline Floats as_float(Lanes bits) { return _mm512_castsi512_ps(bits); }
DBF_TARGET inline Floats times(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
DBF_TARGET inline Floats times(Floats a, float b) { return _mm512_mul_ps(a, _mm512_set1_ps(b)); }
DBF_TARGET inline Floats plus(Floats a, Floats b) { return _mm512_add_ps(a, b); }
DBF_TARGET inline void store(float* to, Floats a) { _mm512_storeu_ps(to, a); }
DBF_TARGET inline void prefetch(const uint32_t* words) { _mm_prefetch(reinterpret_cast<const char*>(words), _MM_HINT_T0); }

inline void pack(const int8_t (*digits)[kStep], int8_t* to) { std::memcpy(to, digits, kDigits * kStep); }

#include "cpu_block.h"

}  // namespace avx512_vnni

#undef DBF_TARGET

// --- AVX2: products of 16-bit numbers, even and odd columns apart --------------------------------------------------

#define DBF_TARGET __attribute__((target("avx2")))

namespace avx2 {

struct Lanes {
  __m256i a, b;
};
struct Floats {
  __m256 a, b;
};
struct Codes {
  Lanes even, odd;  // columns 0 and 2 of each row, columns 1 and 3
};
constexpr int64_t kDigitBytes = 2 * kStep;

DBF_TARGET inline Lanes load(const uint32_t* words) {
  const auto* from = reinterpret_cast<const __m256i*>(words);
  return {_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)};
}
DBF_TARGET inline Lanes same(int32_t value) { return {_mm256_set1_epi32(value), _mm256_set1_epi32(value)}; }
DBF_TARGET inline Lanes both(Lanes a, Lanes b) { return {_mm256_and_si256(a.a, b.a), _mm256_and_si256(a.b, b.b)}; }
DBF_TARGET inline Lanes either(Lanes a, Lanes b) { return {_mm256_or_si256(a.a, b.a), _mm256_or_si256(a.b, b.b)}; }
template <int bits>
DBF_TARGET inline Lanes down(Lanes a) {
  return {_mm256_srli_epi32(a.a, bits), _mm256_srli_epi32(a.b, bits)};
}
template <int bits>
DBF_TARGET inline Lanes up(Lanes a) {
  return {_mm256_slli_epi32(a.a, bits), _mm256_slli_epi32(a.b, bits)};
}
template <int bits>
DBF_TARGET inline Codes codes_of(Lanes bytes) {
  return {both(bytes, same(0x00FF00FF)), both(down<8>(bytes), same(0x00FF00FF))};
}
DBF_TARGET inline __m256i add_pairs(__m256i sum, __m256i codes, __m256i x) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(codes, x));
}
DBF_TARGET inline Lanes add_products(Lanes sum, const Codes& codes, const int8_t* x) {
  int32_t words[2];
  std::memcpy(words, x, sizeof words);
  const __m256i even = _mm256_set1_epi32(words[0]), odd = _mm256_set1_epi32(words[1]);
  return {add_pairs(add_pairs(sum.a, codes.even.a, even), codes.odd.a, odd),
          add_pairs(add_pairs(sum.b, codes.even.b, even), codes.odd.b, odd)};
}
DBF_TARGET inline Floats to_float(Lanes a) { return {_mm256_cvtepi32_ps(a.a), _mm256_cvtepi32_ps(a.b)}; }
DBF_TARGET inline Floats as_float(Lanes bits) { return {_mm256_castsi256_ps(bits.a), _mm256_castsi256_ps(bits.b)}; }
DBF_TARGET inline Floats times(Floats a, Floats b) { return {_mm256_mul_ps(a.a, b.a), _mm256_mul_ps(a.b, b.b)}; }
DBF_TARGET inline Floats times(Floats a, float b) {
  return {_mm256_mul_ps(a.a, _mm256_set1_ps(b)), _mm256_mul_ps(a.b, _mm256_set1_ps(b))};
}
DBF_TARGET inline Floats plus(Floats a, Floats b) { return {_mm256_add_ps(a.a, b.a), _mm256_add_ps(a.b, b.b)}; }
DBF_TARGET inline void store(float* to, Floats a) {
  _mm256_storeu_ps(to, a.a);
  _mm256_storeu_ps(to + 8, a.b);
}
DBF_TARGET inline void prefetch(const uint32_t* words) { _mm_prefetch(reinterpret_cast<const char*>(words), _MM_HINT_T0); }

inline void pack(const int8_t (*digits)[kStep], int8_t* to) {
  for (int64_t d = 0; d < kDigits; ++d) {
    const int16_t wide[kStep] = {digits[d][0], digits[d][2], digits[d][1], digits[d][3]};
    std::memcpy(to + d * kDigitBytes, wide, sizeof wide);
  }
}

#include "cpu_block.h"

}  // namespace avx2

#undef DBF_TARGET

inline const Kernel& avx512_vnni_kernel() {
  static const Kernel kernel{"avx512_vnni", kDigits * avx512_vnni::kDigitBytes, avx512_vnni::pack,
                             avx512_vnni::multiply};
  return kernel;
}
inline const Kernel& avx2_kernel() {
  static const Kernel kernel{"avx2", kDigits * avx2::kDigitBytes, avx2::pack, avx2::multiply};
  return kernel;
}

}  // namespace dbf_rows
