#include "bind.h"

namespace taylorkern {
namespace {

namespace py = pybind11;

constexpr int kDtypes = 4;  // all codes; f64 is refused by name
constexpr Address kAlignment = 16;

Shape served_shape(int64_t N, int64_t C, int64_t S, int layout, int dtype) {
  const Shape shape = checked_shape(N, C, S, layout, dtype, kDtypes);
  if (shape.dtype == Dtype::f64) throw py::value_error("taylorkern: the CUDA kernels have no float64");
  return shape;
}

cuda::Launch checked_launch(const Shape& shape, Address stream, Address workspace, int64_t resident_bytes) {
  if (resident_bytes < 0) throw py::value_error("taylorkern: resident_bytes is negative");
  if (workspace % kAlignment) throw py::value_error("taylorkern: the workspace isn't aligned to 16 bytes");
  return {optional(stream), required("workspace", workspace, cuda::workspace_bytes(shape)), resident_bytes};
}

int64_t workspace_bytes(int64_t N, int64_t C, int64_t S, int layout, int dtype) {
  return cuda::workspace_bytes(served_shape(N, C, S, layout, dtype));
}

void channel_scores(Address a, Address g, Address s, int64_t N, int64_t C, int64_t S, int layout, int dtype,
                    Address stream, Address workspace, int64_t resident_bytes) {
  const Shape shape = served_shape(N, C, S, layout, dtype);
  const cuda::Launch launch = checked_launch(shape, stream, workspace, resident_bytes);
  const ChannelScores args{shape, required("a", a, N * C * S), required("g", g, N * C * S), required("s", s, N * C)};
  const py::gil_scoped_release unlocked;
  cuda::channel_scores(args, launch);
}

void batch_norm_act(Address x, Address residual, Address weight, Address bias, Address y, Address mask, Address mean,
                    Address var, double eps, bool training, int activation, double slope, int64_t N, int64_t C,
                    int64_t S, int layout, int dtype, Address stream, Address workspace, int64_t resident_bytes) {
  const Shape shape = served_shape(N, C, S, layout, dtype);
  const cuda::Launch launch = checked_launch(shape, stream, workspace, resident_bytes);
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
  cuda::batch_norm_act(args, launch);
}

void batch_norm_act_backward(Address dy, Address x, Address mask, Address y, Address weight, Address bias, Address mean,
                             Address var, Address dx, Address dresidual, Address dweight, Address dbias, Address s,
                             double eps, bool training, int activation, double slope, int64_t N, int64_t C, int64_t S,
                             int layout, int dtype, Address stream, Address workspace, int64_t resident_bytes) {
  const Shape shape = served_shape(N, C, S, layout, dtype);
  const cuda::Launch launch = checked_launch(shape, stream, workspace, resident_bytes);
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
  cuda::batch_norm_act_backward(args, launch);
}

void follow(Address mean, Address var, Address running_mean, Address running_var, double momentum, double correction,
            int64_t C, int dtype, Address stream) {
  const Shape shape = served_shape(1, C, 1, 0, dtype);
  if (shape.dtype != Dtype::f32) throw py::value_error("taylorkern: running statistics are float32");
  const RunningStatistics args{C,
                               shape.dtype,
                               required("mean", mean, C),
                               required("var", var, C),
                               required("running_mean", running_mean, C),
                               required("running_var", running_var, C),
                               momentum,
                               correction};
  const py::gil_scoped_release unlocked;
  cuda::follow(args, {optional(stream), nullptr, 0});
}

}  // namespace
}  // namespace taylorkern

// The builder names the module after its cache key, so that two builds can live in one process.
PYBIND11_MODULE(TAYLORKERN_MODULE, module) {
  module.attr("compiler") = __VERSION__;
  module.attr("cuda") = TAYLORKERN_CUDA;                    // the toolkit's version
  module.attr("architectures") = TAYLORKERN_ARCHITECTURES;  // as TORCH_CUDA_ARCH_LIST names them
  module.def("workspace_bytes", &taylorkern::workspace_bytes);
  module.def("channel_scores", &taylorkern::channel_scores);
  module.def("batch_norm_act", &taylorkern::batch_norm_act);
  module.def("batch_norm_act_backward", &taylorkern::batch_norm_act_backward);
  module.def("follow", &taylorkern::follow);
  // For the library that calls kernels without Python in between
  const auto address = [](auto* function) { return reinterpret_cast<taylorkern::Address>(function); };
  namespace cuda = taylorkern::cuda;
  module.attr("addresses") = pybind11::make_tuple(address(&cuda::batch_norm_act), address(&cuda::batch_norm_act_backward),
                                                  address(&cuda::follow), address(&cuda::workspace_bytes));
}
