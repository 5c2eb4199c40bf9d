// V-JEPA's masks: the targets are the union of blocks of patches and frames, the context is the rest.
#include <algorithm>

#include "masks/masks.h"

namespace jepa {

Roles::Roles(const MultiBlock3dParams& p)
    : clips(p.batch), frames(p.frames), frame(p.grid.height * p.grid.width), roles(clips * frames * frame) {}

namespace {

constexpr uint8_t NEITHER = Roles::NEITHER, CONTEXT = Roles::CONTEXT, TARGET = Roles::TARGET;

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

// Draws the blocks of one clip.
class Clip {
public:
  Clip(const MultiBlock3dParams& p, const Block& block, uint8_t* roles)
      : p_(p), block_(block), frame_(p.grid.height * p.grid.width), roles_(roles),
        shown_(roles + p.context_frames * frame_) {}

  // False where the blocks leave no context.
  bool draw(Random& random) {
    std::fill(roles_, shown_, CONTEXT);
    for (int64_t i = 0; i < p_.num_blocks; ++i) draw_block(random);
    std::fill(shown_, roles_ + p_.frames * frame_, TARGET);
    if (tubes())
      for (uint8_t* next = roles_ + frame_; next < shown_; next += frame_) std::copy_n(roles_, frame_, next);
    return std::find(roles_, shown_, CONTEXT) != shown_;
  }

private:
  // All frames are alike: one is drawn and copied.
  bool tubes() const { return block_.frames == p_.frames; }

  void draw_block(Random& random) {
    const int64_t top = random.below(p_.grid.height - block_.size.height + 1);
    const int64_t left = random.below(p_.grid.width - block_.size.width + 1);
    const int64_t start = random.below(p_.frames - block_.frames + 1);
    for (int64_t t = start; t < start + (tubes() ? 1 : block_.frames); ++t) {
      for (int64_t y = top; y < top + block_.size.height; ++y) {
        uint8_t* const row = roles_ + t * frame_ + y * p_.grid.width + left;
        std::fill(row, row + block_.size.width, TARGET);
      }
    }
  }

  const MultiBlock3dParams& p_;
  const Block block_;
  const int64_t frame_;
  uint8_t* const roles_;
  uint8_t* const shown_; // end of the frames that a context may lie in
};

// Writes every patch, so that it is vectorised.
void replace(uint8_t* begin, uint8_t* end, uint8_t from, uint8_t to) {
  std::transform(begin, end, begin, [=](uint8_t role) { return role == from ? to : role; });
}

// In 8 bits, into which 255 patches fit, the count of a stretch is vectorised.
int64_t count(const uint8_t* roles, int64_t patches, uint8_t role) {
  int64_t found = 0;
  for (int64_t start = 0; start < patches; start += 255) {
    const int64_t end = std::min<int64_t>(start + 255, patches);
    uint8_t stretch = 0;
    for (int64_t i = start; i < end; ++i) stretch += roles[i] == role;
    found += stretch;
  }
  return found;
}

// Of the patches of a role the first in each clip keep it, as many as the poorest clip has, `most` at most.
void truncate(Roles& spec, uint8_t role, int64_t most) {
  for (int64_t i = 0; i < spec.clips; ++i) most = std::min(most, count(spec.clip(i), spec.patches(), role));
  for (int64_t i = 0; i < spec.clips; ++i) {
    uint8_t *patch = spec.clip(i), *const end = patch + spec.patches();
    int64_t left = most;
    for (int64_t whole; patch < end && (whole = count(patch, spec.frame, role)) <= left; left -= whole)
      patch += spec.frame;
    for (; left > 0; ++patch) left -= *patch == role;
    replace(patch, end, role, NEITHER);
  }
}

// Of the context patches of each clip a random choice of `most` remains.
void thin(Roles& spec, int64_t most, Random& random) {
  for (int64_t i = 0; i < spec.clips; ++i) {
    int64_t left = count(spec.clip(i), spec.patches(), CONTEXT), wanted = std::min(left, most);
    for (uint8_t* patch = spec.clip(i); wanted < left; ++patch) {
      if (*patch != CONTEXT) continue;
      const bool kept = wanted > 0 && random.below(left) < wanted;
      if (!kept) *patch = NEITHER;
      wanted -= kept;
      --left;
    }
  }
}

// Turns roles into rows. Frames are mostly like the one before: their ids are those, a frame later.
class Rows {
public:
  Rows(const Roles& spec, Masks& out) : spec_(spec), out_(out), context_(spec.frame), target_(spec.frame) {}

