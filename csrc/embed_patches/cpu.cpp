// Compute-bound matrix products over kept patches only. Operands are gathered into fp32 panels, the layer's
// once a call, the patches' a tile at a time, so that no matrix of patches is ever in memory; bias and
// position are added as the tile is stored.
#include "embed_patches/embed_patches.h"

#include "common/floats.h"
#include "common/multiply.h"
#include "common/parallel.h"
#include "common/sort_rows.h"
#include "embed_patches/patch.h"

namespace jepa::JEPA_ISA {

using Layer = EmbedPatchesLayer;
using Forward = EmbedPatchesForwardParams;
using Backward = EmbedPatchesBackwardParams;
using embed_patches::padded;
using embed_patches::row_size;
using embed_patches::TILE_ROWS;
using embed_patches::TOKENS;
static_assert(TILE_ROWS % ROWS == 0 && embed_patches::MAX_COLUMNS % COLUMNS == 0);

// Where a token's patch begins.
struct Place {
  int64_t image, frame, line, column;

  Place(const Layer& at, int64_t token)
      : image(token / at.at.count), frame(token % at.at.count / (at.grid_w * at.grid_h) * at.tubelet),
        line(token % at.at.count / at.grid_w % at.grid_h * at.patch),
        column(token % at.at.count % at.grid_w * at.patch) {}
};

static Patch pixel_shape(const Layer& at) {
  return {at.channels, at.tubelet, at.patch, at.pixel_strides + 1};
}
static Patch weight_shape(const Layer& at) {
  return {at.channels, at.tubelet, at.patch, at.weight_strides + 1};
}

// The first pixel of a token's patch.
template <class X> static const X* pixels_of(const Layer& at, int64_t token) {
  const Place place(at, token);
  const int64_t* stride = at.pixel_strides;
  return static_cast<const X*>(at.pixels) + place.image * stride[0] + place.frame * stride[2] +
         place.line * stride[3] + place.column * stride[4];
}

template <class X> static void prefetch_token(const Layer& at, const Patch& shape, int64_t token) {
  each_line(pixels_of<X>(at, token), shape, [&](const X* line, int64_t) {
    prefetch(line);
    prefetch(line + (shape.length - 1) * shape.step);
  });
}

template <class X> static void read_token(const Layer& at, const Patch& shape, int64_t token, float* row) {
  const X* first = pixels_of<X>(at, token);
  if (at.scale && at.shift)
    read_patch(first, shape, at.scale, at.shift, row);
  else
    read_patch(first, shape, row);
}

// The weights of one output, summed over the frames that show the same image.
template <class T> static void read_weights(const Layer& at, const Patch& shape, int64_t e, float* row) {
  const T* first = static_cast<const T*>(at.weight) + e * at.weight_strides[0];
  read_patch(first, shape, row);
  for (int64_t i = 1; i < at.copies; ++i) add_patch(first + i * at.weight_strides[2], shape, row);
}

// W^T [depth, embed_dim] as right panels.
template <class T> static void pack_weights(const Forward& p) {
  const Layer& at = p.layer;
  const int64_t depth = at.depth(), width = row_size(depth);
  const Patch shape = weight_shape(at);
  parallel_for(panels_of(at.embed_dim, COLUMNS), at.threads, [&](int64_t begin, int64_t end) {
    float* rows = p.scratch + thread_rank() * p.scratch_size;
    for (int64_t e = begin * COLUMNS; e < end * COLUMNS; e += COLUMNS) {
      for (int64_t i = 0; i < COLUMNS; ++i)
        if (e + i < at.embed_dim)
          read_weights<T>(at, shape, e + i, rows + i * width);
        else
          std::memset(rows + i * width, 0, depth * sizeof(float));
      interleave<COLUMNS>(rows, width, depth, p.weights + e * depth);
    }
  });
}

template <class T> static const T* position(const Forward& p, int64_t id) {
  return static_cast<const T*>(p.pos) + (id < 0 ? 0 : id) * p.pos_strides[0];
}

// Adds bias and position to a row of sums, and rounds. A row without a patch (id < 0) is 0.
template <class T>
static void finish(const Forward& p, int64_t row, int64_t id, int64_t column, const float* sums) {
  const int64_t embed_dim = p.layer.embed_dim;
  const T *bias = static_cast<const T*>(p.bias), *pos = p.pos ? position<T>(p, id) : nullptr;
  T* out = static_cast<T*>(p.out) + row * embed_dim;
  for (int64_t e = column; e < column + COLUMNS && e < embed_dim; e += W, sums += W) {
    const int n = part(embed_dim - e);
    vf x = load(sums);
    if (bias) x = add(x, load(bias + e * p.bias_stride, p.bias_stride, n));
    if (pos) x = add(x, load(pos + e * p.pos_strides[1], p.pos_strides[1], n));
    store_first(out + e, id < 0 ? zero() : x, n);
  }
}

// The patches of rows [begin, end), at most TILE_ROWS, as left panels.
template <class X>
static void pack_patches(const Forward& p, const Patch& shape, int64_t begin, int64_t end, float* left,
                         float* rows) {
  const int64_t depth = p.layer.depth(), width = row_size(depth);
  for (; begin < end; begin += ROWS, left += depth * ROWS) {
    for (int64_t i = ROWS; i < 2 * ROWS && begin + i < end; ++i)
      if (p.token[begin + i] >= 0) prefetch_token<X>(p.layer, shape, p.token[begin + i]);
    for (int64_t i = 0; i < ROWS; ++i)
      if (begin + i < end && p.token[begin + i] >= 0)
        read_token<X>(p.layer, shape, p.token[begin + i], rows + i * width);
      else
        std::memset(rows + i * width, 0, depth * sizeof(float));
    interleave<ROWS>(rows, width, depth, left);
  }
}

template <class T, class X>
static void embed_tile(const Forward& p, const Patch& shape, int64_t begin, int64_t end, float* scratch) {
  const int64_t depth = p.layer.depth(), embed_dim = p.layer.embed_dim;
  pack_patches<X>(p, shape, begin, end, scratch, scratch + TILE_ROWS * depth);
  alignas(64) float sums[ROWS * COLUMNS];
  int64_t ids[TILE_ROWS];
  for (int64_t i = begin; i < end; ++i) ids[i - begin] = p.token[i] < 0 ? -1 : p.token[i] % p.layer.at.count;
  for (int64_t e = 0; e < embed_dim; e += COLUMNS)
    for (int64_t row = begin; row < end; row += ROWS) {
      const int64_t rows = end - row < ROWS ? end - row : ROWS;
      const int64_t* id = ids + (row - begin);
      if (p.pos)
        for (int64_t i = 0; i < rows; ++i) prefetch(position<T>(p, id[i]) + e);
      fetch_block(static_cast<T*>(p.out) + row * embed_dim + e, rows, COLUMNS, embed_dim);
      multiply_panel(scratch + (row - begin) * depth, p.weights + e * depth, depth, sums);
      for (int64_t i = 0; i < rows; ++i) finish<T>(p, row + i, id[i], e, sums + i * COLUMNS);
    }
}

template <class T, class X> static void forward(const Forward& p) {
  const KeptRows& at = p.layer.at;
  for (int64_t row = 0; row < at.rows; ++row) p.token[row] = -1;
  each_kept(at, [&](int64_t token, int64_t row) { p.token[row] = token; });
  pack_weights<T>(p);
  const Patch shape = pixel_shape(p.layer);
  parallel_for(panels_of(at.rows, ROWS), p.layer.threads, [&](int64_t begin, int64_t end) {
    float* scratch = p.scratch + thread_rank() * p.scratch_size;
    const int64_t last = end * ROWS < at.rows ? end * ROWS : at.rows;
    for (int64_t row = begin * ROWS; row < last; row += TILE_ROWS)
      embed_tile<T, X>(p, shape, row, row + TILE_ROWS < last ? row + TILE_ROWS : last, scratch);
  });
}

template <class T> static const T* grad_row(const Backward& p, int64_t row) {
  const T* grad = static_cast<const T*>(p.grad);
  if (p.layer.at.cu_seqlens) return grad + row * p.grad_strides[1];
  const int64_t run = row / p.layer.at.run_length;
  return grad + run * p.grad_strides[0] + (row - run * p.layer.at.run_length) * p.grad_strides[1];
}

// The gradient of a token: the sum over the rows that embed it, in their order.
template <class T> static void read_grad(const Backward& p, int64_t token, float* sum) {
  const int64_t step = p.grad_strides[2], embed_dim = p.layer.embed_dim;
  const int32_t *row = p.source + p.first[token], *last = p.source + p.first[token + 1];
  read_line(grad_row<T>(p, *row), step, embed_dim, sum);
  while (++row < last) add_line(grad_row<T>(p, *row), step, embed_dim, sum);
}

// dpos of channels [e, e + n) sums the rows of each id; dbias sums those, GROUP ids at a time: one long chain
// would round worse.
template <class T>
static void sum_channels(const Backward& p, int64_t e, int64_t n, float* sum, float* group, float* total) {
  constexpr int64_t GROUP = 32;
  const Layer& at = p.layer;
  const int64_t count = at.at.count, tokens = at.at.batch * count, step = p.grad_strides[2];
  for (int64_t id = 0; id < count; ++id) {
    std::memset(sum, 0, n * sizeof(float));
    for (int64_t token = id; token < tokens; token += count)
      for (int32_t i = p.first[token]; i < p.first[token + 1]; ++i)
        add_line(grad_row<T>(p, p.source[i]) + e * step, step, n, sum);
    if (p.dpos) write_line(sum, n, static_cast<T*>(p.dpos) + id * at.embed_dim + e);
    if (!p.dbias) continue;
    if (id % GROUP == 0) {
      add_line(group, 1, n, total);
      std::memset(group, 0, n * sizeof(float));
    }
    add_line(sum, 1, n, group);
  }
  add_line(group, 1, n, total);
  if (p.dbias) write_line(total, n, static_cast<T*>(p.dbias) + e);
}

template <class T> static void bias_and_position_gradients(const Backward& p) {
  const int64_t embed_dim = p.layer.embed_dim, width = row_size(embed_dim);
  parallel_for(panels_of(embed_dim, W), p.layer.threads, [&](int64_t begin, int64_t end) {
    float* rows = p.scratch + thread_rank() * p.scratch_size;
    std::memset(rows, 0, 3 * width * sizeof(float));
    const int64_t last = end * W < embed_dim ? end * W : embed_dim;
    sum_channels<T>(p, begin * W, last - begin * W, rows, rows + width, rows + 2 * width);
  });
}

// Patches of tokens [begin, end) as right panels, their gradients as left panels.
template <class T, class X> static void pack_tokens(const Backward& p, int64_t begin, int64_t end) {
  const Layer& at = p.layer;
  const Patch shape = pixel_shape(at);
  parallel_for(end - begin, at.threads, [&](int64_t from, int64_t to) {
    float* row = p.scratch + thread_rank() * p.scratch_size;
    for (int64_t k = from; k < to; ++k) {
      if (k + 1 < to) prefetch_token<X>(at, shape, p.token[begin + k + 1]);
      read_token<X>(at, shape, p.token[begin + k], row);
      cut<COLUMNS>(row, at.depth(), k, end - begin, p.right);
      read_grad<T>(p, p.token[begin + k], row);
      cut<ROWS>(row, at.embed_dim, k, end - begin, p.left);
    }
  });
}

// dweight_sum = left right, or += it.
static void multiply_tokens(const Backward& p, int64_t tokens, bool add_to) {
  const int64_t depth = p.layer.depth(), embed_dim = p.layer.embed_dim;
  parallel_for(panels_of(embed_dim, ROWS), p.layer.threads, [&](int64_t begin, int64_t end) {
    alignas(64) float sums[ROWS * COLUMNS];
    const int64_t last = end * ROWS < embed_dim ? end * ROWS : embed_dim;
    for (int64_t first = begin * ROWS; first < last; first += TILE_ROWS)
      for (int64_t k = 0; k < depth; k += COLUMNS)
        for (int64_t e = first; e < first + TILE_ROWS && e < last; e += ROWS) {
          const int64_t rows = last - e < ROWS ? last - e : ROWS,
                        n = depth - k < COLUMNS ? depth - k : COLUMNS;
          float* out = p.dweight_sum + e * depth + k;
          fetch_block(out, rows, n, depth);
          multiply_panel(p.left + e * tokens, p.right + k * tokens, tokens, sums);
          for (int64_t i = 0; i < rows; ++i, out += depth) {
            if (add_to) add_line(out, 1, n, sums + i * COLUMNS);
            write_line(sums + i * COLUMNS, n, out);
          }
        }
  });
}

// Rounded, and the same for every frame of a weight that an image was shown to.
template <class T> static void write_weight_gradient(const Backward& p) {
  const Layer& at = p.layer;
  const int64_t line = at.depth() / at.channels;
  parallel_for(at.embed_dim * at.channels, at.threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * at.copies; i < end * at.copies; ++i)
      write_line(p.dweight_sum + i / at.copies * line, line, static_cast<T*>(p.dweight) + i * line);
  });
}

