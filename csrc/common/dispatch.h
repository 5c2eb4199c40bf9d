// One CPU kernel, three builds: declared here, chosen at run time by what the processor has.
#pragma once

namespace jepa {

enum class Isa { none, avx2, avx512, avx512_bf16 };

Isa isa();                      // the level in use: the best this processor has, or what set_isa chose
bool set_isa(const char* name); // "avx2", "avx512", "avx512_bf16", "best"; false where the processor lacks it
const char* isa_name(Isa level);
bool is_amd(); // whether AMD made this processor

} // namespace jepa

#define JEPA_DECLARE_CPU(kernel, Params)                                                                     \
  namespace avx2 {                                                                                           \
  void kernel(const Params&);                                                                                \
  }                                                                                                          \
  namespace avx512 {                                                                                         \
  void kernel(const Params&);                                                                                \
  }                                                                                                          \
  namespace avx512_bf16 {                                                                                    \
  void kernel(const Params&);                                                                                \
  }                                                                                                          \
  void kernel(const Params&);
