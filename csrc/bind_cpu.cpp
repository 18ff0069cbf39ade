#include "bind.h"

namespace taylorkern {
namespace {

namespace py = pybind11;

void channel_scores(Address a, Address g, Address s, int64_t N, int64_t C, int64_t S, int layout, int dtype,
                    int threads) {
  const Shape shape = checked_shape(N, C, S, layout, dtype);
  const ChannelScores args{shape, required("a", a, N * C * S), required("g", g, N * C * S), required("s", s, N * C)};
  const py::gil_scoped_release unlocked;
  cpu::channel_scores(args, threads);
}

void batch_norm_act(Address x, Address residual, Address weight, Address bias, Address y, Address mean, Address var,
                    double eps, bool training, int activation, double slope, int64_t N, int64_t C, int64_t S, int layout,
                    int dtype, int threads) {
  const Shape shape = checked_shape(N, C, S, layout, dtype);
  const int64_t elements = N * C * S;
  const BatchNormAct args{shape,
                          required("x", x, elements),
                          optional(residual),
                          optional(weight),
                          optional(bias),
                          required("y", y, elements),
                          required("mean", mean, C),
                          required("var", var, C),
                          eps,
                          training,
                          checked_activation(activation),
                          slope};
  const py::gil_scoped_release unlocked;
  cpu::batch_norm_act(args, threads);
}

void batch_norm_act_backward(Address dy, Address x, Address y, Address weight, Address bias, Address mean, Address var,
                             Address dx, Address dresidual, Address dweight, Address dbias, Address s, double eps,
                             bool training, int activation, double slope, int64_t N, int64_t C, int64_t S,
                             int layout, int dtype, int threads) {
  const Shape shape = checked_shape(N, C, S, layout, dtype);
  const int64_t elements = N * C * S;
  const BatchNormActBackward args{shape,
                                  required("dy", dy, elements),
                                  required("x", x, elements),
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

void follow(Address mean, Address var, Address running_mean, Address running_var, double momentum, double correction,
            int64_t C, int dtype) {
  const Shape shape = checked_shape(1, C, 1, 0, dtype);
  cpu::follow({C, shape.dtype, required("mean", mean, C), required("var", var, C),
               required("running_mean", running_mean, C), required("running_var", running_var, C), momentum,
               correction});
}

}  // namespace

void bind_cpu(py::module_& module) {
  module.def("channel_scores", &channel_scores);
  module.def("batch_norm_act", &batch_norm_act);
  module.def("batch_norm_act_backward", &batch_norm_act_backward);
  module.def("follow", &follow);
}

}  // namespace taylorkern
