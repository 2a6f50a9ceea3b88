// How a step's attention is cut into tiles and shared by the threads, and the memory that it works in.
#pragma once
#include "attention_tiles.h"
#include "team.h"

namespace mpillama {

constexpr i64 SPAN_BLOCKS = 16;  // blocks of a span; spans may be computed apart
constexpr i64 SPAN = SPAN_BLOCKS * POSITIONS;
constexpr i64 TILE_ROWS = 16;    // most query rows that pass over the cache together, but for a token's heads

inline i64 smaller(i64 x, i64 y) { return x < y ? x : y; }
inline i64 larger(i64 x, i64 y) { return x > y ? x : y; }

// Query rows that pass over the cache together: some tokens of a segment with the heads that share a KV head. Its
// spans are first_span : last_span, those before lie outside the window of all rows.
struct Tile {
    const i64* table;
    i64 segment, kv_head, first_head, heads, token, tokens, position, first_span, last_span;

    i64 rows() const { return heads * tokens; }
    i64 spans() const { return last_span - first_span; }
    i64 row_position(i64 row) const { return position + row / heads; }
};

// The first position that a token sees.
inline i64 first_seen(const AttentionLayer& layer, i64 position) {
    if (layer.chunk > 0) return position - position % layer.chunk;
    return layer.window > 0 ? larger(0, position + 1 - layer.window) : 0;
}

// Of a step the tokens from : to.
struct TokenRange {
    i64 from = 0, to = INT64_MAX;

    // Call `use` with every segment that has some of them: its number, their first one, how many, its position.
    template <class Use> void for_each_segment(const Step& step, Use use) const {
        for (i64 s = 0; s < step.segment_count; s++) {
            const i64* segment = step.segments + 3 * s;
            const i64 first = larger(segment[0], from), last = smaller(segment[0] + segment[1], to);
            if (first < last) use(s, first, last - first, segment[2] + first - segment[0]);
        }
    }
};

// Call `use` with every tile of a step or of some of its tokens, in the same order for every thread.
template <class Use>
inline void for_each_tile(const AttentionLayer& layer, const Step& step, Use use, TokenRange range = {}) {
    range.for_each_segment(step, [&](i64 s, i64 token, i64 count, i64 start) {
        const i64* table = step.tables + s * step.table_width;
        for (i64 kv_head = 0; kv_head < layer.kv_heads; kv_head++) {
            const i64 first_head = layer.head_start[kv_head], heads = layer.head_start[kv_head + 1] - first_head;
            if (heads == 0) continue;
            const i64 most = larger(1, TILE_ROWS / heads);
            for (i64 first = 0; first < count; first += most) {
                const i64 tokens = smaller(most, count - first), position = start + first;
                const i64 first_span = first_seen(layer, position) / SPAN, last_span = (position + tokens - 1) / SPAN + 1;
                use(Tile{table, s, kv_head, first_head, heads, token + first, tokens, position, first_span, last_span});
            }
        }
    });
}

// How the threads share a step: tiles, or the tiles' spans where any has several and there are few tiles, or not many
// and the threads do not divide them.
struct Sharing {
    i64 tiles = 0, spans = 0, rows = 0;
    bool by_span;

    Sharing(const AttentionLayer& layer, const Step& step, i64 threads) {
        for_each_tile(layer, step, [&](const Tile& tile) {
            tiles++;
            spans += tile.spans();
            rows = larger(rows, tile.rows());
        });
        const bool few = tiles < 2 * threads || (tiles < 4 * threads && tiles % threads != 0);
        by_span = threads > 1 && few && spans > tiles;
    }
};

// Memory handed out piece by piece, in cache lines; without memory it only counts.
struct Room {
    u8* memory;
    i64 used = 0;

    template <class T> T* take(i64 count) {
        T* piece = memory ? reinterpret_cast<T*>(memory + used) : nullptr;
        used += (count * static_cast<i64>(sizeof(T)) + 63) / 64 * 64;
        return piece;
    }
};

// `largest` [rows], sums [rows, 16], out [rows, head_dim].
struct TileSums {
    float *largest, *sums, *out;

    TileSums(Room& room, i64 rows, i64 head_dim)
        : largest(room.take<float>(rows)),
          sums(room.take<float>(rows * LANES)),
          out(room.take<float>(rows * head_dim)) {}

    RowSums row(i64 r, i64 head_dim) const { return {largest + r, sums + r * LANES, out + r * head_dim}; }

    void clear(i64 rows, i64 head_dim) const {
        for (i64 r = 0; r < rows; r++) largest[r] = FAR_BELOW;
        for (i64 i = 0; i < rows * LANES; i++) sums[i] = 0.0f;
        for (i64 i = 0; i < rows * head_dim; i++) out[i] = 0.0f;
    }
};

// What a thread works with: the query rows of a tile, their scores [rows, 64], and which positions of a block each of
// them sees: its first counts[row] but the first hidden[row].
struct Workplace {
    Queries queries;
    TileSums part, total;
    float* scores;
    i64 *counts, *hidden;

    Workplace(Room& room, i64 rows, i64 head_dim)
        : queries{room.take<float>(rows * head_dim), room.take<i8>(rows * head_dim),
                  room.take<float>(rows * head_dim / BLOCK), room.take<i32>(rows * head_dim / BLOCK)},
          part(room, rows, head_dim),
          total(room, rows, head_dim),
          scores(room.take<float>(rows * POSITIONS)),
          counts(room.take<i64>(rows)),
          hidden(room.take<i64>(rows)) {}
};

// The most query rows of a tile: a single token may have more heads on a KV head than TILE_ROWS.
inline i64 most_rows(const AttentionLayer& layer) {
    i64 most = TILE_ROWS;
    for (i64 i = 0; i < layer.kv_heads; i++) most = larger(most, layer.head_start[i + 1] - layer.head_start[i]);
    return most;
}

inline i64 attention_scratch_bytes(const AttentionLayer& layer) {
    Room room{nullptr};
    Workplace(room, most_rows(layer), layer.head_dim);
    return room.used;
}

inline i64 attention_shared_bytes(const AttentionLayer& layer, const Step& step, i64 threads) {
    const Sharing sharing(layer, step, threads);
    Room room{nullptr};
    TileSums(room, sharing.rows, layer.head_dim);
    return sharing.by_span ? sharing.spans * room.used : 0;
}

// What the threads leave of a span for the combination.
inline TileSums span_sums(const Member& member, const AttentionLayer& layer, const Sharing& sharing, i64 unit) {
    Room size{nullptr};
    TileSums(size, sharing.rows, layer.head_dim);
    Room room{member.shared + unit * size.used};
    return TileSums(room, sharing.rows, layer.head_dim);
}

}  // namespace mpillama
