// The bits that csrc/cuda/score/mask_bits.cuh makes of a boolean mask and the band, on random masks.
#include "cuda/score/mask_bits.cuh"

#include "units.h"

namespace jax_flash::units {
namespace {

constexpr int kMasks = 300, kLanes = 32;

uint32_t state = 1;
int32_t draw(int32_t least, int32_t most) {
  state = state * 1664525u + 1013904223u;
  return least + static_cast<int32_t>((state >> 8) % static_cast<uint32_t>(most - least + 1));
}

// Lane l reads rows `row` + l and `row` + l + 32.
__global__ void read_bits(MaskRows mask, Band band, int32_t row, int32_t key, uint32_t* out) {
  const int32_t own = row + static_cast<int32_t>(threadIdx.x);
  out[threadIdx.x] = mask.bits_of_two(own, own + kLanes, band, key);
}

// The number of lanes whose bits are wrong.
float wrong_lanes() {
  const int32_t rows = draw(1, 100), keys = draw(0, 1) ? draw(1, 60) : 8 * draw(1, 8),
                before = draw(0, 1) * draw(0, 8);
  const bool of_rows = draw(0, 3), of_keys = draw(0, 5);
  const int64_t apart = draw(0, 1) ? keys : (keys + 7) / 8 * 8;
  std::vector<uint8_t> elements(before + (of_rows ? rows : 1) * apart);
  for (uint8_t& x : elements) x = draw(0, 2) ? draw(0, 255) : 0;
  const Band band{draw(0, rows), draw(0, keys), draw(-60, 60), draw(0, 1) ? int64_t{1} << 40 : draw(0, 40),
                  draw(0, 1) ? int64_t{1} << 40 : draw(0, 40)};
  uint8_t* memory = nullptr;
  uint32_t *out = nullptr, got[kLanes];
  check(cudaMalloc(reinterpret_cast<void**>(&memory), elements.size()));
  check(cudaMalloc(reinterpret_cast<void**>(&out), sizeof(got)));
  check(cudaMemcpy(memory, elements.data(), elements.size(), cudaMemcpyHostToDevice));
  const MaskRows mask{memory + before, of_rows ? apart : 0, of_keys, keys};
  const int32_t row = 16 * draw(0, 5), key = 16 * draw(0, 3);
  check(launch(read_bits, 1, kLanes, 0, nullptr, mask, band, row, key, out));
  check(cudaMemcpy(got, out, sizeof(got), cudaMemcpyDeviceToHost));
  check(cudaFree(memory));
  check(cudaFree(out));
  int wrong = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    uint32_t right = 0;
    for (int bit = 0; bit < 32; ++bit) {
      const int32_t i = row + lane + bit / 16 * kLanes, j = key + bit % 16;
      if (band.row(i).contains(j) && elements[before + (of_rows ? i * apart : 0) + (of_keys ? j : 0)])
        right |= 1u << bit;
    }
    wrong += got[lane] != right;
  }
  return static_cast<float>(wrong);
}

}  // namespace

void test_masks() {
  std::vector<float> wrong;
  for (int i = 0; i < kMasks; ++i) wrong.push_back(wrong_lanes());
  expect("bits of boolean masks", wrong, [](int) { return 0; });
}

}  // namespace jax_flash::units
