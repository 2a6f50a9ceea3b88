// The threads of a rank: one region at a time, in which they meet at barriers.
#pragma once
#include "lanes.h"

namespace mpillama {

struct Team;

// What a thread's time goes to, if somebody asks; mpillama/kernels/library.py has the same names in the same order.
enum class Part { NORM, QKV, ROPE, ATTENTION, O_PROJ, ROUTER, GATE_UP, DOWN, COLUMN, RESIDUAL, OTHERS, WAITING, COUNT };

struct alignas(64) Clock {
    i64 last;
    i64 nanoseconds[static_cast<int>(Part::COUNT)];
};

// A thread's view of a region. `scratch` is memory of its own, `shared` memory that the team has in common: as many bytes
// as were reserved before the region began, both aligned to 64.
struct Member {
    Team* team;
    i64 thread, threads;
    u8* scratch;
    u8* shared;
    Clock* clock;  // null unless times are wanted

    void barrier() const;  // until all threads are here

    void begin() const {
        if (clock != nullptr) clock->last = now();
    }
    void did(Part part) const {
        if (clock == nullptr) return;
        const i64 time = now();
        clock->nanoseconds[static_cast<int>(part)] += time - clock->last;
        clock->last = time;
    }
    static i64 now();

    // This thread's part of `count` units: a range of neighbours.
    i64 first(i64 count) const { return count * thread / threads; }
    i64 last(i64 count) const { return count * (thread + 1) / threads; }
};

using Region = void (*)(const Member&, const void* arguments);

}  // namespace mpillama
