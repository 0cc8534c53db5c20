// The torch operators of the CPU kernels: dtypes, scales, threads. The product itself is in cpu_product.h.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "../c_functions.h"
#include "cpu_product.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

int64_t columns_of(const Tensor& x) { return x.size(x.dim() - 1); }
int64_t tokens_of(const Tensor& x) { return x.numel() / std::max<int64_t>(columns_of(x), 1); }

const dbf::Kernel& chosen_kernel(int64_t tokens) {
  const dbf::Kernel* chosen = dbf::choose_kernel(tokens);
  STD_TORCH_CHECK(chosen != nullptr, "DBF_CPU_ISA=", std::getenv("DBF_CPU_ISA"), "; allowed here: ",
                  dbf::usable_names(), "; unset it for the fastest");
  return *chosen;
}

int64_t bytes_of(ScalarType dtype, const char* what) {
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "dbf_native takes float32, bfloat16 or float16 for ", what);
  return dtype == ScalarType::Float ? 4 : 2;
}

void to_float(const dbf::Kernel& kernel, const void* from, ScalarType dtype, int64_t count, float* to) {
  if (dtype == ScalarType::Float) {
    std::copy_n(static_cast<const float*>(from), count, to);  // an empty tensor has no address, which memcpy may not get
  } else if (dtype == ScalarType::Half) {
    kernel.half_to_float(static_cast<const uint16_t*>(from), count, to);
  } else {
    const auto* halves = static_cast<const uint16_t*>(from);
    auto* bits = reinterpret_cast<uint32_t*>(to);
    for (int64_t i = 0; i < count; ++i) bits[i] = static_cast<uint32_t>(halves[i]) << 16;
  }
}

void from_float(const dbf::Kernel& kernel, const float* from, ScalarType dtype, int64_t count, void* to) {
  if (dtype == ScalarType::Float) {
    std::copy_n(from, count, static_cast<float*>(to));
  } else if (dtype == ScalarType::Half) {
    kernel.float_to_half(from, count, static_cast<uint16_t*>(to));
  } else {
    auto* halves = static_cast<uint16_t*>(to);
    for (int64_t i = 0; i < count; ++i) {
      uint32_t bits;
      std::memcpy(&bits, from + i, 4);
      const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
      halves[i] = static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
    }
  }
}

void check_vector(const Tensor& vector, int64_t size, const char* name) {
  STD_TORCH_CHECK(vector.dim() == 1 && vector.size(0) == size && vector.is_contiguous(),
                  "dbf_native needs a contiguous vector of one value per feature as ", name);
  bytes_of(vector.scalar_type(), name);
}

// A scale or a bias in float32; none where `values` is null.
struct Vector {
  const float* values = nullptr;

  void multiply(float* x, int64_t first, int64_t count) const {
    if (values != nullptr)
      for (int64_t i = 0; i < count; ++i) x[i] *= values[first + i];
  }
  void add(float* x, int64_t first, int64_t count) const {
    if (values != nullptr)
      for (int64_t i = 0; i < count; ++i) x[i] += values[first + i];
  }
};

// A vector's memory, which the next call reuses.
class VectorSpace {
 public:
  Vector load(const dbf::Kernel& kernel, const std::optional<Tensor>& vector, int64_t size, const char* name) {
    if (!vector) return {};
    check_vector(*vector, size, name);
    float* values = memory_.get(size);
    to_float(kernel, vector->const_data_ptr(), vector->scalar_type(), size, values);
    return {values};
  }

 private:
  dbf::Scratch<float> memory_;
};

dbf::Signs checked_signs(const Tensor& signs, int64_t columns, bool interleaved) {
  STD_TORCH_CHECK(signs.scalar_type() == ScalarType::Int, "dbf_native needs int32 signs");
  STD_TORCH_CHECK(signs.is_contiguous(), "dbf_native needs contiguous signs");
  STD_TORCH_CHECK(signs.dim() == 2 && signs.size(1) == dbf::ceil_div(columns, dbf::kWordBits),
                  "dbf_native got signs and activations whose sizes do not fit together");
  return {signs.const_data_ptr(), signs.size(0), columns, interleaved};
}

