// V-JEPA's masks: the targets are the union of blocks of patches and frames, the context is the rest.
#include <algorithm>
#include <numeric>
#include <utility>

#include "masks/masks.h"

namespace jepa {

Chosen::Chosen(const MultiBlock3dParams& p)
    : clips(p.batch), frames(p.frames), frame(p.grid.height * p.grid.width), bytes(clips * frames * frame) {}

static int64_t count(const uint8_t* bytes, int64_t n) {
  return std::accumulate(bytes, bytes + n, int32_t{0});
}

int64_t Chosen::count(int64_t i) const { return jepa::count(clip(i), patches()); }

Chosen Chosen::others() const {
  Chosen found(*this);
  for (uint8_t& byte : found.bytes) byte ^= 1;
  return found;
}

namespace {

struct Block {
  int64_t frames;
  BlockSize size;
};

Block draw_size(const MultiBlock3dParams& p, Random& random) {
  const auto frames = static_cast<int64_t>(p.frames * p.temporal_scale.at(random.uniform()));
  const auto patches =
      static_cast<int64_t>(p.grid.height * p.grid.width * p.spatial_scale.at(random.uniform()));
  return {std::max<int64_t>(frames, 1), block_size(patches, p.aspect.at(random.uniform()), p.grid)};
}

// One clip's context.
class Context {
public:
  Context(const MultiBlock3dParams& p, const Block& block, uint8_t* clip)
      : p_(p), block_(block), clip_(clip), frame_(p.grid.height * p.grid.width),
        shown_(clip + p.context_frames * frame_) {}

  // False where no block leaves anything.
  bool draw(Random& random) {
    std::fill(clip_, shown_, 1);
    for (int64_t i = 0; i < p_.num_blocks; ++i) hide_block(random);
    std::fill(shown_, clip_ + p_.frames * frame_, 0);
    if (tubes())
      for (uint8_t* next = clip_ + frame_; next < shown_; next += frame_) std::copy_n(clip_, frame_, next);
    return std::find(clip_, shown_, 1) != shown_;
  }

private:
  // All frames are alike: one is drawn and copied.
  bool tubes() const { return block_.frames == p_.frames; }

  void hide_block(Random& random) {
    const int64_t top = random.below(p_.grid.height - block_.size.height + 1);
    const int64_t left = random.below(p_.grid.width - block_.size.width + 1);
    const int64_t start = random.below(p_.frames - block_.frames + 1);
    for (int64_t t = start; t < start + (tubes() ? 1 : block_.frames); ++t) {
      for (int64_t y = top; y < top + block_.size.height; ++y) {
        uint8_t* const row = clip_ + t * frame_ + y * p_.grid.width + left;
        std::fill(row, row + block_.size.width, 0);
      }
    }
  }

  const MultiBlock3dParams& p_;
  const Block block_;
  uint8_t* const clip_;
  const int64_t frame_;
  uint8_t* const shown_; // end of the frames that a context may lie in
};

// The first patches of each clip, as many as the poorest clip has and no more than `most`.
void truncate(Chosen& chosen, int64_t most) {
  for (int64_t i = 0; i < chosen.clips; ++i) most = std::min(most, chosen.count(i));
  for (int64_t i = 0; i < chosen.clips; ++i) {
    uint8_t *patch = chosen.clip(i), *const end = patch + chosen.patches();
    int64_t left = most;
    for (int64_t whole; patch < end && (whole = count(patch, chosen.frame)) <= left; left -= whole)
      patch += chosen.frame;
    for (; left > 0; ++patch) left -= *patch;
    std::fill(patch, end, 0);
  }
}

// A random choice of at most `most` patches of each clip.
void thin(Chosen& chosen, int64_t most, Random& random) {
  for (int64_t i = 0; i < chosen.clips; ++i) {
    int64_t left = chosen.count(i), wanted = std::min(left, most);
    for (uint8_t* patch = chosen.clip(i); wanted < left; ++patch) {
      if (!*patch) continue;
      const bool kept = wanted > 0 && random.below(left) < wanted;
      *patch = kept;
      wanted -= kept;
      --left;
    }
  }
}

void append_rows(const Chosen& chosen, MaskRows& rows) {
  std::vector<int64_t> ids(chosen.frame); // of one frame, counted from its first patch
  for (int64_t i = 0; i < chosen.clips; ++i) {
    const auto before = static_cast<int64_t>(rows.ids.size());
    const uint8_t* patch = chosen.clip(i);
    int64_t found = 0;
    for (int64_t t = 0; t < chosen.frames; ++t, patch += chosen.frame) {
      if (t == 0 || !std::equal(patch, patch + chosen.frame, patch - chosen.frame)) { // mostly alike
        found = 0;
        for (int64_t id = 0; id < chosen.frame; ++id) {
          ids[found] = id;
          found += patch[id];
        }
      }
      rows.ids.resize(rows.ids.size() + found);
      std::transform(ids.begin(), ids.begin() + found, rows.ids.end() - found,
                     [first = t * chosen.frame](int64_t id) { return first + id; });
    }
    rows.lengths.push_back(static_cast<int64_t>(rows.ids.size()) - before);
  }
}

MaskRows rows_of(const std::vector<Chosen>& specs) {
  int64_t total = 0;
  for (const Chosen& chosen : specs)
    for (int64_t i = 0; i < chosen.clips; ++i) total += chosen.count(i);
  MaskRows rows;
  rows.ids.reserve(total);
  for (const Chosen& chosen : specs) append_rows(chosen, rows);
  return rows;
}

} // namespace

bool MultiBlock3d::add(const MultiBlock3dParams& p, Random& sizes, Random& places) {
  const Block block = draw_size(p, sizes);
  Chosen context(p);
  for (int64_t i = 0; i < p.batch; ++i) {
    Context clip(p, block, context.clip(i));
    int tries = 0;
    while (!clip.draw(places))
      if (++tries == MAX_TRIES) return false;
  }
  Chosen target = context.others();
  if (p.truncate) {
    truncate(context, p.max_keep);
    truncate(target, target.patches());
  } else {
    thin(context, p.max_keep, places);
  }
  if (p.full_complement)
    target = context.others();
  else if (p.pred_full_complement)
    context = target.others();
  if (p.inv_block) std::swap(context, target);
  contexts_.push_back(std::move(context));
  targets_.push_back(std::move(target));
  return true;
}

Masks MultiBlock3d::rows() const { return {rows_of(contexts_), rows_of(targets_)}; }

} // namespace jepa
