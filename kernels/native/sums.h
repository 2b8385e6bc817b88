// Where a register tile's products go: rows of one panel, `pitch` apart, stored or added to.
//
// `Floats` is memory of float32. `Blocks` sums what becomes a bfloat16 gradient in the very memory of that gradient: 16
// bits a value, and for each row of a panel one exponent that its values share. That is 2^-16 of the largest of them a
// step, where bfloat16 sums would lose 2^-9 of each at every tile.
#pragma once

#include "vectors.h"

struct Floats {
    float* first;
    long pitch;

    Floats down(long rows) const { return {first + rows * pitch, pitch}; }
    Floats panel(long p) const { return {first + p * PANEL, pitch}; }
    void copy_to(Floats to, long rows, long columns) const {
        for (long r = 0; r < rows; r++) std::memcpy(to.first + r * to.pitch, first + r * pitch, columns * sizeof *first);
    }
    void prefetch(long r) const { __builtin_prefetch(first + r * pitch, 1), __builtin_prefetch(first + r * pitch + VL, 1); }
    void put(long r, vf a, vf b, bool add) const {
        float* to = first + r * pitch;
        store(to, add ? load(to) + a : a), store(to + VL, add ? load(to + VL) + b : b);
    }
};

struct Blocks {
    int16_t* first;
    uint8_t* exponent;  // of the unit, biased as in a float: 0 is a block of zeros, 255 one that is not finite
    long pitch, exponent_pitch;

    Blocks down(long rows) const { return {first + rows * pitch, exponent + rows * exponent_pitch, pitch, exponent_pitch}; }
    Blocks panel(long p) const { return {first + p * PANEL, exponent + p, pitch, exponent_pitch}; }
    void copy_to(Blocks to, long rows, long columns) const {
        for (long r = 0; r < rows; r++) {
            std::memcpy(to.first + r * to.pitch, first + r * pitch, columns * sizeof *first);
            to.exponent[r * to.exponent_pitch] = exponent[r * exponent_pitch];
        }
    }
    void prefetch(long r) const { __builtin_prefetch(first + r * pitch, 1), __builtin_prefetch(exponent + r * exponent_pitch, 1); }
    float unit(long r) const { return as_float(uint32_t(exponent[r * exponent_pitch]) << 23); }
    void put(long r, vf a, vf b, bool add) const {
        int16_t* to = first + r * pitch;
        if (add) a += widened(to) * unit(r), b += widened(to + VL) * unit(r);
        const vu size_a = (vu)a & 0x7fffffffu, size_b = (vu)b & 0x7fffffffu;
        const uint32_t top = largest(size_a > size_b ? size_a : size_b) >> 23;
        const uint32_t chosen = top == 255 ? 255 : top > 14 ? top - 14 : 0;  // the largest has 15 bits and a sign
        exponent[r * exponent_pitch] = uint8_t(chosen);
        const float per_unit = as_float((254 - (chosen < 254 ? chosen : 253)) << 23);
        narrowed(a * per_unit, to), narrowed(b * per_unit, to + VL);
    }

   private:
    static vf widened(const int16_t* from) {
        vi16 values;
        std::memcpy(&values, from, sizeof values);
        return __builtin_convertvector(values, vf);
    }
    static void narrowed(vf x, int16_t* to) {
        x = (x < 32767.0f ? x : splat(32767.0f)) + 12582912.0f;  // the low bits are now x rounded to an integer
        const vi16 values = __builtin_convertvector((vi)x, vi16);
        std::memcpy(to, &values, sizeof values);
    }
};