int64_t checked_tokens(const Tensor& x, const Tensor& out, int64_t columns, int64_t rows) {
  STD_TORCH_CHECK(x.is_contiguous() && out.is_contiguous(), "dbf_native needs contiguous tensors");
  STD_TORCH_CHECK(out.dim() == x.dim() && columns_of(out) == rows && out.numel() * columns == x.numel() * rows,
                  "dbf_native got tensors whose sizes do not fit together");
  bytes_of(x.scalar_type(), "x");
  bytes_of(out.scalar_type(), "out");
  return rows == 0 ? 0 : out.numel() / rows;
}

// Runs on torch's threads.
const auto parallel = [](int64_t count, int64_t grain, const auto& body) {
  torch::stable::parallel_for(0, count, grain, body);
};

// Reads rows of x as float32 activations and scales them.
auto reader(const dbf::Kernel& kernel, const Tensor& x) {
  const int64_t columns = columns_of(x), stride = columns * bytes_of(x.scalar_type(), "x");
  const auto* data = static_cast<const char*>(x.const_data_ptr());
  return [=, dtype = x.scalar_type(), &kernel](int64_t token, const Vector& scale, float* values) {
    to_float(kernel, data + token * stride, dtype, columns, values);
    scale.multiply(values, 0, columns);
  };
}

// Scales sums, adds the bias, and writes them to `out` from its value `index` on.
auto writer(const dbf::Kernel& kernel, const Tensor& out) {
  const int64_t size = bytes_of(out.scalar_type(), "out");
  auto* data = static_cast<char*>(out.mutable_data_ptr());
  return [=, dtype = out.scalar_type(), &kernel](int64_t index, const Vector& scale, const Vector& bias, int64_t row,
                                                 int64_t count, float* sums) {
    scale.multiply(sums, row, count);
    bias.add(sums, row, count);
    from_float(kernel, sums, dtype, count, data + index * size);
  };
}

int bits_of(bool fast) { return fast ? 16 : 24; }

// Memory of the calling thread; later calls reuse it.
struct Workspace {
  VectorSpace before, between, after, shift;
  std::vector<dbf::TokenBlock> first, second;
  dbf::Scratch<float> middle;
};
Workspace& workspace() {
  static thread_local Workspace space;
  return space;
}

Tensor sign_matmul_out(const Tensor& x, const Tensor& signs, std::optional<Tensor> in_scale,
                       std::optional<Tensor> out_scale, std::optional<Tensor> bias, bool interleaved, bool fast,
                       Tensor out) {
  STD_TORCH_CHECK(x.dim() > 0, "dbf_native takes no activations of such sizes: a single number");
  const dbf::Signs matrix = checked_signs(signs, columns_of(x), interleaved);
  const int64_t tokens = checked_tokens(x, out, matrix.columns, matrix.rows);
  const int bits = bits_of(fast);
  const dbf::Kernel& kernel = chosen_kernel(tokens);
  Workspace& space = workspace();
  space.first.resize(std::max<size_t>(space.first.size(), 1));
  const Vector before = space.before.load(kernel, in_scale, matrix.columns, "in_scale");
  const Vector after = space.after.load(kernel, out_scale, matrix.rows, "out_scale");
  const Vector shift = space.shift.load(kernel, bias, matrix.rows, "bias");
  const auto read = reader(kernel, x);
  const auto write = writer(kernel, out);
  const int64_t step = dbf::tokens_per_block(kernel, matrix.columns, bits);
  for (int64_t first = 0; first < tokens; first += step)
    dbf::multiply_block(
        kernel, matrix, bits, std::min(step, tokens - first), space.first[0], torch::stable::get_num_threads(), parallel,
        [&](int64_t t, float* values) { read(first + t, before, values); },
        [&](int64_t t, int64_t row, int64_t count, float* sums) {
          write((first + t) * matrix.rows + row, after, shift, row, count, sums);
        });
  return out;
}

// A factored layer whose scales are float32.
struct Layer {
  dbf::Signs inner, outer;
  Vector before, between, after, shift;
};

