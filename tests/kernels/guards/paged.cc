// Random calls of paged attention and append_kv, every operand guarded: whatever tables, lengths and offsets
// hold, nothing is read or written outside the operands; unused slots never matter; rows that need a page
// outside the pool, and no others, are NaN; the same bits for any number of threads.
//
//   paged [count] [seed]
#include "append_case.h"
#include "huge_pool.h"

using namespace jax_flash;

namespace {

class AttentionCase : PoolCase {
 public:
  // Seeds that are multiples of 3 are for append_kv, so `seed` is none.
  explicit AttentionCase(uint64_t seed)
      : PoolCase(seed),
        aim_(backend::aim(static_cast<int64_t>(seed - seed / 3 - 1), Loader::kPaged,
                          {Pass::kForward, Pass::kDecode})) {
    names_ = names_of(p_);
    latent_ = aim_ ? aim_->latent : chance(0.1);
    if (aim_) aim_sizes();
    if (latent_) value_dim_ = std::min(value_dim_, head_dim_);
    choose_call();
    make_operands();
  }
  std::string text() const {
    const AttentionSpec& s = p_.spec;
    char line[400];
    std::snprintf(
        line, sizeof line,
        "attention layout=%d/%d dtype=%d/%d leading=%d batch=%d heads=%d/%d d=%d dv=%d rows=%d pages=%d of "
        "%d, table=%d left=%d right=%d align=%d softcap=%g splits=%d invariant=%d latent=%d operands=%#x",
        static_cast<int>(s.layout), static_cast<int>(layout_), static_cast<int>(dtype_),
        static_cast<int>(pool_dtype_), leading_.rank, batch_, p_.heads, kv_heads_, head_dim_, value_dim_,
        p_.q_rows, pages_, page_size_, table_, s.left, s.right, static_cast<int>(s.align), s.softcap,
        s.num_splits, s.batch_invariant, latent_, s.operands);
    return line;
  }

  void run() {
    const Guarded &out = memory_of(&p_.out), &lse = memory_of(&p_.lse);
    out.poison(), lse.poison();
    if (!backend::run(Pass::kForward, p_, ThreadPool{}) || !backend::computes()) return;
    check();
    if (backend::sparing()) return;
    const std::string first(out.data(), out.bytes()), first_lse(lse.data(), lse.bytes());
    out.poison(), lse.poison();
    with_threads([&](const ThreadPool& pool) { backend::run(Pass::kForward, p_, pool); });
    if (std::memcmp(first.data(), out.data(), out.bytes()) ||
        std::memcmp(first_lse.data(), lse.data(), lse.bytes()))
      fail("the result depends on the threads or on the run");
  }

 private:
  // Draws calls with fewer and fewer options until the targeted kernel runs one; if none does, takes its
  // example.
  void choose_call() {
    constexpr int kTries = 12;
    for (int i = 0; i < kTries; ++i) {
      choose_options();
      if (aim_) aim_options(i);
      choose_operands();
      if (!aim_ || backend::takes(p_)) return;
    }
    take_example();
  }

  void choose_options() {
    AttentionSpec& s = p_.spec;
    s.operands = 0;
    p_.draft_rows = 0;
    s.layout = one_of({Layout::kPaged, Layout::kPagedVarlen});
    s.page_layout = layout_;
    s.align = one_of({Align::kBottomRight, Align::kTopLeft});
    s.left = chance(0.6) ? kUnlimited : static_cast<int32_t>(integer(0, 50));
    s.right = chance(0.4) ? kUnlimited : static_cast<int32_t>(chance(0.6) ? 0 : integer(0, 50));
    s.scale = one_of({0.3f, -0.1f});
    s.softcap = chance(0.7) ? 0.0f : 3.0f;
    s.num_splits = static_cast<int32_t>(chance(0.6) ? 0 : chance(0.1) ? INT_MAX : integer(1, 9));
    s.batch_invariant = chance(0.3);
    s.value_dim = latent_ ? value_dim_ : 0;
    p_.dtype = dtype_;
    p_.kv_dtype = pool_dtype_;
    p_.leading = leading_;
    p_.batch = batch_;
    p_.kv_heads = kv_heads_;
    p_.heads = kv_heads_ * static_cast<int32_t>(chance(0.1) ? integer(90, usual_or(110, 90)) : integer(1, 5));
    p_.head_dim = head_dim_;
    p_.value_dim = value_dim_;
    p_.q_rows = static_cast<int32_t>(integer(0, chance(0.2) ? 120 : 4));
    p_.k_rows = capacity();
    p_.page_size = page_size_;
    p_.pages = pages_;
    p_.table = table_;
  }

