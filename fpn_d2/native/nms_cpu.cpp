// Non-maximum suppression on the CPU, behind a C interface that nms.py calls: torchvision's, to the bit, over vectors of
// 16 boxes. Compile with -ffp-contract=off: one rounding decides on which side of the threshold an overlap lies.

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu_kernels.h"

extern "C" {
// Mirrored by ctypes in nms.py.
struct Problem {
    int64_t count, most;
    double threshold;
    const float* boxes;     // (M, 4), those of a group behind each other, best first
    const int64_t* groups;  // (M), or null for one group
    int64_t* kept;          // (M): indices of those kept, at most `most`
};
}

namespace {

typedef int32_t Mask16 __attribute__((vector_size(64)));
constexpr int64_t kLanes = 16;

// std::max and std::min as torchvision calls them: of a NaN and a number, the first.
inline Float16 larger(Float16 a, Float16 b) { return a < b ? b : a; }
inline Float16 smaller(Float16 a, Float16 b) { return b < a ? b : a; }

int64_t suppress(const Problem& p) {
    const auto [count, most, threshold, boxes, groups, kept] = p;
    const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
    const Workspace workspace(7 * padded);
    float* x0 = workspace.get();
    float *y0 = x0 + padded, *x1 = y0 + padded, *y1 = x1 + padded, *areas = y1 + padded;
    int32_t* group = reinterpret_cast<int32_t*>(areas + padded);
    int32_t* gone = group + padded;
    for (int64_t i = 0; i < padded; ++i) {
        const float* box = boxes + std::min(i, count - 1) * 4;
        x0[i] = box[0], y0[i] = box[1], x1[i] = box[2], y1[i] = box[3];
        areas[i] = (box[2] - box[0]) * (box[3] - box[1]);
        group[i] = groups ? int32_t(groups[std::min(i, count - 1)]) : 0;
        gone[i] = 0;
    }
    // Overlaps are float, the threshold is not: what is greater than it is greater than the float at or below it.
    float limit = float(threshold);
    if (double(limit) > threshold) limit = std::nextafter(limit, -std::numeric_limits<float>::infinity());
    const Float16 zero{};
    int64_t number = 0;
    int64_t end = groups ? 0 : count;  // of the group of box i
    for (int64_t i = 0; i < count && number < most; ++i) {
        while (end < count && (end <= i || group[end] == group[i])) ++end;
        if (gone[i]) continue;
        kept[number++] = i;
        const Float16 left = zero + x0[i], top = zero + y0[i], right = zero + x1[i], bottom = zero + y1[i];
        for (int64_t j = (i + 1) / kLanes * kLanes; j < end; j += kLanes) {
            const Float16 width = smaller(right, load<Float16>(x1 + j)) - larger(left, load<Float16>(x0 + j));
            const Float16 height = smaller(bottom, load<Float16>(y1 + j)) - larger(top, load<Float16>(y0 + j));
            const Float16 inner = larger(zero, width) * larger(zero, height);
            const Float16 overlap = inner / (areas[i] + load<Float16>(areas + j) - inner);
            const Mask16 same = Mask16(load<Mask16>(group + j) == group[i]);
            store(gone + j, load<Mask16>(gone + j) | (Mask16(overlap > limit) & same));
        }
    }
    return number;
}

}  // namespace

// Returns the number of boxes that are kept, or -1 where memory ran out.
extern "C" int64_t nms_float32(const Problem* p) {
    int64_t number = 0;
    const int64_t failed = guarded([&] { number = suppress(*p); });
    return failed ? failed : number;
}
