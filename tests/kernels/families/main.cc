// Reads calls from standard input, one per line as name=value pairs. For each it prints one line: the plan in
// words and the bound of its workspace, or the error.
#include <iostream>
#include <map>
#include <sstream>
#include <string>

#include "core/plan/plan.h"
#include "core/plan/text.h"
#include "core/plan/workspace.h"
#include "core/table.h"

using namespace jax_flash;

int main() {
  for (std::string line; std::getline(std::cin, line);) {
    std::map<std::string, int64_t> given;
    std::istringstream words(line);
    for (std::string word; words >> word;) {
      const size_t at = word.find('=');
      given[word.substr(0, at)] = std::stoll(word.substr(at + 1));
    }
    const auto get = [&](const char* name, int64_t otherwise) {
      return given.contains(name) ? given[name] : otherwise;
    };
    AttentionSpec spec{};
    spec.layout = static_cast<Layout>(get("layout", 0));
    spec.left = kUnlimited, spec.right = static_cast<int32_t>(get("right", kUnlimited));
    spec.scale = 1;
    spec.softcap = static_cast<float>(get("softcap", 0));
    spec.num_splits = static_cast<int32_t>(get("num_splits", 0));
    spec.operands = static_cast<int32_t>(get("operands", 0));
    spec.deterministic = get("deterministic", 0);
    Shapes s{};
    s.dtype = s.kv_dtype = static_cast<DType>(get("dtype", 1));
    s.leading = get("leading", 1), s.leading_rank = static_cast<int32_t>(get("leading_rank", 0));
    s.batch = get("batch", 2), s.heads = get("heads", 8), s.kv_heads = get("kv_heads", 8);
    s.head_dim = get("d", 128), s.value_dim = get("dv", s.head_dim);
    s.q_rows = get("q_rows", 1000), s.k_rows = get("k_rows", 1000), s.page_size = get("page_size", 0);
    const Device device{static_cast<int32_t>(get("capability", 90)), 132,
                        static_cast<int32_t>(get("shared_memory", 232'448))};
    const Pass pass = static_cast<Pass>(get("pass", 0));
    const PlannedCall chosen = plan({pass, spec, s, device}, kernel_table());
    const int64_t bound = workspace_bound(pass, spec, dims_of(s)).value();
    std::cout << (chosen.kernel < 0 ? chosen.error : text_of(chosen, kernel_table()[chosen.kernel]))
              << ", bound " << bound << "\n";
  }
}