  // Options that the targeted kernel supports, some of them chosen at random.
  void aim_sizes() {
    dtype_ = aim_->dtype;
    pool_dtype_ = aim_->float8() ? float8() : dtype_;
    batch_ = std::max(batch_, 1);
    head_dim_ = width_within(aim_->head_dim);
    value_dim_ = width_within(aim_->value_dim);
    if (latent_) head_dim_ = aim_->head_dim - 8 * static_cast<int32_t>(integer(0, chance(0.5) ? 0 : 39));
    if (aim_->pass == Pass::kDecode) {  // at least two tiles of keys
      page_size_ = std::max(page_size_, 40);
      table_ = std::max(table_, 4);
    }
  }

  void aim_options(int tries) {
    AttentionSpec& s = p_.spec;
    p_.q_rows = std::max(p_.q_rows, 1);
    if (aim_->plain()) s.softcap = 0, s.scale = 0.3f;
    const backend::Variant variant = aim_->variant;
    if (variant == backend::Variant::kGeneral || variant == backend::Variant::kFloat8General)
      s.softcap = 3.0f;
    if (aim_->pass == Pass::kDecode) {
      s.batch_invariant = false;
      if (s.num_splits == 1) s.num_splits = 2;
      const bool fits =  // all rows of a sequence share one tile
          variant == backend::Variant::kPlain || variant == backend::Variant::kCluster;
      if (fits) s.num_splits = 0, s.layout = Layout::kPaged;
      const int32_t rows = aim_->block_m;  // at least one row more than the next smaller tile holds
      p_.q_rows = std::min(p_.q_rows, rows > 16 ? 2 : 4);
      const int64_t least = rows > 8 ? rows / 2 + 1 : 1, tokens = p_.packed() ? 1 : p_.q_rows;
      p_.heads = kv_heads_ * static_cast<int32_t>(fits ? integer(ceil_div(least, tokens), rows / tokens)
                                                       : integer(least, rows));
      if (latent_ && chance(0.3)) p_.heads *= 2;  // rows for several tiles
    }
    // Some kernels need one leading dimension, whole groups of 8 page rows, and their own head dims.
    if (tries > 1) {
      p_.leading = leading_ = {};
      p_.head_dim = head_dim_ = aim_->head_dim;
      p_.value_dim = value_dim_ = aim_->value_dim;
      if (latent_) s.value_dim = value_dim_;
      p_.page_size = page_size_ = (page_size_ + 7) / 8 * 8;
      p_.k_rows = capacity();
    }
    packs_heads_ = aim_->pass == Pass::kForward && tries % 2 == 1;
    if (packs_heads_) aim_at_packed_heads();
  }

  // Several tokens per sequence, whose query heads share tiles: rows for one or two tiles of each KV head.
  void aim_at_packed_heads() {
    AttentionSpec& s = p_.spec;
    s.layout = chance(0.5) ? Layout::kPaged : Layout::kPagedVarlen;
    s.align = Align::kBottomRight, s.num_splits = 0, s.batch_invariant = false;
    s.scale = 0.3f, s.softcap = aim_->plain() || chance(0.3) ? 0 : 3.0f;
    if (chance(0.5)) s.left = static_cast<int32_t>(integer(0, capacity()));
    const auto group = 1 << integer(0, 3);
    p_.heads = kv_heads_ * group;
    const int32_t tokens = aim_->block_m / group;
    p_.q_rows = tokens / 2 + static_cast<int32_t>(integer(1, tokens));
    if (p_.packed()) p_.q_rows *= batch_;
  }