  void add(int64_t clip) {
    const int64_t context = out_.context.ids.size(), target = out_.target.ids.size();
    const uint8_t* roles = spec_.clip(clip);
    for (int64_t t = 0; t < spec_.frames; ++t, roles += spec_.frame) {
      if (t > 0 && std::equal(roles, roles + spec_.frame, roles - spec_.frame))
        shift();
      else
        split(roles, t * spec_.frame);
      out_.context.ids.insert(out_.context.ids.end(), context_.begin(), context_.begin() + contexts_);
      out_.target.ids.insert(out_.target.ids.end(), target_.begin(), target_.begin() + targets_);
    }
    out_.context.lengths.push_back(out_.context.ids.size() - context);
    out_.target.lengths.push_back(out_.target.ids.size() - target);
  }

private:
  void shift() {
    for (int64_t i = 0; i < contexts_; ++i) context_[i] += spec_.frame;
    for (int64_t i = 0; i < targets_; ++i) target_[i] += spec_.frame;
  }

  void split(const uint8_t* roles, int64_t first) {
    int64_t *const context = context_.data(), *const target = target_.data();
    int64_t contexts = 0, targets = 0;
    for (int64_t i = 0; i < spec_.frame; ++i) {
      context[contexts] = target[targets] = first + i;
      contexts += roles[i] == CONTEXT;
      targets += roles[i] == TARGET;
    }
    contexts_ = contexts;
    targets_ = targets;
  }

  const Roles& spec_;
  Masks& out_;
  std::vector<int64_t> context_, target_; // ids in the present frame
  int64_t contexts_ = 0, targets_ = 0;
};

} // namespace

bool MultiBlock3d::add(const MultiBlock3dParams& p, Random& sizes, Random& places) {
  const Block block = draw_size(p, sizes);
  Roles spec(p);
  for (int64_t i = 0; i < p.batch; ++i) {
    Clip clip(p, block, spec.clip(i));
    int tries = 0;
    while (!clip.draw(places))
      if (++tries == MAX_TRIES) return false;
  }
  if (p.truncate) {
    truncate(spec, CONTEXT, p.max_keep);
    truncate(spec, TARGET, spec.patches());
  } else {
    thin(spec, p.max_keep, places);
  }
  uint8_t *const begin = spec.clip(0), *const end = spec.clip(p.batch);
  if (p.full_complement)
    replace(begin, end, NEITHER, TARGET);
  else if (p.pred_full_complement)
    replace(begin, end, NEITHER, CONTEXT);
  if (p.inv_block)
    std::transform(begin, end, begin,
                   [](uint8_t role) -> uint8_t { return role ? CONTEXT + TARGET - role : NEITHER; });
  specs_.push_back(std::move(spec));
  return true;
}

Masks MultiBlock3d::rows() const {
  int64_t contexts = 0, targets = 0;
  for (const Roles& spec : specs_) {
    for (int64_t i = 0; i < spec.clips; ++i) {
      contexts += count(spec.clip(i), spec.patches(), CONTEXT);
      targets += count(spec.clip(i), spec.patches(), TARGET);
    }
  }
  Masks out;
  out.context.ids.reserve(contexts);
  out.target.ids.reserve(targets);
  for (const Roles& spec : specs_) {
    Rows rows(spec, out);
    for (int64_t i = 0; i < spec.clips; ++i) rows.add(i);
  }
  return out;
}

} // namespace jepa
