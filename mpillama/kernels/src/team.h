// The threads of a rank: one region at a time, in which they meet at barriers.
#pragma once
#include "lanes.h"

namespace mpillama {

struct Team;

// A thread's view of a region. `scratch` is memory of its own, `shared` memory that the team has in common: as many bytes
// as were reserved before the region began, both aligned to 64.
struct Member {
    Team* team;
    i64 thread, threads;
    u8* scratch;
    u8* shared;

    void barrier() const;  // until all threads are here

    // This thread's part of `count` units: a range of neighbours.
    i64 first(i64 count) const { return count * thread / threads; }
    i64 last(i64 count) const { return count * (thread + 1) / threads; }
};

using Region = void (*)(const Member&, const void* arguments);

}  // namespace mpillama
