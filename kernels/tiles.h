// AMX tiles: whether this process may use them, and a thread's hold on them.
#pragma once

#include "common.h"

#if defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__AVX512VNNI__) && defined(__AVX512BF16__) && \
    defined(__AVX512BW__) && defined(__linux__)
#define TANDEM_TILES 1
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#else
#define TANDEM_TILES 0
#endif

namespace tandem {

#if TANDEM_TILES

constexpr int TILE_ROWS = 16;

// The CPU has tiles, Linux grants them to a process that asks once, and TANDEM_TILES=off doesn't forbid them.
class Tiles {
public:
    static bool used() { return wanted() && granted(); }
    // For tests: the same build with and without.
    static void want(bool tiles) { wanted() = tiles; }

private:
    static bool granted() {
        constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
        static const bool answer = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
        return answer;
    }
    static bool& wanted() {
        static bool tiles = [] {
            const char* said = std::getenv("TANDEM_TILES");
            return said == nullptr || std::strcmp(said, "off") != 0;
        }();
        return tiles;
    }
};

// The shapes of the calling thread's tiles: rows, and bytes of a row.
struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    void set(int first, int last, int64_t tile_rows, int tile_row_bytes) {
        for (int i = first; i < last; ++i) rows[i] = (uint8_t)tile_rows, row_bytes[i] = (uint16_t)tile_row_bytes;
    }
};

// Tiles of these shapes for as long as it lives. What is left set up afterwards would be saved and restored at every switch of threads.
class TileHold {
public:
    explicit TileHold(const TileShapes& shapes) {
        fence();
        _tile_loadconfig(&shapes);
    }
    ~TileHold() { _tile_release(); }
    TileHold(const TileHold&) = delete;
    TileHold& operator=(const TileHold&) = delete;

    // Compilers know nothing of what tiles read from memory: what comes before stays before.
    static void fence() { __asm__ volatile("" ::: "memory"); }
};

#else

struct Tiles {
    static bool used() { return false; }
    static void want(bool) {}
};

#endif

}  // namespace tandem
