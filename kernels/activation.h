// silu(gate) * up of a vector; see kernels/activation.py.
#pragma once

#include "common.h"

namespace tandem {

static inline vf silu_mul(vf gate, vf up) { return gate / (splat(1.0f) + tandem::exp(-gate)) * up; }

}  // namespace tandem
