"""Weights to begin with: a file's state_dict, compared with the network's before anything is put in."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from taylorkern.errors import CommandError, listing, one_line

WRAPPERS = ("state_dict", "model", "model_state_dict", "module")
PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and of compiled models
COUNTER = "num_batches_tracked"  # missing from old files, and of no use beside a momentum


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name: .safetensors, or .pt and .pth, which can hold nothing but data.

    A dict that wraps them ({"state_dict": ...}, {"model": ...}) and the prefix of a data-parallel or compiled model are
    taken off. Raises CommandError where there is no such file, or it is none of these.
    """
    if not path.is_file():
        raise CommandError(f"--weights {path}: there is no such file")
    try:
        if path.suffix == ".safetensors":
            found: Any = safetensors.torch.load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on what is no such file, the reader raises nearly everything
        raise CommandError(
            f"--weights {path} is no file of weights ({one_line(error)[:200]}); give a .safetensors, or a .pt or .pth "
            "that holds a state_dict and no code"
        ) from error
    return _bare(path, found)


def put(path: Path, found: Mapping[str, Tensor], model: nn.Module) -> None:
    """Copy the weights ``found`` in ``path`` into ``model``.

    Raises CommandError, with the model as it was, where names or shapes are not the model's.
    """
    own = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
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


def _bare(path: Path, found: Any) -> dict[str, Tensor]:
    for wrapper in WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(wrapper), Mapping):
            found = found[wrapper]
    if not isinstance(found, Mapping) or not found or not all(isinstance(each, Tensor) for each in found.values()):
        raise CommandError(f"--weights {path} holds no state_dict: names and tensors, by themselves or as 'state_dict'")
    bare = dict(found)
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in bare):
            bare = {name.removeprefix(prefix): tensor for name, tensor in bare.items()}
    return bare
