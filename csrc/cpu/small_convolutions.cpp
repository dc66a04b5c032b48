// small_convolutions: several convolutions, one after the other, of many small images.
#include "kernels/small_convolutions.h"

#include "checks.h"
#include "pages.h"

namespace icseg {
namespace {

constexpr int64_t kAlign = 64;
constexpr int64_t kMostChannels = 128, kMostPixels = 32, kMostKernel = 5;

bool within(int64_t value, int64_t least, int64_t most) { return least <= value && value <= most; }

int64_t whole_steps(int64_t channels) { return (channels + kChannelStep - 1) / kChannelStep * kChannelStep; }

bool possible(const Map& map) {
    return within(map.channels, 1, kMostChannels) && within(map.height, 1, kMostPixels) &&
           within(map.width, 1, kMostPixels);
}

// Maps, places in the workspace, and its bytes in *bytes; an error code if sizes are impossible. Past it, no product or
// sum of them overflows.
int plan(SmallConvolutions& call, const icseg_convolution* layers, int64_t height, int64_t width, int64_t* bytes) {
    if (!within(call.count, 1, kMostLayers)) return ICSEG_LAYERS;
    constexpr int64_t most_slots = int64_t{1} << 20;
    if (call.slots < 1 || call.slots > most_slots) return ICSEG_TOO_LARGE;
    call.maps[0] = {layers[0].in_channels, height, width, 0, layers[0].in_channels, 0, 0};
    if (!possible(call.maps[0])) return ICSEG_LAYERS;
    call.packed[0] = call.even = call.odd = call.work = 0;
    for (int64_t i = 0; i < call.count; ++i) {
        const icseg_convolution& layer = call.layers[i] = layers[i];
        Map &from = call.maps[i], &to = call.maps[i + 1];
        if (layer.in_channels != from.channels || !within(layer.kernel, 1, kMostKernel) || !within(layer.stride, 1, 2) ||
            !within(layer.padding, 0, layer.kernel - 1)) {
            return ICSEG_LAYERS;
        }
        from.padding = layer.padding;
        const int64_t spare_y = from.height + 2 * from.padding - layer.kernel;
        const int64_t spare_x = from.width + 2 * from.padding - layer.kernel;
        if (spare_y < 0 || spare_x < 0) return ICSEG_LAYERS;
        to = {layer.out_channels, spare_y / layer.stride + 1, spare_x / layer.stride + 1, 0, 0, 0, 0};
        if (!possible(to)) return ICSEG_LAYERS;
        to.pitch = whole_steps(to.channels);
        const int64_t depth = layer.kernel * layer.kernel * layer.in_channels;
        call.packed[i + 1] = call.packed[i] + (depth + 1) * to.pitch;
        call.work += to.height * to.width * depth * to.pitch / 4;  // a core computes that while it copies a byte
    }
    for (int64_t i = 0; i <= call.count; ++i) {
        Map& map = call.maps[i];
        map.row = (map.width + 2 * map.padding) * map.pitch;
        map.inside = map.padding * (map.row + map.pitch);
        int64_t& buffer = i % 2 ? call.odd : call.even;
        buffer = std::max(buffer, whole_steps((map.height + 2 * map.padding) * map.row));
    }
    const int64_t elements = call.packed[call.count] + call.slots * (call.even + call.odd);
    *bytes = kAlign + elements * static_cast<int64_t>(sizeof(float));
    return ICSEG_OK;
}

}  // namespace
}  // namespace icseg

int icseg_small_convolutions_workspace(const icseg_convolution* layers, int64_t count, int64_t height, int64_t width,
                                       int64_t slots, int64_t* bytes) {
    icseg::SmallConvolutions call;
    call.count = count;
    call.slots = slots;
    return icseg::plan(call, layers, height, width, bytes);
}

int icseg_small_convolutions_f32(const float* x, const icseg_convolution* layers, int64_t count, float* out,
                                 int64_t images, int64_t height, int64_t width, int64_t stride_image,
                                 int64_t stride_channel, int64_t stride_y, int64_t stride_x, int64_t slots,
                                 void* workspace, int64_t workspace_bytes) {
    using namespace icseg;
    if (images < 0) return ICSEG_NEGATIVE_SIZE;
    SmallConvolutions call;
    call.count = count;
    call.slots = slots;
    int64_t bytes, out_bytes, work;
    if (const int code = plan(call, layers, height, width, &bytes)) return code;
    const Map& last = call.maps[count];
    if (!multiply({last.channels, last.height, last.width, sizeof(float), images}, &out_bytes) ||
        !multiply({call.work, images}, &work)) {
        return ICSEG_TOO_LARGE;
    }
    if (workspace_bytes < bytes) return ICSEG_WORKSPACE;
    if (images == 0) return ICSEG_OK;
    call.x = x;
    call.out = out;
    call.images = images;
    call.stride_image = stride_image;
    call.stride_channel = stride_channel;
    call.stride_y = stride_y;
    call.stride_x = stride_x;
    call.slots = std::min(slots, images);
    call.workspace = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(workspace) + kAlign - 1) / kAlign * kAlign);
    call.work = work;
    expect_writes(out, out_bytes);
    ICSEG_CHOSEN(small_convolutions)(call);
    return ICSEG_OK;
}
