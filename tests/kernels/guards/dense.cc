// Random calls of the passes with every operand guarded: no access out of bounds, no undefined behaviour,
// every result written, no NaN from rows that are not in use, the same bits for any number of threads and at
// every run.
//
//   dense [count] [seed]
#include "dense_case.h"

using namespace jax_flash;

namespace {

class Case : DenseCase {
 public:
  explicit Case(uint64_t seed) : DenseCase(seed) {
    if (p_.spec.shared_kv()) p_.value = p_.key, t_.tvalue = t_.tkey, p_.dvalue = {};
  }

  void run() {
    const bool computes = backend::computes();
    std::vector<View*> results{&p_.out, &p_.lse};
    if (p_.row_max) results.push_back(&p_.row_max);
    if (!check_pass("forward", Pass::kForward, results)) return;
    if (computes) check_forward(), take_forward_results();
    if (check_pass("tangent", Pass::kTangent, {&t_.tout, &t_.tlse}, &t_) && computes) check_tangents();
    std::vector<View*> gradients{&p_.dquery, &p_.dkey};
    if (p_.dvalue) gradients.push_back(&p_.dvalue);
    if (check_pass("backward", Pass::kBackward, gradients) && computes) check_gradients();
    if (p_.bias) check_pass("bias_gradient", Pass::kBiasGradient, {&p_.dbias});
  }

  std::string text() const {
    const AttentionSpec& s = p_.spec;
    char line[400];
    std::snprintf(
        line, sizeof line,
        "%s dtype=%d leading=%d batch=%d heads=%d/%d d=%d dv=%d rows=%d/%d left=%d right=%d align=%d "
        "scale=%g softcap=%g dropout=%g operands=%#x shared=%d",
        p_.varlen() ? "varlen" : "fixed", static_cast<int>(p_.dtype), p_.leading.rank, p_.batch, p_.heads,
        p_.kv_heads, p_.head_dim, p_.value_dim, p_.q_rows, p_.k_rows, s.left, s.right,
        static_cast<int>(s.align), s.scale, s.softcap, s.dropout_rate, s.operands, s.shared_kv());
    return line;
  }

 private:
  // Whether row_max holds integers in the order of floats, which JAX converts, as on CUDA. The integer of −0
  // has the bits of a NaN.
  const bool ordered_max_ = backend::name().starts_with("sm_");

  // Runs the pass twice, alone and with helpers, on results filled with NaN; false where no kernel runs it.
  bool check_pass(const char* name, Pass pass, std::vector<View*> results,
                  const Tangents* tangents = nullptr) {
    for (View* view : results) memory_of(view).poison();
    if (!backend::run(pass, p_, ThreadPool{}, tangents)) return false;
    if (!backend::computes()) return true;
    std::vector<std::string> first;
    for (View* view : results) {
      const Guarded& m = memory_of(view);
      first.emplace_back(m.data(), m.bytes());
      const bool by_row = view == &p_.lse || view == &p_.row_max || view == &t_.tlse;
      const DType dtype = by_row ? DType::kF32 : view == &p_.dbias ? p_.bias_dtype : p_.dtype;
      for (size_t i = 0; i < m.bytes() && !(view == &p_.row_max && ordered_max_); i += size_of(dtype)) {
        if (std::isnan(value_of(dtype, m.data() + i))) {
          fail(std::string(name) + " left NaN at byte " + std::to_string(i) + " of the " +
               std::to_string(m.bytes()) + " of " + m.name);
        }
      }
      if (!backend::sparing()) m.poison();
    }
    if (backend::sparing()) return true;
    with_threads([&](const ThreadPool& pool) { backend::run(pass, p_, pool, tangents); });
    for (size_t i = 0; i < results.size() && backend::repeatable(p_.spec, pass); ++i) {
      const Guarded& m = memory_of(results[i]);
      if (std::memcmp(first[i].data(), m.data(), m.bytes()) != 0)
        fail(std::string(m.name) + " of the " + name + " depends on the threads or on the run");
    }
    return true;
  }

  void check_forward() {
    each(p_.out, true, p_.heads, p_.value_dim, size_of(p_.dtype), [&](char* x, bool used) {
      const float value = value_of(p_.dtype, x);
      if (!std::isfinite(value) || (!used && value != 0)) fail("out is " + std::to_string(value));
    });
    each(p_.lse, true, p_.heads, 0, 4, [&](char* x, bool used) {
      const float value = value_of(DType::kF32, x);
      if (value == kInf || (!used && value != -kInf)) fail("lse is " + std::to_string(value));
    });
    if (!p_.row_max || ordered_max_) return;
    each(p_.row_max, true, p_.heads, 0, 4, [&](char* x, bool used) {
      const float value = value_of(DType::kF32, x);
      if (value == kInf || (!used && value != -kInf)) fail("row_max is " + std::to_string(value));
    });
  }

  // lse and out become operands of the other passes: NaN where they must not be read.
  void take_forward_results() {
    each(p_.out, true, p_.heads, p_.value_dim, size_of(p_.dtype), [&](char* x, bool used) {
      if (!used) set_value(p_.dtype, x, std::nanf(""));
    });
    each(p_.lse, true, p_.heads, 0, 4, [&](char* x, bool used) {
      if (!used) set_value(DType::kF32, x, std::nanf(""));
    });
  }

  // Every element is finite, and 0 where its row is not in use.
  void check_derivative(const char* name, const View& view, bool queries, int32_t heads, int32_t width,
                        DType dtype) {
    each(view, queries, heads, width, size_of(dtype), [&](char* x, bool used) {
      const float value = value_of(dtype, x);
      if (!std::isfinite(value) || (!used && value != 0))
        fail(std::string(name) + " is " + std::to_string(value));
    });
  }

  void check_gradients() {
    check_derivative("dquery", p_.dquery, true, p_.heads, p_.head_dim, p_.dtype);
    check_derivative("dkey", p_.dkey, false, p_.kv_heads, p_.head_dim, p_.dtype);
    if (p_.dvalue) check_derivative("dvalue", p_.dvalue, false, p_.kv_heads, p_.value_dim, p_.dtype);
  }

  void check_tangents() {
    check_derivative("tout", t_.tout, true, p_.heads, p_.value_dim, p_.dtype);
    check_derivative("tlse", t_.tlse, true, p_.heads, 0, DType::kF32);
  }
};

}  // namespace

int main(int argc, char** argv) { return drive<Case>(argc, argv, 1500); }
