// diffuse_patches on CPUs. avfast/ops/diffuse_patches.py holds the definition and checks what comes here.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "philox.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

using torch::stable::Tensor;

// Philox on 64-bit lanes, each with a word in its low half: the product of two low halves is one instruction, and leaves
// the next words where the next round wants them. GCC finds that form in no loop over 32-bit or 64-bit integers.
#if defined(__AVX2__)
#if defined(__AVX512F__)
constexpr int kLanes = 8;
typedef uint64_t Lanes __attribute__((vector_size(64)));
inline Lanes product(Lanes a, Lanes b) { return (Lanes)_mm512_mul_epu32((__m512i)a, (__m512i)b); }
#else
constexpr int kLanes = 4;
typedef uint64_t Lanes __attribute__((vector_size(32)));
inline Lanes product(Lanes a, Lanes b) { return (Lanes)_mm256_mul_epu32((__m256i)a, (__m256i)b); }
#endif
constexpr int kStep = 2 * kLanes;  // blocks at once: even ones in one vector, odd ones in another

// The four words of blocks first, first + 1, ... of a patch, word by word: words[w * stride + i]. Writes up to the next
// multiple of kStep.
void draw(uint32_t first, uint32_t stream, uint64_t sample, uint64_t seed, int64_t blocks, int64_t stride,
          uint32_t* words) {
  Lanes even = {}, one = even + 1;
  for (int i = 0; i < kLanes; ++i) even[i] = 2 * i;
  const Lanes a = one * 0xD2511F53u, b = one * 0xCD9E8D57u, low = one * 0xFFFFFFFFu;
  for (int64_t i = 0; i < blocks; i += kStep) {
    Lanes c[2][4];
    for (int half = 0; half < 2; ++half) {
      c[half][0] = even + uint64_t(first) + uint64_t(i + half);
      c[half][1] = one * stream;
      c[half][2] = one * sample;
      c[half][3] = one * (sample >> 32);
    }
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u)
#pragma GCC unroll 2
      for (auto& word : c) {
        const Lanes of_0 = product(word[0], a), of_2 = product(word[2], b);
        word[0] = (of_2 >> 32) ^ word[1] ^ uint64_t(k0);
        word[1] = of_2;
        word[2] = (of_0 >> 32) ^ word[3] ^ uint64_t(k1);
        word[3] = of_0;
      }
    for (int w = 0; w < 4; ++w) {
      const Lanes both = (c[0][w] & low) | (c[1][w] << 32);
      memcpy(words + w * stride + i, &both, sizeof both);
    }
  }
}
#else
constexpr int kStep = 1;

void draw(uint32_t first, uint32_t stream, uint64_t sample, uint64_t seed, int64_t blocks, int64_t stride,
          uint32_t* words) {
  for (int64_t i = 0; i < blocks; ++i) {
    uint32_t c0 = first + uint32_t(i), c1 = stream, c2 = uint32_t(sample), c3 = uint32_t(sample >> 32);
    avfast::philox(c0, c1, c2, c3, uint32_t(seed), uint32_t(seed >> 32));
    words[i] = c0;
    words[stride + i] = c1;
    words[2 * stride + i] = c2;
    words[3 * stride + i] = c3;
  }
}
#endif

// A function of its own, because where it is inlined GCC forgets that the four pointers are apart.
__attribute__((noinline)) void box_muller(const uint32_t* __restrict v, const uint32_t* __restrict w, int64_t count,
                                          float* __restrict a, float* __restrict b) {
  for (int64_t i = 0; i < count; ++i) avfast::normal_pair(v[i], w[i], a[i], b[i]);
}

void mix(const float* __restrict x, const float* __restrict z, float* __restrict out, int64_t columns, float signal,
         float level) {
  for (int64_t j = 0; j < columns; ++j) out[j] = signal * x[j] + level * z[j];
}

struct BFloat16 {
  uint16_t bits;
};

// To nearest, ties to even.
__attribute__((noinline)) void round_to(const float* __restrict x, int64_t count, BFloat16* __restrict out) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = avfast::bits_of(x[i]);
    out[i].bits = uint16_t(x[i] != x[i] ? 0x7FC0u : (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
  }
}