  // Takes the sizes and options of the targeted kernel's example.
  void take_example() {
    const Problem sure = backend::example();
    AttentionSpec spec = sure.spec;
    spec.page_layout = layout_, spec.scale = 0.3f;
    p_ = {};
    p_.spec = spec;
    p_.leading = leading_ = {};
    p_.dtype = dtype_ = sure.dtype, p_.kv_dtype = pool_dtype_ = sure.kv_dtype;
    p_.batch = batch_ = sure.batch;
    p_.heads = sure.heads, p_.kv_heads = kv_heads_ = sure.kv_heads;
    p_.head_dim = head_dim_ = sure.head_dim, p_.value_dim = value_dim_ = sure.value_dim;
    p_.q_rows = sure.q_rows, p_.draft_rows = sure.draft_rows;
    p_.page_size = page_size_ = sure.page_size, p_.pages = pages_ = sure.pages;
    p_.table = table_ = sure.table, p_.k_rows = capacity();
    add(Operand::kBlockTables), add(Operand::kKvLengths);
    if (!backend::takes(p_)) fail("its own example is not taken by " + backend::aimed());
  }

  void add(Operand operand) { p_.spec.operands |= 1 << static_cast<int32_t>(operand); }

  void choose_operands() {
    const bool plain = aim_ && aim_->plain();
    add(Operand::kBlockTables), add(Operand::kKvLengths);
    if (p_.packed()) add(Operand::kCuSeqlensQ);
    if (chance(0.2) && !plain) add(Operand::kAlibiSlopes);
    if (packs_heads_ ? !plain : chance(0.3) && !plain) choose_draft_mask();
    if (!packs_heads_) choose_window(p_);
    if (chance(0.2) && !plain && !packs_heads_) choose_ranges(p_);
    if (chance(0.1) && !plain) choose_blocks(p_);
    if (chance(0.3)) add(Operand::kSinks);
    if (pool_dtype_ != dtype_ && chance(0.7)) add(Operand::kKScale), add(Operand::kVScale);
  }

  // In packed batches the mask may have fewer rows than some sequences.
  void choose_draft_mask() {
    add(Operand::kDraftMask);
    p_.draft_rows = p_.packed() ? static_cast<int32_t>(integer(1, 9)) : p_.q_rows;
    p_.spec.align = Align::kBottomRight;
  }

  void make_operands() {
    const AttentionSpec& s = p_.spec;
    const bool packed = p_.packed();
    make_tables(p_.block_tables, p_.kv_lengths);
    make_tokens(p_.query, packed, p_.q_rows, p_.heads, head_dim_);
    if (packed)
      make_index(p_.cu_seqlens_q, {{batch_ + 1, &View::batch}}, p_.q_rows, one_of({0.0, 0.5}), true);
    if (s.has(Operand::kAlibiSlopes))
      fill(make(p_.alibi_slopes, 4, {{batch_, &View::batch}, {p_.heads, &View::head}}, true), DType::kF32);
    if (s.has(Operand::kDraftMask)) make_draft_mask();
    make_window(p_, leading_);
    if (s.has(Operand::kRanges)) make_ranges(p_, leading_);
    if (s.has(Operand::kBlockMask)) make_blocks(p_, leading_);
    if (s.has(Operand::kSinks)) make_sinks(p_, leading_);
    if (s.has(Operand::kKScale)) {
      make_scales(p_.k_scale, chance(0.5)), make_scales(p_.v_scale, chance(0.5));
      if (latent_) p_.v_scale = p_.k_scale;
    }
    make_filled_pool(p_.key, head_dim_);
    if (latent_) {
      p_.value = p_.key;  // V is the first columns of K
    } else {
      make_filled_pool(p_.value, value_dim_);
    }
    std::vector<Dim> out{{p_.q_rows, &View::row}, {p_.heads, &View::head}, {value_dim_, &View::column}};
    std::vector<Dim> lse{{p_.heads, &View::head}, {p_.q_rows, &View::row}};
    if (!packed) {
      out.insert(out.begin(), {batch_, &View::batch});
      lse.insert(lse.begin(), {batch_, &View::batch});
    }
    make(p_.out, size_of(dtype_), out, false);
    make(p_.lse, 4, lse, false);
  }

