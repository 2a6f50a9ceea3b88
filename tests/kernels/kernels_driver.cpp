// Calls a kernels' library with numbers of its own making and prints a digest of each result's bits, so that libraries of
// different processors can be compared without Python: `kernels_driver LIBRARY`.
//
// Every case is computed on 1 and on 2 threads. The digests must be equal and no result may be NaN or all zeros: else the
// program says which and returns 1.
#include <dlfcn.h>

#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "activations.h"
#include "cache.h"
#include "shared_sum.h"
#include "types/types.h"

using namespace mpillama;

namespace {

constexpr i64 MOST_THREADS = 2, SPINS = 100;
const i64 SOME_TOKENS[] = {1, 2, 7, 17, 40};
const char* const TYPE_NAMES[] = {"f32",  "f16",  "bf16", "q8_0", "q4_0", "q5_0", "iq4_nl", "mxfp4",
                                  "q4_1", "q5_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k",   "iq4_xs",  "fp8",  "int4",
                                  "int4_f16", "int4_bf16", "int8", "nvfp4"};
const i64 TYPE_NUMBERS[] = {F32::NUMBER,    F16::NUMBER,   BF16::NUMBER, Q8_0::NUMBER, Q4_0::NUMBER, Q5_0::NUMBER,
                            IQ4_NL::NUMBER, MXFP4::NUMBER, Q4_1::NUMBER, Q5_1::NUMBER, Q2_K::NUMBER, Q3_K::NUMBER,
                            Q4_K::NUMBER,   Q5_K::NUMBER,  Q6_K::NUMBER, IQ4_XS::NUMBER, FP8::NUMBER,  INT4::NUMBER,
                            INT4_F16::NUMBER, INT4_BF16::NUMBER, INT8::NUMBER, NVFP4::NUMBER};
constexpr i64 FIRST_WITH_SUPERS = 10, TYPES = 22;

void* library;
bool failed = false;

// The library's function mpillama_<name>.
template <class Function> Function* find(const char* name) {
    void* found = dlsym(library, (std::string("mpillama_") + name).c_str());
    if (found == nullptr) {
        std::fprintf(stderr, "%s\n", dlerror());
        std::exit(2);
    }
    return reinterpret_cast<Function*>(found);
}

// -- numbers and memory -------------------------------------------------------------------------------------------------

// SplitMix64 (https://dl.acm.org/doi/10.1145/2714064.2660195).
struct Random {
    std::uint64_t state;

