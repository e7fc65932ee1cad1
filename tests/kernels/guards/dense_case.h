// A random dense call: its sizes and options, the memory behind its views, and which rows are in use.
#pragma once

#include <optional>

#include "random_case.h"

namespace jax_flash {

class DenseCase : protected RandomCase {
 protected:
  explicit DenseCase(uint64_t seed)
      : RandomCase(seed),
        aim_(backend::aim(static_cast<int64_t>(seed), Loader::kDense,
                          {Pass::kForward, Pass::kBackward, Pass::kBiasGradient, Pass::kTangent})) {
    names_ = names_of(p_);
    names_.merge(names_of(t_));
    choose_sizes();
    if (aim_) aim_sizes();
    p_.kv_dtype = p_.dtype;
    choose_options();
    if (aim_) aim_options();
    make_tensors();
    make_indices();
    make_score_operands();
    p_.spec.row_max = chance(0.3);
    if (p_.spec.row_max) make_statistic(p_.row_max);
    if (!backend::computes()) return;
    find_rows_in_use();
    poison_unused_rows();
  }

  // visit(element, in use) for every element of a per-token tensor (width > 0) or row statistic (width = 0).
  template <class Visit>
  void each(const View& view, bool queries, int32_t heads, int32_t width, size_t element,
            const Visit& visit) {
    const int64_t rows = queries ? p_.q_rows : p_.k_rows, entries = p_.varlen() ? 1 : p_.batch;
    const std::vector<bool>& used = queries ? q_used_ : k_used_;
    for (int64_t l = 0; l < p_.leading.count(); ++l)
      for (int64_t b = 0; b < entries; ++b)
        for (int64_t h = 0; h < heads; ++h)
          for (int64_t i = 0; i < rows; ++i)
            for (int64_t c = 0; c < std::max(width, 1); ++c) {
              const int64_t at = view.leading_offset(p_.leading, l) + view.offset(b, h, i, c);
              visit(view.as<char>() + at * static_cast<int64_t>(element), used[(l * entries + b) * rows + i]);
            }
  }

  std::optional<backend::Aim> aim_;
  bool chunks_ = false;  // bias and mask can be copied 8 keys at a time
  Problem p_{};
  Tangents t_{};
  std::vector<bool> q_used_, k_used_;

 private:
  void choose_sizes() {
    p_.spec.layout = one_of({Layout::kFixed, Layout::kVarlen});
    p_.dtype = one_of({DType::kF16, DType::kBF16, DType::kF32});
    p_.bias_dtype = one_of({DType::kF16, DType::kBF16, DType::kF32});
    p_.leading = random_leading();
    p_.batch = static_cast<int32_t>(integer(chance(0.05) ? 0 : 1, usual_or(p_.varlen() ? 5 : 2, 2)));
    p_.kv_heads = static_cast<int32_t>(integer(1, usual_or(2, 1)));
    p_.heads = p_.kv_heads * static_cast<int32_t>(integer(1, usual_or(3, 2)));
    const auto width = [&] {
      return backend::width(static_cast<int32_t>(chance(0.1) ? integer(1, kMaxHeadDim) : integer(1, 70)));
    };
    p_.head_dim = width();
    p_.value_dim = chance(0.5) ? p_.head_dim : width();
    const int64_t longest = p_.leading.rank == 0 && chance(0.2) ? usual_or(300, 200) : 60;
    p_.q_rows = static_cast<int32_t>(integer(0, longest));
    p_.k_rows = chance(0.3) ? p_.q_rows : static_cast<int32_t>(integer(0, longest));
  }

