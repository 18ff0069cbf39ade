"""The CUDA C++ kernels: compiled or loaded at the first operation on a GPU, never at import.

They serve in two ways, with the same results to the bit: ``streamed`` passes over whole tensors, ``resident`` takes
channels in waves that stay in the GPU's second-level cache from one pass to the next.
"""

import ctypes
import threading
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import architectures, build, frame
from .native import ORIGINS, Status
from .recipe import CUDA
from .toolchain import BuildError

DTYPES = {dtype: code for dtype, code in frame.DTYPES.items() if dtype is not torch.float64}
OPERATIONS = ("channel_scores", "batch_norm_act", "batch_norm_act_backward")

# Of the second-level cache, what a wave may fill: what is written passes through the cache as well, other streams use
# it, and of large GPUs each half keeps its own copy of some lines.
RESIDENT_SHARE = 0.6

_lock = threading.Lock()
_outcome: build.Library | BuildError | None = None  # None before the first use
_served: frozenset[int] = frozenset()  # indices of the devices that the library has code for


class Kernels:
    """A provider: the kernels in one of their ways."""

    DTYPES = DTYPES

    def __init__(self, name: str, resident: bool) -> None:
        self.__name__ = name
        self.resident = resident

    def supports(self, operation: str, tensor: Tensor) -> bool:
        """Whether ``operation`` on tensors like this one is served here. The first yes has loaded the kernels."""
        known = operation in OPERATIONS and tensor.dtype in DTYPES and tensor.is_cuda
        plain = tensor.layout is torch.strided and not tensor.is_neg() and tensor.dim() >= 2
        return known and plain and serves(tensor.get_device())

    def resident_bytes(self, device: torch.device) -> int:
        """What a wave of channels may fill of the device's second-level cache; 0 where tensors are taken whole."""
        return _resident_bytes(device) if self.resident else 0

    def status(self) -> Status:
        return status()

    def channel_scores(self, a: Tensor, g: Tensor) -> Tensor:
        """``taylorkern::channel_scores`` of :mod:`taylorkern.ops`."""
        return frame.channel_scores(_Frame(a, self.resident_bytes(a.device)), a, g)

    def batch_norm_act(self, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        """``taylorkern::batch_norm_act`` of :mod:`taylorkern.ops`."""
        return frame.batch_norm_act(_Frame(x, self.resident_bytes(x.device)), x, *rest)

    def batch_norm_act_backward(self, dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        """``taylorkern::batch_norm_act_backward`` of :mod:`taylorkern.ops`."""
        return frame.batch_norm_act_backward(_Frame(x, self.resident_bytes(x.device)), dy, x, *rest)


streamed = Kernels("cuda", resident=False)
resident = Kernels("cuda resident", resident=True)


def serves(device: int) -> bool:
    """Whether the kernels can run on the GPU of this index. The first call loads or compiles them."""
    if _outcome is None:
        with _lock:
            if _outcome is None:
                _load()
    return device in _served


def addresses() -> tuple[int, ...] | None:
    """Of the kernels that csrc/autograd_kernels.h calls, and of torch's own function for the current stream.

    None where the kernels aren't loaded, or torch has no such function.
    """
    if not isinstance(_outcome, build.Library):
        return None
    try:
        torch_cuda = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"))
        stream = ctypes.cast(torch_cuda.aoti_torch_get_current_cuda_stream, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None
    return (*_outcome.module.addresses, stream) if stream else None


def status() -> Status:
    """What a first use has found, or would find; compiles and loads nothing."""
    if isinstance(_outcome, BuildError):
        return Status(False, str(_outcome))
    if _outcome is None:
        return _foreseen()
    module = _outcome.module
    if not _served:
        return Status(False, _devices(_outcome)[1])
    compiler = f"nvcc {module.cuda} with {module.compiler}"
    detail = {"path": str(_outcome.path), "compiler": compiler, "architectures": module.architectures}
    return Status(True, ORIGINS[_outcome.origin], detail)


def follows(running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor) -> bool:
    """Whether these are what :func:`follow` takes: [C] tensors of float32, on one GPU that is served already."""
    device, shape = mean.device, mean.shape
    return (
        mean.is_cuda
        and device.index in _served
        and all(
            t.dtype is torch.float32
            and t.shape == shape
            and t.device == device
            and t.is_contiguous()
            and not t.is_neg()
            for t in (running_mean, running_var, var, mean)
        )
    )


def follow(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, momentum: float, unbias: float
) -> None:
    """See :func:`taylorkern.backends.follow`."""
    _launch(
        mean.device, "follow", mean.data_ptr(), var.data_ptr(), running_mean.data_ptr(), running_var.data_ptr(),
        momentum, unbias, len(mean), DTYPES[mean.dtype], _stream(mean.device),
    )  # fmt: skip


class _Frame(frame.Frame):
    __slots__ = ("resident_bytes",)

    def __init__(self, x: Tensor, resident_bytes: int) -> None:
        super().__init__(x)
        self.resident_bytes = resident_bytes

    def call(self, kernel: str, *arguments: Tensor | float | None) -> None:
        """Put a kernel on the current stream: tensors become addresses, 0 for none, and numbers stay what they are."""
        arguments = tuple(map(frame.aligned, arguments))  # held until the kernel is on its stream
        passed = [0 if t is None else t if isinstance(t, _NUMBERS) else t.data_ptr() for t in arguments]
        shape = (*self.sizes(), self.layout, DTYPES[self.dtype])
        # Torch's allocator gives a freed piece of memory to nobody but the stream that it was asked on, and what is put
        # there later runs later. So the workspace, and whatever the frame has made, may go when this returns, though
        # the kernel has not run yet: no event, no waiting, and a graph can capture the call.
        workspace = torch.empty(_kernels().workspace_bytes(*shape), dtype=torch.uint8, device=self.device)
        stream = _stream(self.device)
        _launch(self.device, kernel, *passed, *shape, stream, workspace.data_ptr(), self.resident_bytes)


_NUMBERS = (int, float)  # bool too


def _launch(device: torch.device, kernel: str, *arguments: float) -> None:
    """Call the library with ``device`` as the current one: CUDA takes no stream of another."""
    function = getattr(_kernels(), kernel)
    if torch.cuda.current_device() == device.index:
        function(*arguments)
        return
    with torch.cuda.device(device):
        function(*arguments)


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


@cache
def _resident_bytes(device: torch.device) -> int:
    return int(RESIDENT_SHARE * torch.cuda.get_device_properties(device).L2_cache_size)


def _kernels() -> ModuleType:
    if isinstance(_outcome, build.Library):
        return _outcome.module
    raise _outcome or BuildError("the CUDA kernels aren't loaded; ask supports() first")


def _load() -> None:
    """Find out, once, what serves; one line says what does not."""
    global _outcome, _served
    outcome: build.Library | BuildError
    try:
        outcome = build.load(CUDA)
        _served, lacking = _devices(outcome)
    except BuildError as error:
        outcome, lacking = error, str(error)
    if lacking:
        warnings.warn(
            "taylorkern: Triton serves GPUs, or the slower PyTorch reference where it can't, for want of CUDA C++ "
            f"kernels: {lacking}",
            RuntimeWarning,
            stacklevel=2,
        )
    _outcome = outcome  # last: what others see first is whole


def _devices(library: build.Library) -> tuple[frozenset[int], str]:
    """The devices that ``library`` has code for, and what to say of the others."""
    built = architectures.parsed(library.module.architectures)
    capabilities = dict(enumerate(architectures.visible()))
    served = frozenset(i for i, capability in capabilities.items() if architectures.cover(built, [capability]))
    others = [f"GPU {i} ({major}.{minor})" for i, (major, minor) in capabilities.items() if i not in served]
    if not others:
        return served, ""
    return served, (
        f"{library.path} is for {library.module.architectures}, not for {', '.join(others)}; correct or unset "
        f"{architectures.VARIABLE}"
    )


def _foreseen() -> Status:
    try:
        wanted = build.Wanted.here(CUDA)
    except BuildError as error:
        return Status(False, str(error))
    if found := wanted.locate():
        return Status(True, f"built, not loaded yet ({found[1]})", {"path": str(found[0])})
    if wanted.missing:
        return Status(False, str(wanted.missing))
    where = {"cache": str(build.cache_root()), "compiler": f"{wanted.tools.command} {wanted.tools.identity}"}
    return Status(True, "not built yet: the first use compiles", where)
