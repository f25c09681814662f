// Tiles of AMX: 16 rows of 64 bytes, and the product of two of them in one instruction.
//
// A packed group of 16 weight rows by 64 columns is 16 lines, and 16 lines are just what a tile of weights holds, so
// the packed format serves as it is. With OZ_EMULATE_TILES the instructions are played by plain code, which is how the
// kernel is tested on processors without them.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(OZ_EMULATE_TILES) || defined(__AMX_INT8__)
#define OZ_TILES 1
#endif

#ifdef OZ_TILES
#ifndef OZ_EMULATE_TILES
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace oz {

#ifdef OZ_EMULATE_TILES

inline int64_t allow_tiles() { return 0; }
struct UsingTiles {};
inline thread_local uint8_t tile_memory[8][16][64];

template <int T>
void tile_load(const void* from, int64_t stride) {
    for (int row = 0; row < 16; row++) std::memcpy(tile_memory[T][row], (const uint8_t*)from + row * stride, 64);
}
template <int T>
void tile_store(void* to, int64_t stride) {
    for (int row = 0; row < 16; row++) std::memcpy((uint8_t*)to + row * stride, tile_memory[T][row], 64);
}
template <int T>
void tile_zero() {
    std::memset(tile_memory[T], 0, sizeof tile_memory[T]);
}
// sums[m][n] += signed a[m][4k + j] * unsigned b[k][4n + j]
template <int SUMS, int A, int B>
void tile_dot() {
    for (int m = 0; m < 16; m++)
        for (int n = 0; n < 16; n++) {
            int32_t sum;
            std::memcpy(&sum, &tile_memory[SUMS][m][4 * n], 4);
            for (int k = 0; k < 16; k++)
                for (int j = 0; j < 4; j++)
                    sum += int32_t(int8_t(tile_memory[A][m][4 * k + j])) * int32_t(tile_memory[B][k][4 * n + j]);
            std::memcpy(&tile_memory[SUMS][m][4 * n], &sum, 4);
        }
}

#else

// Linux hands out the tile registers on request only, once for the process. 0, or the system's error.
inline int64_t allow_tiles() {
    constexpr long request = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request, tile_data);
}

// Shapes of all tiles for as long as this lives; other libraries on the same thread set their own.
struct UsingTiles {
    UsingTiles() {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } shapes;
        for (int i = 0; i < 8; i++) shapes.row_bytes[i] = 64, shapes.rows[i] = 16;
        // GCC 12 does not know that the instruction reads the record, and would leave it unwritten.
        asm volatile("" ::"r"(&shapes) : "memory");
        _tile_loadconfig(&shapes);
    }
    ~UsingTiles() { _tile_release(); }
};

// The compiler wants the tile's number as a literal.
template <int T>
void tile_load(const void* from, int64_t stride) {
    static_assert(T <= 2);
    if constexpr (T == 0) _tile_loadd(0, from, stride);
    if constexpr (T == 1) _tile_loadd(1, from, stride);
    if constexpr (T == 2) _tile_loadd(2, from, stride);
}
template <int T>
void tile_store(void* to, int64_t stride) {
    static_assert(T == 3 || T == 4);
    if constexpr (T == 3) _tile_stored(3, to, stride);
    if constexpr (T == 4) _tile_stored(4, to, stride);
}
template <int T>
void tile_zero() {
    static_assert(T == 3 || T == 4);
    if constexpr (T == 3) _tile_zero(3);
    if constexpr (T == 4) _tile_zero(4);
}
template <int SUMS, int A, int B>
void tile_dot() {
    static_assert(A == 0 && SUMS == B + 2);
    if constexpr (B == 1) _tile_dpbsud(3, 0, 1);
    if constexpr (B == 2) _tile_dpbsud(4, 0, 2);
}
#endif

}  // namespace oz
#endif
