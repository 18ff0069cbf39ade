// Batch normalisation under torch's autograd, without a detour through Python. A library of its own, which knows torch
// where the kernels don't. It does what BatchNormAct and FusedBatchNormAct of taylorkern/autograd.py do, for calls in
// which nothing is unusual; `fused` and `gated` answer None to all others, which are theirs.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/_batch_norm_impl_index.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/profiler.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

#include <algorithm>
#include <atomic>
#include <string_view>

#include "autograd_kernels.h"

namespace taylorkern {
namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What Python does where something is unusual
struct Connected {
  PyObject* gradients;    // (dy, saved tensors, training, eps, activation, slope, dresidual wanted) -> gradients
  PyObject* overwritten;  // raises the error of a saved tensor that was overwritten
};
Connected connected{};

std::atomic<int64_t> written_over{0};  // gradients that came in, by what went out

struct WithoutGil {
  PyThreadState* const state = PyEval_SaveThread();
  ~WithoutGil() { PyEval_RestoreThread(state); }
};

struct WithGil {
  const PyGILState_STATE state = PyGILState_Ensure();
  ~WithGil() { PyGILState_Release(state); }
};

std::optional<Dtype> code(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat: return Dtype::f32;
    case at::kDouble: return Dtype::f64;
    case at::kBFloat16: return Dtype::bf16;
    case at::kHalf: return Dtype::f16;
    default: return std::nullopt;
  }
}

