// sample_patches: from an importance map to the logits of its windows, their gradient, and the draw.
#include "kernels/sample_patches.h"

#include "checks.h"
#include "isa.h"

namespace icseg {
namespace {

// Sums and products of a few sizes below kSizeLimit do not overflow it.
using Wide = __int128;
constexpr int64_t kSizeLimit = int64_t(1) << 31;

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

// Fills in what follows from the sizes given, and the bytes of workspace; an error code if they are impossible.
int plan(WindowGrid& g, int64_t element_bytes, int64_t* bytes) {
    for (const int64_t size : {g.batch, g.height, g.width, g.patch, g.stride, g.before, g.after, g.taps, g.threads}) {
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
    const Wide kept = whole_vectors(Wide(g.rows) * g.columns), slot = kAlignment + Wide(g.every_rows) * g.pitch + kept;
    const Wide task = whole_vectors(std::max(pool_elements(g), logits_elements(g)));
    g.slots = std::max<int64_t>(1, std::min(g.batch, g.threads));
    g.tasks = g.slots == 1 ? g.threads : 2 * g.threads;
    const Wide total = (g.slots * slot + g.tasks * (kAlignment + task)) * element_bytes;
    const Wide most = INT64_MAX;
    if (total > most || Wide(g.batch) * g.height * g.width * element_bytes > most ||
        Wide(g.batch) * kept * element_bytes > most) {
        return ICSEG_TOO_LARGE;
    }
    g.slot_elements = static_cast<int64_t>(slot);
    g.task_elements = static_cast<int64_t>(task);
    *bytes = static_cast<int64_t>(total);
    return ICSEG_OK;
}

template <typename Real>
int window_logits_checked(const MapBatch<Real>& maps, const Softening<Real>& softening, WindowGrid g,
                          Real* workspace, int64_t workspace_bytes, Real* logits) {
    int64_t bytes;
    if (const int code = plan(g, sizeof(Real), &bytes)) return code;
    if (workspace_bytes < bytes) return ICSEG_WORKSPACE;
    ICSEG_CHOSEN(window_logits<Real>)(maps, softening, g, workspace, logits);
    return ICSEG_OK;
}

}  // namespace
}  // namespace icseg
