// The transforms of minimal filtering F(4x4, 3x3), of tiles of maps and of weights; winograd_cpu.cpp multiplies between.
//
// The points at which the polynomials are evaluated are 0, infinity, +-a and +-2a with a close to the square root of
// 1/2. There the rounding error in float32 is about 5 times that of the sum itself; with the usual 0, +-1, +-2 it is 10
// to 15 times. Factors in bfloat16 make an error of about 1 % of the size of the outputs, whose own rounding is 0.2 %.

#pragma once

#include <algorithm>

#include "cpu_kernels.h"

extern "C" {
// Mirrored by ctypes in winograd.py. Sizes are counts, not bytes; C and C' are multiples of 16.
struct Problem {
    int64_t num_images, height, width, in_channels, out_channels, num_threads, relu;
    int64_t in_bfloat16;        // whether factors are rounded to bfloat16; sums are of float32 in any case
    const void* input;          // (N, H, W, C)
    const void* packed;         // what winograd_pack wrote, or null: then from `weights`
    const float* weights;       // element (o, c, y, x) at o * strides[0] + c * strides[1] + ...
    const int64_t* strides;     // (4)
    const float* scale;         // (C') factors of the weights, or null
    const float* bias;          // (C') or null
    void* output;               // (N, H, W, C'); for the gradient of the weights, the gradient of the output
    float* weight_gradient;     // (3, 3, C, C')
};
}

namespace {

constexpr int kOut = 4, kIn = 6, kPositions = kIn * kIn, kLanes = 16;

inline int64_t divide_up(int64_t n, int64_t k) { return (n + k - 1) / k; }
inline int64_t round_up(int64_t n, int64_t k) { return divide_up(n, k) * k; }

// ---- The three transforms in one dimension. `step` is the distance between elements.

constexpr double kA = 181.0 / 256, kB = 2 * kA;
constexpr float a1 = kA, a2 = kA * kA, a3 = kA * kA * kA, b1 = kB, b2 = kB * kB, b3 = kB * kB * kB;
constexpr float ab2 = kA * kB * kB, a2b = kA * kA * kB, a2b2 = kA * kA * kB * kB, sum2 = kA * kA + kB * kB;

inline void input_transform(const Float16* d, int step, Float16* v, int v_step) {  // B^T d
    const Float16 d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step];
    const Float16 even_a = d4 - b2 * d2, odd_a = a1 * d3 - ab2 * d1;
    const Float16 even_b = d4 - a2 * d2, odd_b = b1 * d3 - a2b * d1;
    const Float16 first = a2b2 * d[0] - sum2 * d2 + d4, last = a2b2 * d1 - sum2 * d3 + d[5 * step];
    v[0] = first;
    v[v_step] = even_a + odd_a;
    v[2 * v_step] = even_a - odd_a;
    v[3 * v_step] = even_b + odd_b;
    v[4 * v_step] = even_b - odd_b;
    v[5 * v_step] = last;
}

inline void output_transform(const Float16* m, int step, Float16* y, int y_step) {  // A^T m
    const Float16 even_a = m[step] + m[2 * step], odd_a = m[step] - m[2 * step];
    const Float16 even_b = m[3 * step] + m[4 * step], odd_b = m[3 * step] - m[4 * step];
    y[0] = m[0] + even_a + even_b;
    y[y_step] = a1 * odd_a + b1 * odd_b;
    y[2 * y_step] = a2 * even_a + b2 * even_b;
    y[3 * y_step] = a3 * odd_a + b3 * odd_b + m[5 * step];
}

inline void gradient_transform(const Float16* y, int step, Float16* m, int m_step) {  // A dY
    const Float16 y0 = y[0], y1 = y[step], y2 = y[2 * step], y3 = y[3 * step];
    const Float16 even_a = y0 + a2 * y2, odd_a = a1 * y1 + a3 * y3;
    const Float16 even_b = y0 + b2 * y2, odd_b = b1 * y1 + b3 * y3;
    m[0] = y0;
    m[m_step] = even_a + odd_a;
    m[2 * m_step] = even_a - odd_a;
    m[3 * m_step] = even_b + odd_b;
    m[4 * m_step] = even_b - odd_b;
    m[5 * m_step] = y3;
}