  void choose_options() {
    AttentionSpec& s = p_.spec;
    s.align = one_of({Align::kBottomRight, Align::kTopLeft});
    s.left = chance(0.6) ? kUnlimited : static_cast<int32_t>(chance(0.1) ? INT_MAX : integer(0, 50));
    s.right = chance(0.4) ? kUnlimited
                          : static_cast<int32_t>(chance(0.1)   ? INT_MAX
                                                 : chance(0.6) ? 0
                                                               : integer(0, 50));
    s.scale = one_of({0.3f, 0.1f, -0.1f, 0.0f});
    s.softcap = chance(0.7) ? 0.0f : 3.0f;
    const auto add = [&](Operand operand, double odds) {
      if (chance(odds)) s.operands |= 1 << static_cast<int32_t>(operand);
    };
    add(Operand::kKvLengths, 0.4);
    add(Operand::kAlibiSlopes, 0.2);
    add(Operand::kSinks, 0.2);
    add(Operand::kPosition, 0.2);
    add(Operand::kDropout, 0.25);
    choose_window(p_);
    if (chance(0.2)) choose_ranges(p_);
    if (chance(0.15)) choose_blocks(p_);
    if (!aim_ && chance(0.1)) s.value_dim = p_.value_dim = p_.head_dim;
    s.dropout_rate = s.has(Operand::kDropout) ? 0.4f : 0.0f;
    s.deterministic = chance(0.5);
    if (p_.varlen()) {
      s.operands |= 3;
    } else {
      add(Operand::kQLengths, 0.4);
      add(Operand::kMask, 0.2);
      add(Operand::kBias, 0.3);
      if (chance(0.2)) s.operands |= 3 << static_cast<int32_t>(Operand::kQSegmentIds);
    }
  }

  // Options that the targeted kernel supports, some of them chosen at random.
  void aim_sizes() {
    p_.dtype = aim_->dtype;
    const bool bias = aim_->bias(),
               staged_mask = aim_->mask() && aim_->variant != backend::Variant::kListedMask;
    // sm_90's kernels take no bias or mask that cannot be copied 8 keys at a time.
    const bool gradient = aim_->pass == Pass::kBackward || aim_->pass == Pass::kBiasGradient;
    chunks_ = bias || staged_mask || (gradient && !aim_->plain() && chance(0.5));
    if (aim_->pass == Pass::kBiasGradient || chunks_ || aim_->variant == backend::Variant::kSegments ||
        aim_->variant == backend::Variant::kListedMask || aim_->variant == backend::Variant::kBlocks ||
        aim_->variant == backend::Variant::kCluster)
      p_.spec.layout = Layout::kFixed;
    p_.batch = std::max(p_.batch, 1);
    if (aim_->pass == Pass::kForward) p_.heads = 6 * p_.kv_heads;  // more tiles than CTAs
    p_.q_rows = std::max(p_.q_rows, 1);
    p_.k_rows = std::max(p_.k_rows, 1);
    if (aim_->most_rows > 0) {
      p_.spec.layout = Layout::kFixed;
      p_.q_rows = std::min(p_.q_rows, aim_->most_rows), p_.k_rows = std::min(p_.k_rows, aim_->most_rows);
    }
    if (chunks_) make_chunks();
    p_.head_dim = width_within(aim_->head_dim);
    p_.value_dim = width_within(aim_->value_dim);
    if (bias && aim_->pass == Pass::kForward) p_.leading.rank = std::min(p_.leading.rank, 1);
  }

  void make_chunks() {
    chunks_ = true;
    p_.bias_dtype = p_.dtype, p_.k_rows = (p_.k_rows + 7) / 8 * 8;
  }

  // Whether the targeted kernel runs the call, whose bias and mask have no memory yet.
  bool is_taken() const {
    Problem call = p_;
    alignas(16) static uint8_t any[16];
    if (chunks_) {
      call.bias.data = call.mask.data = any, call.bias.column = call.mask.column = 1;
      call.bias.row = call.mask.row = call.k_rows;
    }
    call.dbias_batch = call.dbias_heads = 1, call.dbias_rows = call.q_rows, call.dbias_columns = call.k_rows;
    return backend::takes(call);
  }

