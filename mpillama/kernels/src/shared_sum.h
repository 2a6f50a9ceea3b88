// The sum over ranks of one host through memory that they share.
//
// Every rank writes its addends into a slot of its own, raises its flag to the number of the exchange, waits until all
// flags have reached it, and adds the slots up in order of rank. Slots alternate between two halves: a rank can only be
// writing into a half when all ranks have finished reading it, because they have raised their flags for the exchange
// between; so no second wait is needed.
#pragma once
#include <sched.h>

#include <atomic>
#include <cstring>

#include "lanes.h"

namespace mpillama {

constexpr i64 FLAG_STRIDE = 8;  // flags lie a cache line apart

struct Window {
    double* slots;           // [2, ranks, capacity]
    std::atomic<i64>* flags;  // [ranks, FLAG_STRIDE]
    i64 ranks, rank, capacity;
};

inline bool all_arrived(const Window& window, i64 sequence) {
    for (i64 other = 0; other < window.ranks; other++)
        if (window.flags[other * FLAG_STRIDE].load(std::memory_order_acquire) < sequence) return false;
    return true;
}

// Replace `partial` by its sum over ranks; returns whether all ranks arrived while it waited. Polls `spins` times, then
// gives the core away up to `yields` times. If it returns false, call again with `posted`: the addends are in place.
inline bool sum_shared(const Window& window, double* partial, i64 count, i64 sequence, bool posted, i64 spins,
                       i64 yields) {
    double* half = window.slots + sequence % 2 * window.ranks * window.capacity;
    if (!posted) {
        std::memcpy(half + window.rank * window.capacity, partial, static_cast<std::size_t>(count) * sizeof(double));
        window.flags[window.rank * FLAG_STRIDE].store(sequence, std::memory_order_release);
    }
    for (i64 tries = 0; !all_arrived(window, sequence);) {
        if (++tries > spins + yields) return false;
        if (tries > spins)
            sched_yield();
        else
            pause();
    }
    for (i64 i = 0; i < count; i++) partial[i] = half[i];
    for (i64 other = 1; other < window.ranks; other++)
        for (i64 i = 0; i < count; i++) partial[i] += half[other * window.capacity + i];
    return true;
}

}  // namespace mpillama