// dW = sum over tokens of gradient x patch, some tokens at a time: how many depends on their number alone.
template <class T, class X> static void weight_gradient(const Backward& p, int64_t tokens) {
  const int64_t chunks = tokens > TOKENS ? panels_of(tokens, TOKENS) : 1;
  for (int64_t i = 0; i < chunks; ++i) {
    const int64_t begin = tokens * i / chunks, end = tokens * (i + 1) / chunks;
    pack_tokens<T, X>(p, begin, end);
    multiply_tokens(p, end - begin, i > 0);
  }
  if (p.dweight != p.dweight_sum) write_weight_gradient<T>(p);
}

// Gradients of tokens [begin, end), at most TILE_ROWS, times W: their patches of dpixels.
template <class T> static void pixel_tile(const Backward& p, int64_t begin, int64_t end, float* scratch) {
  const Layer& at = p.layer;
  const int64_t depth = at.depth(), width = embed_patches::row_size(depth),
                panels = panels_of(end - begin, ROWS);
  float *left = scratch, *patches = left + TILE_ROWS * at.embed_dim, *rows = patches + TILE_ROWS * width;
  for (int64_t i = 0; i < panels * ROWS; i += ROWS) {
    for (int64_t lane = 0; lane < ROWS; ++lane)
      if (begin + i + lane < end)
        read_grad<T>(p, p.token[begin + i + lane], rows + lane * row_size(at.embed_dim));
      else
        std::memset(rows + lane * row_size(at.embed_dim), 0, at.embed_dim * sizeof(float));
    interleave<ROWS>(rows, row_size(at.embed_dim), at.embed_dim, left + i * at.embed_dim);
  }
  alignas(64) float sums[ROWS * COLUMNS];
  for (int64_t k = 0; k < depth; k += COLUMNS)
    for (int64_t i = 0; i < panels * ROWS; i += ROWS) {
      multiply_panel(left + i * at.embed_dim, p.right + k * at.embed_dim, at.embed_dim, sums);
      for (int64_t r = i; r < i + ROWS && r < end - begin; ++r)
        std::memcpy(patches + r * width + k, sums + (r - i) * COLUMNS, COLUMNS * sizeof(float));
    }
  const int64_t line = at.grid_w * at.patch, frame = at.grid_h * at.patch * line;
  const int64_t channel = at.at.count / (at.grid_h * at.grid_w) * at.tubelet * frame;
  const int64_t strides[4] = {channel, frame, line, 1};
  const Patch shape(at.channels, at.tubelet, at.patch, strides);
  for (int64_t i = 0; i < end - begin; ++i) {
    const Place place(at, p.token[begin + i]);
    T* out = static_cast<T*>(p.dpixels) + place.image * at.channels * channel;
    write_patch(patches + i * width, shape, at.scale,
                out + place.frame * frame + place.line * line + place.column);
  }
}