  // Takes the sizes and options of the targeted kernel's example.
  void take_example() {
    const Problem sure = backend::example();
    AttentionSpec spec = sure.spec;
    spec.scale = 0.3f, spec.dropout_rate = spec.has(Operand::kDropout) ? 0.4f : 0.0f;
    p_ = {};
    p_.spec = spec;
    p_.dtype = p_.kv_dtype = sure.dtype, p_.bias_dtype = sure.bias_dtype;
    p_.batch = sure.batch, p_.heads = sure.heads, p_.kv_heads = sure.kv_heads;
    p_.head_dim = sure.head_dim, p_.value_dim = sure.value_dim;
    p_.q_rows = sure.q_rows, p_.k_rows = sure.k_rows;
    p_.limits = sure.limits, p_.mask_rows = sure.mask_rows, p_.mask_columns = sure.mask_columns;
    chunks_ = true;
    if (!is_taken()) fail("its own example is not taken by " + backend::aimed());
  }

  void aim_options() {
    AttentionSpec& s = p_.spec;
    const auto bit = [](Operand operand) { return 1 << static_cast<int32_t>(operand); };
    s.deterministic = aim_->deterministic();
    if (aim_->plain()) {
      s.softcap = 0;
      s.scale = 0.3f;
      for (Operand general : {Operand::kQSegmentIds, Operand::kKvSegmentIds, Operand::kMask, Operand::kBias,
                              Operand::kAlibiSlopes, Operand::kRanges, Operand::kBlockMask})
        s.operands &= ~bit(general);
    } else {
      s.softcap = 3.0f;
      if (aim_->pass == Pass::kForward)
        // A second option, because a single one has a kernel of its own.
        s.operands |= bit(Operand::kAlibiSlopes);
    }
    if (aim_->plain() || aim_->pass == Pass::kForward) s.operands &= ~bit(Operand::kDropout);
    if (aim_->dropout()) s.operands |= bit(Operand::kDropout);
    add_visibility();
    if (aim_->variant == backend::Variant::kAlibi) s.operands |= bit(Operand::kAlibiSlopes);
    if (aim_->variant == backend::Variant::kSoftcap) s.softcap = 3.0f;
    s.dropout_rate = s.has(Operand::kDropout) ? 0.4f : 0.0f;
    if (aim_->pass == Pass::kBiasGradient) s.operands |= bit(Operand::kBias);
    if (aim_->variant == backend::Variant::kListedMask || aim_->variant == backend::Variant::kBlocks)
      s.operands &= ~kOfBand;
    if (aim_->bias()) {
      s.operands |= bit(Operand::kBias);
    } else if (!is_taken()) {  // some kernels take no bias, visibility operands or several leading dimensions
      for (Operand other : {Operand::kQSegmentIds, Operand::kKvSegmentIds, Operand::kMask, Operand::kRanges,
                            Operand::kBlockMask, Operand::kBias})
        if (other != Operand::kBias || aim_->pass != Pass::kBiasGradient) s.operands &= ~bit(other);
      p_.leading = {};
      add_visibility();
      if (!is_taken()) make_chunks();
    }
    if (!is_taken()) take_example();
  }

  // The operands of a targeted kernel for one form of visibility.
  void add_visibility() {
    if (aim_->variant == backend::Variant::kSegments)
      p_.spec.operands |= bits_of(Operand::kQSegmentIds, Operand::kKvSegmentIds);
    if (aim_->mask()) p_.spec.operands |= bits_of(Operand::kMask);
    if (aim_->variant == backend::Variant::kRanges) choose_ranges(p_);
    if (aim_->variant == backend::Variant::kBlocks) choose_blocks(p_, {64, 128, 192}, {32, 64, 128});
  }

  Guarded& make(View& view, size_t element, std::vector<Dim> dims, bool broadcast) {
    return RandomCase::make(view, p_.leading, element, std::move(dims), broadcast);
  }

  void make_tensor(View& view, int32_t rows, int32_t heads, int32_t width) {
    std::vector<Dim> dims{{rows, &View::row}, {heads, &View::head}, {width, &View::column}};
    if (!p_.varlen()) dims.insert(dims.begin(), {p_.batch, &View::batch});
    const Guarded& m = make(view, size_of(p_.dtype), dims, false);
    fill(m, p_.dtype);
  }

