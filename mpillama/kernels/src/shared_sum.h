// The sum over ranks of one host through memory that they share.
//
// Every rank writes its addends into a slot of its own; every thread of it counts itself in when its part is there, waits
// until all threads of all ranks have arrived, and adds the slots up in order of rank. Slots alternate between two
// halves: a thread can only be writing into a half when all threads have finished reading it, because they have arrived
// at the exchange between; so no second wait is needed.
//
// Where there are other hosts, too, the first rank of each host waits for the arrivals of its own, adds the slots up into
// `totals`, adds what the other hosts have, and publishes it; all others wait for that. Totals alternate, too, so that a
// rank may compute and hand over its addends of the next exchange before it reads the sum of this one: half of a step's
// tokens go on while the sums of the others are on their way. Before it hands over those of the exchange after the next,
// it must have read this one's.
#pragma once
#include <sched.h>

#include <atomic>
#include <cstring>

#include "arguments.h"
#include "elementwise.h"
#include "team.h"

namespace mpillama {

constexpr i64 FLAG_STRIDE = 8;      // counters lie a cache line apart
constexpr i64 PROGRESS_STRIDE = 8;  // and so does each thread's progress

struct Window {
    double* slots;           // [2, ranks, capacity]
    std::atomic<i64>* flags;  // [ranks, FLAG_STRIDE]: arrivals of a rank's threads, then their number
    i64 ranks, rank, capacity;
    double* totals;              // [2, capacity], null if all ranks are on this host
    std::atomic<i64>* published;  // the last exchange whose totals are there

    double* slot(i64 sequence, i64 of) const { return slots + (sequence % 2 * ranks + of) * capacity; }
    double* totals_of(i64 sequence) const { return totals + sequence % 2 * capacity; }

    void arrive(i64 arrivals) const { flags[rank * FLAG_STRIDE].fetch_add(arrivals, std::memory_order_acq_rel); }

    bool all_arrived(i64 sequence) const {
        for (i64 other = 0; other < ranks; other++) {
            const std::atomic<i64>* of = flags + other * FLAG_STRIDE;
            if (of[0].load(std::memory_order_acquire) < sequence * of[1].load(std::memory_order_relaxed)) return false;
        }
        return true;
    }

    // Whether the sum can be had.
    bool is_ready(i64 sequence) const {
        return totals == nullptr ? all_arrived(sequence) : published->load(std::memory_order_acquire) >= sequence;
    }

    // Polls `spins` times, then gives the core away up to `yields` times; returns whether `is_over`.
    template <class IsOver> static bool wait(i64 spins, i64 yields, const IsOver& is_over) {
        for (i64 tries = 0; !is_over();) {
            if (++tries > spins + yields) return false;
            if (tries > spins)
                sched_yield();
            else
                pause();
        }
        return true;
    }
    bool wait(i64 sequence, i64 spins, i64 yields) const {
        return wait(spins, yields, [&] { return is_ready(sequence); });
    }

