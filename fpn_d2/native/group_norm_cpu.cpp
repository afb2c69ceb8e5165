// Group normalisation of channels-last maps on the CPU, forward and backward, behind a C interface that group_norm.py
// calls. Maps are read twice: once for sums over cells, channel by channel, and once to be written.

#include <algorithm>
#include <cmath>

#include "cpu_kernels.h"

extern "C" {
// Mirrored by ctypes in group_norm.py. Maps are (N, cells, C), C a multiple of 16.
struct Problem {
    int64_t num_images, cells, channels, groups, num_threads;
    double epsilon;
    const void* input;
    const float* weight;     // (C)
    const float* bias;       // (C); forward
    float* moments;          // (N, 2, groups): mean, and one by the standard deviation; forward writes, backward reads
    void* output;            // forward
    const void* gradient;    // of the output; backward
    void* input_gradient;    // or null
    float* weight_gradient;  // (N, 2, C): of weight and bias, a sum for each image
};
}

namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kCells = 256;  // of a part: a sum of float32 is no longer than this, those of parts are double

struct Shape {
    explicit Shape(const Problem& p)
        : parts((p.cells + kCells - 1) / kCells), size(p.channels / p.groups), tasks(p.num_images * parts) {}
    int64_t parts, size, tasks;
};

// Call work(image, part, first cell, one behind the last) for every part of every image.
template <typename Work> void for_parts(const Problem& p, const Work& work) {
    const Shape shape(p);
    std::atomic<int64_t> next{0};
    in_threads(std::max<int64_t>(1, std::min(p.num_threads, shape.tasks)), [&] {
        for (int64_t task; (task = next++) < shape.tasks;) {
            const int64_t part = task % shape.parts;
            work(task / shape.parts, part, part * kCells, std::min(p.cells, (part + 1) * kCells));
        }
    });
}

// sums[0][c] and sums[1][c] of a part: each(cell, c, one, other) adds what 16 channels of a cell give.
template <typename Each> void sum_of_part(const Problem& p, int64_t first, int64_t last, float* sums, const Each& each) {
    float* const others = sums + p.channels;
    std::memset(sums, 0, 2 * p.channels * sizeof(float));
    for (int64_t cell = first; cell < last; ++cell) {
        for (int64_t c = 0; c < p.channels; c += kLanes) {  // in the order in which they lie in memory
            Float16 one = load<Float16>(sums + c), other = load<Float16>(others + c);
            each(cell, c, one, other);
            store(sums + c, one);
            store(others + c, other);
        }
    }
}

template <typename T> void forward(const Problem& p) {
    const Shape shape(p);
    const int64_t channels = p.channels;
    const Workspace workspace(shape.tasks * 2 * channels + p.num_images * 2 * channels);
    float *const sums = workspace.get(), *const factors = sums + shape.tasks * 2 * channels;
    const T* const input = static_cast<const T*>(p.input);
    T* const output = static_cast<T*>(p.output);
    // Distances from the channel's first cell: squares of large numbers would cancel.
    for_parts(p, [&](int64_t image, int64_t part, int64_t first, int64_t last) {
        const T* x = input + image * p.cells * channels;
        sum_of_part(p, first, last, sums + (image * shape.parts + part) * 2 * channels,
                    [&](int64_t cell, int64_t c, Float16& sum, Float16& squares) {
                        const Float16 off = load<Float16>(x + cell * channels + c) - load<Float16>(x + c);
                        sum += off;
                        squares += off * off;
                    });
    });
    for (int64_t image = 0; image < p.num_images; ++image) {
        const T* x = input + image * p.cells * channels;
        float* moments = p.moments + image * 2 * p.groups;
        float* factor = factors + image * 2 * channels;
        for (int64_t group = 0; group < p.groups; ++group) {
            double mean = 0, squares = 0;  // of all channels so far, and their sum of squared distances from it
            for (int64_t i = 0; i < shape.size; ++i) {
                const int64_t c = group * shape.size + i;
                double sum = 0, square = 0;
                for (int64_t part = 0; part < shape.parts; ++part) {
                    const float* of_part = sums + (image * shape.parts + part) * 2 * channels;
                    sum += of_part[c], square += of_part[channels + c];
                }
                const double of_channel = double(load<float>(x + c)) + sum / p.cells, step = of_channel - mean;
                squares += square - sum * sum / p.cells + step * step * p.cells * i / (i + 1);  // Chan et al., 1979
                mean += step / (i + 1);
            }
            const double rstd = 1 / std::sqrt(std::max(squares, 0.0) / (shape.size * p.cells) + p.epsilon);
            moments[group] = float(mean), moments[p.groups + group] = float(rstd);
            for (int64_t c = group * shape.size; c < (group + 1) * shape.size; ++c) {
                factor[c] = float(rstd * p.weight[c]);
                factor[channels + c] = float(p.bias[c] - mean * rstd * p.weight[c]);
            }
        }
    }
    for_parts(p, [&](int64_t image, int64_t, int64_t first, int64_t last) {
        const float* factor = factors + image * 2 * channels;
        for (int64_t cell = first; cell < last; ++cell) {
            const int64_t at = (image * p.cells + cell) * channels;
            for (int64_t c = 0; c < channels; c += kLanes)
                store(output + at + c, load<Float16>(input + at + c) * load<Float16>(factor + c) +
                                           load<Float16>(factor + channels + c));
        }
    });
}

