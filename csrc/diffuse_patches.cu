// diffuse_patches on CUDA devices, for where Triton does not run. avfast/ops/diffuse_patches.py holds the definition.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <string>
#include <vector>

#include "philox.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;

__device__ float wide(float x) { return x; }
__device__ float wide(__half x) { return __half2float(x); }
__device__ float wide(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ void store(float x, float& to) { to = x; }
__device__ void store(float x, __half& to) { to = __float2half_rn(x); }
__device__ void store(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }

struct Shape {
  int64_t stride_b, stride_c, stride_t, stride_h, stride_w;
  int time, height, width;  // patches along each
  int p, q, r;              // sizes of a patch along time, height and width
  int values, blocks;       // of a patch
  int64_t rows;             // patches in all
  int patches, steps;       // of a sample; columns of the tables
  uint32_t stream;
};

// A thread per block of noise, that is per four values; threads beside one another read and write neighbours in each of
// the four words. NaN where a patch or its step does not exist.
template <typename In, typename Out>
__global__ void __launch_bounds__(kThreads)
    diffuse(const In* x, const int64_t* ids, const int64_t* t, const float* tables, const int64_t* seed,
            const int64_t* sample_ids, Out* out, Shape s) {
  const int64_t first = int64_t(blockIdx.x) * kThreads;
  const int item = int(first % s.blocks) + int(threadIdx.x);  // in 32 bits, whose divisions are cheap
  const int64_t row = first / s.blocks + item / s.blocks;
  if (row >= s.rows) return;
  const int block = item % s.blocks, sample = int(row) / s.patches;
  const int64_t id = ids[row], step = t[sample];
  const bool right = id >= 0 && id < int64_t(s.time) * s.height * s.width && step >= 0 && step < s.steps;
  const int patch = right ? int(id) : 0;
  const float signal = right ? tables[step] : 0.0f, level = right ? tables[s.steps + step] : 0.0f;
  const uint64_t key = uint64_t(*seed), name = uint64_t(sample_ids[sample]);
  uint32_t c0 = uint32_t(patch) * uint32_t(s.blocks) + uint32_t(block), c1 = s.stream, c2 = uint32_t(name),
           c3 = uint32_t(name >> 32);
  avfast::philox(c0, c1, c2, c3, uint32_t(key), uint32_t(key >> 32));
  float z[4];
  avfast::normal_pair(c0, c1, z[0], z[1]);
  avfast::normal_pair(c2, c3, z[2], z[3]);
  const int time = patch / (s.height * s.width), i = patch / s.width % s.height, j = patch % s.width;
  const In* corner = x + sample * s.stride_b + int64_t(time) * s.p * s.stride_t + int64_t(i) * s.q * s.stride_h +
                     int64_t(j) * s.r * s.stride_w;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const int value = w * s.blocks + block;
    if (value >= s.values) return;
    int rest = value;
    const int column = rest % s.r;
    rest /= s.r;
    const int line = rest % s.q;
    rest /= s.q;
    const int frame = rest % s.p, channel = rest / s.p;
    const In* from = corner + channel * s.stride_c + frame * s.stride_t + line * s.stride_h + column * s.stride_w;
    store(right ? signal * wide(*from) + level * z[w] : nanf(""), out[row * s.values + value]);
  }
}

template <typename In, typename Out>
void launch(const Tensor& x, const Tensor& ids, const Tensor& t, const Tensor& tables, const Tensor& seed,
            const Tensor& sample_ids, const Tensor& out, const Shape& s) {
  const int64_t programs = (s.rows * s.blocks + kThreads - 1) / kThreads;
  if (programs == 0) return;
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  diffuse<In, Out><<<unsigned(programs), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const In*>(x.const_data_ptr()), ids.const_data_ptr<int64_t>(), t.const_data_ptr<int64_t>(),
      tables.const_data_ptr<float>(), seed.const_data_ptr<int64_t>(), sample_ids.const_data_ptr<int64_t>(),
      static_cast<Out*>(out.mutable_data_ptr()), s);
  const cudaError_t problem = cudaGetLastError();
  STD_TORCH_CHECK(problem == cudaSuccess, "diffuse_patches: ", cudaGetErrorString(problem));
}

template <typename In, typename... Rest>
void to_type(ScalarType type, const Rest&... rest) {
  if (type == ScalarType::Float) return launch<In, float>(rest...);
  if (type == ScalarType::Half) return launch<In, __half>(rest...);
  launch<In, __nv_bfloat16>(rest...);
}

// x is (B, C, T, H, W) of any strides; all else contiguous.
void diffuse_patches(const Tensor& x, const Tensor& ids, const Tensor& t, const Tensor& tables, const Tensor& seed,
                     const Tensor& sample_ids, int64_t stream, std::vector<int64_t> patch, Tensor out) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Shape s;
  s.stride_b = x.stride(0), s.stride_c = x.stride(1), s.stride_t = x.stride(2), s.stride_h = x.stride(3),
  s.stride_w = x.stride(4);
  s.p = int(patch[0]), s.q = int(patch[1]), s.r = int(patch[2]);
  s.time = int(x.size(2)) / s.p, s.height = int(x.size(3)) / s.q, s.width = int(x.size(4)) / s.r;
  s.values = int(x.size(1)) * s.p * s.q * s.r, s.blocks = (s.values + 3) / 4;
  s.rows = ids.numel(), s.patches = int(ids.size(1)), s.steps = int(tables.size(1)), s.stream = uint32_t(stream);
  const ScalarType from = x.scalar_type(), to = out.scalar_type();
  if (from == ScalarType::Float) return to_type<float>(to, x, ids, t, tables, seed, sample_ids, out, s);
  if (from == ScalarType::Half) return to_type<__half>(to, x, ids, t, tables, seed, sample_ids, out, s);
  to_type<__nv_bfloat16>(to, x, ids, t, tables, seed, sample_ids, out, s);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(avfast_native, m) {
  m.def(
      "diffuse_patches_cuda(Tensor x, Tensor ids, Tensor t, Tensor tables, Tensor seed, Tensor sample_ids, int stream, "
      "int[] patch, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(avfast_native, CUDA, m) { m.impl("diffuse_patches_cuda", TORCH_BOX(&diffuse_patches)); }