// Applies layers of one input; results lie side by side in the columns of `out`.
void apply_layers(const dbf::Kernel& kernel, const Tensor& x, const std::vector<Layer>& layers, bool fast, Tensor out) {
  const int bits = bits_of(fast);
  const size_t count = layers.size();
  std::vector<dbf::Signs> inner, outer;
  std::vector<int64_t> start, middle;  // where results of a layer begin: in `out`, and in those between its products
  int64_t columns = 0, between = 0, step = dbf::tokens_per_block(kernel, columns_of(x), bits);
  for (const Layer& layer : layers) {
    inner.push_back(layer.inner);
    outer.push_back(layer.outer);
    start.push_back(columns);
    middle.push_back(between);
    columns += layer.outer.rows;
    between += layer.inner.rows;
    step = std::min(step, dbf::tokens_per_block(kernel, layer.inner.rows, bits));
  }
  const int64_t tokens = checked_tokens(x, out, columns_of(x), columns);
  const auto read = reader(kernel, x);
  const auto write = writer(kernel, out);
  Workspace& space = workspace();
  space.first.resize(std::max(space.first.size(), count));
  space.second.resize(std::max(space.second.size(), count));
  float* h = space.middle.get(std::min(step, tokens) * between);
  const int64_t most = torch::stable::get_num_threads();
  for (int64_t first = 0; first < tokens; first += step) {
    const int64_t block = std::min(step, tokens - first);
    const int64_t threads = std::max(dbf::threads_for(inner, block, most), dbf::threads_for(outer, block, most));
    dbf::Level one(
        kernel, bits, block, inner, space.first.data(), threads,
        [&](int64_t i, int64_t t, float* values) { read(first + t, layers[i].before, values); },
        [&](int64_t i, int64_t t, int64_t row, int64_t rows, float* sums) {
          std::copy_n(sums, rows, h + t * between + middle[i] + row);
        });
    dbf::Level two(
        kernel, bits, block, outer, space.second.data(), threads,
        [&](int64_t i, int64_t t, float* values) {
          std::copy_n(h + t * between + middle[i], inner[i].rows, values);
          layers[i].between.multiply(values, 0, inner[i].rows);
        },
        [&](int64_t i, int64_t t, int64_t row, int64_t rows, float* sums) {
          write((first + t) * columns + start[i] + row, layers[i].after, layers[i].shift, row, rows, sums);
        });
    dbf::run_levels(threads, parallel, one, two);
  }
}

Tensor double_binary_linear_out(const Tensor& x, const Tensor& signs_in, const Tensor& signs_out,
                                const Tensor& scale_in, const Tensor& scale_mid, const Tensor& scale_out,
                                std::optional<Tensor> bias, bool interleaved, bool fast, Tensor out) {
  STD_TORCH_CHECK(x.dim() > 0, "dbf_native takes no activations of such sizes: a single number");
  const dbf::Signs inner = checked_signs(signs_in, columns_of(x), interleaved);
  const dbf::Signs outer = checked_signs(signs_out, inner.rows, interleaved);
  const dbf::Kernel& kernel = chosen_kernel(tokens_of(x));
  Workspace& space = workspace();
  apply_layers(kernel, x,
               {{inner, outer, space.before.load(kernel, scale_in, inner.columns, "scale_in"),
                 space.between.load(kernel, scale_mid, inner.rows, "scale_mid"),
                 space.after.load(kernel, scale_out, outer.rows, "scale_out"),
                 space.shift.load(kernel, bias, outer.rows, "bias")}},
               fast, out);
  return out;
}

// What a call needs of some layers, in one tensor: a head of int64, an entry for each layer, and their vectors as float32.
// So a call takes two tensors instead of dozens, and converts no scales. Signs stay where they are.
struct PreparedHead {
  int64_t mark, layers, columns, interleaved;
};
struct PreparedLayer {
  int64_t signs_in, signs_out;  // addresses
  int64_t middle, rows;
  int64_t before, between, after, shift;  // in bytes from the start; 0 for none
};
constexpr int64_t kMark = 0x5A1D5B1B0D0B1E55;
constexpr size_t kFactors = 5;  // tensors of a layer: signs_in, signs_out, scale_in, scale_mid, scale_out