template <class T> static void pixel_gradient(const Backward& p, int64_t tokens) {
  const Layer& at = p.layer;
  const Patch shape = weight_shape(at);
  const auto scratch = [&] { return p.scratch + thread_rank() * p.scratch_size; };
  parallel_for(at.embed_dim, at.threads, [&](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; ++e) {
      read_weights<T>(at, shape, e, scratch());
      cut<COLUMNS>(scratch(), at.depth(), e, at.embed_dim, p.right);
    }
  });
  parallel_for(panels_of(tokens, ROWS), at.threads, [&](int64_t begin, int64_t end) {
    const int64_t last = end * ROWS < tokens ? end * ROWS : tokens;
    for (int64_t token = begin * ROWS; token < last; token += TILE_ROWS)
      pixel_tile<T>(p, token, token + TILE_ROWS < last ? token + TILE_ROWS : last, scratch());
  });
}

template <class T, class X> static void backward(const Backward& p) {
  const KeptRows& at = p.layer.at;
  sort_rows(at, p.first, p.source);
  int64_t tokens = 0;
  for (int64_t token = 0; token < at.batch * at.count; ++token)
    if (p.first[token + 1] > p.first[token]) p.token[tokens++] = token;
  if (p.dbias || p.dpos) bias_and_position_gradients<T>(p);
  if (p.dweight) weight_gradient<T, X>(p, tokens);
  if (p.dpixels) pixel_gradient<T>(p, tokens);
}

// body(element of the layer, element of the pixels)
template <class Body> static void with_types(const Layer& at, Body body) {
  with_float(at.dtype, [&](auto x) {
    if (at.pixel_dtype == DType::u8)
      body(x, uint8_t{});
    else
      body(x, x);
  });
}

void embed_patches_forward_cpu(const Forward& p) {
  with_types(p.layer, [&](auto x, auto pixel) { forward<decltype(x), decltype(pixel)>(p); });
}

void embed_patches_backward_cpu(const Backward& p) {
  with_types(p.layer, [&](auto x, auto pixel) { backward<decltype(x), decltype(pixel)>(p); });
}

} // namespace jepa::JEPA_ISA