  void make_statistic(View& view) {
    std::vector<Dim> dims{{p_.heads, &View::head}, {p_.q_rows, &View::row}};
    if (!p_.varlen()) dims.insert(dims.begin(), {p_.batch, &View::batch});
    fill(make(view, 4, dims, false), DType::kF32);
  }

  void make_tensors() {
    for (View* x : {&p_.query, &p_.dquery, &t_.tquery}) make_tensor(*x, p_.q_rows, p_.heads, p_.head_dim);
    for (View* x : {&p_.key, &p_.dkey, &t_.tkey}) make_tensor(*x, p_.k_rows, p_.kv_heads, p_.head_dim);
    for (View* x : {&p_.value, &p_.dvalue, &t_.tvalue}) make_tensor(*x, p_.k_rows, p_.kv_heads, p_.value_dim);
    for (View* x : {&p_.out, &p_.dout, &t_.tout}) make_tensor(*x, p_.q_rows, p_.heads, p_.value_dim);
    for (View* x : {&p_.lse, &p_.delta, &t_.tlse}) make_statistic(*x);
  }

  // Sometimes plausible, sometimes arbitrary int32.
  void make_index(View& view, int64_t count, int64_t View::* stride, int32_t limit, bool sorted) {
    std::vector<Dim> dims;
    if (stride == &View::row) dims.push_back({p_.batch, &View::batch});
    dims.push_back({count, stride});
    const Guarded& m = make(view, 4, dims, true);
    int32_t* x = reinterpret_cast<int32_t*>(m.data());
    const bool wild = chance(0.4);
    for (size_t i = 0; i < m.bytes() / 4; ++i) {
      x[i] = wild ? garbage(limit)
                  : static_cast<int32_t>(sorted ? limit * (i % count) / count : integer(0, limit));
    }
    m.make_read_only();
  }

  void make_indices() {
    const AttentionSpec& s = p_.spec;
    if (p_.varlen()) {
      make_index(p_.cu_seqlens_q, p_.batch + 1, &View::batch, p_.q_rows, true);
      make_index(p_.cu_seqlens_k, p_.batch + 1, &View::batch, p_.k_rows, true);
    }
    if (s.has(Operand::kQLengths)) make_index(p_.q_lengths, p_.batch, &View::batch, p_.q_rows, false);
    if (s.has(Operand::kKvLengths)) make_index(p_.kv_lengths, p_.batch, &View::batch, p_.k_rows, false);
    if (s.has(Operand::kQSegmentIds)) {
      make_index(p_.q_segment_ids, p_.q_rows, &View::row, 2, false);
      make_index(p_.kv_segment_ids, p_.k_rows, &View::row, 2, false);
    }
  }

  std::vector<Dim> score_dims() {
    std::vector<Dim> dims = dims_by_head(p_, true, {p_.q_rows, &View::row}, {p_.k_rows, &View::column});
    const bool whole = aim_ && chunks_;
    for (size_t i = 2; i < 4; ++i) broadcast_some(dims[i], whole);
    return dims;
  }

  void make_score_operands() {
    const AttentionSpec& s = p_.spec;
    if (s.has(Operand::kRanges)) make_ranges(p_, p_.leading);
    if (s.has(Operand::kBlockMask)) make_blocks(p_, p_.leading);
    if (s.has(Operand::kMask)) {
      const Guarded& m = make(p_.mask, 1, score_dims(), true);
      for (size_t i = 0; i < m.bytes(); ++i) m.data()[i] = chance(0.7);
    }
    if (s.has(Operand::kBias)) {
      const std::vector<Dim> dims = score_dims();
      const Guarded& m = make(p_.bias, size_of(p_.bias_dtype), dims, true);
      for (size_t i = 0; i < m.bytes(); i += size_of(p_.bias_dtype)) {
        set_value(p_.bias_dtype, m.data() + i, chance(0.1) ? -kInf : normal());
      }
      make(p_.dbias, size_of(p_.bias_dtype), dims, false);
      if (chance(0.7)) fill(make(t_.tbias, size_of(p_.bias_dtype), dims, true), p_.bias_dtype);
      int32_t* own[] = {&p_.dbias_batch, &p_.dbias_heads, &p_.dbias_rows, &p_.dbias_columns};
      for (int i = 0; i < 4; ++i) *own[i] = static_cast<int32_t>(dims[i].size);
    }
    if (s.has(Operand::kAlibiSlopes)) {
      const bool one = chance(0.5) || p_.batch == 1;
      fill(make(p_.alibi_slopes, 4,
                {{one ? 1 : p_.batch, one ? nullptr : &View::batch}, {p_.heads, &View::head}}, true),
           DType::kF32);
    }
    if (s.has(Operand::kSinks)) make_sinks(p_, p_.leading);
    make_window(p_, p_.leading);
    if (s.has(Operand::kPosition)) make_index(p_.position, 2, &View::column, p_.k_rows, false);
    if (s.has(Operand::kDropout)) {
      const Guarded& m = make(p_.dropout, 4, {{6, &View::column}}, true);
      for (size_t i = 0; i < m.bytes() / 4; ++i)
        reinterpret_cast<uint32_t*>(m.data())[i] = static_cast<uint32_t>(random_());
    }
  }

