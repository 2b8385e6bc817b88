// Entry points for `kernels/native/engine.py`: a tile of tokens, vocabulary-major, over one head.
//
// Tiles are float32 z[V, ld] with ld a multiple of PANEL; token columns at or beyond `tokens` are padding. Threads take
// contiguous ranges of the vocabulary. Nothing is kept between calls and nothing of torch is used.
#include <omp.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <memory>
#include <vector>

#include "products.h"
#include "rows.h"

namespace {

constexpr long DEPTH = 128;  // vocabulary rows whose weights are packed at a time: 512 KiB of float32 at D = 1024

template <class T>
struct Scratch {  // 64-byte aligned, uninitialised
    T* data;
    explicit Scratch(long count) : data(static_cast<T*>(::operator new(count * sizeof(T) + 64, std::align_val_t(64)))) {}
    ~Scratch() { ::operator delete(data, std::align_val_t(64)); }
    Scratch(const Scratch&) = delete;
};

struct Range { long first, last; };
Range share(long count, long unit) {
    const long units = (count + unit - 1) / unit, thread = omp_get_thread_num(), threads = omp_get_num_threads();
    return {std::min(count, units * thread / threads * unit), std::min(count, units * (thread + 1) / threads * unit)};
}

long panels(long count) { return (count + PANEL - 1) / PANEL; }

void finish(float* z, long rows, long ld, const float* bias, float scale, float cap) {
    for (long r = 0; r < rows; r++)
        for (long n = 0; n < ld; n += VL) {
            vf x = (load(z + r * ld + n) + (bias ? bias[r] : 0.0f)) * scale;
            store(z + r * ld + n, cap > 0 ? vtanh(x / cap) * cap : x);
        }
}

template <class Op, class Weight>
void logits(const typename Op::Item* x, const Weight* w, const float* bias, float* z, long tokens, long vocab,
            long width, long ld, float scale, float cap, int threads) {
    typedef typename Op::Unit Unit;
    const long steps = (width + Op::K - 1) / Op::K;
    Scratch<Unit> packed(panels(tokens) * steps * PANEL);
    pack_columns<Op>(x, tokens, width, steps, packed.data);
#pragma omp parallel num_threads(threads)
    {
        // Multiplied where they lie, except rows a whole page apart, which would share the sets of the first cache and
        // are copied a line further apart, and short ones, for which the processor waits longer than a copy takes.
        const long bytes = width * sizeof(Weight);
        const bool copied = sizeof(Weight) != sizeof(typename Op::Item) || bytes % 4096 == 0 || bytes < 2048;
        const long pitch = copied ? width + 64 / sizeof(typename Op::Item) + width % Op::K : width;
        Scratch<typename Op::Item> block(copied ? MR * pitch : 0);
        const Range mine = share(vocab, MR);
        for (long v = mine.first; v < mine.last; v += MR) {
            const long rows = std::min<long>(MR, mine.last - v);
            for (long r = 0; copied && r < rows; r++) convert(w + (v + r) * width, width, block.data + r * pitch);
            const void* from = copied ? static_cast<const void*>(block.data) : w + v * width;
            const Unit* a = static_cast<const Unit*>(from);
            const char* next = reinterpret_cast<const char*>(w + (v + rows) * width);
            const long ahead = std::min<long>(MR, mine.last - v - rows) * width * long(sizeof(Weight)) / (ld / PANEL);
            for (long p = 0; p < ld / PANEL; p++, next += ahead) {
                for (long line = 0; line < ahead; line += 64) __builtin_prefetch(next + line, 0, 2);
                const Unit* b = packed.data + p * steps * PANEL;
                for (long k = 0; k < steps; k += Op::RUN)
                    tiles<Op>(rows, std::min(Op::RUN, steps - k), a + k, pitch / Op::K, 1, b + k * PANEL,
                              Floats{z + v * ld, ld}.panel(p), k > 0);
            }
            if (bias || scale != 1 || cap > 0) finish(z + v * ld, rows, ld, bias ? bias + v : nullptr, scale, cap);
        }
    }
}

// Gradient block g[rows, ld] as items [rows][ld], which are units along n, and as units along v [steps][ld]. Padding
// tokens become 0, whatever the tile holds there.
template <class Op>
void gradient_units(const float* g, long rows, long tokens, long ld, typename Op::Item* items, typename Op::Unit* along_v) {
    convert(g, rows * ld, items);
    for (long v = 0; v < rows; v++) std::fill(items + v * ld + tokens, items + (v + 1) * ld, typename Op::Item(0));
    for (long v = rows; v % Op::K; v++) std::fill_n(items + v * ld, ld, typename Op::Item(0));
    for (long v = 0; v < rows; v += Op::K) {
        const typename Op::Item *first = items + v * ld, *second = first + (Op::K - 1) * ld;
        typename Op::Unit* out = along_v + v / Op::K * ld;
        for (long n = 0; n < ld; n++) out[n] = Op::join(first[n], second[n]);
    }
}

// What the gradient of a weight is summed in: see sums.h.
template <class Weight> struct Sums;
template <> struct Sums<float> {
    typedef Floats Out;
    static Out at(void* first, uint8_t*, long pitch) { return {static_cast<float*>(first), pitch}; }
};
template <> struct Sums<uint16_t> {
    typedef Blocks Out;
    static Out at(void* first, uint8_t* exponents, long pitch) {
        return {static_cast<int16_t*>(first), exponents, pitch, panels(pitch)};
    }
};

template <class Op, class Weight>
struct Backward {
    typedef typename Op::Unit Unit;
    typedef typename Sums<Weight>::Out Out;
    const Weight* w;
    const float* g;
    const Unit* packed_x;
    Out dw;
    float* db;
    const float* token_weight;
    long tokens, width, ld;