at::ScalarType accumulator(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// The format in which x [N, C, *S] is dense, if it is: contiguous, or torch's channels_last of images and volumes
std::optional<at::MemoryFormat> dense(const Tensor& x) {
  const at::MemoryFormat last = x.dim() == 5 ? at::MemoryFormat::ChannelsLast3d : at::MemoryFormat::ChannelsLast;
  if (x.is_contiguous()) return at::MemoryFormat::Contiguous;
  if ((x.dim() == 4 || x.dim() == 5) && x.is_contiguous(last)) return last;
  return std::nullopt;
}

// Where both layouts are the same memory, the one with the longer inner loop
Shape shape(const Tensor& x) {
  const int64_t N = x.size(0), C = x.size(1), S = N && C ? x.numel() / N / C : 0;
  const bool last = S == 1 || !x.is_contiguous();
  return {N, C, S, last ? Layout::channels_last : Layout::channels_first, *code(x.scalar_type())};
}

// Values in the memory of a device that has kernels, and nobody in between
bool plain(const Tensor& t) {
  using Key = c10::DispatchKey;
  constexpr c10::DispatchKeySet strange({Key::Python, Key::Negative, Key::ZeroTensor});
  const Kernels* kernels = t.defined() ? kernels_of(t.device().type()) : nullptr;
  return kernels && t.layout() == at::kStrided && t.has_storage() && !t.is_inference() &&
         !t.key_set().has_any(strange) && kernels->takes(t);
}

bool alike(const Tensor& t, const Tensor& x) {
  return plain(t) && t.device() == x.device() && t.scalar_type() == x.scalar_type() && t.sizes() == x.sizes();
}

// A [C] tensor as the kernels take it, or none
bool fits_channels(const Optional& t, const Tensor& x) {
  return !t || (plain(*t) && t->device() == x.device() && t->dim() == 1 && t->size(0) == x.size(1) &&
                t->scalar_type() == accumulator(x) && t->is_contiguous());
}

// An input that a kernel serves, and of more than one value a channel
bool fits(const Tensor& x) {
  if (!plain(x)) return false;
  const std::optional<Dtype> dtype = code(x.scalar_type());
  return x.dim() >= 2 && x.numel() > x.size(1) && dtype && kernels_of(x.device().type())->serves(*dtype) && dense(x);
}

// Whether x, what tells act' and the [C] tensors are as forward has saved them: a hook may have put others in their place.
bool kept(const variable_list& saved, Activation activation) {
  const Tensor &x = saved[0], &told = saved[1];
  if (!fits(x)) return false;
  const at::ScalarType telling = activation == Activation::relu ? x.scalar_type() : at::kBool;
  const bool good = !told.defined() || (plain(told) && told.device() == x.device() && told.scalar_type() == telling &&
                                        told.sizes() == x.sizes() && told.is_contiguous(*dense(x)));
  const auto channels = [&](const Tensor& t) { return !t.defined() || fits_channels(t, x); };
  return good && std::all_of(saved.begin() + 2, saved.end(), channels);
}

// Whether nobody else has t, nor another tensor its memory
bool ours(const Tensor& t) { return t.use_count() == 1 && t.storage().use_count() == 1; }

// Whether nobody follows single operations or changes what they do: no mode, transform, tracer, profiler or dual number
bool unwatched() {
  using Key = c10::DispatchKey;
  constexpr c10::DispatchKeySet watching({Key::Python, Key::PythonTLSSnapshot, Key::FuncTorchDynamicLayerFrontMode,
                                          Key::FuncTorchDynamicLayerBackMode, Key::Functionalize, Key::Tracer});
  return !c10::impl::tls_local_dispatch_key_set().included_.has_any(watching) &&
         at::impl::PythonTorchFunctionTLS::stack_len() == 0 && !torch::autograd::profiler::profilerEnabled() &&
         !torch::autograd::ForwardADLevel::try_get_by_idx(0);
}

void* data(const Tensor& t) { return t.defined() ? const_cast<void*>(t.const_data_ptr()) : nullptr; }
void* data(const Optional& t) { return t ? data(*t) : nullptr; }

Tensor per_channel(const Tensor& x) { return at::empty({x.size(1)}, x.options().dtype(accumulator(x))); }
Tensor per_sample(const Tensor& x) {
  return at::empty({x.size(0), x.size(1)}, x.options().dtype(accumulator(x)));
}

struct Settings {
  bool training;
  double eps;
  Activation activation;
  double slope;
  int64_t resident_bytes;  // for the backward's kernels
};

struct Inputs {
  Tensor x;
  Optional residual, weight, bias, running_mean, running_var, z;  // z [N, C]: the gate
  bool training;
  double eps;
  int64_t resident_bytes[2];  // for the forward's kernels and for the backward's
};

// What a forward has made of its inputs, without gradients
struct Ran {
  Tensor y, mean, var;
  Tensor told;  // what tells act' behind an addition: relu's y, which the next layer keeps anyway, or a mask
  Settings settings;
};

class Normalisation : public torch::autograd::Function<Normalisation> {
 public:
  // Nothing is computed here: y gets its history.
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Optional& residual, const Optional& weight,
                        const Optional& bias, const Optional& z, const Ran& ran) {
    ctx->save_for_backward({x, ran.told, weight.value_or(Tensor()), bias.value_or(Tensor()), ran.mean, ran.var});
    // Which of the inputs that are there each one is, as needs_input_grad counts them
    int64_t count = 1;
    const auto number = [&](const Optional& t) { return t ? count++ : int64_t{-1}; };
    const std::vector<int64_t> numbers{0, number(residual), number(weight), number(bias), number(z)};
    ctx->saved_data["numbers"] = numbers;
    ctx->saved_data["training"] = ran.settings.training;
    ctx->saved_data["eps"] = ran.settings.eps;
    ctx->saved_data["activation"] = static_cast<int64_t>(ran.settings.activation);
    ctx->saved_data["slope"] = ran.settings.slope;
    ctx->saved_data["resident_bytes"] = ran.settings.resident_bytes;
    return ran.y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& incoming) {
    const variable_list saved = unpacked(*ctx);
    const Tensor &dy = incoming[0], &x = saved[0];
    const std::vector<int64_t> numbers = ctx->saved_data["numbers"].toIntVector();
    const auto wanted = [&](size_t i) { return numbers[i] >= 0 && ctx->needs_input_grad(numbers[i]); };
    auto& of = ctx->saved_data;
    const Settings settings{of["training"].toBool(), of["eps"].toDouble(),
                            static_cast<Activation>(of["activation"].toInt()), of["slope"].toDouble(),
                            of["resident_bytes"].toInt()};
    const bool usual = !at::GradMode::is_enabled() && unwatched() && kept(saved, settings.activation) && alike(dy, x);
    variable_list found = usual ? gradients(dy, saved, settings, wanted(1)) : in_python(dy, saved, settings, wanted(1));
    for (size_t i = 0; i < numbers.size(); ++i) {
      if (!wanted(i)) found[i] = Tensor();
    }
    found.emplace_back();  // of what forward has made
    return found;
  }

 private:
  // dx, dresidual, dweight, dbias, s
  static variable_list gradients(const Tensor& given, const variable_list& saved, const Settings& settings,
                                 bool joined) {
    const Tensor &x = saved[0], &told = saved[1], &weight = saved[2], &bias = saved[3], &mean = saved[4], &var = saved[5];
    const bool by_y = settings.activation == Activation::relu;
    const Tensor mask = by_y ? Tensor() : told, y = by_y ? told : Tensor();
    const bool apart = joined && told.defined();  // else the residual's gradient is dy
    const Kernels& kernels = *kernels_of(x.device().type());
    const bool spare = ours(given) && (apart || !joined) && kernels.writes_over(given, shape(x));
    const Tensor dy = given.contiguous(*dense(x));
    const Tensor dx = spare && !(apart && y.defined()) ? dy : at::empty_like(x);
    const Tensor dz = !apart ? Tensor() : spare && y.defined() ? dy : at::empty_like(x);
    const Tensor dweight = per_channel(x), dbias = per_channel(x), s = per_sample(x);
    const BatchNormActBackward args{shape(x),   data(dy),  data(x),   data(mask),   data(y),
                                    data(weight), data(bias), data(mean), data(var),    data(dx),
                                    data(dz),   data(dweight), data(dbias), data(s),    settings.eps,
                                    settings.training, settings.activation, settings.slope};
    kernels.backward(args, x, settings.resident_bytes);
    written_over += spare && dy.is_same(given);
    return {dx, apart ? dz : given, dweight, dbias, s};
  }

  static variable_list in_python(const Tensor& dy, const variable_list& saved, const Settings& settings, bool joined) {
    const WithGil locked;
    const THPObjectPtr tensors(PyTuple_New(static_cast<Py_ssize_t>(saved.size())));
    if (!tensors) throw_python_error();
    for (size_t i = 0; i < saved.size(); ++i) {
      PyObject* item = saved[i].defined() ? THPVariable_Wrap(saved[i]) : Py_NewRef(Py_None);
      PyTuple_SET_ITEM(tensors.get(), static_cast<Py_ssize_t>(i), item);
    }
    const THPObjectPtr answer(PyObject_CallFunction(
        connected.gradients, "NOOdidO", THPVariable_Wrap(dy), tensors.get(), settings.training ? Py_True : Py_False,
        settings.eps, static_cast<int>(settings.activation), settings.slope, joined ? Py_True : Py_False));
    if (!answer) throw_python_error();
    variable_list found;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(answer.get()); ++i) {
      PyObject* item = PyTuple_GET_ITEM(answer.get(), i);
      found.push_back(THPVariable_Check(item) ? THPVariable_Unpack(item) : Tensor());
    }
    return found;
  }

  static variable_list unpacked(const AutogradContext& ctx) {
    try {
      return ctx.get_saved_variables();
    } catch (const c10::Error& error) {
      if (std::string_view(error.what_without_backtrace()).find("modified by an inplace operation") ==
          std::string_view::npos) {
        throw;
      }
    }
    const WithGil locked;
    const THPObjectPtr none(PyObject_CallNoArgs(connected.overwritten));
    throw_python_error();
  }

  [[noreturn]] static void throw_python_error() {
    python_error error;
    error.persist();
    throw error;
  }
};

