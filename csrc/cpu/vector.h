// Vector registers of the host, through the compilers' vector extensions, and loads and stores that convert on the way.
#pragma once

#if defined(__FMA__) || defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "../formula.h"

// Between a lambda's parameters and its body: the loops of layout.h and their bodies become one piece of code.
#define TAYLORKERN_LAMBDA __attribute__((always_inline))

namespace taylorkern::cpu {

struct bfloat16 {
  uint16_t bits;
};

template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

#if defined(__AVX512F__)
constexpr int64_t kRegisterBytes = 64;
#else
constexpr int64_t kRegisterBytes = 32;
#endif

// Whether a*b + c is one instruction that rounds once
#if defined(__FMA__) || defined(FP_FAST_FMAF)
constexpr bool kFma = true;
#else
constexpr bool kFma = false;
#endif

template <class E, int64_t Lanes>
struct Register {
  typedef E type __attribute__((vector_size(sizeof(E) * Lanes)));
};
template <class E>
struct Register<E, 1> {
  using type = E;
};

template <class E, int64_t Lanes>
using Vector = typename Register<E, Lanes>::type;

template <class A>
constexpr int64_t kLanes = kRegisterBytes / static_cast<int64_t>(sizeof(A));

// A register as a function argument: its type, and how many of its first lanes the register before has covered.
template <class A, int64_t Lanes>
struct Pack {
  using acc = A;
  using type = Vector<A, Lanes>;
  static constexpr int64_t lanes = Lanes;
  int64_t overlap = 0;
};

// f(pack) with the widest register that `count` elements fill
template <class A, class F>
TAYLORKERN_INLINE void with_width(int64_t count, const F& f) {
  constexpr int64_t whole = kLanes<A>, quarter = kLanes<A> / 4;
  if (count >= whole) return f(Pack<A, whole>{});
  if (count >= quarter) return f(Pack<A, quarter>{});
  f(Pack<A, 1>{});
}

// f(pack, i) for registers at i = from, from + Lanes ... up to `end`. The last one may overlap the one before:
// what f adds up must pass through `unless_covered`; what it stores per element it stores twice.
template <class A, int64_t Lanes, class F>
TAYLORKERN_INLINE void step(Pack<A, Lanes>, int64_t from, int64_t end, const F& f) {
  for (int64_t i = from; i < end; i += Lanes) {
    const int64_t start = std::min(i, end - Lanes);
    f(Pack<A, Lanes>{i - start}, start);
  }
}

// f(pack, i) over [begin, end), in registers of one width
template <class A, class F>
TAYLORKERN_INLINE void for_packs(int64_t begin, int64_t end, const F& f) {
  with_width<A>(end - begin, [&](auto pack) { step(pack, begin, end, f); });
}

// f(0), f(1) ... f(count - 1); without a loop where count is a number that the compiler knows
template <class F>
TAYLORKERN_INLINE void unrolled(int64_t count, const F& f) {
  for (int64_t i = 0; i < count; ++i) f(i);
}
template <int64_t Count, class F>
TAYLORKERN_INLINE void unrolled(std::integral_constant<int64_t, Count>, const F& f) {
  if constexpr (Count > 0) {
    unrolled(std::integral_constant<int64_t, Count - 1>{}, f);
    f(Count - 1);
  }
}

template <class To, class From>
TAYLORKERN_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class To, class From>
TAYLORKERN_INLINE To convert(From from) {
  if constexpr (std::is_arithmetic_v<From>) {
    return static_cast<To>(from);
  } else {
    return __builtin_convertvector(from, To);
  }
}

template <class P, class T>
TAYLORKERN_INLINE typename P::type load(P, const T* from) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    Vector<uint16_t, P::lanes> bits;
    std::memcpy(&bits, from, sizeof bits);
    return bit_cast<typename P::type>(convert<Vector<uint32_t, P::lanes>>(bits) << 16);
  } else {
    typename P::type value;
    std::memcpy(&value, from, sizeof value);
    return value;
  }
}

