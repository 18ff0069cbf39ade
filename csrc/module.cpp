#include <omp.h>

#include "bind.h"
#include "cpu/vector.h"

// The builder names the module after its cache key, so that two builds can live in one process.
PYBIND11_MODULE(TAYLORKERN_MODULE, module) {
  module.attr("compiler") = __VERSION__;
  module.attr("register_bytes") = taylorkern::cpu::kRegisterBytes;
  module.attr("fma") = taylorkern::cpu::kFma;
  module.def("max_threads", &omp_get_max_threads);
  taylorkern::bind_cpu(module);
}
