// sample_patches: from an importance map to the logits of its windows, their gradient, and the draw.
#include "kernels/sample_patches.h"

#include "checks.h"
#include "isa.h"
#include "kernels/draw_sizes.h"

namespace icseg {
namespace {

// Sums and products of a few sizes below kSizeLimit do not overflow it.
using Wide = __int128;
constexpr int64_t kSizeLimit = int64_t(1) << 31;
constexpr int64_t kTogetherPixels = 32768;

Wide whole_vectors(Wide count) { return (count + kAlignment - 1) / kAlignment * kAlignment; }

Wide smaller(Wide a, Wide b) { return std::min(a, b); }

// Scratch of pool() in kernels/pool.h: a padded row, its maxima, those above the next block, a block.
Wide pool_elements(const WindowGrid& g) {
    return 2 * Wide(g.row_elements) + g.pitch + Wide(g.patch) * g.pitch;
}

// Scratch of sharp_logits and blurred_logits in kernels/sample_patches.cpp. A pointer takes two elements at most.
Wide logits_elements(const WindowGrid& g) {
    if (g.taps == 1) return 2 * whole_vectors(g.columns);
    const Wide reach = smaller(g.taps / 2, g.every_columns), taps = 2 * reach + 1;
    const Wide rows = smaller(g.taps, g.every_rows);
    const Wide deinterleaved = smaller(taps, g.stride) * whole_vectors(g.columns + taps / g.stride + kAlignment);
    const Wide filled = 2 * whole_vectors(reach) + g.pitch + kAlignment + deinterleaved + whole_vectors(g.columns);
    return filled + 2 * (whole_vectors(rows) + whole_vectors(taps)) + rows * g.pitch;
}

// A slot behind its head in kernels/sample_patches.cpp: maxima of all windows, logits of those kept.
Wide slot_elements(const WindowGrid& g) {
    return Wide(g.every_rows) * g.pitch + whole_vectors(Wide(g.rows) * g.columns);
}

// A slot behind its head in kernels/window_logits_backward.cpp: maxima of all windows and their gradients, those along
// rows and theirs, sums of each row of windows, what each row of pixels passes on.
Wide backward_slot_elements(const WindowGrid& g) {
    return 2 * Wide(g.every_rows) * g.pitch + 2 * Wide(g.padded_height) * g.pitch + 8 * Wide(g.every_rows) +
           2 * Wide(g.height);  // a sum takes eight elements at most
}

// Scratch of back_to_scaled, back_down_columns and back_along_rows there.
Wide backward_elements(const WindowGrid& g) {
    const Wide reach = smaller(g.taps / 2, g.every_columns), taps = whole_vectors(2 * reach + 1);
    const Wide rows = smaller(g.rows, g.taps / g.stride + 2);
    const Wide scaled =
        2 * whole_vectors(reach) + g.pitch + kAlignment + 3 * taps + rows * g.pitch + 3 * whole_vectors(rows);
    const Wide columns = 2 * (Wide(g.patch) + 1) * kStrip, along = 4 * Wide(g.row_elements);
    return std::max(scaled, std::max(columns, along));
}

// Fills in what follows from the sizes given, and the bytes of workspace; an error code if they are impossible.
int plan(WindowGrid& g, bool backward, int64_t element_bytes, int64_t* bytes) {
    if (element_bytes != sizeof(float) && element_bytes != sizeof(double)) return ICSEG_ELEMENT_BYTES;
    for (const int64_t size :
         {g.batch, g.height, g.width, g.patch, g.stride, g.before, g.after, g.taps, g.threads, g.draws}) {
        if (size < 0) return ICSEG_NEGATIVE_SIZE;
        if (size >= kSizeLimit) return ICSEG_TOO_LARGE;
    }
    g.padded_height = g.height + g.before + g.after;
    g.padded_width = g.width + g.before + g.after;
    g.every_rows = g.padded_height - g.patch + 1;
    g.every_columns = g.padded_width - g.patch + 1;
    if (g.patch < 1 || g.stride < 1 || g.height < 1 || g.width < 1 || g.taps % 2 == 0 || g.threads < 1 ||
        g.every_rows < 1 || g.every_columns < 1) {
        return ICSEG_WINDOWS;
    }
    g.rows = (g.every_rows - 1) / g.stride + 1;
    g.columns = (g.every_columns - 1) / g.stride + 1;
    // An odd number of vectors, so that the rows of a block do not compete for the same lines of a cache.
    g.pitch = (static_cast<int64_t>(whole_vectors(g.every_columns)) / kAlignment | 1) * kAlignment;
    g.row_elements = static_cast<int64_t>(whole_vectors(g.pitch + g.patch)) + 2 * kAlignment;
    const Wide candidates = Wide(g.rows) * g.columns;
    if (g.draws > candidates) return ICSEG_DRAWS;
    if (candidates >= kSizeLimit) return ICSEG_TOO_LARGE;  // indices fit 32 bits in the keys of a draw
    // A parallel region costs more than it saves where few pixels are.
    if (Wide(g.batch) * g.padded_height * g.pitch < kTogetherPixels) g.threads = 1;
    const Wide keys = 2 * draw_workspace(static_cast<int64_t>(candidates), g.draws);
    const Wide slot = kAlignment + whole_vectors(backward ? backward_slot_elements(g) : slot_elements(g));
    const Wide own = backward ? backward_elements(g) : std::max(keys, logits_elements(g));
    const Wide task = whole_vectors(std::max(own, pool_elements(g)));
    g.slots = std::max<int64_t>(1, std::min(g.batch, g.threads));
    g.tasks = g.slots == 1 ? g.threads : 2 * g.threads;
    const Wide total = (g.slots * slot + g.tasks * (kAlignment + task)) * element_bytes;
    const Wide most = INT64_MAX;
    if (total > most || Wide(g.batch) * g.height * g.width * element_bytes > most ||
        Wide(g.batch) * slot * element_bytes > most) {
        return ICSEG_TOO_LARGE;
    }
    g.slot_elements = static_cast<int64_t>(slot);
    g.task_elements = static_cast<int64_t>(task);
    *bytes = static_cast<int64_t>(total);
    return ICSEG_OK;
}

WindowGrid grid_of(const icseg_windows& w, int64_t k) {
    WindowGrid g{};
    g.batch = w.batch, g.height = w.height, g.width = w.width;
    g.patch = w.patch, g.stride = w.stride, g.before = w.before, g.after = w.after;
    g.taps = w.tap_count, g.threads = w.threads, g.draws = k;
    return g;
}

// The maps, what softens their maxima, the windows planned: all that a kernel wants but its outputs.
template <typename Real>
struct Call {
    MapBatch<Real> maps;
    Softening<Real> softening;
    WindowGrid grid;
    int code;