// The running statistics that a backward will need, which the layer may have moved by then
Tensor copied(const Optional& running, const Tensor& x) { return running->to(accumulator(x), false, true); }

Ran run_fused(const Inputs& in, double momentum, Activation activation, double slope) {
  const Tensor& x = in.x;
  const Shape sizes = shape(x);
  const Kernels& kernels = *kernels_of(x.device().type());
  Ran ran{at::empty_like(x), {}, {}, {}, {in.training, in.eps, activation, slope, in.resident_bytes[1]}};
  ran.mean = in.training ? per_channel(x) : copied(in.running_mean, x);
  ran.var = in.training ? per_channel(x) : copied(in.running_var, x);
  const bool telling = in.residual && activation != Activation::none, by_output = activation == Activation::relu;
  const Tensor mask = telling && !by_output ? at::empty_like(x, x.options().dtype(at::kBool)) : Tensor();
  if (telling) ran.told = by_output ? ran.y : mask;
  const Tensor residual = in.residual ? in.residual->contiguous(*dense(x)) : Tensor();
  kernels.forward({sizes, data(x), data(residual), data(in.weight), data(in.bias), data(ran.y), data(mask),
                   data(ran.mean), data(ran.var), in.eps, in.training, activation, slope},
                  x, in.resident_bytes[0]);
  if (in.training && in.running_mean && in.running_var) {
    const auto count = static_cast<double>(sizes.N * sizes.S);
    kernels.follow({sizes.C, sizes.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32, data(ran.mean), data(ran.var),
                    in.running_mean->mutable_data_ptr(), in.running_var->mutable_data_ptr(), momentum, count / (count - 1)},
                   x);
  }
  return ran;
}

