#pragma once

#include <stdint.h>

// The threads of the host units: one pool a process, which outlives every call.
namespace personafast {

// Calls run(context, part) once for every part in [0, parts), on the calling thread and on up to threads - 1 others,
// which take a part whenever they are done with one. Returns when all are done. The caller does all parts itself if the
// pool is at work already: for another thread, or for a part that calls this again.
//
// What a part throws is thrown here, once no part runs any more; parts that nobody had begun are left out, and of
// several exceptions one is kept.
//
// Between calls a worker watches for the next for PERSONAFAST_SPIN_US microseconds (200 unless set; 0 never watches)
// before it sleeps: waking a sleeping thread takes some 40 us, as long as reading a megabyte, and a model calls several
// times a millisecond. A worker that comes too late for a call does not delay it, and one that a call has no part for
// is not woken. Throws std::runtime_error if PERSONAFAST_SPIN_US is no such number.
void run_parts(int64_t parts, int threads, void (*run)(void* context, int64_t part), void* context);

}  // namespace personafast
