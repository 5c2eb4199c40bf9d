// V-JEPA's masks: the targets are the union of blocks of patches and frames, the context is the rest.
#include <algorithm>

#include "masks/masks.h"

namespace jepa {

static constexpr int64_t WORD = 64; // bits in it

PatchSets::PatchSets(const MultiBlock3dParams& p)
    : clips(p.batch), frames(p.frames), words((p.grid.height * p.grid.width + WORD - 1) / WORD),
      bits(clips * frames * words), counts(clips) {}

namespace {

struct Block {
  int64_t frames;
  BlockSize size;
  std::vector<uint64_t> bits; // of its patches in a frame's first corner
};

std::vector<uint64_t> corner_bits(BlockSize size, int64_t width) {
  std::vector<uint64_t> bits(((size.height - 1) * width + size.width + WORD - 1) / WORD);
  for (int64_t y = 0; y < size.height; ++y)
    for (int64_t patch = y * width; patch < y * width + size.width; ++patch)
      bits[patch / WORD] |= uint64_t{1} << patch % WORD;
  return bits;
}

Block draw_size(const MultiBlock3dParams& p, Random& random) {
  const auto frames = static_cast<int64_t>(p.frames * p.temporal_scale.at(random.uniform()));
  const auto patches =
      static_cast<int64_t>(p.grid.height * p.grid.width * p.spatial_scale.at(random.uniform()));
  const BlockSize size = block_size(patches, p.aspect.at(random.uniform()), p.grid);
  return {std::max<int64_t>(frames, 1), size, corner_bits(size, p.grid.width)};
}

// Every patch of a frame.
std::vector<uint64_t> whole_frame(int64_t patches) {
  std::vector<uint64_t> frame((patches + WORD - 1) / WORD, ~uint64_t{0});
  frame.back() >>= frame.size() * WORD - patches;
  return frame;
}

int64_t count(const uint64_t* bits, int64_t words) {
  int64_t found = 0;
  for (int64_t i = 0; i < words; ++i) found += __builtin_popcountll(bits[i]);
  return found;
}

// Draws the blocks of one clip.
class Clip {
public:
  Clip(const MultiBlock3dParams& p, const Block& block, const std::vector<uint64_t>& whole, uint64_t* context,
       uint64_t* target)
      : p_(p), block_(block), whole_(whole), words_(whole.size()), context_(context), target_(target) {}

  // Patches of the context that the blocks leave.
  int64_t draw(Random& random) {
    std::fill_n(target_, (tubes() ? 1 : p_.frames) * words_, 0);
    for (int64_t i = 0; i < p_.num_blocks; ++i) draw_block(random);
    int64_t left = 0, here = 0;
    for (int64_t t = 0; t < p_.frames; ++t) {
      if (t == 0 || t == p_.context_frames || !tubes())
        here = divide(t);
      else
        repeat(t);
      left += here;
    }
    return left;
  }

private:
  // All frames are alike: one is drawn and copied.
  bool tubes() const { return block_.frames == p_.frames; }

  void draw_block(Random& random) {
    const int64_t top = random.below(p_.grid.height - block_.size.height + 1);
    const int64_t left = random.below(p_.grid.width - block_.size.width + 1);
    const int64_t start = random.below(p_.frames - block_.frames + 1);
    for (int64_t t = start; t < start + (tubes() ? 1 : block_.frames); ++t)
      add_block(target_ + t * words_, top * p_.grid.width + left);
  }

  // The block's bits, moved on to its first patch.
  void add_block(uint64_t* frame, int64_t patch) {
    frame += patch / WORD;
    const int64_t place = patch % WORD;
    uint64_t carried = 0;
    for (const uint64_t bits : block_.bits) {
      *frame++ |= bits << place | carried;
      carried = bits >> 1 >> (WORD - 1 - place);
    }
    if (carried) *frame |= carried;
  }

  // Gives a frame's context what the blocks leave, none of frames that are not shown; returns its patches.
  int64_t divide(int64_t t) {
    uint64_t *const context = context_ + t * words_, *const target = target_ + t * words_;
    if (t >= p_.context_frames) std::copy_n(whole_.data(), words_, target);
    for (int64_t i = 0; i < words_; ++i) context[i] = whole_[i] & ~target[i];
    return count(context, words_);
  }

  void repeat(int64_t t) {
    for (uint64_t* role : {context_, target_})
      std::copy_n(role + (t - 1) * words_, words_, role + t * words_);
  }