struct Input {
  const float* x;
  int64_t samples, channels, stride_sample, stride_channel, stride_t, stride_h;
  int64_t grid_h, grid_w, p, q, r;  // patches along height and width; sizes of a patch along time, height and width
  const int64_t *ids, *t, *sample_ids;
  const float* tables;  // signal at every step, then noise
  int64_t steps, patches;
  uint64_t seed;
  uint32_t stream;
};

template <typename Out>
void run(const Input& in, Out* out) {
  const int64_t values = in.channels * in.p * in.q * in.r, blocks = (values + 3) / 4;
  std::vector<int64_t> lines;  // where each line of a patch begins, from its corner
  for (int64_t c = 0; c < in.channels; ++c)
    for (int64_t dt = 0; dt < in.p; ++dt)
      for (int64_t di = 0; di < in.q; ++di)
        lines.push_back(c * in.stride_channel + dt * in.stride_t + di * in.stride_h);
  const int64_t stride = (blocks + kStep - 1) / kStep * kStep;
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, values));
  torch::stable::parallel_for(0, in.samples * in.patches, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> noise(4 * blocks);
    std::vector<uint32_t> random(4 * stride);
    std::vector<float> mixed(std::is_same_v<Out, float> ? 0 : values);
    float* z = noise.data();
    uint32_t* words = random.data();
    for (int64_t row = begin; row < end; ++row) {
      const int64_t sample = row / in.patches, patch = in.ids[row], step = in.t[sample];
      const int64_t time = patch / (in.grid_h * in.grid_w), i = patch / in.grid_w % in.grid_h, j = patch % in.grid_w;
      const float* corner =
          in.x + sample * in.stride_sample + time * in.p * in.stride_t + i * in.q * in.stride_h + j * in.r;
      for (int64_t offset : lines) __builtin_prefetch(corner + offset);  // arrives while the noise is made
      draw(uint32_t(patch * blocks), in.stream, uint64_t(in.sample_ids[sample]), in.seed, blocks, stride, words);
      for (int pair = 0; pair < 4; pair += 2)
        box_muller(words + pair * stride, words + (pair + 1) * stride, blocks, z + pair * blocks,
                   z + (pair + 1) * blocks);
      float* to = nullptr;
      if constexpr (std::is_same_v<Out, float>)
        to = out + row * values;
      else
        to = mixed.data();
      const float signal = in.tables[step], level = in.tables[in.steps + step];
      const float* from = z;
      for (int64_t offset : lines) {
        if (in.r == 16)  // a constant, so that no loop is left
          mix(corner + offset, from, to, 16, signal, level);
        else
          mix(corner + offset, from, to, in.r, signal, level);
        from += in.r;
        to += in.r;
      }
      if constexpr (!std::is_same_v<Out, float>) round_to(mixed.data(), values, out + row * values);
    }
  });
}

// x is (B, C, T, H, W) float32 with columns side by side; out (B, M, P) float32 or bfloat16; all else contiguous.
void diffuse_patches(const Tensor& x, const Tensor& ids, const Tensor& t, const Tensor& tables, const Tensor& seed,
                     const Tensor& sample_ids, int64_t stream, std::vector<int64_t> patch, Tensor out) {
  const Input in{
      x.const_data_ptr<float>(), x.size(0), x.size(1), x.stride(0), x.stride(1), x.stride(2), x.stride(3),
      x.size(3) / patch[1], x.size(4) / patch[2], patch[0], patch[1], patch[2],
      ids.const_data_ptr<int64_t>(), t.const_data_ptr<int64_t>(), sample_ids.const_data_ptr<int64_t>(),
      tables.const_data_ptr<float>(), tables.size(1), ids.size(1),
      uint64_t(*seed.const_data_ptr<int64_t>()), uint32_t(stream)};
  if (out.scalar_type() == torch::headeronly::ScalarType::BFloat16)
    run(in, static_cast<BFloat16*>(out.mutable_data_ptr()));
  else
    run(in, out.mutable_data_ptr<float>());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(avfast_native, m) {
  m.def(
      "diffuse_patches_cpu(Tensor x, Tensor ids, Tensor t, Tensor tables, Tensor seed, Tensor sample_ids, int stream, "
      "int[] patch, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(avfast_native, CPU, m) { m.impl("diffuse_patches_cpu", TORCH_BOX(&diffuse_patches)); }
