#include <pybind11/stl.h>

#include <vector>

#include "bind.h"

namespace taylorkern {
namespace {

namespace py = pybind11;

constexpr int kDtypes = 3;  // the codes before f16

void channel_scores(Address a, Address g, Address s, int64_t N, int64_t C, int64_t S, int layout, int dtype,
                    int threads) {
  const Shape shape = checked_shape(N, C, S, layout, dtype, kDtypes);
  const ChannelScores args{shape, required("a", a, N * C * S), required("g", g, N * C * S), required("s", s, N * C)};
  const py::gil_scoped_release unlocked;
  cpu::channel_scores(args, threads);
}

void batch_norm_act(Address x, Address residual, Address weight, Address bias, Address y, Address mask, Address mean,
                    Address var, double eps, bool training, int activation, double slope, int64_t N, int64_t C,
                    int64_t S, int layout, int dtype, int threads) {
  const Shape shape = checked_shape(N, C, S, layout, dtype, kDtypes);
  const int64_t elements = N * C * S;
  const BatchNormAct args{shape,
                          required("x", x, elements),
                          optional(residual),
                          optional(weight),
                          optional(bias),
                          required("y", y, elements),
                          optional(mask),
                          required("mean", mean, C),
                          required("var", var, C),
                          eps,
                          training,
                          checked_activation(activation),
                          slope};
  const py::gil_scoped_release unlocked;
  cpu::batch_norm_act(args, threads);
}

void batch_norm_act_backward(Address dy, Address x, Address mask, Address y, Address weight, Address bias, Address mean,
                             Address var, Address dx, Address dresidual, Address dweight, Address dbias, Address s,
                             double eps, bool training, int activation, double slope, int64_t N, int64_t C, int64_t S,
                             int layout, int dtype, int threads) {
  const Shape shape = checked_shape(N, C, S, layout, dtype, kDtypes);
  const int64_t elements = N * C * S;
  const BatchNormActBackward args{shape,
                                  required("dy", dy, elements),
                                  required("x", x, elements),
                                  optional(mask),
                                  optional(y),
                                  optional(weight),
                                  optional(bias),
                                  required("mean", mean, C),
                                  required("var", var, C),
                                  required("dx", dx, elements),
                                  optional(dresidual),
                                  required("dweight", dweight, C),
                                  required("dbias", dbias, C),
                                  required("s", s, N * C),
                                  eps,
                                  training,
                                  checked_activation(activation),
                                  slope};
  const py::gil_scoped_release unlocked;
  cpu::batch_norm_act_backward(args, threads);
}

void checked_run(const FoldRun& of, const std::vector<FoldPiece>& pieces, int64_t U) {
  const bool inside = of.piece >= 0 && of.piece < static_cast<int64_t>(pieces.size()) && of.length >= 0 &&
                      of.channel >= 0 && of.channel + of.length <= pieces[static_cast<size_t>(of.piece)].C &&
                      of.unit >= 0 && of.unit + of.length <= U;
  if (!inside) throw py::value_error("taylorkern: a run reaches outside of its piece or of the units");
}

void follow(Address mean, Address var, Address running_mean, Address running_var, double momentum, double correction,
            int64_t C, int dtype) {
  const Shape shape = checked_shape(1, C, 1, 0, dtype, kDtypes);
  cpu::follow({C, shape.dtype, required("mean", mean, C), required("var", var, C),
               required("running_mean", running_mean, C), required("running_var", running_var, C), momentum,
               correction});
}

// s: the pieces' addresses, and how many channels each has; runs: [count] of FoldRun
void fold(const std::vector<Address>& s, const std::vector<int64_t>& channels, Address runs, Address sums,
          Address squares, int64_t N, int64_t U, int64_t count, int dtype, int threads) {
  const Shape shape = checked_shape(N, U, 1, 0, dtype, kDtypes);
  std::vector<FoldPiece> pieces;
  for (size_t i = 0; i < s.size(); ++i) pieces.push_back({required("s", s[i], N * channels.at(i)), channels.at(i)});
  const auto* found = static_cast<const FoldRun*>(required("runs", runs, count));
  for (int64_t i = 0; i < count; ++i) checked_run(found[i], pieces, U);
  cpu::fold({N, U, count, shape.dtype, pieces.data(), found, static_cast<double*>(required("sums", sums, U)),
             static_cast<double*>(required("squares", squares, U))},
            threads);
}

bool accumulate(const std::vector<Address>& to, const std::vector<Address>& from, const std::vector<int64_t>& counts) {
  std::vector<Addend> addends;
  for (size_t i = 0; i < counts.size(); ++i) {
    addends.push_back({static_cast<const double*>(required("from", from.at(i), counts[i])),
                       static_cast<double*>(required("to", to.at(i), counts[i])), counts[i]});
  }
  return cpu::accumulate(addends.data(), static_cast<int64_t>(addends.size()));
}

}  // namespace

void bind_cpu(py::module_& module) {
  module.def("channel_scores", &channel_scores);
  module.def("batch_norm_act", &batch_norm_act);
  module.def("batch_norm_act_backward", &batch_norm_act_backward);
  module.def("follow", &follow);
  module.def("fold", &fold);
  module.def("accumulate", &accumulate);
  // For the library that calls kernels without Python in between
  const auto address = [](auto* function) { return reinterpret_cast<Address>(function); };
  module.attr("addresses") = py::make_tuple(address(&cpu::batch_norm_act), address(&cpu::batch_norm_act_backward),
                                            address(&cpu::follow));
}

}  // namespace taylorkern