    void hidden(long v, long rows, const Unit* along_v, typename Op::Item* converted, Unit* packed_w, float* sums) const {
        const long steps = (rows + Op::K - 1) / Op::K;
        pack_rows<Op>(as_items(w + v * width, rows * width, converted), rows, width, steps, packed_w);
        for (long p = 0; p < panels(width); p++)
            tiles<Op>(tokens, steps, along_v, 1, ld, packed_w + p * steps * PANEL,
                      Floats{sums + p * tokens * PANEL, PANEL}, true);
    }

    // `next` rows of the weight follow: they are fetched meanwhile, for `hidden` waits for memory otherwise.
    void weight(long v, long rows, const Unit* along_n, long next) const {
        const long steps = ld / Op::K;
        const char* ahead = reinterpret_cast<const char*>(w + (v + rows) * width);
        const long bytes = next * width * long(sizeof(Weight)) / (panels(width) * ((rows + MR - 1) / MR));
        alignas(64) float room[MR * PANEL] = {};
        uint8_t exponents[MR] = {};
        const Out edge = Sums<Weight>::at(room, exponents, PANEL);
        for (long r = 0; r < rows; r += MR) {
            const long count = std::min<long>(MR, rows - r);
            for (long p = 0; p < panels(width); p++) {
                const Out to = dw.down(v + r).panel(p);
                const long columns = std::min<long>(PANEL, width - p * PANEL);
                const Unit *a = along_n + r * steps, *b = packed_x + p * steps * PANEL;
                for (long line = 0; line < bytes; line += 64) __builtin_prefetch(ahead + line, 0, 1);
                ahead += bytes;
                if (columns == PANEL) {
                    tiles<Op>(count, steps, a, steps, 1, b, to, true);
                    continue;
                }
                to.copy_to(edge, count, columns);
                tiles<Op>(count, steps, a, steps, 1, b, edge, true);
                edge.copy_to(to, count, columns);
            }
        }
    }

