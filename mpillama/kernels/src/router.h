// Which experts a token takes, and their shares of its result.
//
// An expert has a score: of its logit the softmax over all experts, a sigmoid, or sqrt(softplus); or the logit itself,
// and then the shares are the softmax over the chosen ones, or the sigmoid of each. What is chosen by is the score, with a correction if there
// is one; ties go to the lower number. Scores are float32, sums of them float64 in ascending order.
#pragma once
#include "arguments.h"
#include "numbers.h"

namespace mpillama {

enum class Scores : i64 { SOFTMAX, SIGMOID, SQRT_SOFTPLUS, LOGITS, LOGITS_TO_SIGMOID };

// The first of the largest of numbers; what is chosen among NaNs does not matter, since they make all shares NaN.
inline i64 largest(const float* row, i64 count) {
    i64 best = 0;
    for (i64 i = 1; i < count; i++)
        if (!(row[i] <= row[best])) best = i;
    return best;
}

constexpr float NEVER = -__builtin_inff();

// Rule out all experts but those of the best groups: a group counts by the sum of its two best experts. `room` float32
// [2 * groups].
inline void keep_best_groups(const Router& router, i64 experts, float* choices, float* room) {
    const i64 size = experts / router.groups;
    float *sums = room, *kept = room + router.groups;
    for (i64 g = 0; g < router.groups; g++) {
        float* group = choices + g * size;
        const i64 best = largest(group, size);
        const float first = group[best];
        group[best] = NEVER;
        sums[g] = first + group[largest(group, size)];
        group[best] = first;
        kept[g] = 0.0f;
    }
    for (i64 n = 0; n < router.chosen_groups; n++) {
        const i64 best = largest(sums, router.groups);
        kept[best] = 1.0f;
        sums[best] = NEVER;
    }
    for (i64 i = 0; i < experts; i++)
        if (kept[i / size] == 0.0f) choices[i] = NEVER;
}

// A token's experts, the best first, and their shares. `row` float32 [width] are its logits, which are overwritten;
// `choices` float32 [width + 2 * groups] is room to work in.
inline void choose_experts(const Router& router, i64 experts, float* row, float* choices, i64* chosen, float* shares) {
    const i64 width = router.matrix.groups * LANES;
    const Scores kind = static_cast<Scores>(router.scores);
    for (i64 i = 0; i < experts && router.bias != nullptr; i++) row[i] += router.bias[i];
    double total = 1.0, taken = 0.0;
    for (i64 i = 0; i < experts; i++)
        if (row[i] != row[i]) total = __builtin_nan("");
    if (kind == Scores::SOFTMAX) {
        const Vf top = splat(row[largest(row, experts)]);
        for (i64 i = 0; i < width; i += W) store(row + i, exponential(sub(load(row + i), top)));
        total = 0.0;
        for (i64 i = 0; i < experts; i++) total += static_cast<double>(row[i]);
    } else if (kind == Scores::SIGMOID) {
        for (i64 i = 0; i < width; i += W) store(row + i, sigmoid(load(row + i)));
    } else if (kind == Scores::SQRT_SOFTPLUS) {
        for (i64 i = 0; i < experts; i++) row[i] = __builtin_sqrtf(softplus(row[i]));
    }
    const auto score = [&](i64 i) { return static_cast<float>(static_cast<double>(row[i]) / total); };
    const bool as_they_are = router.correction == nullptr && router.groups <= 1;
    float* by = as_they_are ? row : choices;
    for (i64 i = 0; i < experts && !as_they_are; i++)
        by[i] = router.correction == nullptr ? score(i) : score(i) + router.correction[i];
    if (router.groups > 1) keep_best_groups(router, experts, by, choices + width);
    for (i64 j = 0; j < router.chosen; j++) {
        chosen[j] = largest(by, experts);
        shares[j] = score(chosen[j]);
        by[chosen[j]] = NEVER;
    }
    if (kind == Scores::LOGITS) {
        const float top = shares[0];
        for (i64 j = 0; j < router.chosen; j++) shares[j] = exponential(shares[j] - top);
    }
    for (i64 j = 0; j < router.chosen && kind == Scores::LOGITS_TO_SIGMOID; j++) shares[j] = sigmoid(shares[j]);
    for (i64 j = 0; j < router.chosen; j++) taken += static_cast<double>(shares[j]);
    for (i64 j = 0; j < router.chosen; j++) {
        if (router.renormalise != 0) shares[j] = static_cast<float>(static_cast<double>(shares[j]) / (taken + router.epsilon));
        shares[j] *= static_cast<float>(router.scaling);
    }
}

}  // namespace mpillama