  void make_draft_mask() {
    std::vector<Dim> dims{{p_.draft_rows, &View::row}, {p_.draft_rows, &View::column}};
    if (chance(0.7)) dims.insert(dims.begin(), {batch_, &View::batch});
    const Guarded& m = make(p_.draft_mask, 1, dims, true);
    for (size_t i = 0; i < m.bytes(); ++i) m.data()[i] = chance(0.5);
    m.make_read_only();
  }
  bool draft_hides(int64_t leading, int32_t z, int64_t row, int64_t token, int64_t rows) const {
    const View& view = p_.draft_mask;
    if (!view || token < 0 || rows > p_.draft_rows) return false;
    return !view.as<const uint8_t>()[view.leading_offset(leading_, leading) + view.offset(z, 0, row, token)];
  }

  // `row`: of the sequence, whose first row in the operand is `begin`.
  bool ranges_hide(int64_t leading, int32_t z, int32_t h, int64_t begin, int64_t row, int64_t key) const {
    const View& view = p_.ranges;
    if (!view) return false;
    const int64_t at = view.leading_offset(leading_, leading) + view.offset(z, h, begin + row);
    const int32_t* x = view.as<const int32_t>() + at;
    bool sees = false;
    for (int32_t i = 0; i < p_.limits; i += 2) sees |= x[i] <= key && key < x[i + 1];
    return !sees;
  }
  bool blocks_hide(int64_t leading, int32_t z, int32_t h, int64_t row, int64_t key) const {
    const View& view = p_.block_mask;
    if (!view) return false;
    const int64_t i = row / p_.spec.block_rows, j = key / p_.spec.block_keys;
    const int64_t at = view.leading_offset(leading_, leading) + view.offset(z, h, i, j);
    return i >= p_.mask_rows || j >= p_.mask_columns || !view.as<const uint8_t>()[at];
  }

  // A number of a sequence's window: that of the array, if there is one.
  int64_t window(const View& view, int64_t leading, int32_t z, int64_t otherwise) const {
    return view ? index(view, leading, z) : otherwise;
  }
  int64_t length(int64_t leading, int32_t z) const {
    return clamp(index(p_.kv_lengths, leading, z), capacity());
  }
  // -1: outside the pool.
  int64_t page(int64_t leading, int32_t z, int64_t key) const {
    const int64_t found = index(p_.block_tables, leading, z, key / page_size_);
    return 0 <= found && found < pages_ ? found : -1;
  }

  // Fills the slots that hold keys of some sequence with numbers, and all others with NaN.
  void make_filled_pool(View& view, int32_t width) {
    Guarded& m = make_pool(view, width, true);
    if (!backend::computes()) return;
    m.poison();
    for (int64_t l = 0; l < leading_.count(); ++l)
      for (int32_t z = 0; z < batch_; ++z)
        for (int64_t key = 0; key < length(l, z); ++key) {
          const int64_t at = page(l, z, key);
          for (int32_t h = 0; at >= 0 && h < kv_heads_; ++h)
            for (int32_t c = 0; c < width; ++c) {
              const int64_t offset =
                  view.leading_offset(leading_, l) + view.offset(at, h, key % page_size_, c);
              set_value(pool_dtype_, m.data() + offset * static_cast<int64_t>(size_of(pool_dtype_)),
                        normal());
            }
        }
    m.make_read_only();
  }