  const MultiBlock3dParams& p_;
  const Block& block_;
  const std::vector<uint64_t>& whole_;
  const int64_t words_;
  uint64_t *const context_, *const target_;
};

// Leaves the first `most` of more patches. Frames are mostly like the one before.
void cut(uint64_t* word, uint64_t* end, int64_t words, int64_t most) {
  for (int64_t here = count(word, words); here <= most;) {
    most -= here;
    word += words;
    if (!std::equal(word - words, word, word)) here = count(word, words);
  }
  for (int64_t here; (here = count(word, 1)) <= most; most -= here) ++word;
  uint64_t rest = *word;
  for (; most > 0; --most) rest &= rest - 1; // without its first bit
  *word++ ^= rest;
  std::fill(word, end, 0);
}

// The first patches of each clip remain, as many as the poorest clip has, `most` at most.
void truncate(PatchSets& sets, int64_t most) {
  most = std::min(most, *std::min_element(sets.counts.begin(), sets.counts.end()));
  for (int64_t i = 0; i < sets.clips; ++i) {
    if (sets.counts[i] > most) cut(sets.clip(i), sets.clip(i + 1), sets.words, most);
    sets.counts[i] = most;
  }
}

// Of the patches of each clip a random choice of `most` remains.
void thin(PatchSets& sets, int64_t most, Random& random) {
  for (int64_t i = 0; i < sets.clips; ++i) {
    int64_t left = sets.counts[i], wanted = std::min(left, most);
    sets.counts[i] = wanted;
    for (uint64_t* word = sets.clip(i); wanted < left; ++word) {
      for (uint64_t open = *word; open && wanted < left; open &= open - 1) {
        const bool kept = wanted > 0 && random.below(left) < wanted;
        if (!kept) *word ^= open & -open;
        wanted -= kept;
        --left;
      }
    }
  }
}

// `sets` become what `others` are not.
void complement(PatchSets& sets, const PatchSets& others, const std::vector<uint64_t>& whole,
                int64_t patches) {
  for (size_t i = 0; i < sets.bits.size(); ++i) sets.bits[i] = whole[i % whole.size()] & ~others.bits[i];
  for (int64_t i = 0; i < sets.clips; ++i) sets.counts[i] = patches - others.counts[i];
}

// Writes the ids of a frame whose first patch is `first`; returns their end.
int64_t* expand(const uint64_t* bits, int64_t words, int64_t first, int64_t* ids) {
  for (int64_t w = 0; w < words; ++w)
    for (uint64_t left = bits[w]; left; left &= left - 1) *ids++ = first + w * WORD + __builtin_ctzll(left);
  return ids;
}

// The ids of a frame that is like the one before, whose ids lie in [before, ids).
int64_t* shift(const int64_t* before, int64_t* ids, int64_t frame) {
  const int64_t count = ids - before;
  for (int64_t i = 0; i < count; ++i) ids[i] = before[i] + frame;
  return ids + count;
}

// Bound by what it writes, eight bytes for a bit.
int64_t* write_row(const PatchSets& sets, int64_t clip, int64_t frame, int64_t* ids) {
  const uint64_t* bits = sets.clip(clip);
  const int64_t* before = ids;
  for (int64_t t = 0; t < sets.frames; ++t, bits += sets.words) {
    int64_t* const begin = ids;
    const bool alike = t > 0 && std::equal(bits, bits + sets.words, bits - sets.words);
    ids = alike ? shift(before, begin, frame) : expand(bits, sets.words, t * frame, begin);
    before = begin;
  }
  return ids;
}

MaskRows rows_of(const std::vector<PatchSets>& specs, int64_t frame) {
  MaskRows rows;
  for (const PatchSets& sets : specs)
    rows.lengths.insert(rows.lengths.end(), sets.counts.begin(), sets.counts.end());
  rows.make_room(rows.total());
  int64_t* ids = rows.ids.get();
  for (const PatchSets& sets : specs)
    for (int64_t i = 0; i < sets.clips; ++i) ids = write_row(sets, i, frame, ids);
  return rows;
}

} // namespace

bool MultiBlock3d::add(const MultiBlock3dParams& p, Random& sizes, Random& places) {
  frame_ = p.grid.height * p.grid.width;
  const int64_t patches = p.frames * frame_;
  const Block block = draw_size(p, sizes);
  const std::vector<uint64_t> whole = whole_frame(frame_);
  PatchSets context(p), target(p);
  for (int64_t i = 0; i < p.batch; ++i) {
    Clip clip(p, block, whole, context.clip(i), target.clip(i));
    int tries = 0;
    while ((context.counts[i] = clip.draw(places)) == 0)
      if (++tries == MAX_TRIES) return false;
    target.counts[i] = patches - context.counts[i];
  }
  if (p.truncate) {
    truncate(context, p.max_keep);
    truncate(target, patches);
  } else {
    thin(context, p.max_keep, places);
  }
  if (p.full_complement)
    complement(target, context, whole, patches);
  else if (p.pred_full_complement)
    complement(context, target, whole, patches);
  if (p.inv_block) std::swap(context, target);
  contexts_.push_back(std::move(context));
  targets_.push_back(std::move(target));
  return true;
}

Masks MultiBlock3d::rows() const { return {rows_of(contexts_, frame_), rows_of(targets_, frame_)}; }

} // namespace jepa