  int64_t index_value(const View& view, int64_t leading, int64_t i) const {
    return static_cast<const int32_t*>(view.data)[view.leading_offset(p_.leading, leading) + i * view.batch];
  }

  // Whether a row is in use, by (leading, batch entry, row); packed rows have entry 0.
  void find_rows_in_use() {
    const int64_t entries = p_.varlen() ? 1 : p_.batch;
    q_used_.assign(p_.leading.count() * entries * p_.q_rows, false);
    k_used_.assign(p_.leading.count() * entries * p_.k_rows, false);
    for (int64_t l = 0; l < p_.leading.count(); ++l) {
      int64_t q_start = p_.varlen() ? clamp(index_value(p_.cu_seqlens_q, l, 0), p_.q_rows) : 0;
      int64_t k_start = p_.varlen() ? clamp(index_value(p_.cu_seqlens_k, l, 0), p_.k_rows) : 0;
      for (int64_t b = 0; b < p_.batch; ++b) {
        const int64_t entry = p_.varlen() ? 0 : b;
        int64_t q_end = p_.q_rows, k_end = p_.k_rows;
        if (p_.varlen()) {
          q_end = std::max(q_start, clamp(index_value(p_.cu_seqlens_q, l, b + 1), p_.q_rows));
          k_end = std::max(k_start, clamp(index_value(p_.cu_seqlens_k, l, b + 1), p_.k_rows));
        }
        int64_t q_used = q_end, k_used = k_end;
        if (p_.q_lengths) q_used = clamp(index_value(p_.q_lengths, l, b), p_.q_rows);
        if (p_.kv_lengths) k_used = k_start + clamp(index_value(p_.kv_lengths, l, b), k_end - k_start);
        for (int64_t i = q_start; i < q_used; ++i) q_used_[(l * entries + entry) * p_.q_rows + i] = true;
        for (int64_t j = k_start; j < k_used; ++j) k_used_[(l * entries + entry) * p_.k_rows + j] = true;
        if (p_.varlen()) q_start = q_end, k_start = k_end;
      }
    }
  }

  void poison_unused_rows() {
    const size_t size = size_of(p_.dtype);
    const auto poison = [&](const View& view, bool queries, int32_t heads, int32_t width, size_t element,
                            DType dtype) {
      each(view, queries, heads, width, element, [&](char* x, bool used) {
        if (!used) set_value(dtype, x, std::nanf(""));
      });
    };
    for (const View& x : {p_.query, t_.tquery}) poison(x, true, p_.heads, p_.head_dim, size, p_.dtype);
    for (const View& x : {p_.key, t_.tkey}) poison(x, false, p_.kv_heads, p_.head_dim, size, p_.dtype);
    for (const View& x : {p_.value, t_.tvalue}) poison(x, false, p_.kv_heads, p_.value_dim, size, p_.dtype);
    poison(p_.dout, true, p_.heads, p_.value_dim, size, p_.dtype);
    poison(p_.delta, true, p_.heads, 0, 4, DType::kF32);
  }
};

}  // namespace jax_flash