    Call(const icseg_windows& w, const Real* pixels, int64_t k, bool backward, int64_t workspace_bytes)
        : maps{pixels, w.stride_batch, w.stride_y, w.stride_x},
          softening{static_cast<const Real*>(w.taps), static_cast<Real>(w.temperature)},
          grid(grid_of(w, k)) {
        int64_t bytes = 0;
        code = plan(grid, backward, sizeof(Real), &bytes);
        if (code == ICSEG_OK && workspace_bytes < bytes) code = ICSEG_WORKSPACE;
    }
};

}  // namespace
}  // namespace icseg

int icseg_sample_patches_workspace(const icseg_windows* windows, int64_t element_bytes, int64_t k, int64_t backward,
                                   int64_t* bytes) {
    icseg::WindowGrid grid = icseg::grid_of(*windows, k);
    int64_t found;
    if (const int code = icseg::plan(grid, backward != 0, element_bytes, &found)) return code;
    *bytes = found;
    return ICSEG_OK;
}

#define ICSEG_SAMPLE_PATCHES(suffix, Real)                                                                         \
    int icseg_sample_patches_##suffix(const icseg_windows* windows, const Real* maps, const Real* noise,           \
                                      int64_t noise_stride, int64_t k, int64_t seeded, uint64_t seed,              \
                                      int64_t* indices, Real* scores, int32_t* coords, Real* workspace,            \
                                      int64_t workspace_bytes) {                                                   \
        using namespace icseg;                                                                                     \
        const Call<Real> call(*windows, maps, k, false, workspace_bytes);                                          \
        if (call.code != ICSEG_OK) return call.code;                                                               \
        ICSEG_CHOSEN(sample_patches<Real>)                                                                         \
        (call.maps, call.softening, {noise, noise_stride, seeded != 0, seed}, call.grid, workspace,                \
         {indices, scores, coords});                                                                               \
        return ICSEG_OK;                                                                                           \
    }                                                                                                              \
    int icseg_window_logits_backward_##suffix(const icseg_windows* windows, const Real* maps,                      \
                                              const Real* grad_logits, Real* grad_maps, Real* workspace,           \
                                              int64_t workspace_bytes) {                                           \
        using namespace icseg;                                                                                     \
        const Call<Real> call(*windows, maps, 0, true, workspace_bytes);                                           \
        if (call.code != ICSEG_OK) return call.code;                                                               \
        ICSEG_CHOSEN(window_logits_backward<Real>)                                                                 \
        (call.maps, grad_logits, call.softening, call.grid, workspace, grad_maps);                                 \
        return ICSEG_OK;                                                                                           \
    }
ICSEG_SAMPLE_PATCHES(f32, float)
ICSEG_SAMPLE_PATCHES(f64, double)
