// Row maths on vocabulary-major tiles z[V, ld]: reductions over v, one token per vector lane.
//
// Sums are relative to a running maximum, taken in float32 over BLOCK rows and kept in float64 beyond that. An entry
// without mass adds nothing, whatever the other side says of it (0 log 0 = 0).
#pragma once

#include <algorithm>

#include "vectors.h"

constexpr long BLOCK = 32;
constexpr float LOWEST = -1e38f;  // stands for the maximum of nothing: finite, so that differences stay finite

// Running sums of both sides for VL tokens. Order of `sum`: e^a, e^b, e^a a, e^b b, e^a (a - b), e^b (b - a), where
// a = student - its maximum, b = teacher - its maximum.
struct PairSums {
    vf top_a = splat(LOWEST), top_b = splat(LOWEST);
    double sum[6][VL] = {};

    // Move the sums to maxima higher by da and db.
    void shift(vf new_a, vf new_b) {
        for (int i = 0; i < VL; i++) {
            const double da = double(top_a[i]) - new_a[i], db = double(top_b[i]) - new_b[i];
            if (da == 0 && db == 0) continue;
            const double ea = da ? __builtin_exp(da) : 1, eb = db ? __builtin_exp(db) : 1;
            sum[2][i] = ea * (sum[2][i] + sum[0][i] * da);
            sum[4][i] = ea * (sum[4][i] + sum[0][i] * (da - db));
            sum[3][i] = eb * (sum[3][i] + sum[1][i] * db);
            sum[5][i] = eb * (sum[5][i] + sum[1][i] * (db - da));
            sum[0][i] *= ea, sum[1][i] *= eb;
        }
        top_a = new_a, top_b = new_b;
    }

    void merge(PairSums other) {
        const vf a = vmax(top_a, other.top_a), b = vmax(top_b, other.top_b);
        shift(a, b), other.shift(a, b);
        for (int s = 0; s < 6; s++)
            for (int i = 0; i < VL; i++) sum[s][i] += other.sum[s][i];
    }

    void add(const float* za, const float* zb, long rows, long ld) {
        vf a_top = top_a, b_top = top_b;
        for (long v = 0; v < rows; v++) a_top = vmax(load(za + v * ld), a_top), b_top = vmax(load(zb + v * ld), b_top);
        shift(a_top, b_top);
        vf part[6] = {};
        for (long v = 0; v < rows; v++) {
            const vf a = load(za + v * ld) - a_top, b = load(zb + v * ld) - b_top;
            const vf ea = vexp(a), eb = vexp(b), gap = a - b;
            const vi has_a = ea > 0.0f, has_b = eb > 0.0f;
            part[0] += ea, part[1] += eb;
            part[2] += has_a ? ea * a : vf{}, part[3] += has_b ? eb * b : vf{};
            part[4] += has_a ? ea * gap : vf{}, part[5] -= has_b ? eb * gap : vf{};
        }
        for (int s = 0; s < 6; s++)
            for (int i = 0; i < VL; i++) sum[s][i] += part[s][i];
    }
};

// The student alone: e^a and e^a a.
struct SoloSums {
    vf top = splat(LOWEST);
    double sum[2][VL] = {};

    void shift(vf to) {
        for (int i = 0; i < VL; i++) {
            const double d = double(top[i]) - to[i];
            if (d == 0) continue;
            const double e = __builtin_exp(d);
            sum[1][i] = e * (sum[1][i] + sum[0][i] * d), sum[0][i] *= e;
        }
        top = to;
    }

    void merge(SoloSums other) {
        const vf to = vmax(top, other.top);
        shift(to), other.shift(to);
        for (int s = 0; s < 2; s++)
            for (int i = 0; i < VL; i++) sum[s][i] += other.sum[s][i];
    }

    void add(const float* z, long rows, long ld) {
        vf to = top;
        for (long v = 0; v < rows; v++) to = vmax(load(z + v * ld), to);
        shift(to);
        vf part[2] = {};
        for (long v = 0; v < rows; v++) {
            const vf a = load(z + v * ld) - to, e = vexp(a);
            part[0] += e, part[1] += e > 0.0f ? e * a : vf{};
        }
        for (int s = 0; s < 2; s++)
            for (int i = 0; i < VL; i++) sum[s][i] += part[s][i];
    }
};

// Per token, as float: what the gradient of the mixed loss needs.
struct PairRow {
    const float *student_max, *student_rate, *teacher_max, *teacher_rate, *offset;  // rate = 1 / sum
    float forward_weight;
};

// scale * (1 - (z / cap)^2), the derivative of the finished logits; inverse_cap 0 means no cap.
struct Chain {
    float scale, inverse_cap;
    inline vf apply(vf gradient, vf z) const {
        if (inverse_cap == 0) return gradient * scale;
        const vf t = z * inverse_cap;
        const vf g = gradient * (1.0f - t * t) * scale;
        return gradient == 0.0f ? vf{} : g;
    }
};

template <bool FORWARD, bool REVERSE>
static inline vf pair_gradient(vf zs, vf zt, const PairRow& row, long n) {
    const vf a = zs - load(row.student_max + n), b = zt - load(row.teacher_max + n);
    const vf q = vexp(a) * load(row.student_rate + n);
    vf gradient = vf{};
    if (FORWARD) gradient = (q - vexp(b) * load(row.teacher_rate + n)) * (REVERSE ? row.forward_weight : 1.0f);
    if (REVERSE) {
        const vf reverse = q * (a - b - load(row.offset + n));
        gradient += (q > 0.0f ? reverse : vf{}) * (FORWARD ? 1 - row.forward_weight : 1.0f);
    }
    return gradient;
}
