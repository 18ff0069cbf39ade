"""Copies: models of the same tensors as another, averages of its weights above all, that go through its cuts."""

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor, nn

# What wraps a model keeps it under one of these names: AveragedModel, DistributedDataParallel; torch.compile.
_WRAPPED = ("module", "_orig_mod")


def counterparts(model: nn.Module, copies: nn.Module | Iterable[nn.Module] | None) -> list[nn.Module]:
    """Of one copy, several or None, the modules whose parameters and buffers have the names and shapes of ``model``'s.

    That is the copy itself or what it wraps (``torch.optim.swa_utils.AveragedModel``, ``DistributedDataParallel``,
    ``torch.compile``). dtypes and devices may differ. Raises ValueError, naming the tensor, for a copy that lacks one,
    has it in another shape, or shares it otherwise than the model does.

    >>> from torch.optim import swa_utils
    >>> model = nn.Sequential(nn.Linear(2, 3))
    >>> average = swa_utils.AveragedModel(model)
    >>> counterparts(model, average) == [average.module]
    True
    """
    return [_counterpart(model, copy, number) for number, copy in enumerate(_listed(copies))]


def _listed(copies: nn.Module | Iterable[nn.Module] | None) -> Sequence[nn.Module]:
    if copies is None:
        return ()
    listed = [copies] if isinstance(copies, nn.Module) else list(copies)
    for number, copy in enumerate(listed):
        if not isinstance(copy, nn.Module):
            raise ValueError(f"copies[{number}] is a {type(copy).__name__}; a copy is a module, like the model")
    return listed


def _counterpart(model: nn.Module, copy: nn.Module, number: int) -> nn.Module:
    own = _all_names(model)
    candidates = list(_unwrapped(copy))
    best = max(candidates, key=lambda module: len(own.keys() & _all_names(module).keys()))
    found, what = _all_names(best), f"copies[{number}] ({type(copy).__name__})"
    for name, tensor in own.items():
        if name not in found:
            raise ValueError(f"{what} is no copy of the model: it has no {name}")
        if found[name].shape != tensor.shape:
            raise ValueError(
                f"{what} is no copy of the model: its {name} is {tuple(found[name].shape)}, the model's "
                f"{tuple(tensor.shape)}; was one of them cut without the other?"
            )
    for name, other in _torn(own, found):
        raise ValueError(f"{what} is no copy of the model: {name} and {other} are one tensor in one of them only")
    return best


def _unwrapped(module: nn.Module | None) -> Iterator[nn.Module]:
    """The module, what it wraps, what that wraps …"""
    while isinstance(module, nn.Module):
        yield module
        module = next((inner for name in _WRAPPED if (inner := module._modules.get(name)) is not None), None)


def _all_names(model: nn.Module) -> dict[str, Tensor]:
    parameters = model.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(model.named_buffers(remove_duplicate=False))}


def _torn(own: dict[str, Tensor], found: dict[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Names of one tensor in one model and of two in the other."""
    for a, b in ((own, found), (found, own)):
        first: dict[int, str] = {}
        for name in own:
            other = first.setdefault(id(a[name]), name)
            if b[name] is not b[other]:
                yield other, name
