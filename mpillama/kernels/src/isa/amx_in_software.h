// The tile instructions of AMX as plain code, for tests on processors without them (Intel's Architecture Instruction Set
// Extensions reference, chapter on AMX): one state for each thread, as in the processor.
#pragma once
#include "../lanes.h"

namespace mpillama {

struct SoftwareTiles {
    u8 data[8][16][64];
    u16 row_bytes[8];
    u8 rows[8];
};
inline thread_local SoftwareTiles software_tiles;

inline void tile_loadconfig(const void* configuration) {
    std::memcpy(software_tiles.row_bytes, static_cast<const u8*>(configuration) + 16, sizeof software_tiles.row_bytes);
    std::memcpy(software_tiles.rows, static_cast<const u8*>(configuration) + 48, sizeof software_tiles.rows);
}
inline void tile_release() { software_tiles = SoftwareTiles{}; }
inline void tile_zero(int tile) { std::memset(software_tiles.data[tile], 0, sizeof software_tiles.data[tile]); }
inline void tile_loadd(int tile, const void* from, i64 stride) {
    tile_zero(tile);
    for (int row = 0; row < software_tiles.rows[tile]; row++)
        std::memcpy(software_tiles.data[tile][row], static_cast<const u8*>(from) + row * stride,
                    software_tiles.row_bytes[tile]);
}
inline void tile_stored(int tile, void* to, i64 stride) {
    for (int row = 0; row < software_tiles.rows[tile]; row++)
        std::memcpy(static_cast<u8*>(to) + row * stride, software_tiles.data[tile][row], software_tiles.row_bytes[tile]);
}
inline void tile_dpbssd(int result, int a, int b) {
    SoftwareTiles& s = software_tiles;
    for (int m = 0; m < s.rows[result]; m++)
        for (int n = 0; n < s.row_bytes[result] / 4; n++) {
            i32 sum = load_i32(s.data[result][m] + 4 * n);
            for (int k = 0; k < s.row_bytes[a] / 4; k++)
                for (int i = 0; i < 4; i++)
                    sum += static_cast<i8>(s.data[a][m][4 * k + i]) * static_cast<i8>(s.data[b][k][4 * n + i]);
            std::memcpy(s.data[result][m] + 4 * n, &sum, sizeof sum);
        }
}

}  // namespace mpillama

#define _tile_loadconfig mpillama::tile_loadconfig
#define _tile_release mpillama::tile_release
#define _tile_zero mpillama::tile_zero
#define _tile_loadd mpillama::tile_loadd
#define _tile_stored mpillama::tile_stored
#define _tile_dpbssd mpillama::tile_dpbssd