  // Results must be NaN exactly where a row sees a missing page, and 0 and -inf outside every sequence.
  void check() {
    constexpr int64_t kFar = int64_t{1} << 40;
    const AttentionSpec& s = p_.spec;
    for (int64_t l = 0; l < leading_.count(); ++l) {
      std::vector<bool> covered(p_.packed() ? p_.q_rows : 0);
      for (int32_t z = 0; z < batch_; ++z) {
        const auto [begin, end] = p_.packed() ? rows_of(p_.cu_seqlens_q, l, z, p_.q_rows)
                                              : std::pair<int64_t, int64_t>{0, p_.q_rows};
        const int64_t nq = end - begin, nk = length(l, z);
        const int32_t entry = p_.packed() ? 0 : z;
        const int64_t left = window(p_.window_left, l, z, s.left < 0 ? kFar : s.left),
                      right = window(p_.window_right, l, z, s.right < 0 ? kFar : s.right),
                      offset = window(p_.window_offset, l, z, 0);
        for (int64_t i = 0; i < nq; ++i) {
          const int64_t diagonal = offset + (s.align == Align::kBottomRight ? i + nk - nq : i);
          for (int32_t h = 0; h < p_.heads; ++h) {
            bool missing = false, any = false;
            for (int64_t j = 0; j < nk; ++j) {
              if (j < diagonal - left || j > diagonal + right) continue;
              if (draft_hides(l, z, i, j - (nk - nq), nq) || blocks_hide(l, z, h, i, j)) continue;
              if (ranges_hide(l, entry, h, begin, i, j)) continue;
              any = true;
              missing |= page(l, z, j) < 0;
            }
            check_row(l, entry, h, begin + i, missing, any);
          }
          if (p_.packed()) covered[begin + i] = true;
        }
      }
      for (int64_t row = 0; row < static_cast<int64_t>(covered.size()); ++row) {
        for (int32_t h = 0; h < p_.heads && !covered[row]; ++h) check_row(l, 0, h, row, false, false, true);
      }
    }
  }

  void check_row(int64_t l, int32_t batch, int32_t h, int64_t row, bool missing, bool any,
                 bool padding = false) {
    const auto at = [&](const View& view, int64_t c) {
      return view.leading_offset(leading_, l) + view.offset(batch, h, row, c);
    };
    const float lse = p_.lse.as<const float>()[at(p_.lse, 0)];
    const bool empty = padding || (!any && !p_.sinks);
    if (missing ? !std::isnan(lse) : empty ? lse != -kInf : !std::isfinite(lse))
      fail("lse of row " + std::to_string(row) + " is " + std::to_string(lse));
    for (int32_t c = 0; c < value_dim_; ++c) {
      const int64_t offset = at(p_.out, c) * static_cast<int64_t>(size_of(dtype_));
      const float out = value_of(dtype_, p_.out.as<const char>() + offset);
      if (missing ? !std::isnan(out) : any ? !std::isfinite(out) : out != 0)
        fail("out of row " + std::to_string(row) + " is " + std::to_string(out));
    }
  }

  std::optional<backend::Aim> aim_;
  bool packs_heads_ = false;
  bool latent_;
  Problem p_{};
};

// Paged attention or append_kv, by the seed.
class Case {
 public:
  explicit Case(uint64_t seed) {
    if (seed % 3) {
      attention_ = std::make_unique<AttentionCase>(seed);
    } else {
      append_ = std::make_unique<AppendCase>(seed);
    }
  }
  std::string text() const { return attention_ ? attention_->text() : append_->text(); }
  void run() { attention_ ? attention_->run() : append_->run(); }

 private:
  std::unique_ptr<AttentionCase> attention_;
  std::unique_ptr<AppendCase> append_;
};

}  // namespace

int main(int argc, char** argv) {
  if (const int failed = drive<Case>(argc, argv, 3000)) return failed;
  if (current_call.empty()) return 0;                 // another instruction set runs these seeds
  if (argc > 2 && std::atol(argv[2]) != 0) return 0;  // one of several processes is enough
  std::printf("a pool of more than 2^31 elements %s\n",
              use_a_huge_pool() ? "is addressed whole" : "was not tried: no kernel for it");
}
