#include "personafast/attend.h"

#include <math.h>

#include <algorithm>

#include "host.h"

namespace personafast {
namespace {

const char* moved(const void* base, int64_t bytes) {
  return base == nullptr ? nullptr : static_cast<const char*>(base) + bytes;
}

// The memory that the rows of one key head need: pointers first, as they are aligned wider.
struct Room {
  const void** queries;
  const void** masks;
  void** out;
  float* scores;
  float* sums;
  float* most;
  float* total;
  float* keep;

  static int64_t bytes(int64_t rows, int64_t padded) { return rows * (24 + 4 * (kAttendKeys + padded + 3)); }

  Room(void* at, int64_t rows, int64_t padded) {
    queries = static_cast<const void**>(at);
    masks = queries + rows;
    out = const_cast<void**>(masks + rows);
    sums = reinterpret_cast<float*>(out + rows);
    scores = sums + rows * padded;
    most = scores + rows * kAttendKeys;
    total = most + rows;
    keep = total + rows;
  }
};

// Key head `item` of all: head item % key_heads of sequence item / key_heads. `next` is another that follows, or -1.
void attend_head(const AttendArgs& a, Isa isa, const Room& room, int64_t item, int64_t next) {
  const int64_t bytes = a.dtype == Dtype::f32 ? 4 : 2;
  const int64_t mask_bytes = a.mask_adds ? bytes : 1;
  const int64_t b = item / a.key_heads;
  const int64_t k = item % a.key_heads;
  const int64_t rows = a.groups * a.queries;
  const int64_t padded = (a.width + kAttendColumns - 1) / kAttendColumns * kAttendColumns;
  for (int64_t g = 0; g < a.groups; ++g) {
    const int64_t h = k * a.groups + g;
    for (int64_t j = 0; j < a.queries; ++j) {
      const int64_t r = g * a.queries + j;
      room.queries[r] = moved(a.query, (b * a.query_stride_b + h * a.query_stride_h + j * a.query_stride_q) * bytes);
      room.masks[r] = moved(a.mask, (b * a.mask_stride_b + j * a.mask_stride_q) * mask_bytes);
      room.out[r] = static_cast<char*>(a.out) + (b * a.out_stride_b + h * a.out_stride_h + j * a.out_stride_q) * bytes;
    }
  }
  std::fill_n(room.sums, rows * padded, 0.0f);
  std::fill_n(room.total, rows, 0.0f);
  std::fill_n(room.most, rows, -HUGE_VALF);
  AttendBlock block = {};
  block.queries = room.queries;
  block.masks = room.masks;
  block.out = room.out;
  block.rows = rows;
  block.scores = room.scores;
  block.sums = room.sums;
  block.padded = padded;
  block.most = room.most;
  block.total = room.total;
  block.keep = room.keep;
  const char* key = moved(a.key, (b * a.key_stride_b + k * a.key_stride_h) * bytes);
  const char* value = moved(a.value, (b * a.value_stride_b + k * a.value_stride_h) * bytes);
  for (int64_t first = 0; first < a.keys; first += kAttendKeys) {
    block.key = key + first * a.key_stride_n * bytes;
    block.value = value + first * a.value_stride_n * bytes;
    block.first = first;
    block.count = std::min(kAttendKeys, a.keys - first);
    block.last = first + block.count == a.keys;
    if (block.last && next >= 0) {
      block.next = moved(a.key, (next / a.key_heads * a.key_stride_b + next % a.key_heads * a.key_stride_h) * bytes);
    }
    PERSONAFAST_RUN(isa, attend_block, a, block);
  }
}

}  // namespace

void attend_cpu(const AttendArgs& args, int threads) {
  const int64_t rows = args.groups * args.queries;
  const int64_t items = args.batch * args.key_heads;
  const int64_t padded = (args.width + kAttendColumns - 1) / kAttendColumns * kAttendColumns;
  if (rows == 0 || items == 0 || args.width == 0) return;
  const Isa isa = isa_chosen();
  const uint64_t call = call_number();
  split(items, 2 * items * rows * args.keys * args.width, kWorkPerThread, threads, [&](int64_t begin, int64_t end) {
    const Room room(scratch(Room::bytes(rows, padded), call).at, rows, padded);
    for (int64_t item = begin; item < end; ++item) attend_head(args, isa, room, item, item + 1 < end ? item + 1 : -1);
  });
}

}  // namespace personafast