// Torch's own forward, bit for bit, be it cuDNN's; the eps is in the variance that it has saved.
Ran run_gated(const Inputs& in, double momentum) {
  const Tensor& x = in.x;
  auto [y, mean, inverse_std, reserve, kind] =
      at::_batch_norm_impl_index(x, in.weight, in.bias, in.running_mean, in.running_var, in.training, momentum, in.eps,
                                 at::globalContext().userEnabledCuDNN());
  const Settings settings{in.training, in.training ? 0.0 : in.eps, Activation::none, 0.0, in.resident_bytes[1]};
  if (!in.training) return {y, copied(in.running_mean, x), copied(in.running_var, x), {}, settings};
  const auto acc = accumulator(x);
  return {y, mean.to(acc), inverse_std.to(acc).pow_(-2), {}, settings};
}

Optional optional(PyObject* object) {
  return object == Py_None ? std::nullopt : Optional(THPVariable_Unpack(object));
}

// The weight of this batch in the running statistics, counted; without a momentum all batches weigh the same.
double counted(const std::optional<double>& momentum, const Optional& batches) {
  if (batches) batches->add_(1);
  return momentum ? *momentum : batches ? 1.0 / batches->item<double>() : 0.0;
}

// A tensor of torch's own type, followed by others or None
bool ordinary(PyObject* const* objects, Py_ssize_t count) {
  const auto tensor_or_none = [](PyObject* t) { return t == Py_None || THPVariable_CheckExact(t); };
  return THPVariable_CheckExact(objects[0]) && std::all_of(objects + 1, objects + count, tensor_or_none);
}

// x, residual, weight, bias, running_mean, running_var, z, training, eps; what the kernels' waves may fill is behind them
std::optional<Inputs> read(PyObject* const* a) {
  if (!ordinary(a, 7) || !PyFloat_Check(a[8])) return std::nullopt;
  Inputs in{THPVariable_Unpack(a[0]), optional(a[1]), optional(a[2]), optional(a[3]), optional(a[4]), optional(a[5]),
            optional(a[6]),           a[7] == Py_True, PyFloat_AS_DOUBLE(a[8]),
            {PyLong_AsLongLong(a[11]), PyLong_AsLongLong(a[12])}};
  const Tensor& x = in.x;
  const bool known = at::GradMode::is_enabled() && unwatched() && fits(x) && fits_channels(in.weight, x) &&
                     fits_channels(in.bias, x) && fits_channels(in.running_mean, x) &&
                     fits_channels(in.running_var, x) && (in.training || (in.running_mean && in.running_var)) &&
                     (!in.residual || alike(*in.residual, x));
  return known ? std::optional(std::move(in)) : std::nullopt;
}

template <class Run>
PyObject* attached(PyObject* const* a, const Run& run) {
  HANDLE_TH_ERRORS
  const std::optional<Inputs> in = read(a);
  const bool follows = (a[9] == Py_None || PyFloat_Check(a[9])) && (a[10] == Py_None || THPVariable_CheckExact(a[10]));
  if (!in || !follows) Py_RETURN_NONE;
  const auto momentum = a[9] == Py_None ? std::nullopt : std::optional(PyFloat_AS_DOUBLE(a[9]));
  const Optional batches = optional(a[10]);
  Tensor y;
  {
    const WithoutGil unlocked;
    const Ran ran = [&] {
      const at::NoGradGuard no_grad;
      return run(*in, counted(momentum, batches));
    }();
    y = Normalisation::apply(in->x, in->residual, in->weight, in->bias, in->z, ran);
  }
  return THPVariable_Wrap(std::move(y));
  END_HANDLE_TH_ERRORS
}

