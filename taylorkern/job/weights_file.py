"""Weights to begin with: a file's state_dict, compared with the network's before anything is put in."""

import pickle
from argparse import Namespace
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, TypeGuard

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from taylorkern.errors import CommandError, listing, one_line
from taylorkern.plan import PLAN

WRAPPERS = ("state_dict", "model", "model_state_dict", "module")
COMPILED = "_orig_mod"  # what torch.compile puts before the names of what it compiled, a whole network or a part
COUNTER = "num_batches_tracked"  # missing from old files, and of no use beside a momentum
AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # heads of GoogLeNet and Inception that serve in training alone


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name: .safetensors, or .pt, .pth and .ckpt, which can hold nothing but data.

    A dict that wraps them, {"state_dict": ...} or {"net": ..., "epoch": 3}, is taken off. Raises CommandError where
    there is no such file, or it is none of these.
    """
    if not path.is_file():
        raise CommandError(f"--weights {path}: there is no such file")
    try:
        found = _safetensors(path) if path.suffix == ".safetensors" else _pickled(path)
    except CommandError:
        raise
    except Exception as error:  # on what is no such file, the reader raises nearly everything
        raise CommandError(
            f"--weights {path} is no file of weights ({one_line(error)[:200]}); give a .safetensors, or a .pt, .pth or "
            ".ckpt that holds a state_dict"
        ) from error
    return _unwrapped(path, found)


def put(path: Path, found: Mapping[str, Tensor], model: nn.Module) -> None:
    """Copy the weights ``found`` in ``path`` into ``model``.

    What wrappers put before every name (module., model., _orig_mod.) is taken off where names are the model's without
    it; auxiliary heads that the model lacks are left out. Raises CommandError, with the model as it was, where names or
    shapes are not the model's.
    """
    own = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    found = _named_alike(found, own.keys())
    missing = [name for name in own if name not in found and not name.endswith(COUNTER)]
    foreign = [name for name in found if name not in own]
    told = [f"it lacks {listing(missing)}"] if missing else []
    told += [f"the model lacks {listing(foreign)}"] if foreign else []
    if told:
        why = "; ".join(told)
        raise CommandError(f"--weights {path} is of another network: {why}; give the --model it was saved of")
    wrong = [
        f"{name} is {list(found[name].shape)} there and {list(tensor.shape)} here"
        for name, tensor in own.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if wrong:
        raise CommandError(
            f"--weights {path} does not fit: {listing(wrong)}; where that is the last layer, the file is of another "
            "number of classes than --data: fine-tune such a network on this data first"
        )
    model.load_state_dict(dict(found), strict=False)


def _safetensors(path: Path) -> dict[str, Tensor]:
    with safetensors.safe_open(path, "pt") as file:
        if PLAN in (file.metadata() or {}):
            raise CommandError(
                f"--weights {path} is a pruned network of taylorkern's: tk.load(path, model) puts it into the dense "
                "model; to prune it further, give --model FILE.py:FUNCTION, a function that returns tk.load's network"
            )
    return safetensors.torch.load_file(path)


def _pickled(path: Path) -> Any:
    """Nothing in the file is run; of objects, only a script's options are let in, which are data."""
    try:
        with torch.serialization.safe_globals([Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not (objects := _objects(path)):
            raise ValueError("torch.load can't read it without running what is in it") from error
        raise CommandError(
            f"--weights {path} holds objects beside its tensors ({listing(objects)}), and making those could run "
            "anything; where you trust it, keep its tensors alone: "
            "torch.save(torch.load(path, weights_only=False)['state_dict'], 'weights.pt')"
        ) from error


def _objects(path: Path) -> list[str]:
    """The kinds of objects in a file of torch.save's, as far as they are told."""
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # no such file, and what is wrong with it is told already
        return []


def _unwrapped(path: Path, found: Any) -> dict[str, Tensor]:
    while isinstance(found, Mapping) and not _is_state(found):
        named = [found[name] for name in WRAPPERS if isinstance(found.get(name), Mapping)]
        states = named or [each for each in found.values() if _is_state(each)]
        if not states or (len(states) > 1 and not named):
            break
        found = states[0]
    if not _is_state(found):
        has = f" (it has {listing([repr(key) for key in found])})" if isinstance(found, Mapping) and found else ""
        raise CommandError(
            f"--weights {path} holds no state_dict{has}: names and tensors, by themselves or as 'state_dict'"
        )
    return dict(found)


def _is_state(found: Any) -> TypeGuard[Mapping[str, Tensor]]:
    if not isinstance(found, Mapping) or not found:
        return False
    return all(isinstance(name, str) and isinstance(each, Tensor) for name, each in found.items())


def _named_alike(found: Mapping[str, Tensor], own: Set[str]) -> dict[str, Tensor]:
    """``found`` by those names, among what is left of them without common beginnings, that ``own`` has most of."""
    named = [dict(found), {_not_compiled(name): tensor for name, tensor in found.items()}]
    while len(heads := {name.partition(".")[::2] for name in named[-1]}) and _one_beginning(heads):
        named.append({name.partition(".")[2]: tensor for name, tensor in named[-1].items()})
    best = max(named, key=lambda each: len(own & each.keys()))
    return {name: tensor for name, tensor in best.items() if name in own or not name.startswith(AUXILIARY)}


def _not_compiled(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != COMPILED)


def _one_beginning(split: set[tuple[str, str]]) -> bool:
    return len({head for head, _ in split}) == 1 and all(rest for _, rest in split)
