#pragma once

namespace personafast {

// Instruction sets a CPU kernel may be compiled for, weakest first. avx512 means F, BW, VL, DQ, VBMI2 and BF16: a
// machine with AVX-512 but without those takes avx2.
enum class Isa : int { scalar = 0, avx2 = 1, avx512 = 2 };

constexpr int kIsas = 3;

// "scalar", "avx2" or "avx512".
const char* isa_name(Isa isa);

// Whether this build has kernels for `isa`.
bool isa_compiled(Isa isa);

// Whether this machine can run them.
bool isa_supported(Isa isa);

// The set in use: the strongest that is compiled and supported, or the one PERSONAFAST_CPU_ISA names. Read once.
// Throws std::runtime_error if that one is unknown, not compiled or not supported.
Isa isa_chosen();

}  // namespace personafast
