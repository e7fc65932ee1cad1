// The lists that csrc/cuda/blocks.cu makes of block masks and boolean masks, and the tiles of boolean masks,
// on random calls, against the mask pair by pair.
#include <algorithm>
#include <set>
#include <utility>

#include "core/visible/key_tiles.h"
#include "cuda/registry.h"
#include "units.h"

namespace jax_flash::units {
namespace {

constexpr int32_t kTileRows = 2 * kRowBlock;
constexpr int kCalls = 200;

uint32_t state = 1;
int32_t draw(int32_t least, int32_t most) {
  state = state * 1664525u + 1013904223u;
  return least + static_cast<int32_t>((state >> 8) % static_cast<uint32_t>(most - least + 1));
}

// Device memory of one call; freed with it.
class Memory {
 public:
  Memory() = default;
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() {
    for (void* x : all_) check(cudaFree(x));
  }
  template <class T>
  T* copy(const std::vector<T>& from) {
    void* to = nullptr;
    check(cudaMalloc(&to, from.size() * sizeof(T)));
    check(cudaMemcpy(to, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice));
    all_.push_back(to);
    return static_cast<T*>(to);
  }

 private:
  std::vector<void*> all_;
};

template <class T>
std::vector<T> read(const T* from, int64_t count) {
  std::vector<T> to(static_cast<size_t>(count));
  check(cudaMemcpy(to.data(), from, to.size() * sizeof(T), cudaMemcpyDeviceToHost));
  return to;
}

// A random call with block masks or a boolean mask, whose index arrays may be outside of their operands.
struct Drawn {
  Problem p{};
  bool boolean;
  std::vector<int32_t> q_lengths, kv_lengths;
  std::vector<uint8_t> mask;
  int32_t before = 0;  // bytes before the first element of a boolean mask
  int32_t group = draw(1, 4);
  bool mask_of_heads = draw(0, 1) == 1;