    std::uint64_t next() {
        std::uint64_t z = state += 0x9e3779b97f4a7c15;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
        z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
        return z ^ (z >> 31);
    }
    float number() { return static_cast<float>(static_cast<i64>(next() >> 40)) * 0x1p-23f - 1.0f; }  // exact, [-1, 1)
    u16 scale() { return static_cast<u16>(0x1c00 + (next() & 0x8fff)); }  // float16 of either sign, below 0.25
};

// Zeros, as aligned as mpillama's memory; kept until the program ends.
template <class Element> Element* zeros(i64 count) {
    void* memory = nullptr;
    const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(Element) + 64;
    if (posix_memalign(&memory, 4096, bytes) != 0) std::abort();
    std::memset(memory, 0, bytes);
    return static_cast<Element*>(memory);
}

float* floats(Random& random, i64 count, float times = 1.0f, float plus = 0.0f) {
    float* made = zeros<float>(count);
    for (i64 i = 0; i < count; i++) made[i] = random.number() * times + plus;
    return made;
}

u16* scales(Random& random, i64 count) {
    u16* made = zeros<u16>(count);
    for (i64 i = 0; i < count; i++) made[i] = random.scale();
    return made;
}

// Bytes e for 2^(e - 128), below 0.25.
u8* exponents(Random& random, i64 count) {
    u8* made = zeros<u8>(count);
    for (i64 i = 0; i < count; i++) made[i] = static_cast<u8>(110 + random.next() % 16);
    return made;
}

// `count` numbers of a type, below 1 (f32, f16, bf16), or bytes of any value.
u8* numbers(Random& random, i64 type, i64 count) {
    u8* made = zeros<u8>(count * 4);
    for (i64 i = 0; i < count; i++) {
        const float x = random.number();
        u32 bits;
        std::memcpy(&bits, &x, 4);
        const u16 bf16 = static_cast<u16>(bits >> 16);
        const u16 half = static_cast<u16>(random.next() & 0xbbff);  // subnormals too
        if (type == F32::NUMBER) std::memcpy(made + 4 * i, &x, 4);
        else if (type == F16::NUMBER) std::memcpy(made + 2 * i, &half, 2);
        else if (type == BF16::NUMBER) std::memcpy(made + 2 * i, &bf16, 2);
        else made[i] = static_cast<u8>(random.next());
    }
    return made;
}

constexpr i64 SUPER_COLUMNS = 32;

Matrix matrix(Random& random, i64 type, i64 panels, i64 groups, i64 columns, i64 experts = 1) {
    const i64 values = experts * panels * groups * LANES * columns;
    const u8* of_blocks = type == MXFP4::NUMBER ? exponents(random, values / BLOCK)
                                                : reinterpret_cast<const u8*>(scales(random, 2 * values / BLOCK));
    const u8* supers = nullptr;
    bool has_supers = false;
    for (i64 i = FIRST_WITH_SUPERS; i < TYPES; i++) has_supers |= type == TYPE_NUMBERS[i];
    if (has_supers) {  // any integers as scales, and small steps
        u8* const of_halves = numbers(random, type, 2 * values / BLOCK);
        u16* const steps = scales(random, 3 * values / SUPER_COLUMNS);
        if (type == NVFP4::NUMBER)  // finite scales, and a float32 of which `steps` are halves
            for (i64 i = 0; i < 2 * values / BLOCK; i++) of_halves[i] %= 56;
        if (type == NVFP4::NUMBER || type == INT4::NUMBER || type == INT4_BF16::NUMBER)  // bfloat16 from 2^-7 to 2^-5
            for (i64 i = 0; i < 3 * values / SUPER_COLUMNS; i++) steps[i] = static_cast<u16>(0x3c00 + (steps[i] & 0xff));
        of_blocks = of_halves, supers = reinterpret_cast<const u8*>(steps);
    }
    return {numbers(random, type, values), of_blocks, supers, type, experts, panels, groups, columns, SUPER_COLUMNS};
}

Activations activations(i64 tokens, i64 columns) {
    const i64 blocks = places(tokens, columns / BLOCK);
    return {zeros<float>(tokens * columns), zeros<i8>(blocks * BLOCK), zeros<float>(blocks), zeros<i32>(blocks), zeros<i32>(blocks),
            columns};
}

// -- digests ------------------------------------------------------------------------------------------------------------

// FNV-1a (http://www.isthe.com/chongo/tech/comp/fnv/) of results.
struct Digest {
    std::uint64_t hash = 0xcbf29ce484222325;
    bool nan = false, zero = false;

    template <class Element> void add(const Element* results, i64 count) {
        const u8* bytes = reinterpret_cast<const u8*>(results);
        for (i64 i = 0; i < count * static_cast<i64>(sizeof(Element)); i++) hash = (hash ^ bytes[i]) * 0x100000001b3;
        bool zeros = true;
        for (i64 i = 0; i < count; i++) {
            nan |= results[i] != results[i];
            zeros &= results[i] == 0;
        }
        zero |= zeros;
    }