// Rounds to nearest, ties to even; a NaN becomes a quiet NaN of the same sign.
template <class U>
TAYLORKERN_INLINE U bfloat16_bits(U bits) {
  const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const U quiet = (bits >> 16) | 0x40u;
  return (bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded;
}

// Writes a whole cache line, or half of one, past the caches, so that the line need not be fetched first. Returns false,
// and does nothing, where there is no instruction for it or the address is not aligned.
template <class R>
TAYLORKERN_INLINE bool stream([[maybe_unused]] void* to, [[maybe_unused]] const R& value) {
#if defined(__AVX__)
  if (reinterpret_cast<uintptr_t>(to) % sizeof(R)) return false;
#if defined(__AVX512F__)
  if constexpr (sizeof(R) == 64) return _mm512_stream_si512(static_cast<__m512i*>(to), bit_cast<__m512i>(value)), true;
#endif
  if constexpr (sizeof(R) == 32) return _mm256_stream_si256(static_cast<__m256i*>(to), bit_cast<__m256i>(value)), true;
#endif
  return false;
}

// What was streamed before is written before what follows.
TAYLORKERN_INLINE void finish_streams() {
#if defined(__AVX__)
  _mm_sfence();
#endif
}

// `past`: past the caches where that is possible
template <class P, class T>
TAYLORKERN_INLINE void store(P, T* to, typename P::type value, bool past = false) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    const auto bits = bfloat16_bits(bit_cast<Vector<uint32_t, P::lanes>>(value));
    const auto narrow = convert<Vector<uint16_t, P::lanes>>(bits);
    if (!past || !stream(to, narrow)) std::memcpy(to, &narrow, sizeof narrow);
  } else {
    if (!past || !stream(to, value)) std::memcpy(to, &value, sizeof value);
  }
}

template <int64_t Bytes>
struct Integer;
template <>
struct Integer<1> {
  using type = int8_t;
};
template <>
struct Integer<2> {
  using type = int16_t;
};
template <>
struct Integer<4> {
  using type = int32_t;
};
template <>
struct Integer<8> {
  using type = int64_t;
};

template <int64_t Bytes, int64_t Lanes>
using Integers = Vector<typename Integer<Bytes>::type, Lanes>;

// Integers of From bytes each as integers of To. Compilers make code for single lanes of it, unless the registers are named
// or the steps are to half or double the size.
template <int64_t To, int64_t From, int64_t Lanes>
TAYLORKERN_INLINE Integers<To, Lanes> resized(Integers<From, Lanes> value) {
  if constexpr (To == From) {
    return value;
  } else {
#if defined(__AVX512F__)
    if constexpr (From == 1 && To == 4 && Lanes == 16) {
      return bit_cast<Integers<4, 16>>(_mm512_maskz_cvtepi8_epi32(0xffff, bit_cast<__m128i>(value)));
    }
    if constexpr (From == 4 && To == 1 && Lanes == 16) {
      return bit_cast<Integers<1, 16>>(_mm512_maskz_cvtepi32_epi8(0xffff, bit_cast<__m512i>(value)));
    }
#endif
#if defined(__AVX2__)
    if constexpr (From == 1 && To == 4 && Lanes == 8) {
      return bit_cast<Integers<4, 8>>(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(bit_cast<int64_t>(value))));
    }
#endif
    constexpr int64_t next = To < From ? From / 2 : From * 2;
    return resized<To, next, Lanes>(convert<Integers<next, Lanes>>(value));
  }
}

// What comparing registers gives, kept as a byte for each lane: 1 where it is true
template <class P, class Truth>
TAYLORKERN_INLINE void store_mask(P, uint8_t* to, Truth truth) {
  if constexpr (P::lanes == 1) {
    *to = truth;
  } else {
    const auto bytes = resized<1, sizeof(typename P::acc), P::lanes>(truth) & 1;
    std::memcpy(to, &bytes, sizeof bytes);
  }
}

template <class P>
TAYLORKERN_INLINE auto load_mask(P, const uint8_t* from) {
  if constexpr (P::lanes == 1) {
    return *from != 0;
  } else {
    Integers<1, P::lanes> bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    return resized<sizeof(typename P::acc), 1, P::lanes>(bytes) != 0;
  }
}

// All lanes equal; subtracting zero keeps the sign of -0.
template <class P>
TAYLORKERN_INLINE typename P::type splat(P, typename P::acc value) {
  return value - typename P::type{};
}

template <class P>
TAYLORKERN_INLINE Vector<double, P::lanes> widen(P, typename P::type value) {
  return convert<Vector<double, P::lanes>>(value);
}

// `fresh`, but `old` in the lanes that the register before has covered
template <class P, class V>
TAYLORKERN_INLINE V unless_covered(P pack, V fresh, V old) {
  if constexpr (P::lanes > 1) {
    if (pack.overlap == 0) return fresh;
    using Number = std::conditional_t<sizeof(V) / P::lanes == 8, int64_t, int32_t>;
    Number numbers[P::lanes];
    for (int64_t lane = 0; lane < P::lanes; ++lane) numbers[lane] = static_cast<Number>(lane);
    Vector<Number, P::lanes> lane;
    std::memcpy(&lane, numbers, sizeof lane);
    return lane >= static_cast<Number>(pack.overlap) ? fresh : old;
  }
  return fresh;
}