  Drawn(Memory& memory, bool is_boolean) : boolean(is_boolean), q_lengths(2), kv_lengths(2) {
    p.batch = draw(1, 2), p.kv_heads = draw(1, 2), p.heads = p.kv_heads * group;
    p.q_rows = draw(1, 700), p.k_rows = draw(0, 1) ? draw(1, 900) : 8 * draw(1, 112);
    if (!is_boolean && draw(0, 30) == 0)
      p.q_rows = draw(4000, 40'000), p.k_rows = draw(1, 100);  // long lists
    p.spec.block_rows = 16 * draw(1, 16), p.spec.block_keys = 32 * draw(1, 8);
    p.spec.left = draw(0, 3) ? -1 : draw(0, 300), p.spec.right = draw(0, 1) ? -1 : draw(0, 50);
    p.spec.align = draw(0, 1) ? Align::kBottomRight : Align::kTopLeft;
    for (int i = 0; i < 2; ++i) q_lengths[i] = draw(-1, p.q_rows + 1), kv_lengths[i] = draw(-1, p.k_rows + 1);
    boolean ? draw_elements(memory) : draw_blocks(memory);
    if (draw(0, 1)) {
      p.q_lengths.data = memory.copy(q_lengths), p.q_lengths.batch = 1;
      give(Operand::kQLengths);
    }
    if (draw(0, 1)) {
      p.kv_lengths.data = memory.copy(kv_lengths), p.kv_lengths.batch = 1;
      give(Operand::kKvLengths);
    }
  }
  bool unlimited() const { return p.spec.left < 0 && p.spec.right < 0 && !p.q_lengths && !p.kv_lengths; }
  int32_t rows_of(int32_t b) const { return length(Operand::kQLengths, q_lengths[b], p.q_rows); }
  int32_t keys_of(int32_t b) const { return length(Operand::kKvLengths, kv_lengths[b], p.k_rows); }
  // Whether row i of head h sees key j, by window, lengths and blocks.
  bool sees(int32_t b, int32_t h, int32_t i, int32_t j) const {
    const int32_t rows = rows_of(b), keys = keys_of(b);
    if (i >= rows || j >= keys) return false;
    const int32_t ahead = j - i - (p.spec.align == Align::kBottomRight ? keys - rows : 0);
    if ((p.spec.right >= 0 && ahead > p.spec.right) || (p.spec.left >= 0 && -ahead > p.spec.left))
      return false;
    if (boolean) return mask[before + p.mask.offset(b, h, i, j)];
    return mask[p.block_mask.offset(b, h, i / p.spec.block_rows, j / p.spec.block_keys)];
  }
  // Whether `seen` says rightly which of the keys the rows in use see. At the edges of lengths and windows
  // kSome is always right.
  bool is(SeenPiece seen, int32_t b, int32_t h, Interval rows, Interval keys) const {
    bool any = false, all = true;
    for (int32_t i = rows.lo; i < std::min(rows.hi, rows_of(b)); ++i)
      for (int32_t j = keys.lo; j < keys.hi; ++j) {
        const bool x = sees(b, h, i, j);
        any |= x, all &= x;
      }
    if (seen == SeenPiece::kSome) return !unlimited() || keys.hi > p.k_rows || (any && !all);
    return seen == SeenPiece::kAll ? any && all : !any;
  }

 private:
  void draw_blocks(Memory& memory) {
    p.mask_rows = ceil_div(p.q_rows, p.spec.block_rows);
    p.mask_columns = ceil_div(p.k_rows, p.spec.block_keys);
    const int32_t blocks = p.mask_rows * p.mask_columns, heads = mask_of_heads ? p.heads : 1;
    mask.resize(static_cast<size_t>(p.batch) * heads * blocks);
    const int32_t chosen = draw(0, 10);
    for (uint8_t& x : mask) x = draw(0, 9) < chosen;
    View& view = p.block_mask;
    view.data = memory.copy(mask), view.column = 1, view.row = p.mask_columns;
    view.head = mask_of_heads ? blocks : 0, view.batch = static_cast<int64_t>(heads) * blocks;
    give(Operand::kBlockMask);
  }
  // Tiles of 32 rows and keys show all, none or some; rows may lie apart, and each dimension be broadcast.
  void draw_elements(Memory& memory) {
    p.spec.block_rows = p.spec.block_keys = 0;
    const bool of_batch = draw(0, 1), of_rows = draw(0, 4), of_keys = draw(0, 6);
    View& view = p.mask;
    const int32_t rows = of_rows ? p.q_rows : 1, keys = of_keys ? p.k_rows : 1;
    const int64_t apart = draw(0, 1) ? keys : (keys + 7) / 8 * 8 + 8 * draw(0, 2);
    const int64_t size = rows * apart;
    view.column = of_keys, view.row = of_rows ? apart : 0, view.head = mask_of_heads ? size : 0;
    view.batch = of_batch ? size * (mask_of_heads ? p.heads : 1) : 0;
    before = draw(0, 2) ? 0 : draw(1, 7);
    mask.resize(before + size * (mask_of_heads ? p.heads : 1) * (of_batch ? p.batch : 1));
    const int32_t all = draw(0, 9), none = draw(all, 10);
    std::vector<int32_t> kinds(1 << 12);
    for (int32_t& kind : kinds) kind = draw(0, 9);
    for (size_t i = 0; i < mask.size(); ++i) {
      const size_t tile = i / size * 1024 + i % size / apart / 32 * 32 + i % apart / 32;
      const int32_t kind = kinds[tile % kinds.size()];
      mask[i] = kind < all ? 1 : kind < none ? 0 : draw(0, 1) * draw(1, 255);
    }
    const auto last = static_cast<int32_t>(mask.size()) - 1;
    for (int32_t single = draw(0, last / 2048); single > 0; --single) {
      uint8_t& x = mask[draw(0, last)];
      x = !x;
    }
    view.data = memory.copy(mask) + before;
    give(Operand::kMask);
  }
  void give(Operand operand) { p.spec.operands |= 1 << static_cast<int>(operand); }
  int32_t length(Operand operand, int32_t given, int32_t rows) const {
    return p.spec.has(operand) ? std::clamp(given, 0, rows) : rows;
  }
};

// The workspace of a call's lists, full of what earlier calls left, and where in it a boolean mask's tiles
// and their elements lie.
constexpr int64_t kWords = 1 << 21, kCounter = 3 << 20, kMaskTiles = 4 << 20, kMaskWords = 5 << 20;
void* poisoned(Memory& memory) { return memory.copy(std::vector<uint32_t>(kWords, 0x77777777u)); }

// The number of query tiles of the forward whose lists are wrong.
int wrong_key_lists(bool boolean) {
  Memory memory;
  const Drawn x(memory, boolean);
  const Problem& p = x.p;
  LaunchPlan plan{};
  TileGrid& grid = plan.queries;
  grid.consumers = !boolean && p.spec.block_keys % kRowBlock == 0 ? draw(2, 3) : 2;
  const bool pairs = grid.consumers == 2 ? x.group % 2 == 0 : draw(0, 1) == 1;
  plan.tile_counter = kCounter;
  if (boolean) grid.mask_tiles = kMaskTiles;
  grid.block = pairs && p.spec.block_rows % kTileRows ? kRowBlock : kTileRows,
  grid.other_block = draw(0, 1) ? 128 : 64;
  grid.tiles = ceil_div(p.q_rows, grid.block), grid.lists = 0;
  void* const workspace = poisoned(memory);
  check(launch_blocks(p, plan, workspace, nullptr));
  check(cudaDeviceSynchronize());
  const KeyLists to = key_lists(p, grid, workspace);
  const int32_t pieces = grid.other_block / to.keys;
  const int64_t count = static_cast<int64_t>(p.batch) * to.listed * to.query_tiles;
  const std::vector<KeyList> lists = read(to.lists, count);
  const std::vector<KeyPieces> tiles = read(to.tiles, count * to.most);
  int wrong = *read(tile_counter(plan, workspace), 1).data() != 0;
  for (int32_t number = 0; number < p.batch * to.slots * to.query_tiles; ++number) {
    const int32_t tile = number % to.query_tiles, b = number / to.query_tiles / to.slots,
                  slot = number / to.query_tiles % to.slots;
    const int64_t at =
        (int64_t{b} * to.listed + std::min(slot, to.listed - 1)) * to.query_tiles + tile;  // take_list()
    // The head of a consumer and its first row; the consumer has none past the last head of its KV head.
    const auto place = [&](int32_t i) {
      const int32_t part = slot % to.of_group * to.consumers + i, parts = grid.block / kRowBlock;
      const int32_t head = slot / to.of_group * x.group + part / parts;
      return part / parts < x.group ? std::pair{head, tile * to.rows + part % parts * kRowBlock}
                                    : std::pair{0, p.q_rows};
    };
    const KeyList own = lists[at];
    bool right = own.tiles <= to.most;
    std::set<int32_t> listed[3];
    for (int32_t n = 0, before = -1; right && n < own.tiles * kMostPieces; ++n) {
      const int32_t piece = tiles[at * to.most + n / kMostPieces].piece[n % kMostPieces];
      const int32_t key = to.consumers == 2 ? KeyPieces::key(piece) : KeyPieces::key<3>(piece);
      const int32_t at_key = n % kMostPieces * to.keys;
      const bool last = n / kMostPieces + 1 == own.tiles;
      if (n % kMostPieces >= pieces || key == kNoKeys) {
        right &= key == kNoKeys ? last : piece == 0;
        continue;
      }
      right &= key > before && key % to.keys == 0 && (last || key + to.keys <= std::max(x.keys_of(b), key));
      before = key;
      for (int i = 0; i < to.consumers; ++i) {
        const auto [head, row] = place(i);
        const SeenPiece seen = KeyPieces::seen(piece, i);
        right &= x.is(seen, b, head, {row, row + kRowBlock}, {key, key + to.keys});
        if (seen != SeenPiece::kNone) listed[i].insert(key);
      }
      for (int32_t j = key; last && p.k_rows > x.keys_of(b) && j < key + to.keys; ++j)
        right &= (j < x.keys_of(b)) == (at_key + j - key < own.last_values);
    }
    for (int i = 0; i < to.consumers; ++i) {
      const auto [head, first] = place(i);
      for (int32_t row = first; row < first + kRowBlock; ++row)
        for (int32_t j = 0; j < p.k_rows; ++j)
          right &= listed[i].count(j / to.keys * to.keys) || !x.sees(b, head, row, j);
    }
    wrong += !right;
  }
  return wrong;
}

// Whether each `together` heads have all their key tiles in `order`: as they are if lists have at least half
// of their spans, else with lists that become shorter, up to one part in 255 of the longest possible one.
bool is_ordered(const std::vector<int32_t>& order, const std::vector<int32_t>& counts,
                const std::vector<int32_t>& spans, int32_t most, int32_t tiles, int32_t heads,
                int32_t together) {
  bool right = true;
  for (int32_t first = 0; first < heads; first += together) {
    const int32_t own = std::min(together, heads - first);
    std::set<int32_t> all;
    int64_t steps_of_all = 0, spans_of_all = 0;
    for (int32_t i = first * tiles; i < (first + own) * tiles; ++i)
      steps_of_all += counts[i], spans_of_all += spans[i];
    const bool stays = 2 * steps_of_all >= spans_of_all;
    for (int32_t n = 0, before = INT32_MAX; n < own * tiles; ++n) {
      const int32_t i = order[first * tiles + n] - first * tiles;  // the order of find_work()
      if (i < 0 || i >= own * tiles || !all.insert(i).second) return false;
      const int32_t steps = counts[(first + i % own) * tiles + i / own];
      right &= stays ? i == n : steps - most / 255 - 1 <= before;
      before = std::min(before, steps);
    }
  }
  return right;
}

// The number of key tiles of the backward whose lists are wrong.
int wrong_step_lists(bool boolean) {
  Memory memory;
  const Drawn x(memory, boolean);
  const Problem& p = x.p;
  LaunchPlan plan{};
  TileGrid& grid = plan.keys;
  const int32_t parts = draw(1, 2);
  grid.block = parts * kRowBlock, grid.other_block = draw(0, 1) ? 64 : 128;
  if (boolean) grid.mask_tiles = kMaskTiles;
  grid.tiles = ceil_div(p.k_rows, grid.block), grid.lists = 0;
  void* const workspace = poisoned(memory);
  check(launch_blocks(p, plan, workspace, nullptr));
  check(cudaDeviceSynchronize());
  const StepLists to = step_lists(p, grid, workspace);
  const int64_t count = static_cast<int64_t>(p.batch) * p.kv_heads * grid.tiles;
  const int32_t heads = p.batch * p.kv_heads, together = draw(1, heads);
  check(launch_step_order(to, static_cast<int32_t>(grid.tiles), heads, together, nullptr));
  check(cudaDeviceSynchronize());
  const std::vector<int32_t> counts = read(to.counts, count), steps = read(to.steps, count * to.most),
                             spans = read(to.spans, count);
  int wrong = !is_ordered(read(to.order, count), counts, spans, to.most, static_cast<int32_t>(grid.tiles),
                          heads, together);
  for (int64_t at = 0; at < count; ++at) {
    const int32_t key = static_cast<int32_t>(at % grid.tiles) * grid.block;
    const auto b = static_cast<int32_t>(at / grid.tiles / p.kv_heads);
    const int32_t head = static_cast<int32_t>(at / grid.tiles % p.kv_heads) * x.group;
    bool right = counts[at] >= 0 && counts[at] <= to.most;
    std::set<std::pair<int32_t, int32_t>> listed;
    Interval seeing{INT32_MAX, 0};
    for (int32_t n = 0; right && n < counts[at]; ++n) {
      const int32_t step = steps[at * to.most + n], h = ListedStep::head(step);
      const int32_t row = ListedStep::tile(step) * grid.other_block;
      right &= h < x.group && row < p.q_rows && listed.insert({h, row}).second;
      seeing = {std::min(seeing.lo, ListedStep::tile(step)), std::max(seeing.hi, ListedStep::tile(step) + 1)};
      for (int i = 0; right && i < parts; ++i) {
        const int32_t first = key + i * kRowBlock;
        right &= x.is(KeyPieces::seen(step, i), b, head + h, {row, row + grid.other_block},
                      {first, first + kRowBlock});
      }
      right &= KeyPieces::seen(step, 0) != SeenPiece::kNone || KeyPieces::seen(step, 1) != SeenPiece::kNone;
      right &= parts == 2 || KeyPieces::seen(step, 1) == SeenPiece::kNone;
    }
    right &= spans[at] == x.group * seeing.size();
    for (int32_t h = 0; h < x.group; ++h)
      for (int32_t i = 0; i < p.q_rows; ++i)
        for (int32_t j = key; j < std::min(key + grid.block, p.k_rows); ++j)
          right &= listed.count({h, i / grid.other_block * grid.other_block}) || !x.sees(b, head + h, i, j);
    wrong += !right;
  }
  return wrong;
}

// The number of elements that differ from the mask, by the words of the tiles in which some are visible.
int wrong_elements(const Drawn& x, const TileGrid& grid, void* workspace) {
  const Problem& p = x.p;
  MaskWords words = mask_words(p, grid, workspace);
  if (!words.words) return 0;
  const std::vector<uint32_t> bits = read(words.words, (kWords * 4 - kMaskWords) / 4);
  words.words = const_cast<uint32_t*>(bits.data());
  int wrong = 0;
  for (int32_t b = 0; b < p.batch; ++b)
    for (int32_t h = 0; h < p.heads; ++h)
      for (int32_t i = 0; i < p.q_rows; i += kRowBlock)
        for (int32_t j = 0; j < p.k_rows; j += kRowBlock) {
          const uint32_t* tile = words.tile(0, b, h, i / kRowBlock, j / kRowBlock);
          bool any = false;
          int differ = 0;
          for (int32_t at = 0; at < kRowBlock * kRowBlock; ++at) {
            const int32_t row = at / kRowBlock, key = at % kRowBlock;
            if (i + row >= p.q_rows || j + key >= p.k_rows) continue;
            const bool sees = x.mask[x.before + p.mask.offset(b, h, i + row, j + key)];
            const int32_t thread = row / 16 * 32 + row % 8 * 4 + key % 8 / 2;
            any |= sees;
            differ += sees != (tile[thread] >> (row % 16 / 8 * 16 + key / 8 * 2 + key % 2) & 1);
          }
          wrong += any ? differ : 0;
        }
  return wrong;
}

// The number of sets of rows and keys, and of elements, of which the tiles of a call say something wrong.
int wrong_mask_tiles() {
  Memory memory;
  const Drawn x(memory, true);
  const Problem& p = x.p;
  LaunchPlan plan{};
  (draw(0, 1) ? plan.keys : plan.queries).mask_tiles = kMaskTiles;
  if (plan.queries.mask_tiles >= 0 && draw(0, 3)) plan.queries.mask_words = kMaskWords;
  void* const workspace = poisoned(memory);
  check(launch_blocks(p, plan, workspace, nullptr));
  check(cudaDeviceSynchronize());
  TileGrid grid{};
  grid.mask_tiles = kMaskTiles;
  MaskTiles tiles = mask_tiles(p, grid, workspace);
  std::vector<uint8_t> seen = read(tiles.seen, tiles.heads * tiles.rows * tiles.columns);
  tiles.seen = seen.data();
  int wrong = wrong_elements(x, plan.queries, workspace);
  for (int i = 0; i < 20; ++i) {
    const int32_t b = draw(0, p.batch - 1), first = draw(0, p.heads - 1), h = draw(0, p.heads - 1 - first);
    const int32_t row = draw(0, p.q_rows - 1) / 16 * 16, key = draw(0, p.k_rows - 1) / 16 * 16;
    const Interval rows{row, std::min(row + 16 * draw(1, 8), p.q_rows)},
        keys{key, std::min(key + 16 * draw(1, 8), p.k_rows)};
    bool any = false, all = true;  // of the tiles that rows and keys lie in
    for (int32_t r = rows.lo / kRowBlock * kRowBlock;
         r < p.q_rows && r < ceil_div(rows.hi, kRowBlock) * kRowBlock; ++r)
      for (int32_t j = keys.lo / kRowBlock * kRowBlock;
           j < p.k_rows && j < ceil_div(keys.hi, kRowBlock) * kRowBlock; ++j) {
        const bool sees = x.mask[x.before + p.mask.offset(b, first + h, r, j)];
        any |= sees, all &= sees;
      }
    wrong += tiles.at(0, b, first).seen_of(h, rows, keys) != seen_piece_of(any, all);
  }
  return wrong;
}

}  // namespace

void test_blocks() {
  std::vector<float> of_tiles;
  for (int i = 0; i < kCalls; ++i) of_tiles.push_back(static_cast<float>(wrong_mask_tiles()));
  expect("tiles of boolean masks", of_tiles, [](int) { return 0; });
  for (const bool boolean : {false, true}) {
    std::vector<float> of_queries, of_keys;
    for (int i = 0; i < kCalls; ++i) {
      of_queries.push_back(static_cast<float>(wrong_key_lists(boolean)));
      of_keys.push_back(static_cast<float>(wrong_step_lists(boolean)));
    }
    const std::string of = boolean ? " of boolean masks" : " of block masks";
    expect("lists of key tiles" + of, of_queries, [](int) { return 0; });
    expect("lists of the backward's steps" + of, of_keys, [](int) { return 0; });
  }
}

}  // namespace jax_flash::units
