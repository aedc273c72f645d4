// Chooses the instruction set, once.

#include "personafast/isa.h"

#include <stdlib.h>

#include <stdexcept>
#include <string>

namespace personafast {
namespace {

#ifdef PERSONAFAST_X86
constexpr bool kX86 = true;
#else
constexpr bool kX86 = false;
#endif

Isa choose() {
  const char* forced = getenv("PERSONAFAST_CPU_ISA");
  if (forced == nullptr || *forced == '\0') {
    for (int i = kIsas - 1; i > 0; --i) {
      const Isa isa = static_cast<Isa>(i);
      if (isa_compiled(isa) && isa_supported(isa)) return isa;
    }
    return Isa::scalar;
  }
  for (int i = 0; i < kIsas; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (std::string(forced) != isa_name(isa)) continue;
    const std::string asked = std::string("PERSONAFAST_CPU_ISA=") + forced;
    if (!isa_compiled(isa)) throw std::runtime_error(asked + ": this build has no such kernels");
    if (!isa_supported(isa)) throw std::runtime_error(asked + ": this machine cannot run it");
    return isa;
  }
  throw std::runtime_error(std::string("PERSONAFAST_CPU_ISA=") + forced + ": choose scalar, avx2 or avx512");
}

}  // namespace

const char* isa_name(Isa isa) {
  static const char* const names[kIsas] = {"scalar", "avx2", "avx512"};
  return names[static_cast<int>(isa)];
}

bool isa_compiled(Isa isa) { return kX86 || isa == Isa::scalar; }

bool isa_supported(Isa isa) {
#ifdef PERSONAFAST_X86
  switch (isa) {
    case Isa::scalar:
      return true;
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case Isa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi2") &&
             __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }
#endif
  return isa == Isa::scalar;
}

Isa isa_chosen() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace personafast