// What `read` reads first, momentum or None, the tensor that counts batches or None, the bytes of waves in forward and
// backward, activation, slope
PyObject* fused(PyObject*, PyObject* const* a, Py_ssize_t) {
  const auto activation = static_cast<Activation>(PyLong_AsLong(a[13]));
  const double slope = PyFloat_AsDouble(a[14]);
  if (a[1] != Py_None && (activation == Activation::silu || activation == Activation::hardswish)) Py_RETURN_NONE;
  return attached(a, [&](const Inputs& in, double momentum) { return run_fused(in, momentum, activation, slope); });
}

// The same without activation and slope
PyObject* gated(PyObject*, PyObject* const* a, Py_ssize_t) { return attached(a, run_gated); }

// Whether `fused` would take x, weight, bias, running_mean and running_var
PyObject* takes(PyObject*, PyObject* const* a, Py_ssize_t) {
  HANDLE_TH_ERRORS
  if (!ordinary(a, 5) || !at::GradMode::is_enabled() || !unwatched()) Py_RETURN_FALSE;
  const Tensor& x = THPVariable_Unpack(a[0]);
  const bool good = fits(x) && std::all_of(a + 1, a + 5, [&](PyObject* t) { return fits_channels(optional(t), x); });
  return PyBool_FromLong(good);
  END_HANDLE_TH_ERRORS
}

// How many gradients have been written over, for tests: no other way leads there without keeping the gradient.
PyObject* count_of_written_over(PyObject*, PyObject* const*, Py_ssize_t) { return PyLong_FromLongLong(written_over); }

template <class Function>
void put(PyObject* address, Function& to) {
  to = reinterpret_cast<Function>(PyLong_AsSize_t(address));
}

PyObject* connect_kernels(int64_t device, std::unique_ptr<const Kernels> kernels) {
  if (PyErr_Occurred()) return nullptr;
  kernels_by_device.at(static_cast<size_t>(device)) = std::move(kernels);
  Py_RETURN_NONE;
}

// The addresses of the CPU's kernels, and the two callables of `Connected`
PyObject* connect(PyObject*, PyObject* const* a, Py_ssize_t) {
  auto kernels = std::make_unique<CpuKernels>();
  put(a[0], kernels->run_forward);
  put(a[1], kernels->run_backward);
  put(a[2], kernels->run_follow);
  connected = {Py_NewRef(a[3]), Py_NewRef(a[4])};
  return connect_kernels(static_cast<int64_t>(c10::DeviceType::CPU), std::move(kernels));
}

// The number of a device type, and the addresses of the CUDA kernels for it and of torch's function for its stream
PyObject* connect_cuda(PyObject*, PyObject* const* a, Py_ssize_t) {
  HANDLE_TH_ERRORS
  auto kernels = std::make_unique<CudaKernels>();
  put(a[1], kernels->run_forward);
  put(a[2], kernels->run_backward);
  put(a[3], kernels->run_follow);
  put(a[4], kernels->workspace_bytes);
  put(a[5], kernels->current_stream);
  return connect_kernels(PyLong_AsLongLong(a[0]), std::move(kernels));
  END_HANDLE_TH_ERRORS
}

// Arguments are counted here, and their order is that of taylorkern/direct.py; nobody else calls.
template <PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t), Py_ssize_t arguments>
PyObject* called(PyObject* self, PyObject* const* a, Py_ssize_t count) {
  if (count == arguments) return function(self, a, count);
  return PyErr_Format(PyExc_TypeError, "taylorkern: %zd arguments given, %zd needed", count, arguments);
}

template <PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t), Py_ssize_t arguments>
PyMethodDef method(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&called<function, arguments>)),
          METH_FASTCALL, nullptr};
}

PyMethodDef methods[] = {method<takes, 5>("takes"), method<fused, 15>("fused"), method<gated, 13>("gated"),
                         method<connect, 5>("connect"), method<connect_cuda, 6>("connect_cuda"),
                         method<count_of_written_over, 0>("written_over"), {}};
PyModuleDef definition{PyModuleDef_HEAD_INIT, "taylorkern_autograd", nullptr, -1, methods,
                       nullptr,               nullptr,               nullptr, nullptr};

}  // namespace
}  // namespace taylorkern

#define TAYLORKERN_JOINED(a, b) a##b
#define TAYLORKERN_INIT(name) TAYLORKERN_JOINED(PyInit_, name)

PyMODINIT_FUNC TAYLORKERN_INIT(TAYLORKERN_MODULE)() { return PyModule_Create(&taylorkern::definition); }