    void add(const Activations& h, i64 tokens) {
        const i64 blocks = places(tokens, h.columns / BLOCK);
        add(h.x, tokens * h.columns);
        add(h.values, blocks * BLOCK);
        add(h.scales, blocks);
        add(h.starts, blocks);
        add(h.halves, blocks);
    }
};

Team* teams[MOST_THREADS];

// Print the digest of what `compute` makes with each team; its Random begins anew each time.
template <class Compute> void compare(const std::string& name, Compute compute) {
    Digest digests[MOST_THREADS];
    for (i64 i = 0; i < MOST_THREADS; i++) {
        Random random{42};
        compute(teams[i], random, digests[i]);
    }
    bool equal = true;
    for (const Digest& digest : digests) {
        equal &= digest.hash == digests[0].hash;
        if (digest.nan || digest.zero) std::printf("%s: %s\n", name.c_str(), digest.nan ? "NaN" : "all zeros");
        failed |= digest.nan || digest.zero;
    }
    if (!equal) std::printf("%s: differs with the number of threads\n", name.c_str());
    failed |= !equal;
    std::printf("%s: %016" PRIx64 "\n", name.c_str(), digests[0].hash);
}

// -- cases --------------------------------------------------------------------------------------------------------------

Activations quantised(Random& random, i64 tokens, i64 columns) {
    const auto quantise = find<void(const Activations*, i64)>("quantise");
    Activations h = activations(tokens, columns);
    h.x = floats(random, tokens * columns, 3.0f);
    quantise(&h, tokens);
    return h;
}

void products(i64 type, i64 tokens, i64 in_flight) {
    const std::string kind = std::string(TYPE_NAMES[type]) + ", " + std::to_string(tokens) + " tokens, " +
                             std::to_string(in_flight) + " in flight";
    constexpr i64 panels = 3, groups = 5, columns = 96;
    compare("column product, " + kind, [&](Team* team, Random& random, Digest& digest) {
        const auto product =
            find<i64(Team*, const Matrix*, const Activations*, i64, float*, i64)>("column_parallel");
        const Matrix m = matrix(random, TYPE_NUMBERS[type], 1, groups, columns);
        const Activations h = quantised(random, tokens, columns);
        float* out = zeros<float>(tokens * groups * LANES);
        if (!product(team, &m, &h, tokens, out, in_flight)) std::abort();
        digest.add(out, tokens * groups * LANES);
    });
    compare("row product, " + kind, [&](Team* team, Random& random, Digest& digest) {
        const auto product = find<i64(Team*, const Matrix*, const Activations*, i64, double*, i64)>("row_parallel");
        const Matrix m = matrix(random, TYPE_NUMBERS[type], panels, groups, columns);
        const Activations h = quantised(random, tokens, panels * columns);
        double* out = zeros<double>(tokens * groups * LANES);
        if (!product(team, &m, &h, tokens, out, in_flight)) std::abort();
        digest.add(out, tokens * groups * LANES);
    });
}

void embedding(i64 type) {
    compare(std::string("embedding, ") + TYPE_NAMES[type], [&](Team*, Random& random, Digest& digest) {
        const Matrix m = matrix(random, TYPE_NUMBERS[type], 1, 3, 64);
        const i64 rows[] = {47, 0, -1, 17, 5};
        double* out = zeros<double>(5 * 64);
        find<void(const Matrix*, const i64*, i64, double*)>("embed")(&m, rows, 5, out);
        digest.add(out, 5 * 64);
    });
}

// Blocks of every magnitude: from subnormal to the largest, zeros, and ties between two integers.
void quantisation(i64 tokens) {
    compare("quantisation, " + std::to_string(tokens) + " tokens", [&](Team*, Random& random, Digest& digest) {
        constexpr i64 blocks = 20;
        Activations h = activations(tokens, blocks * BLOCK);
        h.x = floats(random, tokens * blocks * BLOCK);
        for (i64 i = 0; i < tokens * blocks * BLOCK; i++) {
            const i64 block = i / BLOCK % blocks;
            if (block == 18) h.x[i] = i % BLOCK == 0 ? 127.0f : static_cast<float>(i % 97) - 48.5f;
            else if (block == 19) h.x[i] = 0.0f;
            else h.x[i] *= block == 17 ? 0x1.fffffep127f : __builtin_ldexpf(1.0f, static_cast<int>(15 * block) - 140);
        }
        find<void(const Activations*, i64)>("quantise")(&h, tokens);
        digest.add(h, tokens);
    });
}

void norm(i64 tokens) {
    compare("norm, " + std::to_string(tokens) + " tokens", [&](Team* team, Random& random, Digest& digest) {
        constexpr i64 columns = 192, size = 180;
        const Activations h = activations(tokens, columns);
        float *x = floats(random, tokens * columns, 30.0f), *weight = floats(random, columns, 0.5f, 1.0f);
        for (i64 i = 0; i < tokens * columns; i++) x[i] = i % columns < size ? x[i] : 0.0f;
        const auto normalise =
            find<void(Team*, const float*, i64, const float*, i64, double, i64, const Activations*)>("normalise");
        normalise(team, x, tokens, weight, size, 1e-5, 1, &h);
        digest.add(h, tokens);
    });
}

constexpr i64 ROTARY_HALF = 26;  // neither a multiple of 16 nor half of a head

void angles(const i32* positions, i64 tokens, float* cosines, float* sines) {
    float frequencies[ROTARY_HALF];
    frequencies[0] = 1.0f;
    for (i64 i = 1; i < ROTARY_HALF; i++) frequencies[i] = frequencies[i - 1] * 0.6f;
    find<void(const i32*, i64, const float*, i64, double, float*, float*)>("rope_angles")(
        positions, tokens, frequencies, ROTARY_HALF, 1.25, cosines, sines);
}

void rope() {
    compare("angles of RoPE", [&](Team*, Random& random, Digest& digest) {
        constexpr i64 tokens = 300;
        i32 positions[tokens];
        for (i32& position : positions) position = static_cast<i32>(random.next() >> 45);
        float *cosines = zeros<float>(tokens * ROTARY_HALF), *sines = zeros<float>(tokens * ROTARY_HALF);
        angles(positions, tokens, cosines, sines);
        digest.add(cosines, tokens * ROTARY_HALF);
        digest.add(sines, tokens * ROTARY_HALF);
    });
}

void sums() {
    compare("sums rounded", [&](Team* team, Random& random, Digest& digest) {
        constexpr i64 tokens = 40, width = 96;
        float *x = floats(random, tokens * width), *bias = floats(random, width), *out = zeros<float>(tokens * width);
        double* total = zeros<double>(tokens * width);
        for (i64 i = 0; i < tokens * width; i++)
            total[i] = static_cast<double>(random.number()) + static_cast<double>(random.number()) * 0x1p-24;
        find<void(Team*, float*, const double*, const float*, double, i64, i64)>("add_rounded")(
            team, x, total, bias, 0.5, tokens, width);
        find<void(Team*, const double*, float*, double, i64, i64)>("round_to_float")(team, total, out, 0.75, tokens, width);
        digest.add(x, tokens * width);
        digest.add(out, tokens * width);
    });
}

constexpr i64 HIDDEN = 128;

Step step_of(Random& random, i64 tokens, i64 context, i64 inner, i64 in_flight) {
    Step step{};
    step.tokens = tokens;
    step.x = floats(random, tokens * HIDDEN, 2.0f);
    step.hidden = activations(tokens, HIDDEN);
    step.context = activations(tokens, context);
    step.gate = activations(tokens, inner);
    step.up = zeros<float>(tokens * inner);
    step.partial = zeros<double>(tokens * HIDDEN);
    step.in_flight = in_flight;
    return step;
}

// One sequence that is told on and others whose prompts are read; the past is random.
struct Sequences {
    static constexpr i64 count = 3, width = 26;
    i64 segments[3 * count] = {0, 1, 1600, 1, 9, 60, 10, 3, 0};  // first token, tokens, first position
    i64 tables[count * width];
    i64 slots[13];
    i32 positions[13];

