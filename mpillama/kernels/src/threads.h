// The team's threads: they wait for regions, and meet at barriers inside them.
//
// A wait polls for a bounded time and then sleeps on a futex. Where a host has more threads than cores it gives the core
// away at once instead of polling.
#pragma once
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <csignal>
#include <cstdlib>
#include <ctime>
#include <new>

#include "team.h"

namespace mpillama {

constexpr i64 YIELDS = 32;  // turns of giving the core away before a thread sleeps

// A number that threads wait to see changed.
struct Bell {
    alignas(64) std::atomic<u32> rung{0};
    std::atomic<i32> sleepers{0};

    void ring() {
        rung.fetch_add(1, std::memory_order_seq_cst);
        if (sleepers.load(std::memory_order_seq_cst) > 0) futex(FUTEX_WAKE_PRIVATE, INT_MAX);
    }

    void wait(u32 before, i64 spins) {
        for (i64 i = 0; i < spins; i++) {
            if (rung.load(std::memory_order_acquire) != before) return;
            pause();
        }
        for (i64 i = 0; i < YIELDS; i++) {
            if (rung.load(std::memory_order_acquire) != before) return;
            sched_yield();
        }
        sleepers.fetch_add(1, std::memory_order_seq_cst);
        while (rung.load(std::memory_order_seq_cst) == before) futex(FUTEX_WAIT_PRIVATE, before);
        sleepers.fetch_sub(1, std::memory_order_seq_cst);
    }

  private:
    void futex(int operation, u32 value) { syscall(SYS_futex, &rung, operation, value, nullptr, nullptr, 0); }
};

struct Team {
    i64 threads, spins;
    pthread_t* handles;
    Region region;
    const void* arguments;
    u8 *scratch, *shared;
    i64 scratch_bytes, shared_bytes;
    bool ending;
    Clock* clocks;
    Bell begun, met;
    alignas(64) std::atomic<i64> arrived{0};

    Member member(i64 thread) {
        Clock* clock = clocks == nullptr ? nullptr : clocks + thread;
        return {this, thread, threads, scratch + thread * scratch_bytes, shared, clock};
    }

    void barrier() {
        if (threads == 1) return;
        const u32 before = met.rung.load(std::memory_order_acquire);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
            arrived.store(0, std::memory_order_relaxed);
            met.ring();
        } else {
            met.wait(before, spins);
        }
    }

    // Make sure of memory before a region: per thread, and in common. Returns whether there is enough.
    bool reserve(i64 for_each, i64 in_common) {
        return grow(scratch, scratch_bytes, (for_each + 4095) / 4096 * 4096, threads) &&
               grow(shared, shared_bytes, in_common, 1);
    }

    void run(Region what, const void* with) {
        region = what;
        arguments = with;
        if (threads > 1) begun.ring();
        take_part(0);
    }

    void take_part(i64 thread) {
        const Member own = member(thread);
        own.begin();
        region(own, arguments);
        own.barrier();
    }

    // Begin or end to count what the threads' time goes to; returns whether there is memory for it.
    bool watch(bool wanted) {
        std::free(clocks);
        clocks = nullptr;
        if (!wanted) return true;
        void* fresh = nullptr;
        const std::size_t bytes = static_cast<std::size_t>(threads) * sizeof(Clock);
        if (posix_memalign(&fresh, 64, bytes) != 0) return false;
        std::memset(fresh, 0, bytes);
        clocks = static_cast<Clock*>(fresh);
        return true;
    }

  private:
    static bool grow(u8*& memory, i64& bytes, i64 wanted, i64 times) {
        if (wanted <= bytes) return true;
        std::free(memory);
        memory = nullptr;
        bytes = 0;
        void* fresh = nullptr;
        if (posix_memalign(&fresh, 4096, static_cast<std::size_t>(wanted) * static_cast<std::size_t>(times)) != 0)
            return false;
        memory = static_cast<u8*>(fresh);
        bytes = wanted;
        return true;
    }
};

inline void Member::barrier() const {
    team->barrier();
    did(Part::WAITING);
}

inline i64 Member::now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000 + time.tv_nsec;
}

struct Start {
    Team* team;
    i64 thread;
};

inline void* work(void* given) {
    const Start start = *static_cast<Start*>(given);
    std::free(given);
    Team& team = *start.team;
    u32 seen = 0;
    while (true) {
        team.begun.wait(seen, team.spins);
        seen++;
        if (team.ending) return nullptr;
        team.take_part(start.thread);
    }
}

inline void end_team(Team* team, i64 running) {
    team->ending = true;
    team->begun.ring();
    for (i64 i = 0; i < running; i++) pthread_join(team->handles[i], nullptr);
    std::free(team->handles);
    std::free(team->scratch);
    std::free(team->shared);
    std::free(team->clocks);
    team->~Team();
    std::free(team);
}

// Start threads 1, 2, … of a team; the caller is thread 0. `cpus` says where each runs, -1 for anywhere. Null if the
// system has no more threads or memory.
inline Team* start_team(i64 threads, i64 spins, const i32* cpus) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, sizeof(Team)) != 0) return nullptr;
    Team* team = new (memory) Team{};
    team->threads = threads;
    team->spins = spins;
    team->handles = static_cast<pthread_t*>(std::calloc(static_cast<std::size_t>(threads), sizeof(pthread_t)));
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are the interpreter's
    i64 running = 0;
    for (i64 thread = 1; thread < threads; thread++, running++) {
        Start* start = static_cast<Start*>(std::malloc(sizeof(Start)));
        *start = {team, thread};
        if (pthread_create(&team->handles[running], nullptr, work, start) != 0) {
            std::free(start);
            break;
        }
        if (cpus[thread] >= 0) {
            cpu_set_t place;
            CPU_ZERO(&place);
            CPU_SET(cpus[thread], &place);
            pthread_setaffinity_np(team->handles[running], sizeof place, &place);
        }
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    if (running == threads - 1) return team;
    end_team(team, running);
    return nullptr;
}

}  // namespace mpillama
