// The matrix products of an output head, on vocabulary-major tiles: one register kernel, three uses.
//
//   logits[v, n]  = sum_d W[v, d] X[n, d]        rows v, vectors along n
//   dX[n, d]      = sum_v G[v, n] W[v, d]        rows n, vectors along d
//   dW[v, d]     += sum_n G[v, n] X[n, d]        rows v, vectors along d
//
// Each reads one operand as broadcast scalars where it lies and the other from a packed panel [k][PANEL]. In bfloat16 a
// "scalar" is a pair along k, and a panel holds pairs; accumulation is float32 throughout.
#pragma once

#include <algorithm>

#include "sums.h"

// RUN: units of a logit summed in registers before they join the total in memory. Rounding grows with a run's length: at
// 64, float32 logits carry half the error of the BLAS they were compared with, at 256 twice it. Of bfloat16 factors it is
// the lesser error.
struct F32 {
    typedef float Item;      // as stored by torch
    typedef float Unit;      // what one k step broadcasts
    static constexpr int K = 1;
    static constexpr long RUN = 64;
    static inline Unit unit(const Item* p, long) { return p[0]; }
    static inline Item from(float x) { return x; }
    static inline float to(Item x) { return x; }
    static inline Unit join(Item a, Item) { return a; }
    static inline vf mac(vf acc, Unit a, const Unit* b) { return acc + a * load(b); }
};

struct BF16 {
    typedef uint16_t Item;
    typedef uint32_t Unit;   // two bfloat16, the lower k in the lower half
    static constexpr int K = 2;
    static constexpr long RUN = 256;
    static inline Item from(float x) { return narrow(x); }
    static inline float to(Item x) { return widen(x); }
    static inline Unit join(Item a, Item b) { return uint32_t(a) | (uint32_t(b) << 16); }
    static inline vf mac(vf acc, Unit a, const Unit* b) {
#if defined(__AVX512BF16__)
        return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)_mm512_loadu_si512(b));
#else
        vi pairs;
        std::memcpy(&pairs, b, sizeof pairs);
        const vi high = pairs & int(0xffff0000u);
        return acc + as_float(a << 16) * (vf)(pairs << 16) + as_float(a & 0xffff0000u) * (vf)high;
#endif
    }
};

// c[R, PANEL] (+)= sum over `steps` units of a[r * row_step + k * k_step] * b[k, PANEL]; c is Floats or Blocks.
template <class Op, int R, class Out>
static inline void tile(long steps, const typename Op::Unit* a, long row_step, long k_step,
                        const typename Op::Unit* b, Out c, bool add) {
    vf acc[R][2];
    for (int r = 0; r < R; r++) {
        acc[r][0] = acc[r][1] = vf{};
        if (add) c.prefetch(r);
    }
    for (long k = 0; k < steps; k++, b += PANEL, a += k_step) {
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            acc[r][0] = Op::mac(acc[r][0], a[r * row_step], b);
            acc[r][1] = Op::mac(acc[r][1], a[r * row_step], b + VL);
        }
    }
    for (int r = 0; r < R; r++) c.put(r, acc[r][0], acc[r][1], add);
}

// Any number of rows: full register tiles, then halves.
template <class Op, class Out>
static inline void tiles(long rows, long steps, const typename Op::Unit* a, long row_step, long k_step,
                         const typename Op::Unit* b, Out c, bool add) {
    for (; rows >= MR; rows -= MR, a += MR * row_step, c = c.down(MR))
        tile<Op, MR>(steps, a, row_step, k_step, b, c, add);
#define REST(R)                                             \
    if (rows >= R) {                                        \
        tile<Op, R>(steps, a, row_step, k_step, b, c, add); \
        rows -= R, a += R * row_step, c = c.down(R);        \
    }
    if (MR > 8) { REST(8) }
    REST(4) REST(2) REST(1)
#undef REST
}

// panels[p][k][PANEL], p over columns of x[rows, columns], k over (pairs of) rows: for sums over rows.
// Rows at or beyond `rows` and columns beyond `columns` are 0.
template <class Op>
static void pack_rows(const typename Op::Item* x, long rows, long columns, long steps, typename Op::Unit* panels) {
    for (long k = 0; k < steps; k++) {
        const bool whole = (k + 1) * Op::K <= rows;
        const typename Op::Item *first = x + k * Op::K * columns, *second = first + (Op::K - 1) * columns;
        for (long from = 0, p = 0; from < columns; from += PANEL, p++) {
            typename Op::Unit* out = panels + (p * steps + k) * PANEL;
            if (whole && from + PANEL <= columns) {
                for (int j = 0; j < PANEL; j++) out[j] = Op::join(first[from + j], second[from + j]);
                continue;
            }
            for (long j = 0; j < PANEL; j++) {
                const bool inside = from + j < columns;
                const typename Op::Item a = inside && k * Op::K < rows ? first[from + j] : 0;
                const typename Op::Item b = inside && whole ? second[from + j] : 0;
                out[j] = Op::join(a, b);
            }
        }
    }
}

// panels[p][k][PANEL], p over rows of x[rows, columns], k over (pairs of) columns: for sums over columns.
template <class Op>
static void pack_columns(const typename Op::Item* x, long rows, long columns, long steps, typename Op::Unit* panels) {
    for (long from = 0, p = 0; from < rows; from += PANEL, p++)
        for (long k = 0; k < steps; k++)
            for (long j = 0; j < PANEL; j++) {
                const bool inside = from + j < rows;
                const typename Op::Item* at = x + (from + j) * columns + k * Op::K;
                const typename Op::Item a = inside ? at[0] : 0;
                const typename Op::Item b = inside && k * Op::K + Op::K - 1 < columns ? at[Op::K - 1] : 0;
                panels[(p * steps + k) * PANEL + j] = Op::join(a, b);
            }
}

// Items from floats or bfloat16, as stored to as multiplied.
static inline void convert(const float* x, long count, float* out) { std::memcpy(out, x, count * sizeof *x); }
static inline void convert(const uint16_t* x, long count, uint16_t* out) { std::memcpy(out, x, count * sizeof *x); }
static inline void convert(const uint16_t* x, long count, float* out) {
    for (long i = 0; i < count; i++) out[i] = widen(x[i]);
}
static inline void convert(const float* x, long count, uint16_t* out) {
    long i = 0;
#if defined(__AVX512BF16__)
    for (; i + 32 <= count; i += 32)
        _mm512_storeu_si512(out + i, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + i + 16), _mm512_loadu_ps(x + i)));
#endif
    for (; i < count; i++) out[i] = narrow(x[i]);
}

// Rows of a weight in the type the products take: where they lie, or converted into `scratch`.
template <class Item> static inline const Item* as_items(const Item* w, long, Item*) { return w; }
template <class Item, class Other> static inline const Item* as_items(const Other* w, long count, Item* scratch) {
    convert(w, count, scratch);
    return scratch;
}