// Values of the accumulation type A as doubles
template <class P, class A>
TAYLORKERN_INLINE typename P::type load_wide(P, const A* from) {
  const Pack<A, P::lanes> narrow{};
  return widen(narrow, load(narrow, from));
}

// to[0..lanes) += value
template <class P>
TAYLORKERN_INLINE void add_to(P pack, double* to, typename P::type value) {
  const auto old = load(pack, to);
  store(pack, to, unless_covered(pack, old + value, old));
}

template <int64_t Lanes>
TAYLORKERN_INLINE double lane_sum(Vector<double, Lanes> value) {
  if constexpr (Lanes == 1) {
    return value;
  } else {
    Vector<double, Lanes / 2> halves[2];
    std::memcpy(halves, &value, sizeof halves);
    return lane_sum<Lanes / 2>(halves[0] + halves[1]);
  }
}

}  // namespace taylorkern::cpu

namespace taylorkern {

// Compilers don't make one instruction of a loop over std::fma, so each register is named. Where a processor has none,
// torch rounds twice as well.
template <class V>
struct MultiplyAdd<V, std::enable_if_t<!std::is_arithmetic_v<V>>> {
  static TAYLORKERN_INLINE V of(V a, V b, V c) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<V, cpu::Vector<float, 16>>) return _mm512_fmadd_ps(a, b, c);
    if constexpr (std::is_same_v<V, cpu::Vector<double, 8>>) return _mm512_fmadd_pd(a, b, c);
#endif
#if defined(__FMA__)
    if constexpr (std::is_same_v<V, cpu::Vector<float, 8>>) return _mm256_fmadd_ps(a, b, c);
    if constexpr (std::is_same_v<V, cpu::Vector<double, 4>>) return _mm256_fmadd_pd(a, b, c);
    if constexpr (std::is_same_v<V, cpu::Vector<float, 4>>) return _mm_fmadd_ps(a, b, c);
    if constexpr (std::is_same_v<V, cpu::Vector<double, 2>>) return _mm_fmadd_pd(a, b, c);
#endif
    if constexpr (!cpu::kFma) return a * b + c;
    V sum{};
    for (size_t lane = 0; lane < sizeof(V) / sizeof(a[0]); ++lane) sum[lane] = std::fma(a[lane], b[lane], c[lane]);
    return sum;
  }
};

// Of float registers: x = k ln 2 + r, e^r by its Taylor polynomial, |r| <= ln(2) / 2, and 2^k by the exponent's bits.
// Below the normal numbers it is 0, above the largest it is infinite.
template <class V>
struct Exponential<V, std::enable_if_t<!std::is_arithmetic_v<V>>> {
  using Number = std::remove_reference_t<decltype(V{}[0])>;
  static constexpr int64_t kCount = sizeof(V) / sizeof(Number);

  static TAYLORKERN_INLINE V of(V x) {
    if constexpr (sizeof(Number) == 8) {
      for (int64_t lane = 0; lane < kCount; ++lane) x[lane] = std::exp(x[lane]);
      return x;
    } else {
      using Bits = cpu::Vector<int32_t, kCount>;
      const V scaled = x * 1.44269504f;
      const V bounded = scaled > 128.0f ? V{} + 128.0f : (scaled < -125.0f ? V{} - 125.0f : scaled);
      const Bits k = cpu::convert<Bits>(bounded + (bounded < 0.0f ? V{} - 0.5f : V{} + 0.5f));
      const V turns = cpu::convert<V>(k);
      const auto fma = [](V a, V b, V c) TAYLORKERN_LAMBDA { return MultiplyAdd<V>::of(a, b, c); };
      const V r = fma(turns, V{} - 1.42860677e-6f, fma(turns, V{} - 0.693145752f, x));
      V p = V{} + 1.0f / 5040;
      for (const float coefficient : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
        p = fma(p, r, V{} + coefficient);
      }
      // 2^128 in two factors
      const V result = p * cpu::bit_cast<V>((k + 126) << 23) * 2.0f;
      const V upper = scaled > 128.0f ? V{} + std::numeric_limits<float>::infinity() : result;
      return scaled < -125.0f ? V{} : upper;
    }
  }
};

}  // namespace taylorkern