// With n = (x - mean) * rstd, s cells times channels in a group, and sums over the group:
//     input_gradient = rstd * (gradient * weight - sum(gradient * weight) / s - n * sum(gradient * weight * n) / s).
template <typename T> void backward(const Problem& p) {
    const Shape shape(p);
    const int64_t channels = p.channels;
    const Workspace workspace(shape.tasks * 2 * channels + p.num_images * 4 * channels);
    float *const sums = workspace.get(), *const factors = sums + shape.tasks * 2 * channels;
    const T* const input = static_cast<const T*>(p.input);
    const T* const gradient = static_cast<const T*>(p.gradient);
    for (int64_t image = 0; image < p.num_images; ++image)
        for (int64_t c = 0; c < channels; ++c)
            factors[image * 4 * channels + c] = p.moments[image * 2 * p.groups + c / shape.size];
    for_parts(p, [&](int64_t image, int64_t part, int64_t first, int64_t last) {
        const float* mean = factors + image * 4 * channels;
        sum_of_part(p, first, last, sums + (image * shape.parts + part) * 2 * channels,
                    [&](int64_t cell, int64_t c, Float16& with_input, Float16& alone) {
                        const int64_t at = (image * p.cells + cell) * channels + c;
                        const Float16 g = load<Float16>(gradient + at);
                        with_input += g * (load<Float16>(input + at) - load<Float16>(mean + c));
                        alone += g;
                    });
    });
    for (int64_t image = 0; image < p.num_images; ++image) {
        float *of_weight = p.weight_gradient + image * 2 * channels, *factor = factors + image * 4 * channels;
        for (int64_t group = 0; group < p.groups; ++group) {
            const double rstd = p.moments[(image * 2 + 1) * p.groups + group], count = double(shape.size) * p.cells;
            double with_norm = 0, alone = 0;
            for (int64_t c = group * shape.size; c < (group + 1) * shape.size; ++c) {
                double norm_sum = 0, sum = 0;
                for (int64_t part = 0; part < shape.parts; ++part) {
                    const float* of_part = sums + (image * shape.parts + part) * 2 * channels;
                    norm_sum += of_part[c] * rstd, sum += of_part[channels + c];
                }
                of_weight[c] = float(norm_sum), of_weight[channels + c] = float(sum);
                with_norm += norm_sum * p.weight[c], alone += sum * p.weight[c];
            }
            for (int64_t c = group * shape.size; c < (group + 1) * shape.size; ++c) {
                factor[channels + c] = float(rstd * p.weight[c]);
                factor[2 * channels + c] = float(-rstd * rstd * with_norm / count);
                factor[3 * channels + c] = float(-rstd * alone / count);
            }
        }
    }
    if (!p.input_gradient) return;
    T* const of_input = static_cast<T*>(p.input_gradient);
    for_parts(p, [&](int64_t image, int64_t, int64_t first, int64_t last) {
        const float* factor = factors + image * 4 * channels;
        for (int64_t cell = first; cell < last; ++cell) {
            const int64_t at = (image * p.cells + cell) * channels;
            for (int64_t c = 0; c < channels; c += kLanes) {
                const Float16 off = load<Float16>(input + at + c) - load<Float16>(factor + c);
                store(of_input + at + c, load<Float16>(gradient + at + c) * load<Float16>(factor + channels + c) +
                                             off * load<Float16>(factor + 2 * channels + c) +
                                             load<Float16>(factor + 3 * channels + c));
            }
        }
    });
}

}  // namespace

extern "C" {
int64_t group_norm_forward_float32(const Problem* p) { return guarded([&] { forward<float>(*p); }); }
int64_t group_norm_forward_bfloat16(const Problem* p) { return guarded([&] { forward<BFloat16>(*p); }); }
int64_t group_norm_backward_float32(const Problem* p) { return guarded([&] { backward<float>(*p); }); }
int64_t group_norm_backward_bfloat16(const Problem* p) { return guarded([&] { backward<BFloat16>(*p); }); }
}