    void bias(long v, long rows) const {
        for (long r = 0; r < rows; r++)
            for (long n = 0; n < tokens; n++) db[v + r] += token_weight[n] * g[(v + r) * ld + n];
    }
};

// dx[tokens, width] = G^T W; dw[vocab, width] += G weighted_x; db[vocab] += G token_weight. Null outputs are skipped.
// dw is float32, or the 16-bit values of `Blocks` whose exponents are dw_exponents[vocab, panels(width)].
template <class Op, class Weight>
void backward(const float* g, const typename Op::Item* weighted_x, const Weight* w, const float* token_weight,
              float* dx, void* dw, uint8_t* dw_exponents, float* db, long tokens, long vocab, long width, long ld,
              int threads) {
    typedef typename Op::Unit Unit;
    const long steps = ld / Op::K, columns = panels(width) * PANEL;
    Scratch<Unit> packed_x(dw ? columns * steps : 0);
    if (dw) pack_rows<Op>(weighted_x, tokens, width, steps, packed_x.data);
    const auto sums_of_w = Sums<Weight>::at(dw, dw_exponents, width);
    const Backward<Op, Weight> job{w, g, packed_x.data, sums_of_w, db, token_weight, tokens, width, ld};
    std::vector<std::unique_ptr<Scratch<float>>> sums(threads);
#pragma omp parallel num_threads(threads)
    {
        Scratch<Unit> along_v(DEPTH * ld), packed_w(dx ? DEPTH * columns : 0);
        Scratch<typename Op::Item> items(DEPTH * ld), converted(DEPTH * width);
        auto& mine = sums[omp_get_thread_num()];
        if (dx) {
            mine = std::make_unique<Scratch<float>>(tokens * columns);
            std::fill_n(mine->data, tokens * columns, 0.0f);
        }
        const Range range = share(vocab, DEPTH);
        for (long v = range.first; v < range.last; v += DEPTH) {
            const long rows = std::min(DEPTH, range.last - v);
            gradient_units<Op>(g + v * ld, rows, tokens, ld, items.data, along_v.data);
            if (dx) job.hidden(v, rows, along_v.data, converted.data, packed_w.data, mine->data);
            if (dw) job.weight(v, rows, reinterpret_cast<const Unit*>(items.data), std::min(DEPTH, range.last - v - rows));
            if (db) job.bias(v, rows);
        }
    }
    if (!dx) return;
    for (long p = 0; p < panels(width); p++)
        for (long n = 0; n < tokens; n++)
            for (long j = 0; j < std::min<long>(PANEL, width - p * PANEL); j++) {
                float total = 0;  // threads in order: the same sum every time
                for (auto& part : sums)
                    if (part) total += part->data[(p * tokens + n) * PANEL + j];
                dx[n * width + p * PANEL + j] = total;
            }
}

template <class Sums, int COUNT, class Add, class Write>
void reduce(long vocab, long ld, int threads, Add add, Write write) {
    const long lanes = ld / VL;
    std::vector<std::vector<Sums>> parts(threads, std::vector<Sums>(lanes));
#pragma omp parallel num_threads(threads)
    {
        auto& mine = parts[omp_get_thread_num()];
        const Range range = share(vocab, BLOCK);
        for (long v = range.first; v < range.last; v += BLOCK)
            for (long lane = 0; lane < lanes; lane++)
                add(mine[lane], v * ld + lane * VL, std::min(BLOCK, range.last - v));
    }
    for (long lane = 0; lane < lanes; lane++) {
        for (int t = 1; t < threads; t++) parts[0][lane].merge(parts[t][lane]);
        write(parts[0][lane], lane * VL);
    }
}

template <bool FORWARD, bool REVERSE>
void pair_gradient_pass(float* zs, const float* zt, long vocab, long ld, const PairRow& row, Chain chain, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long v = 0; v < vocab; v++)
        for (long n = 0; n < ld; n += VL) {
            const vf z = load(zs + v * ld + n);
            const vf g = pair_gradient<FORWARD, REVERSE>(z, load(zt + v * ld + n), row, n);
            store(zs + v * ld + n, chain.apply(g, z));
        }
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

#define HEAD(name, Op, Weight)                                                                                        \
    EXPORT void logits_##name(const Op::Item* x, const Weight* w, const float* bias, float* z, long tokens,          \
                              long vocab, long width, long ld, float scale, float cap, int threads) {                \
        logits<Op, Weight>(x, w, bias, z, tokens, vocab, width, ld, scale, cap, threads);                            \
    }                                                                                                                 \
    EXPORT void backward_##name(const float* g, const Op::Item* x, const Weight* w, const float* token_weight,        \
                                float* dx, void* dw, uint8_t* dw_exponents, float* db, long tokens, long vocab,       \
                                long width, long ld, int threads) {                                                   \
        backward<Op, Weight>(g, x, w, token_weight, dx, dw, dw_exponents, db, tokens, vocab, width, ld, threads);     \
    }
