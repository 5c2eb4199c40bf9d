// How the sequences of a call are shared out among threads.
#pragma once
#include <cstdint>
#include <vector>

#include "masked_attention.h"

namespace jepa {

// Both fill the shape's most_queries, most_keys, head_step, tasks and task_count from its other fields, and
// make threads 1 where the work is not worth a second one. The shape points into `tasks` from then on. No
// result depends on how a call is shared out.
void schedule_attention_forward(AttentionShape& shape, int64_t sequences, std::vector<AttentionTask>& tasks);

// Whole sequences, and parts of those that one thread would work on while others have nothing left to do, or
// whose keys would fill too much of its memory. MaskedAttentionBackwardParams has fields of these names.
struct AttentionBackwardTasks {
  std::vector<AttentionTask> whole, query_parts, key_parts;
  int64_t most_whole_keys = 0;
};

void schedule_attention_backward(AttentionShape& shape, int64_t sequences, AttentionBackwardTasks& tasks);

} // namespace jepa