struct WeightTransform {  // G
    float g[kIn][3];
    WeightTransform() {
        const double points[kIn - 1] = {0, kA, -kA, kB, -kB};
        for (int i = 0; i < kIn - 1; ++i) {
            double scale = 1;
            for (int j = 0; j < kIn - 1; ++j)
                if (j != i) scale *= points[i] - points[j];
            for (int j = 0; j < 3; ++j) g[i][j] = float((j == 0 ? 1 : j == 1 ? points[i] : points[i] * points[i]) / scale);
        }
        g[kIn - 1][0] = g[kIn - 1][1] = 0;
        g[kIn - 1][2] = 1;
    }
};

// Read a square of kLanes rows, `step` apart, and store its columns.
inline void transpose(const float* from, int64_t step, Float16* to) {
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define FPN_D2_SHUFFLES
#endif
#endif
#ifdef FPN_D2_SHUFFLES
    // Four times, vectors i and i + 8 are interleaved into 2 i and 2 i + 1.
    Float16 a[kLanes], b[kLanes];
    for (int i = 0; i < kLanes; ++i) a[i] = load<Float16>(from + i * step);
    const auto interleave = [](const Float16* x, Float16* y) {
        for (int i = 0; i < kLanes / 2; ++i) {
            const Float16 low = x[i], high = x[i + kLanes / 2];
            y[2 * i] = __builtin_shufflevector(low, high, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            y[2 * i + 1] =
                __builtin_shufflevector(low, high, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        }
    };
    interleave(a, b);
    interleave(b, a);
    interleave(a, b);
    interleave(b, to);
#else
    for (int64_t i = 0; i < kLanes; ++i)
        for (int64_t k = 0; k < kLanes; ++k) to[k][i] = from[i * step + k];
#endif
}

// ---- Factors: float, or a Pair of bfloat16 whose products are summed at once. A matrix of pairs has half the depth.

struct Pair {
    uint32_t bits;  // the first number in the lower half
};
template <typename E> constexpr int64_t kTerms = 1;
template <> constexpr int64_t kTerms<Pair> = 2;

// Store the vectors of a tile, or a row: `first` and, in the upper halves of pairs, `second`.
inline void store_terms(float* to, Float16 first, Float16) { store(to, first); }
inline void store_terms(Pair* to, Float16 first, Float16 second) {
    BFloat16 halves[2][kLanes];
    store(halves[0], first);
    store(halves[1], second);
    const Bits16 low = __builtin_convertvector(load<Half16>(halves[0]), Bits16);
    const Bits16 high = __builtin_convertvector(load<Half16>(halves[1]), Bits16);
    store(to, low | (high << 16));
}

// ---- Tiles of a map, in two dimensions.

struct Tile {
    int64_t image, row, column;  // of its first output
};

struct Tiles {
    int64_t across, down, count;
    explicit Tiles(const Problem& p)
        : across(divide_up(p.width, kOut)), down(divide_up(p.height, kOut)), count(p.num_images * across * down) {}
    Tile operator[](int64_t i) const {
        return {i / (across * down), i / across % down * kOut, i % across * kOut};
    }
};

// The inputs of a tile, zero outside the map, and B^T d B of them for one vector of channels.
template <typename T> struct TileInputs {
    const T* from[kPositions];
    TileInputs(const Problem& p, const Tile& tile, const T* zeros) {
        const T* map = static_cast<const T*>(p.input) + tile.image * p.height * p.width * p.in_channels;
        for (int64_t i = 0; i < kPositions; ++i) {
            const int64_t y = tile.row + i / kIn - 1, x = tile.column + i % kIn - 1;
            const bool inside = y >= 0 && y < p.height && x >= 0 && x < p.width;
            from[i] = inside ? map + (y * p.width + x) * p.in_channels : zeros;
        }
    }
    void transform(int64_t c, Float16* d) const {
        Float16 t[kPositions];
#pragma GCC unroll 36
        for (int i = 0; i < kPositions; ++i) d[i] = load<Float16>(from[i] + c);
#pragma GCC unroll 36
        for (int j = 0; j < kIn; ++j) input_transform(d + j, kIn, t + j, kIn);
#pragma GCC unroll 36
        for (int i = 0; i < kIn; ++i) input_transform(t + i * kIn, 1, d + i * kIn, 1);
    }
};

// Element c of v + position * stride = (B^T d B)[position]. E: as what it is stored.
template <typename T, typename E>
void transform_input(const Problem& p, const Tile& tile, const T* zeros, E* v, int64_t stride) {
    const TileInputs<T> inputs(p, tile, zeros);
    for (int64_t c = 0; c < p.in_channels; c += kLanes) {
        Float16 d[kPositions];
        inputs.transform(c, d);
#pragma GCC unroll 36
        for (int i = 0; i < kPositions; ++i) {
            if constexpr (kTerms<E> == 1)
                store(v + i * stride + c, d[i]);
            else
                store(reinterpret_cast<BFloat16*>(v + i * stride) + c, d[i]);
        }
    }
}

// The tile's outputs from m[position * stride + o]: A^T m A, the bias and the ReLU.
template <typename T> void transform_output(const Problem& p, const Tile& tile, const float* m, int64_t stride) {
    const int64_t rows = std::min<int64_t>(kOut, p.height - tile.row);
    const int64_t columns = std::min<int64_t>(kOut, p.width - tile.column);
    T* to = static_cast<T*>(p.output) +
            ((tile.image * p.height + tile.row) * p.width + tile.column) * p.out_channels;
    for (int64_t o = 0; o < p.out_channels; o += kLanes) {
        Float16 d[kPositions], t[kOut * kIn];
#pragma GCC unroll 36
        for (int i = 0; i < kPositions; ++i) d[i] = load<Float16>(m + i * stride + o);
#pragma GCC unroll 36
        for (int j = 0; j < kIn; ++j) output_transform(d + j, kIn, t + j, kIn);
#pragma GCC unroll 36
        for (int i = 0; i < kOut; ++i) output_transform(t + i * kIn, 1, d + i * kIn, 1);
        const Float16 bias = p.bias ? load<Float16>(p.bias + o) : Float16{};
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < columns; ++j) {
                Float16 y = d[i * kIn + j] + bias;
                if (p.relu) y = y < 0.0f ? Float16{} : y;  // a NaN stays one
                store(to + (i * p.width + j) * p.out_channels + o, y);
            }
    }
}

// A dY A^T for one vector of channels, dY the gradient of the tile's outputs.
template <typename T> void transform_gradient(const Problem& p, const Tile& tile, int64_t o, Float16* d) {
    const int64_t rows = std::min<int64_t>(kOut, p.height - tile.row);
    const int64_t columns = std::min<int64_t>(kOut, p.width - tile.column);
    const T* from = static_cast<const T*>(p.output) +
                    ((tile.image * p.height + tile.row) * p.width + tile.column) * p.out_channels + o;
    Float16 y[kOut * kOut] = {}, t[kIn * kOut];
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j)
            y[i * kOut + j] = load<Float16>(from + (i * p.width + j) * p.out_channels);
#pragma GCC unroll 36
    for (int j = 0; j < kOut; ++j) gradient_transform(y + j, kOut, t + j, kOut);
#pragma GCC unroll 36
    for (int i = 0; i < kIn; ++i) gradient_transform(t + i * kOut, 1, d + i * kIn, 1);
}

