// Gradients of a depthwise convolution on the CPU, behind a C interface that depthwise.py calls: of channels-last maps, a
// row of 16 channels at a time, which is widened to float32 and kept for as long as the kernel reaches it.

#include <algorithm>

#include "cpu_kernels.h"

extern "C" {
// Mirrored by ctypes in depthwise.py. Maps are (N, H, W, C), C a multiple of 16; kernels are square.
struct Problem {
    int64_t num_images, channels, height, width, out_height, out_width, kernel, stride, padding, num_threads;
    const void* input;
    const void* gradient;         // of the output
    const float* weights;         // (kernel, kernel, C)
    void* input_gradient;         // or null
    float* weight_gradient;       // (N, kernel, kernel, C), a sum for each image, or null
};
}

namespace {

constexpr int64_t kLanes = 16;

// One image, 16 channels from `c` on. In coordinates of the padded input, output column x begins at x * stride, so that
// a row of gradients is spread over those columns, with zeros between and kernel - 1 of them before: then
//     input_gradient[u] = sum over j of spread[u - j] * weights[j],   weight_gradient[j] = sum over v of spread[v] * input[v + j].
template <typename T, int64_t K> class Block {
  public:
    Block(const Problem& p, float* memory)
        : p_(p), columns_(p.width + 2 * p.padding + K - 1), row_(memory), sum_(row_ + columns_ * kLanes),
          spread_(sum_ + p.width * kLanes) {
        std::memset(memory, 0, size(p) * sizeof(float));
    }
    static int64_t size(const Problem& p) {
        return ((p.width + 2 * p.padding + K - 1) * (K + 1) + p.width) * kLanes;
    }

    void run(int64_t image, int64_t c) {
        Float16 weights[K][K], sums[K][K] = {};
        for (int64_t i = 0; i < K; ++i)
            for (int64_t j = 0; j < K; ++j) weights[i][j] = load<Float16>(p_.weights + (i * K + j) * p_.channels + c);
        int64_t next = 0;  // the first row of gradients that is not spread yet; row y lies in place y % K
        for (int64_t y = 0; y < p_.height; ++y) {
            if (p_.weight_gradient) widen(at<const T>(p_.input, image * p_.height + y, p_.width, c));
            if (p_.input_gradient) std::memset(sum_, 0, p_.width * kLanes * sizeof(float));
            for (int64_t i = K - 1; i >= 0; --i) {
                const int64_t from = y + p_.padding - i;
                if (from < 0 || from % p_.stride || from / p_.stride >= p_.out_height) continue;
                const int64_t out = from / p_.stride;
                for (; next <= out; ++next)
                    spread(at<const T>(p_.gradient, image * p_.out_height + next, p_.out_width, c), place(next));
                if (p_.weight_gradient) correlate(place(out), sums[i]);
                if (p_.input_gradient) scatter(place(out), weights[i]);
            }
            if (p_.input_gradient) {
                T* to = at<T>(p_.input_gradient, image * p_.height + y, p_.width, c);
                for (int64_t x = 0; x < p_.width; ++x) store(to + x * p_.channels, load<Float16>(sum_ + x * kLanes));
            }
        }
        if (!p_.weight_gradient) return;
        for (int64_t i = 0; i < K; ++i)
            for (int64_t j = 0; j < K; ++j)
                store(p_.weight_gradient + ((image * K + i) * K + j) * p_.channels + c, sums[i][j]);
    }

  private:
    template <typename E, typename Void> E* at(Void* map, int64_t row, int64_t width, int64_t c) const {
        return static_cast<E*>(map) + row * width * p_.channels + c;
    }
    float* place(int64_t row) const { return spread_ + row % K * columns_ * kLanes; }
    void widen(const T* from) const {
        for (int64_t x = 0; x < p_.width; ++x)
            store(row_ + (p_.padding + x) * kLanes, load<Float16>(from + x * p_.channels));
    }
    void spread(const T* from, float* to) const {  // what lies between stays zero
        for (int64_t x = 0; x < p_.out_width; ++x)
            store(to + (K - 1 + x * p_.stride) * kLanes, load<Float16>(from + x * p_.channels));
    }
    void correlate(const float* spread, Float16* sums) const {
        Float16 own[K];
        for (int64_t j = 0; j < K; ++j) own[j] = sums[j];
        for (int64_t x = 0; x < p_.out_width; ++x) {
            const int64_t column = x * p_.stride;
            const Float16 gradient = load<Float16>(spread + (K - 1 + column) * kLanes);
            for (int64_t j = 0; j < K; ++j) own[j] += gradient * load<Float16>(row_ + (column + j) * kLanes);
        }
        for (int64_t j = 0; j < K; ++j) sums[j] = own[j];
    }
    void scatter(const float* spread, const Float16* weights) const {
        for (int64_t x = 0; x < p_.width; ++x) {
            const float* last = spread + (K - 1 + p_.padding + x) * kLanes;
            Float16 sum = load<Float16>(sum_ + x * kLanes);
            for (int64_t j = 0; j < K; ++j) sum += load<Float16>(last - j * kLanes) * weights[j];
            store(sum_ + x * kLanes, sum);
        }
    }

    const Problem& p_;
    const int64_t columns_;
    float *const row_, *const sum_, *const spread_;
};

template <typename T, int64_t K> void run(const Problem& p) {
    const int64_t blocks = p.channels / kLanes, tasks = p.num_images * blocks;
    const int64_t threads = std::max<int64_t>(1, std::min(p.num_threads, tasks));
    const int64_t size = Block<T, K>::size(p);
    const Workspace workspace(threads * size);
    std::atomic<int64_t> thread{0}, next{0};
    in_threads(threads, [&] {
        Block<T, K> block(p, workspace.get() + thread++ * size);
        for (int64_t task; (task = next++) < tasks;) block.run(task / blocks, task % blocks * kLanes);
    });
}

template <typename T> int64_t gradients(const Problem* p) {
    return guarded([&] {
        switch (p->kernel) {
            case 3: return run<T, 3>(*p);
            case 5: return run<T, 5>(*p);
            case 7: return run<T, 7>(*p);
            default: throw std::bad_alloc();  // depthwise.py asks for no other
        }
    });
}

}  // namespace

extern "C" {
int64_t depthwise_gradients_float32(const Problem* p) { return gradients<float>(p); }
int64_t depthwise_gradients_bfloat16(const Problem* p) { return gradients<BFloat16>(p); }
}
