// Which token of which image each row stands for.
#pragma once
#include <cstdint>

namespace jepa {

// Rows lie in `sequences` runs; run s reads image s % batch. Runs end at cu_seqlens[1], cu_seqlens[2], ...,
// or are `run_length` long where cu_seqlens is null. Rows past the last run stand for nothing.
struct KeptRows {
  const int64_t* ids; // null: row i of a run is token i
  const int32_t* cu_seqlens;
  int64_t sequences, run_length, rows, batch, count; // count: tokens of an image; ids outside it are skipped
};

} // namespace jepa