// Both of kTerms<E> tiles from `begin` on, as v[position * v_stride + c] and m[position * m_stride + o]. A tile that
// there is not is zero.
template <typename T, typename E>
void transform_both(const Problem& p, const Tiles& tiles, int64_t begin, const T* zeros, E* v, int64_t v_stride, E* m,
                    int64_t m_stride) {
    const bool two = kTerms<E> == 2 && begin + 1 < tiles.count;
    const Tile tile = tiles[begin], second = two ? tiles[begin + 1] : tile;
    const TileInputs<T> inputs(p, tile, zeros), inputs2(p, second, zeros);
    Float16 d[kPositions], d2[kPositions] = {};
    for (int64_t c = 0; c < p.in_channels; c += kLanes) {
        inputs.transform(c, d);
        if (two) inputs2.transform(c, d2);
        for (int64_t i = 0; i < kPositions; ++i) store_terms(v + i * v_stride + c, d[i], d2[i]);
    }
    for (int64_t o = 0; o < p.out_channels; o += kLanes) {
        transform_gradient<T>(p, tile, o, d);
        if (two) transform_gradient<T>(p, second, o, d2);
        for (int64_t i = 0; i < kPositions; ++i) store_terms(m + i * m_stride + o, d[i], d2[i]);
    }
}

}  // namespace