HEAD(f32_f32, F32, float)
HEAD(f32_bf16, F32, uint16_t)
HEAD(bf16_bf16, BF16, uint16_t)
HEAD(bf16_f32, BF16, float)

// tops[2, ld], sums[6, ld]: see PairSums.
EXPORT void pair_sums(const float* zs, const float* zt, long vocab, long ld, double* tops, double* sums, int threads) {
    reduce<PairSums, 6>(
        vocab, ld, threads,
        [=](PairSums& total, long at, long rows) { total.add(zs + at, zt + at, rows, ld); },
        [=](const PairSums& total, long n) {
            for (int i = 0; i < VL; i++) {
                tops[n + i] = total.top_a[i], tops[ld + n + i] = total.top_b[i];
                for (int s = 0; s < 6; s++) sums[s * ld + n + i] = total.sum[s][i];
            }
        });
}

// tops[ld], sums[2, ld]: see SoloSums.
EXPORT void solo_sums(const float* z, long vocab, long ld, double* tops, double* sums, int threads) {
    reduce<SoloSums, 2>(
        vocab, ld, threads, [=](SoloSums& total, long at, long rows) { total.add(z + at, rows, ld); },
        [=](const SoloSums& total, long n) {
            for (int i = 0; i < VL; i++) {
                tops[n + i] = total.top[i];
                for (int s = 0; s < 2; s++) sums[s * ld + n + i] = total.sum[s][i];
            }
        });
}

// zs becomes the gradient; rows[5, ld] in the order of PairRow.
EXPORT void pair_gradient_into(float* zs, const float* zt, long vocab, long ld, const float* rows, float forward_weight,
                               float scale, float inverse_cap, int threads) {
    const PairRow row{rows, rows + ld, rows + 2 * ld, rows + 3 * ld, rows + 4 * ld, forward_weight};
    const Chain chain{scale, inverse_cap};
    if (forward_weight == 1) pair_gradient_pass<true, false>(zs, zt, vocab, ld, row, chain, threads);
    else if (forward_weight == 0) pair_gradient_pass<false, true>(zs, zt, vocab, ld, row, chain, threads);
    else pair_gradient_pass<true, true>(zs, zt, vocab, ld, row, chain, threads);
}

// z becomes e^(z - base) * factor * chain; rows[2, ld] = base, factor.
EXPORT void solo_gradient_into(float* z, long vocab, long ld, const float* rows, float scale, float inverse_cap, int threads) {
    const Chain chain{scale, inverse_cap};
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long v = 0; v < vocab; v++)
        for (long n = 0; n < ld; n += VL) {
            const vf x = load(z + v * ld + n);
            store(z + v * ld + n, chain.apply(vexp(x - load(rows + n)) * load(rows + ld + n), x));
        }
}

// Sums of `Blocks`, first[vocab, width], become the bfloat16 nearest to them times factors[width].
EXPORT void round_sums(uint16_t* first, uint8_t* exponents, const float* factors, long vocab, long width, int threads) {
    const Blocks sums = Sums<uint16_t>::at(first, exponents, width);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long v = 0; v < vocab; v++)
        for (long p = 0; p < panels(width); p++) {
            const Blocks from = sums.down(v).panel(p);
            const long columns = std::min<long>(PANEL, width - p * PANEL);
            float block[PANEL];
            for (long i = 0; i < columns; i++) block[i] = from.first[i] * from.unit(0) * factors[p * PANEL + i];
            convert(block, columns, first + v * width + p * PANEL);
        }
}

EXPORT void advise_huge_pages(void* memory, long bytes) {
#if defined(__linux__)
    const uintptr_t huge = 2 << 20, first = (uintptr_t(memory) + huge - 1) / huge * huge, last = uintptr_t(memory) + bytes;
    if (last > first + huge) madvise(reinterpret_cast<void*>(first), (last - first) / huge * huge, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

EXPORT int panel_tokens() { return PANEL; }
