#pragma once

namespace personafast {

// Element types the kernels read and write; every sum is kept in fp32.
enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2 };

}  // namespace personafast
