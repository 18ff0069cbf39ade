"""Processes: several that prune one model do it alike, or none does it."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .edits import confirmed
from .peers import Peers
from .scores import Scores
from .statistics import gathered

_DIFFERENT = {
    "weights": "the parameters are not the same in all processes: their gradients are not averaged, or something moves "
    "them in one alone. After a cut in mode 'cut' the model has to be wrapped anew, "
    "ddp = DistributedDataParallel(model), for the old wrapper averages nothing any more; go on from a checkpoint of "
    "before, or with mode='mask'",
    "choice": "the processes chose different units from the same statistics: are the pruners made with the same "
    "arguments, on machines of one kind?",
}


class Ballot:
    """What a process is about to do; to be the same in all of ``processes``, and to succeed in all or in none."""

    def __init__(self, processes: "Processes") -> None:
        self._processes, self._digests = processes, dict[str, str]()
        self._open = processes.several

    def same(self, what: str, *tensors: Tensor | None) -> None:
        """``tensors`` must have the same bits in all processes."""
        if self._open:
            self._digests[what] = _digest(tensors)

    def cast(self) -> None:
        """Say that everything succeeded here, once. Raises RuntimeError where it did not elsewhere, or differs."""
        if self._open:
            self._open = False
            _count(gathered({"error": "", "digests": self._digests}, self._processes.handle))

    def refuse(self, error: Exception) -> None:
        """Say that it failed here, unless this process has voted already."""
        if self._open:
            self._open = False
            gathered({"error": f"{type(error).__name__}: {error}", "digests": {}}, self._processes.handle)


class Processes:
    """Those of ``group`` that prune one model: "world" is all there are, None this one by itself.

    Raises ValueError where ``group`` is another word, or this process is not in it.

    >>> Processes("world").several
    False
    """

    def __init__(self, group: Any) -> None:
        if isinstance(group, str) and group != "world":
            raise ValueError(f"group={group!r} is no process group; give one, 'world' for all processes, or None")
        self._group = group
        Peers.of(group)  # or ValueError

    @property
    def several(self) -> bool:
        """Whether there are more than this one."""
        return Peers.of(self._group).size > 1

    @property
    def handle(self) -> Any:
        """The group as ``torch.distributed`` takes it."""
        return None if self._group == "world" else self._group

    @contextmanager
    def together(self, model: nn.Module) -> Iterator[Ballot]:
        """Within, edits of ``model`` stay in all processes or in none: before they do, all ask one another.

        The parameters, and what the ballot names, must have the same bits everywhere. Raises RuntimeError where they
        have not, or another process failed; this one's own errors go on as they are.
        """
        ballot = Ballot(self)
        try:
            if self.several:
                ballot.same("weights", checksums(model))
            with confirmed(ballot.cast):
                yield ballot
            ballot.cast()
        except Exception as error:
            ballot.refuse(error)
            raise

    @contextmanager
    def reduced(self, scores: Scores) -> Iterator[None]:
        """Within, ``scores`` hold the minibatches of all processes; their own again after an error."""
        if not self.several:
            yield
            return
        if not scores.lockstep:
            raise RuntimeError(
                "the pruner was made before the process group, so its scores are of this process alone: call "
                "torch.distributed.init_process_group first, or pass group=None"
            )
        own = scores.state_dict()
        try:
            scores.all_reduce(self.handle)
            yield
        except BaseException:
            scores.load_state_dict(own)
            raise

    def check_alike(self, model: nn.Module) -> None:
        """Raise RuntimeError in all processes unless the parameters of ``model`` have the same bits in all of them."""
        with self.together(model):
            pass


def checksums(model: nn.Module) -> Tensor:
    """The sum of every parameter's bits, read as whole numbers, [P], int64, on the CPU: buffers may differ.

    >>> checksums(nn.Linear(1, 1, bias=False).requires_grad_(False)).shape
    torch.Size([1])
    """
    return torch.stack([_bits(p.detach()).sum(dtype=torch.int64).cpu() for p in model.parameters()])


_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def _bits(tensor: Tensor) -> Tensor:
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.view(_WHOLE[tensor.element_size()])


def _digest(tensors: tuple[Tensor | None, ...]) -> str:
    told = hashlib.sha256()
    for tensor in tensors:
        told.update(b"none" if tensor is None else _bits(tensor.cpu()).contiguous().numpy().tobytes())
    return told.hexdigest()


def _count(votes: list[dict[str, Any]]) -> None:
    """Raise RuntimeError unless all votes are for it, and for the same."""
    for rank, vote in enumerate(votes):
        if vote["error"]:
            raise RuntimeError(f"this call changed nothing, for process {rank} of the group failed: {vote['error']}")
    for what, why in _DIFFERENT.items():
        if len({vote["digests"].get(what) for vote in votes}) > 1:
            raise RuntimeError(f"this call changed nothing: {why}")