Tensor prepare_layers_out(std::vector<Tensor> factors, std::vector<Tensor> biases, bool interleaved, Tensor out) {
  const size_t layers = factors.size() / kFactors;
  STD_TORCH_CHECK(layers > 0 && factors.size() % kFactors == 0 && (biases.empty() || biases.size() == layers),
                  "dbf_native needs five tensors for each of one layer or more, and a bias for all or none");
  STD_TORCH_CHECK(out.scalar_type() == ScalarType::Byte && out.is_contiguous(), "dbf_native prepares bytes");
  const dbf::Kernel& kernel = chosen_kernel(1);
  auto* bytes = static_cast<char*>(out.mutable_data_ptr());
  const int64_t columns = factors[2].size(0);
  const PreparedHead head{kMark, static_cast<int64_t>(layers), columns, interleaved};
  int64_t end = sizeof(PreparedHead) + layers * sizeof(PreparedLayer);
  STD_TORCH_CHECK(end <= out.numel(), "dbf_native got too few bytes to prepare layers in");
  std::memcpy(bytes, &head, sizeof(head));
  const auto add = [&](const Tensor& vector, int64_t size, const char* name) {
    check_vector(vector, size, name);
    end = dbf::ceil_div(end, 64) * 64;
    const int64_t at = end;
    end += size * sizeof(float);
    STD_TORCH_CHECK(end <= out.numel(), "dbf_native got too few bytes to prepare layers in");
    to_float(kernel, vector.const_data_ptr(), vector.scalar_type(), size, reinterpret_cast<float*>(bytes + at));
    return at;
  };
  for (size_t i = 0; i < layers; ++i) {
    const Tensor* own = factors.data() + i * kFactors;
    const dbf::Signs inner = checked_signs(own[0], columns, interleaved);
    const dbf::Signs outer = checked_signs(own[1], inner.rows, interleaved);
    const PreparedLayer layer{reinterpret_cast<int64_t>(inner.words),
                              reinterpret_cast<int64_t>(outer.words),
                              inner.rows,
                              outer.rows,
                              add(own[2], columns, "scale_in"),
                              add(own[3], inner.rows, "scale_mid"),
                              add(own[4], outer.rows, "scale_out"),
                              biases.empty() ? 0 : add(biases[i], outer.rows, "bias")};
    std::memcpy(bytes + sizeof(PreparedHead) + i * sizeof(PreparedLayer), &layer, sizeof(layer));
  }
  return out;
}

Tensor prepared_layers_out(const Tensor& x, const Tensor& prepared, bool fast, Tensor out) {
  const auto* bytes = static_cast<const char*>(prepared.const_data_ptr());
  const auto* head = reinterpret_cast<const PreparedHead*>(bytes);
  STD_TORCH_CHECK(prepared.scalar_type() == ScalarType::Byte && prepared.is_contiguous() &&
                      prepared.numel() >= static_cast<int64_t>(sizeof(PreparedHead)) && head->mark == kMark,
                  "dbf_native got bytes that no layers were prepared in");
  STD_TORCH_CHECK(x.dim() > 0 && columns_of(x) == head->columns,
                  "dbf_native got prepared layers and activations whose sizes do not fit together");
  const auto* own = reinterpret_cast<const PreparedLayer*>(bytes + sizeof(PreparedHead));
  const auto vector = [bytes](int64_t at) { return Vector{at == 0 ? nullptr : reinterpret_cast<const float*>(bytes + at)}; };
  std::vector<Layer> layers;
  for (int64_t i = 0; i < head->layers; ++i, ++own)
    layers.push_back({{reinterpret_cast<const void*>(own->signs_in), own->middle, head->columns, head->interleaved != 0},
                      {reinterpret_cast<const void*>(own->signs_out), own->rows, own->middle, head->interleaved != 0},
                      vector(own->before),
                      vector(own->between),
                      vector(own->after),
                      vector(own->shift)});
  apply_layers(chosen_kernel(tokens_of(x)), x, layers, fast, out);
  return out;
}

