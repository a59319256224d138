// The arguments of `linear_loss`, checked: see cpu/diffusion_loss.cpp.
#pragma once

#include <optional>
#include <vector>

#include "cpu/tensors.h"
#include "cpu/values.h"

namespace unif2ace::diffusion_loss {

constexpr int64_t kIgnore = -100;

// The arguments, checked. `gemm` is the dtype of the products.
struct Problem {
  ScalarType dtype, gemm;
  int64_t hidden, start, columns, mass_begin, mass_end;  // mass columns counted from `start`
  Tensor h, weight;                                      // [R, H], [V, H], dense
  std::optional<Tensor> bias;                            // [V], dense
  std::vector<int64_t> rows;                             // the rows that count
  std::vector<int64_t> target;                           // their columns, counted from `start`
  std::vector<float> row_weight, mass_weight;            // [R]; mass_weight empty for none

  int64_t item() const { return dtype == ScalarType::Float ? 4 : 2; }  // bytes
  int64_t gemm_item() const { return gemm == ScalarType::Float ? 4 : 2; }
  int32_t gemm_aoti_dtype() const {
    return gemm == ScalarType::Float ? aoti_torch_dtype_float32() : aoti_torch_dtype_bfloat16();
  }
};

template <class Index>
inline void collect_rows(Problem& a, const Tensor& targets) {
  const Tensor dense_targets = dense(targets);
  const Index* target = pointer<Index>(dense_targets);
  for (int64_t r = 0; r < targets.numel(); ++r) {
    if (target[r] == kIgnore) continue;
    check(target[r] >= a.start && target[r] < a.start + a.columns, "linear_loss: targets must be -100 or in ", a.start,
          " .. ", a.start + a.columns - 1, ", got ", static_cast<int64_t>(target[r]));
    a.rows.push_back(r);
    a.target.push_back(target[r] - a.start);
  }
}

// Checks everything that memory safety hangs on.
inline Problem make_problem(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
                            const Tensor& targets, const Tensor& row_weight, const std::optional<Tensor>& mass_weight,
                            const std::vector<int64_t>& columns, const std::vector<int64_t>& mass_columns) {
  check_float("linear_loss", "hidden", hidden);
  check(hidden.dim() == 2 && weight.dim() == 2 && hidden.size(1) == weight.size(1) && hidden.size(1) >= 1,
        "linear_loss: hidden [R, H] and weight [V, H] must have the same H >= 1");
  check(weight.scalar_type() == hidden.scalar_type() && (!bias || bias->scalar_type() == hidden.scalar_type()),
        "linear_loss: hidden, weight and bias must have one dtype");
  check(!bias || bias->numel() == weight.size(0), "linear_loss: bias must have ", weight.size(0), " elements");
  const int64_t rows = hidden.size(0), width = hidden.size(1);
  check(targets.numel() == rows && row_weight.numel() == rows && (!mass_weight || mass_weight->numel() == rows),
        "linear_loss: targets, row_weight and mass_weight must have ", rows, " elements");
  check(columns.size() == 2 && 0 <= columns[0] && columns[0] < columns[1] && columns[1] <= weight.size(0),
        "linear_loss: columns must be a range within 0 .. ", weight.size(0));
  check(!mass_weight || (mass_columns.size() == 2 && columns[0] <= mass_columns[0] &&
                         mass_columns[0] <= mass_columns[1] && mass_columns[1] <= columns[1]),
        "linear_loss: mass_columns must be a range within columns");
  const ScalarType dtype = hidden.scalar_type();
  Problem a{dtype,
            dtype == ScalarType::Half ? ScalarType::Float : dtype,
            width,
            columns[0],
            columns[1] - columns[0],
            mass_weight ? mass_columns[0] - columns[0] : 0,
            mass_weight ? mass_columns[1] - columns[0] : 0,
            dense(hidden),
            dense(weight),
            bias ? std::optional<Tensor>(dense(*bias)) : std::nullopt,
            {},
            {},
            read_floats("linear_loss", "row_weight", row_weight),
            {}};
  if (mass_weight) a.mass_weight = read_floats("linear_loss", "mass_weight", *mass_weight);
  check(targets.scalar_type() == ScalarType::Int || targets.scalar_type() == ScalarType::Long,
        "linear_loss: targets must be int32 or int64");
  if (targets.scalar_type() == ScalarType::Int)
    collect_rows<int32_t>(a, targets);
  else
    collect_rows<int64_t>(a, targets);
  return a;
}

}  // namespace unif2ace::diffusion_loss
