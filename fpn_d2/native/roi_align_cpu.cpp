// Multi-level RoIAlign on the CPU, forward and backward, behind a C interface that compiled_roi_align.py calls.
//
// The average over a cell's sampling grid is separable. A sample at (y, x) weighs map rows by its bilinear weights in y
// and columns by those in x, and the grid is the product of its positions in y and in x: so the weights of all
// positions are merged into one weight per map row and one per map column ("taps"), once per RoI.
//
//   forward    per map row that a RoI touches: the row's columns are summed into w cells, those into the h x w cells
//   backward   the same two steps the other way round
//
// Maps lie channels-last, so both steps are sums of vectors of channels. Forward, threads share out the RoIs. Backward,
// each thread owns images and blocks of channels, so no two write the same number, and every number is summed in the
// same order whatever the number of threads.
//
// The order of operations on coordinates is torchvision's: one rounding decides on which side of a limit it lies.
// So compile with -ffp-contract=off; the sums of vectors ask for fused operations where they want them.

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <tuple>

#include "cpu_kernels.h"

extern "C" {
// Mirrored by ctypes in compiled_roi_align.py. Sizes are counts, not bytes.
struct Problem {
    int64_t num_levels, num_images, num_channels, num_rois, out_height, out_width, sampling_ratio, aligned, num_threads;
    int64_t pooled_channels_last;   // 0: pooled is (M, C, h, w) in memory, 1: (M, h, w, C)
    const int64_t* heights;         // (L)
    const int64_t* widths;          // (L)
    const double* scales;           // (L)
    void* const* maps;              // (L) pointers to (N, H, W, C)
    const void* rois;               // (M, 5) image index, x0, y0, x1, y1; of the accumulator's type
    const int64_t* level_indices;   // (M)
    void* pooled;                   // (M) RoIs of pooled cells, or the gradient of them
};
}