// In C++, as a step of decoding calls it a hundred times, and Python takes as long as a small layer.
Tensor prepared_layers(const Tensor& x, const Tensor& prepared, int64_t columns, std::optional<ScalarType> dtype,
                       bool fast) {
  STD_TORCH_CHECK(x.dim() > 0, "dbf_native takes no activations of such sizes: a single number");
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = columns;
  const Tensor out = torch::stable::new_empty(x, sizes, dtype.value_or(ScalarType::Float));
  return prepared_layers_out(torch::stable::contiguous(x), prepared, fast, out);
}

STABLE_TORCH_LIBRARY(dbf_native, library) {
  library.def(
      "sign_matmul.out(Tensor x, Tensor signs, Tensor? in_scale=None, Tensor? out_scale=None, Tensor? bias=None, "
      "*, bool interleaved=False, bool fast=False, Tensor(a!) out) -> Tensor(a!)");
  library.def(
      "double_binary_linear.out(Tensor x, Tensor signs_in, Tensor signs_out, Tensor scale_in, Tensor scale_mid, "
      "Tensor scale_out, Tensor? bias=None, *, bool interleaved=False, bool fast=False, Tensor(a!) out) -> Tensor(a!)");
  library.def(
      "prepare_layers.out(Tensor[] factors, Tensor[] biases, *, bool interleaved=False, Tensor(a!) out) -> Tensor(a!)");
  library.def("prepared_layers.out(Tensor x, Tensor prepared, *, bool fast=False, Tensor(a!) out) -> Tensor(a!)");
}

STABLE_TORCH_LIBRARY_IMPL(dbf_native, CPU, library) {
  library.impl("sign_matmul.out", TORCH_BOX(&sign_matmul_out));
  library.impl("double_binary_linear.out", TORCH_BOX(&double_binary_linear_out));
  library.impl("prepare_layers.out", TORCH_BOX(&prepare_layers_out));
  library.impl("prepared_layers.out", TORCH_BOX(&prepared_layers_out));
}

STABLE_TORCH_LIBRARY_IMPL(dbf, CPU, library) { library.impl("prepared_layers", TORCH_BOX(&prepared_layers)); }

}  // namespace

DBF_C_FUNCTION aoti_torch_cpu_sign_matmul(AtenTensorHandle out, AtenTensorHandle x, AtenTensorHandle signs,
                                          AtenTensorHandle* in_scale, AtenTensorHandle* out_scale, AtenTensorHandle* bias,
                                          int32_t interleaved, int32_t fast) {
  sign_matmul_out(tensor_of(x), tensor_of(signs), tensor_of(in_scale), tensor_of(out_scale), tensor_of(bias),
                  interleaved != 0, fast != 0, tensor_of(out));
  return AOTI_TORCH_SUCCESS;
}

DBF_C_FUNCTION aoti_torch_cpu_double_binary_linear(AtenTensorHandle out, AtenTensorHandle x, AtenTensorHandle signs_in,
                                                   AtenTensorHandle signs_out, AtenTensorHandle scale_in,
                                                   AtenTensorHandle scale_mid, AtenTensorHandle scale_out,
                                                   AtenTensorHandle* bias, int32_t interleaved, int32_t fast) {
  double_binary_linear_out(tensor_of(x), tensor_of(signs_in), tensor_of(signs_out), tensor_of(scale_in),
                           tensor_of(scale_mid), tensor_of(scale_out), tensor_of(bias), interleaved != 0, fast != 0,
                           tensor_of(out));
  return AOTI_TORCH_SUCCESS;
}

DBF_C_FUNCTION aoti_torch_cpu_prepared_layers(AtenTensorHandle out, AtenTensorHandle x, AtenTensorHandle prepared,
                                              int32_t fast) {
  prepared_layers_out(tensor_of(x), tensor_of(prepared), fast != 0, tensor_of(out));
  return AOTI_TORCH_SUCCESS;
}