    // W numbers' sum, in order of rank.
    Vd total(i64 sequence, i64 i) const {
        if (totals != nullptr) return load(totals_of(sequence) + i);
        Vd sum = load(slot(sequence, 0) + i);
        for (i64 other = 1; other < ranks; other++) sum = add(sum, load(slot(sequence, other) + i));
        return sum;
    }
};

// The slots' sum, in order of rank.
inline void add_slots(const Window& window, i64 count, i64 sequence, double* sum) {
    std::memcpy(sum, window.slot(sequence, 0), static_cast<std::size_t>(count) * sizeof(double));
    for (i64 other = 1; other < window.ranks; other++) {
        const double* addends = window.slot(sequence, other);
        for (i64 i = 0; i < count; i++) sum[i] += addends[i];
    }
}

// Replace `partial` by its sum over ranks, one thread for all of this rank's; returns whether all ranks arrived while it
// waited. If it returns false, call again with `posted`: the addends are in place.
inline bool sum_shared(const Window& window, double* partial, i64 count, i64 sequence, bool posted, i64 spins,
                       i64 yields) {
    if (!posted) {
        std::memcpy(window.slot(sequence, window.rank), partial, static_cast<std::size_t>(count) * sizeof(double));
        window.arrive(window.flags[window.rank * FLAG_STRIDE + 1].load(std::memory_order_relaxed));
    }
    if (!window.wait(sequence, spins, yields)) return false;
    if (window.totals == nullptr) add_slots(window, count, sequence, partial);
    else
        std::memcpy(partial, window.totals_of(sequence), static_cast<std::size_t>(count) * sizeof(double));
    return true;
}

// The first rank of a host begins the totals with what this host's ranks have; returns whether they all arrived while it
// waited. What other hosts have is then to be added, and the totals to be published.
inline bool sum_host(const Window& window, i64 count, i64 sequence, i64 spins, i64 yields) {
    if (!Window::wait(spins, yields, [&] { return window.all_arrived(sequence); })) return false;
    add_slots(window, count, sequence, window.totals_of(sequence));
    return true;
}

// How a half layer's results become part of the residual stream. Without a window this rank is alone. `sequence` is the
// number of the first exchange: there is one for as many tokens as fit a slot. With an `addend` the sum and the bias are
// left there, float32 [tokens, width], else they are added to step.x, times `factor`. `progress` i64 [threads, stride]: twice
// the exchanges that a thread is through with, and 1 if its addends of the next are in place. `waited` adds up the
// nanoseconds for which the first thread waited.
struct Sum {
    const Window* window;
    const float* bias;
    i64* progress;
    float* addend;
    double factor;
    i64 sequence, spins, yields, waited;
};

inline i64 tokens_at_once(const Sum& sum, const Step& step) {
    return sum.window == nullptr ? step.tokens : sum.window->capacity / step.hidden.columns;
}

inline i64 exchanges(const Sum& sum, const Step& step) {
    const i64 at_once = tokens_at_once(sum, step);
    return (step.tokens + at_once - 1) / at_once;
}

// Where a half layer should put its results: at once into the slot, if one exchange does for all of them.
inline double* addends(const Sum* sum, const Step& step) {
    if (sum == nullptr || sum->window == nullptr || exchanges(*sum, step) > 1) return step.partial;
    return sum->window->slot(sum->sequence, sum->window->rank);
}

inline void restart(Sum* sum, i64 threads) {
    for (i64 thread = 0; sum != nullptr && thread < threads; thread++) sum->progress[thread * PROGRESS_STRIDE] = 0;
}

inline bool finished(const Sum& sum, const Step& step, i64 threads) {
    for (i64 thread = 0; thread < threads; thread++)
        if (sum.progress[thread * PROGRESS_STRIDE] < 2 * exchanges(sum, step)) return false;
    return true;
}

// x += factor * (the sum over ranks of step.partial rounded to float32, and then the bias): this thread's columns of all tokens, which
// are those that it computed. Leaves off when others do not come; the next call goes on from there.
inline void add_up(const Member& member, Sum& sum, const Step& step) {
    const i64 width = step.hidden.columns, groups = width / LANES, at_once = tokens_at_once(sum, step);
    const i64 begin = LANES * member.first(groups), end = LANES * member.last(groups);
    i64& progress = sum.progress[member.thread * PROGRESS_STRIDE];
    for (; progress < 2 * exchanges(sum, step); progress++) {
        const i64 number = progress / 2, first = number * at_once, sequence = sum.sequence + number;
        const i64 tokens = step.tokens - first < at_once ? step.tokens - first : at_once;
        if (sum.window != nullptr) {
            const Window& window = *sum.window;
            double* slot = window.slot(sequence, window.rank);
            if (progress % 2 == 0) {
                const double* from = step.partial + first * width;
                for (i64 t = 0; t < tokens && from != slot; t++)
                    std::memcpy(slot + t * width + begin, from + t * width + begin, (end - begin) * sizeof(double));
                window.arrive(1);
                progress++;
            }
            member.did(Part::RESIDUAL);
            const i64 start = member.thread == 0 ? Member::now() : 0;
            const bool arrived = window.wait(sequence, sum.spins, sum.yields);
            if (member.thread == 0) sum.waited += Member::now() - start;
            member.did(Part::OTHERS);
            if (!arrived) return;
        } else {
            progress++;
        }
        const float factor = static_cast<float>(sum.factor);
        for (i64 t = 0; t < tokens; t++) {
            float* x = (sum.addend != nullptr ? sum.addend : step.x) + (first + t) * width;
            const double* alone = step.partial + (first + t) * width;
            if (sum.addend != nullptr) std::memset(x + begin, 0, (end - begin) * sizeof(float));
            for (i64 i = begin; i < end; i += W) {
                const Vd total = sum.window == nullptr ? load(alone + i) : sum.window->total(sequence, t * width + i);
                store(x + i, add(load(x + i), mul(narrow(total), splat(factor))));
            }
            for (i64 i = begin; i < end && sum.bias != nullptr; i++) x[i] += sum.bias[i] * factor;
        }
        member.did(Part::RESIDUAL);
    }
}

}  // namespace mpillama
