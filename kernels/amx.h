// Whether this processor has the matrix unit of bytes, AMX, with GFNI, and the system lets this process use it. Who asks has
// checked for AVX-512.

#pragma once

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dbf {

// Asks the system once: the registers of the unit are large, so a process has to say that it wants them.
inline bool has_amx() {
#if defined(__x86_64__) && defined(__linux__)
  static const bool granted = [] {
    constexpr unsigned kGfni = 1u << 8, kTiles = 1u << 24, kBytes = 1u << 25;
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned eax, ebx, ecx, edx;
    if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
    if ((ecx & kGfni) == 0 || (edx & kTiles) == 0 || (edx & kBytes) == 0) return false;
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  }();
  return granted;
#else
  return false;
#endif
}

}  // namespace dbf