    Sequences() {
        for (i64 i = 0; i < count * width; i++) tables[i] = (i * 7 + 3) % (count * width);
        for (i64 s = 0; s < count; s++)
            for (i64 i = 0; i < segments[3 * s + 1]; i++) {
                const i64 token = segments[3 * s] + i, position = segments[3 * s + 2] + i;
                slots[token] = tables[s * width + position / POSITIONS] * POSITIONS + position % POSITIONS;
                positions[token] = static_cast<i32>(position);
            }
    }
};

void attention(const char* cache_name, i64 cache_type, i64 weights, bool with_everything) {
    const std::string name = std::string("attention, cache ") + cache_name + ", weights " + TYPE_NAMES[weights] +
                             (with_everything ? ", biases, norms of heads and a window" : "");
    compare(name, [&](Team* team, Random& random, Digest& digest) {
        constexpr i64 heads = 6, kv_heads = 2, size = 64, tokens = 13, blocks = Sequences::count * Sequences::width;
        constexpr i64 cached = blocks * kv_heads * POSITIONS * size;
        const i64 head_start[] = {0, 4, 6}, type = TYPE_NUMBERS[weights];
        const Sequences sequences;
        AttentionLayer layer{};
        layer.q = matrix(random, type, 1, heads * size / LANES, HIDDEN);
        layer.k = matrix(random, type, 1, kv_heads * size / LANES, HIDDEN);
        layer.v = matrix(random, type, 1, kv_heads * size / LANES, HIDDEN);
        layer.o = matrix(random, type, 3, HIDDEN / LANES, heads * size / 3);
        layer.cache = {numbers(random, cache_type, cached), scales(random, cached / BLOCK),
                       numbers(random, cache_type, cached), scales(random, cached / BLOCK), cache_type};
        layer.norm = floats(random, HIDDEN, 0.5f, 1.0f);
        if (with_everything) {
            layer.q_bias = floats(random, heads * size);
            layer.k_bias = floats(random, kv_heads * size);
            layer.v_bias = floats(random, kv_heads * size);
            layer.q_norm = floats(random, size, 0.5f, 1.0f);
            layer.k_norm = floats(random, size, 0.5f, 1.0f);
            layer.window = 1100;
        }
        layer.head_start = head_start;
        layer.eps = 1e-5;
        layer.scale = 0.125;
        layer.hidden_size = HIDDEN;
        layer.heads = heads;
        layer.kv_heads = kv_heads;
        layer.head_dim = size;
        layer.channels = 2 * ROTARY_HALF;
        Step step = step_of(random, tokens, heads * size, HIDDEN, 1);
        step.q = zeros<float>(tokens * heads * size);
        step.k = zeros<float>(tokens * kv_heads * size);
        step.v = zeros<float>(tokens * kv_heads * size);
        float *cosines = zeros<float>(tokens * ROTARY_HALF), *sines = zeros<float>(tokens * ROTARY_HALF);
        angles(sequences.positions, tokens, cosines, sines);
        step.cosines = cosines;
        step.sines = sines;
        step.rotary_half = ROTARY_HALF;
        step.slots = sequences.slots;
        step.segments = sequences.segments;
        step.tables = sequences.tables;
        step.segment_count = Sequences::count;
        step.table_width = Sequences::width;
        if (!find<i64(Team*, const AttentionLayer*, const Step*, Sum*)>("attention_half")(team, &layer, &step, nullptr)) std::abort();
        const i64 bytes = cached * (cache_type == F32::NUMBER ? 4 : cache_type == F16::NUMBER ? 2 : 1);
        digest.add(layer.cache.keys, bytes);
        digest.add(layer.cache.values, bytes);
        digest.add(layer.cache.key_scales, cached / BLOCK);
        digest.add(layer.cache.value_scales, cached / BLOCK);
        digest.add(step.q, tokens * heads * size);
        digest.add(step.context.x, tokens * heads * size);
        digest.add(step.partial, tokens * HIDDEN);
    });
}

void latent_attention(const char* cache_name, i64 cache_type, i64 weights, bool compressed) {
    const std::string name = std::string("latent attention, cache ") + cache_name + ", weights " + TYPE_NAMES[weights] +
                             (compressed ? ", compressed queries" : "");
    compare(name, [&](Team* team, Random& random, Digest& digest) {
        constexpr i64 heads = 6, nope = 32, rope = 2 * ROTARY_HALF, value = 32, kv_rank = 64, q_rank = 64, tokens = 13;
        constexpr i64 head = nope + (rope + 31) / 32 * 32, width = kv_rank + (rope + 31) / 32 * 32;
        constexpr i64 cached = Sequences::count * Sequences::width * POSITIONS * width;
        const i64 type = TYPE_NUMBERS[weights];
        const Sequences sequences;
        LatentLayer layer{};
        if (compressed) layer.q_a = matrix(random, type, 1, q_rank / LANES, HIDDEN);
        layer.q = matrix(random, type, 1, heads * head / LANES, compressed ? q_rank : HIDDEN);
        layer.kv_a = matrix(random, type, 1, width / LANES, HIDDEN);
        layer.k_b = matrix(random, type, 1, heads * kv_rank / LANES, nope);
        layer.v_b = matrix(random, type, 1, heads * value / LANES, kv_rank);
        layer.o = matrix(random, type, heads, HIDDEN / LANES, value);
        layer.cache = {numbers(random, cache_type, cached), scales(random, cached / BLOCK), cache_type};
        layer.norm = floats(random, HIDDEN, 0.5f, 1.0f);
        layer.q_norm = floats(random, q_rank, 0.5f, 1.0f);
        layer.kv_norm = floats(random, kv_rank, 0.5f, 1.0f);
        layer.eps = 1e-5;
        layer.latent_eps = 1e-6;
        layer.scale = 0.125;
        layer.hidden_size = HIDDEN;
        layer.heads = heads;
        layer.q_rank = q_rank;
        layer.kv_rank = kv_rank;
        layer.nope = nope;
        layer.rope = rope;
        layer.pairs = compressed;
        Step step = step_of(random, tokens, heads * value, HIDDEN, 1);
        step.latent = activations(tokens, heads * kv_rank);
        step.q = zeros<float>(tokens * heads * head);
        step.k = zeros<float>(tokens * q_rank);
        step.v = zeros<float>(tokens * width);
        float *cosines = zeros<float>(tokens * ROTARY_HALF), *sines = zeros<float>(tokens * ROTARY_HALF);
        angles(sequences.positions, tokens, cosines, sines);
        step.cosines = cosines;
        step.sines = sines;
        step.rotary_half = ROTARY_HALF;
        step.slots = sequences.slots;
        step.segments = sequences.segments;
        step.tables = sequences.tables;
        step.segment_count = Sequences::count;
        step.table_width = Sequences::width;
        if (!find<i64(Team*, const LatentLayer*, const Step*, Sum*)>("latent_half")(team, &layer, &step, nullptr)) std::abort();
        digest.add(layer.cache.values, cached * (cache_type == F32::NUMBER ? 4 : cache_type == F16::NUMBER ? 2 : 1));
        digest.add(layer.cache.scales, cached / BLOCK);
        digest.add(step.latent.x, tokens * heads * kv_rank);
        digest.add(step.context.x, tokens * heads * value);
        digest.add(step.partial, tokens * HIDDEN);
    });
}

// SwiGLU, or with experts a mixture of it.
void mlp(i64 weights, i64 tokens, i64 experts) {
    const std::string name = (experts > 0 ? "experts, " : "SwiGLU, ") + std::string(TYPE_NAMES[weights]) + ", " +
                             std::to_string(tokens) + " tokens";
    compare(name, [&](Team* team, Random& random, Digest& digest) {
        constexpr i64 inner = 192;
        const i64 each = experts > 0 ? experts : 1, type = TYPE_NUMBERS[weights];
        MlpLayer layer{};
        layer.gate = matrix(random, type, 1, inner / LANES, HIDDEN, each);
        layer.up = matrix(random, type, 1, inner / LANES, HIDDEN, each);
        layer.down = matrix(random, type, 3, HIDDEN / LANES, inner / 3, each);
        if (experts > 0) layer.router.matrix = matrix(random, F32::NUMBER, 1, 1, HIDDEN);
        layer.norm = floats(random, HIDDEN, 0.5f, 1.0f);
        layer.gate_bias = experts > 0 ? nullptr : floats(random, inner);
        layer.up_bias = experts > 0 ? nullptr : floats(random, inner);
        layer.eps = 1e-5;
        layer.hidden_size = HIDDEN;
        layer.router.chosen = experts > 0 ? 3 : 0;
        layer.router.renormalise = tokens % 2;
        layer.router.scaling = 1.0;
        const Step step = step_of(random, tokens, HIDDEN, inner, 2);
        if (!find<i64(Team*, const MlpLayer*, const Step*, Sum*)>("mlp_half")(team, &layer, &step, nullptr)) std::abort();
        digest.add(step.partial, tokens * HIDDEN);
    });
}

void all_cases() {
    for (i64 type = 0; type < TYPES; type++) {
        if (type >= 5 && type < FIRST_WITH_SUPERS) continue;
        for (i64 tokens : SOME_TOKENS) products(type, tokens, 1);
        products(type, 1, 2);
        embedding(type);
    }
    for (i64 tokens : SOME_TOKENS) quantisation(tokens);
    for (i64 tokens : SOME_TOKENS) norm(tokens);
    rope();
    sums();
    for (bool with_everything : {false, true}) {
        attention("f32", F32::NUMBER, 2, with_everything);
        attention("f16", F16::NUMBER, 3, with_everything);
        attention("q8", Q8_0::NUMBER, 4, with_everything);
        attention("q4", Q4_0::NUMBER, 3, with_everything);
    }
    for (bool compressed : {false, true}) {
        latent_attention("f32", F32::NUMBER, 2, compressed);
        latent_attention("f16", F16::NUMBER, 3, compressed);
        latent_attention("q8", Q8_0::NUMBER, 4, compressed);
        latent_attention("q4", Q4_0::NUMBER, 3, compressed);
    }
    for (i64 type : {0, 1, 3, 4})
        for (i64 experts : {0, 6})
            for (i64 tokens : {1, 7, 40}) mlp(type, tokens, experts);
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 2) return std::fprintf(stderr, "usage: kernels_driver LIBRARY\n"), 2;
    library = dlopen(arguments[1], RTLD_NOW);
    if (library == nullptr) return std::fprintf(stderr, "%s\n", dlerror()), 2;
    const std::vector<i32> anywhere(MOST_THREADS, -1);
    for (i64 i = 0; i < MOST_THREADS; i++) {
        teams[i] = find<Team*(i64, i64, const i32*)>("start_team")(i + 1, SPINS, anywhere.data());
        if (teams[i] == nullptr) return std::fprintf(stderr, "there can be no team of %d\n", static_cast<int>(i + 1)), 2;
    }
    all_cases();
    for (Team* team : teams) find<void(Team*)>("end_team")(team);
    return failed;
}