namespace {

// ---- Vectors of channels: 64 bytes in registers, and single numbers for the rest.

template <typename V> struct Lanes;
template <> struct Lanes<Float16> { typedef float Scalar; static constexpr int count = 16; };
template <> struct Lanes<Double8> { typedef double Scalar; static constexpr int count = 8; };
template <> struct Lanes<float> { typedef float Scalar; static constexpr int count = 1; };
template <> struct Lanes<double> { typedef double Scalar; static constexpr int count = 1; };

template <typename T> struct WideOf;
template <> struct WideOf<float> { typedef Float16 Type; };
template <> struct WideOf<double> { typedef Double8 Type; };

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(BFloat16 value) { return load<float, BFloat16>(&value); }

template <typename V> inline V multiply_add(typename Lanes<V>::Scalar weight, V x, V sum) {
#ifdef __FMA__
    // Contraction is off in this file; element by element, the compiler turns this back into one vector instruction.
    if constexpr (Lanes<V>::count == 1) {
        return std::fma(weight, x, sum);
    } else {
        V result;
        for (int i = 0; i < Lanes<V>::count; ++i) result[i] = std::fma(weight, x[i], sum[i]);
        return result;
    }
#else
    return sum + x * weight;
#endif
}

// ---- Taps: which rows (or columns) of the map weigh how much in which cell.

template <typename T> struct Tap {
    int64_t at;  // row or column of the map
    int64_t cell;
    T weight;
};

// All taps of one axis, in groups taps[begin[i] .. begin[i + 1]): those of cell i, or those of one row of the map.
template <typename T> struct Axis {
    std::vector<Tap<T>> taps;
    std::vector<int64_t> begin;

    int64_t count() const { return int64_t(begin.size()) - 1; }

    // Fill in groups by cell. `factor` scales every weight.
    void fill(T start, T cell_size, int64_t samples, int64_t cells, int64_t size, T factor) {
        taps.clear();
        begin.clear();
        for (int64_t cell = 0; cell < cells; ++cell) {
            const size_t first = taps.size();
            begin.push_back(int64_t(first));
            // Of a RoI far larger than the map, only positions near the map; each is checked all the same.
            int64_t from = 0, to = samples;
            if (samples > size) {
                const double step = double(cell_size) / double(samples), origin = double(start + T(cell) * cell_size);
                const double a = (-1 - origin) / step, b = (double(size) - origin) / step;
                const double slack = 4 + 1e-6 * std::max(std::abs(a), std::abs(b));
                from = int64_t(std::clamp(std::floor(std::min(a, b) - slack), 0.0, double(samples)));
                to = int64_t(std::clamp(std::ceil(std::max(a, b) + slack), 0.0, double(samples)));
            }
            for (int64_t i = from; i < to; ++i) {
                T at = start + T(cell) * cell_size + T(T(i) + T(0.5)) * cell_size / T(samples);
                if (!(at >= T(-1) && at <= T(size))) continue;
                if (at <= T(0)) at = T(0);
                int64_t low = int64_t(at);
                int64_t high = low + 1;
                if (low >= size - 1) {
                    low = high = size - 1;
                    at = T(low);
                }
                const T upper = at - T(low);
                add(first, low, cell, (T(1) - upper) * factor);
                add(first, high, cell, upper * factor);
            }
        }
        begin.push_back(int64_t(taps.size()));
    }

    // Turn groups by cell into groups by row, in ascending order.
    void group_by_row() {
        begin.clear();
        std::stable_sort(taps.begin(), taps.end(), [](const Tap<T>& a, const Tap<T>& b) { return a.at < b.at; });
        for (size_t i = 0; i < taps.size(); ++i)
            if (i == 0 || taps[i].at != taps[i - 1].at) begin.push_back(int64_t(i));
        begin.push_back(int64_t(taps.size()));
    }

  private:
    // Positions ascend (descend in a RoI turned inside out) by a step: an earlier tap of the same row is near the end.
    void add(size_t first, int64_t at, int64_t cell, T weight) {
        for (size_t i = taps.size(); i > first && i + 4 > taps.size(); --i)
            if (taps[i - 1].at == at) {
                taps[i - 1].weight += weight;
                return;
            }
        taps.push_back({at, cell, weight});
    }
};

template <typename T> int64_t round_up(T value) { return int64_t(std::min(std::ceil(double(value)), 0x1p53)); }

template <typename T> struct Roi {
    int64_t image, level;
    bool finite, sampled;
    Axis<T> y, x;

    void fill(const Problem& p, int64_t index, bool columns_by_position) {
        const T* roi = static_cast<const T*>(p.rois) + index * 5;
        image = int64_t(roi[0]);
        level = p.level_indices[index];
        finite = std::isfinite(roi[1]) && std::isfinite(roi[2]) && std::isfinite(roi[3]) && std::isfinite(roi[4]);
        sampled = false;
        if (!finite) return;
        const T scale = T(p.scales[level]), offset = p.aligned ? T(0.5) : T(0);
        const T x0 = roi[1] * scale - offset, y0 = roi[2] * scale - offset;
        T width = (roi[3] * scale - offset) - x0, height = (roi[4] * scale - offset) - y0;
        if (!p.aligned) {
            width = std::max(width, T(1));
            height = std::max(height, T(1));
        }
        const T cell_height = height / T(p.out_height), cell_width = width / T(p.out_width);
        const int64_t samples_y = p.sampling_ratio > 0 ? p.sampling_ratio : round_up(cell_height);
        const int64_t samples_x = p.sampling_ratio > 0 ? p.sampling_ratio : round_up(cell_width);
        if (samples_y <= 0 || samples_x <= 0) return;
        y.fill(y0, cell_height, samples_y, p.out_height, p.heights[level], T(1) / T(samples_y));
        x.fill(x0, cell_width, samples_x, p.out_width, p.widths[level], T(1) / T(samples_x));
        y.group_by_row();
        if (columns_by_position) x.group_by_row();
        sampled = true;
    }
};

// ---- One RoI and one block of channels. A block is U vectors V; `cells` is (h * w, block) in scratch memory.

template <typename T, typename V, int U, typename Map>
void pool_block(const Problem& p, const Roi<T>& roi, const Map* map, int64_t channel, T* cells, T* row_cells) {
    constexpr int lanes = Lanes<V>::count, block = lanes * U;
    const int64_t width = p.out_width, row_size = p.widths[roi.level] * p.num_channels;
    std::fill(cells, cells + p.out_height * width * block, T(0));
    if (!roi.sampled) return;
    for (int64_t i = 0; i < roi.y.count(); ++i) {
        const Map* row = map + roi.y.taps[roi.y.begin[i]].at * row_size + channel;
        for (int64_t j = 0; j < width; ++j) {
            V sums[U] = {};
            for (int64_t k = roi.x.begin[j]; k < roi.x.begin[j + 1]; ++k) {
                const Map* column = row + roi.x.taps[k].at * p.num_channels;
                for (int u = 0; u < U; ++u)
                    sums[u] = multiply_add<V>(roi.x.taps[k].weight, load<V>(column + u * lanes), sums[u]);
            }
            for (int u = 0; u < U; ++u) store(row_cells + j * block + u * lanes, sums[u]);
        }
        for (int64_t k = roi.y.begin[i]; k < roi.y.begin[i + 1]; ++k) {
            T* sum = cells + roi.y.taps[k].cell * width * block;
            for (int64_t c = 0; c < width * block; c += lanes)
                store(sum + c, multiply_add<V>(roi.y.taps[k].weight, load<V>(row_cells + c), load<V>(sum + c)));
        }
    }
}

template <typename T, typename V, int U>
void unpool_block(const Problem& p, const Roi<T>& roi, T* map, int64_t channel, const T* cells, T* row_cells) {
    constexpr int lanes = Lanes<V>::count, block = lanes * U;
    const int64_t width = p.out_width, row_size = p.widths[roi.level] * p.num_channels;
    for (int64_t i = 0; i < roi.y.count(); ++i) {
        T* row = map + roi.y.taps[roi.y.begin[i]].at * row_size + channel;
        std::fill(row_cells, row_cells + width * block, T(0));
        for (int64_t k = roi.y.begin[i]; k < roi.y.begin[i + 1]; ++k) {
            const T* values = cells + roi.y.taps[k].cell * width * block;
            for (int64_t c = 0; c < width * block; c += lanes)
                store(row_cells + c,
                      multiply_add<V>(roi.y.taps[k].weight, load<V>(values + c), load<V>(row_cells + c)));
        }
        for (int64_t j = 0; j < roi.x.count(); ++j) {
            const int64_t first = roi.x.begin[j], last = roi.x.begin[j + 1];
            T* column = row + roi.x.taps[first].at * p.num_channels;
            V sums[U];
            for (int u = 0; u < U; ++u) sums[u] = load<V>(column + u * lanes);
            for (int64_t k = first; k < last; ++k) {
                const T* values = row_cells + roi.x.taps[k].cell * block;
                for (int u = 0; u < U; ++u)
                    sums[u] = multiply_add<V>(roi.x.taps[k].weight, load<V>(values + u * lanes), sums[u]);
            }
            for (int u = 0; u < U; ++u) store(column + u * lanes, sums[u]);
        }
    }
}

// ---- Pooled cells between scratch memory (cells, block) and the tensor of either memory format.

// Call move(cell, c) for all, in tiles: cells lie a power of two apart, so that few columns of them fit in a cache.
template <typename Move> inline void tiled(int64_t num_cells, int64_t block, const Move& move) {
    constexpr int64_t tile = 16;
    for (int64_t c0 = 0; c0 < block; c0 += tile)
        for (int64_t cell0 = 0; cell0 < num_cells; cell0 += tile)
            for (int64_t c = c0; c < std::min(c0 + tile, block); ++c)
                for (int64_t cell = cell0; cell < std::min(cell0 + tile, num_cells); ++cell) move(cell, c);
}

template <typename T, typename Out>
void write_cells(const Problem& p, int64_t roi, int64_t channel, int64_t block, const T* cells, Out* pooled) {
    const int64_t num_cells = p.out_height * p.out_width;
    if (p.pooled_channels_last) {
        for (int64_t cell = 0; cell < num_cells; ++cell) {
            Out* to = pooled + (roi * num_cells + cell) * p.num_channels + channel;
            for (int64_t c = 0; c < block; ++c) to[c] = narrow(cells[cell * block + c], static_cast<Out*>(nullptr));
        }
    } else {
        Out* to = pooled + (roi * p.num_channels + channel) * num_cells;
        tiled(num_cells, block, [=](int64_t cell, int64_t c) {
            to[c * num_cells + cell] = narrow(cells[cell * block + c], static_cast<Out*>(nullptr));
        });
    }
}

template <typename T, typename Out>
void read_cells(const Problem& p, int64_t roi, int64_t channel, int64_t block, const Out* pooled, T* cells) {
    const int64_t num_cells = p.out_height * p.out_width;
    if (p.pooled_channels_last) {
        for (int64_t cell = 0; cell < num_cells; ++cell) {
            const Out* from = pooled + (roi * num_cells + cell) * p.num_channels + channel;
            for (int64_t c = 0; c < block; ++c) cells[cell * block + c] = widen(from[c]);
        }
    } else {
        const Out* from = pooled + (roi * p.num_channels + channel) * num_cells;
        tiled(num_cells, block, [=](int64_t cell, int64_t c) {
            cells[cell * block + c] = widen(from[c * num_cells + cell]);
        });
    }
}

// ---- The order of work.

// RoIs by image, level, band of 32 rows and left edge: neighbours in this order read the same part of a map.
template <typename T> std::vector<int64_t> local_order(const Problem& p) {
    const T* rois = static_cast<const T*>(p.rois);
    std::vector<int64_t> order(p.num_rois);
    std::iota(order.begin(), order.end(), int64_t(0));
    // NaN has no place in an order, and any place does for it.
    auto ordered = [](double value) { return std::isfinite(value) ? value : 0.0; };
    auto key = [&](int64_t i) {
        const T* roi = rois + i * 5;
        const double band = std::floor(ordered(roi[2]) * p.scales[p.level_indices[i]] / 32);
        return std::make_tuple(double(roi[0]), p.level_indices[i], band, ordered(roi[1]));
    };
    auto before = [&](int64_t a, int64_t b) { return key(a) < key(b); };
    std::stable_sort(order.begin(), order.end(), before);
    return order;
}

// Call step(channel, block) with V and U for blocks that together cover the channels [begin, end).
template <typename T, typename Step> void for_blocks(int64_t begin, int64_t end, const Step& step) {
    typedef typename WideOf<T>::Type V;
    constexpr int64_t lanes = Lanes<V>::count;
    int64_t channel = begin;
#ifdef __AVX512F__  // 32 registers of 64 bytes
    if constexpr (sizeof(T) == 4)
        for (; channel + 16 * lanes <= end; channel += 16 * lanes) step.template run<V, 16>(channel);
#endif
    for (; channel + 4 * lanes <= end; channel += 4 * lanes) step.template run<V, 4>(channel);
    for (; channel + lanes <= end; channel += lanes) step.template run<V, 1>(channel);
    for (; channel < end; ++channel) step.template run<T, 1>(channel);
}

template <typename T> struct Scratch {
    std::vector<T> cells, row_cells;
    explicit Scratch(const Problem& p) {
        const int64_t block = 16 * Lanes<typename WideOf<T>::Type>::count;  // the widest of for_blocks
        cells.resize(p.out_height * p.out_width * block);
        row_cells.resize(p.out_width * block);
    }
};

template <typename T, typename Map> struct PoolStep {
    const Problem& p;
    const Roi<T>& roi;
    int64_t index;
    Map* pooled;
    Scratch<T>& scratch;

    template <typename V, int U> void run(int64_t channel) const {
        const Map* map = static_cast<const Map*>(p.maps[roi.level]);
        map += roi.image * p.heights[roi.level] * p.widths[roi.level] * p.num_channels;
        pool_block<T, V, U, Map>(p, roi, map, channel, scratch.cells.data(), scratch.row_cells.data());
        constexpr int64_t block = Lanes<V>::count * U;
        if (!roi.finite)
            std::fill(scratch.cells.begin(), scratch.cells.end(), std::numeric_limits<T>::quiet_NaN());
        write_cells(p, index, channel, block, scratch.cells.data(), pooled);
    }
};

template <typename T, typename Map> struct UnpoolStep {
    const Problem& p;
    const Roi<T>& roi;
    int64_t index;
    const Map* pooled_gradient;
    Scratch<T>& scratch;

    template <typename V, int U> void run(int64_t channel) const {
        T* map = static_cast<T*>(p.maps[roi.level]);
        map += roi.image * p.heights[roi.level] * p.widths[roi.level] * p.num_channels;
        read_cells(p, index, channel, Lanes<V>::count * U, pooled_gradient, scratch.cells.data());
        unpool_block<T, V, U>(p, roi, map, channel, scratch.cells.data(), scratch.row_cells.data());
    }
};

template <typename T, typename Map> void pool(const Problem& p) {
    Map* pooled = static_cast<Map*>(p.pooled);
    const std::vector<int64_t> order = local_order<T>(p);
    std::atomic<int64_t> next{0};
    in_threads(std::min(p.num_threads, p.num_rois), [&] {
        Roi<T> roi;
        Scratch<T> scratch(p);
        constexpr int64_t batch = 8;
        for (int64_t begin; (begin = next.fetch_add(batch)) < p.num_rois;)
            for (int64_t i = begin; i < std::min(begin + batch, p.num_rois); ++i) {
                roi.fill(p, order[i], false);
                for_blocks<T>(0, p.num_channels, PoolStep<T, Map>{p, roi, order[i], pooled, scratch});
            }
    });
}

template <typename T> void clear_maps(const Problem& p) {
    constexpr int64_t part = int64_t(1) << 20;
    std::vector<std::pair<T*, int64_t>> parts;
    for (int64_t level = 0; level < p.num_levels; ++level) {
        T* map = static_cast<T*>(p.maps[level]);
        const int64_t numbers = p.num_images * p.heights[level] * p.widths[level] * p.num_channels;
        for (int64_t i = 0; i < numbers; i += part) parts.push_back({map + i, std::min(part, numbers - i)});
    }
    std::atomic<size_t> next{0};
    in_threads(std::min(p.num_threads, int64_t(parts.size())), [&] {
        for (size_t i; (i = next.fetch_add(1)) < parts.size();) std::fill_n(parts[i].first, parts[i].second, T(0));
    });
}

template <typename T, typename Map> void unpool(const Problem& p) {
    const Map* pooled_gradient = static_cast<const Map*>(p.pooled);
    const std::vector<int64_t> order = local_order<T>(p);
    const T* rois = static_cast<const T*>(p.rois);
    clear_maps<T>(p);
    // Blocks of whole cache lines, one or more per thread.
    constexpr int64_t line = Lanes<typename WideOf<T>::Type>::count;
    const int64_t lines = (p.num_channels + line - 1) / line;
    const int64_t blocks = std::min(lines, p.num_threads);
    std::atomic<int64_t> next{0};
    in_threads(std::min(p.num_threads, p.num_images * blocks), [&] {
        Roi<T> roi;
        Scratch<T> scratch(p);
        for (int64_t task; (task = next.fetch_add(1)) < p.num_images * blocks;) {
            const int64_t image = task / blocks, block = task % blocks;
            const int64_t begin = lines * block / blocks * line;
            const int64_t end = std::min(p.num_channels, lines * (block + 1) / blocks * line);
            const auto first = std::partition_point(
                order.begin(), order.end(), [&](int64_t i) { return int64_t(rois[i * 5]) < image; });
            for (auto i = first; i != order.end() && int64_t(rois[*i * 5]) == image; ++i) {
                roi.fill(p, *i, true);
                if (roi.sampled) for_blocks<T>(begin, end, UnpoolStep<T, Map>{p, roi, *i, pooled_gradient, scratch});
            }
        }
    });
}

}  // namespace

// Level and image indices must be in range.
extern "C" {
int64_t pool_float32(const Problem* p) { return guarded([&] { pool<float, float>(*p); }); }
int64_t pool_float64(const Problem* p) { return guarded([&] { pool<double, double>(*p); }); }
int64_t pool_bfloat16(const Problem* p) { return guarded([&] { pool<float, BFloat16>(*p); }); }
// `maps` are the gradients to write, whatever they held, of the accumulator's type (float32 for bfloat16).
int64_t unpool_float32(const Problem* p) { return guarded([&] { unpool<float, float>(*p); }); }
int64_t unpool_float64(const Problem* p) { return guarded([&] { unpool<double, double>(*p); }); }
int64_t unpool_bfloat16(const Problem* p) { return guarded([&] { unpool<float, BFloat16>(*p); }); }
}
