"""Pruning as a callback of Lightning's Trainer, of the package ``lightning`` or ``pytorch_lightning``."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any

from ..coupling import Unit
from ..example import converted
from ..pruner import Pruner
from .training import Training

PACKAGES = ("lightning.pytorch", "pytorch_lightning")
AVERAGING = {"StochasticWeightAveraging", "WeightAveraging", "EMAWeightAveraging"}


def _callback() -> Any:
    """A class that is a Callback of every package here: a Trainer refuses another package's."""
    bases = []
    for package in PACKAGES:
        with suppress(ModuleNotFoundError):
            bases.append(import_module(package).Callback)
    if not bases:
        raise ModuleNotFoundError("Lightning is not installed: pip install 'taylorkern[integrations]'")
    return type("Callback", tuple(bases), {})


_Callback: Any = _callback()


class PruningCallback(_Callback):
    """Prunes ``module`` of the LightningModule (a name; by default all of it) while a Trainer fits it.

    ``example_inputs`` and the keyword arguments are those of :class:`taylorkern.Pruner`; the optimisers and the loss's
    scaler are the Trainer's. Without ``example_inputs`` the first samples of the first batch are taken: of a pair (or
    longer) its first item, of a dict all of it. The model is converted when fitting begins.

    A step is a training batch in which an optimiser stepped, so that accumulated batches count once; in manual
    optimisation, too. After each round ``pruning/units`` and ``pruning/kept`` are logged. When the target is met,
    training goes on, or ends with ``stop``. With mode="mask", what is masked is cut when fitting ends.

    Lightning's checkpoints hold the pruner's state, and ``trainer.fit(..., ckpt_path=...)`` of a module built anew
    goes on from it: its cuts are repeated before the weights are loaded. A checkpoint without it is loaded as it is,
    and its network is the dense one. Of several processes only the first one's statistics of the round under way are
    in the checkpoint.

    The pruned network is ``module`` after fitting: ``taylorkern.save(module, path)``, and ``taylorkern.load(path,
    module)`` of a module built anew. Lightning's ``load_from_checkpoint`` builds the dense network, which cut weights
    don't fit.

    ``pruner`` is the Pruner, None before; ``removed`` has the units of every round of this fit.

    Fitting raises ValueError unless mode="mask" with several processes, or a callback that averages weights; with a
    strategy that shards the model, and for what Pruner refuses; RuntimeError where this callback has pruned a fit
    already.

    >>> PruningCallback(target=0.5, of="params", every=30, step=100).removed
    []
    """

    def __init__(self, example_inputs: Any = None, *, module: str = "", stop: bool = False, **arguments: Any) -> None:
        super().__init__()
        self.module, self.stop = module, stop
        self._training = Training(example_inputs, arguments)
        self._steps = 0
        self._aside: tuple[Mapping[str, Any], Mapping[str, Any]] | None = None  # state and weights to resume from

    @property
    def pruner(self) -> Pruner | None:
        """The pruner, once fitting has begun."""
        return self._training.pruner

    @property
    def removed(self) -> list[list[Unit]]:
        """The units of every round."""
        return self._training.removed

    @property
    def state_key(self) -> str:
        """Its name in a checkpoint: callbacks of different modules have different ones."""
        return self._generate_state_key(module=self.module)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return self._training.state_dict()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse what can't be pruned, and see checkpoints before Lightning loads their weights."""
        if stage != "fit":
            return
        if trainer.strategy.restore_checkpoint_after_setup:
            raise ValueError(
                f"{type(trainer.strategy).__name__} shards the model, and pieces of channels can't be cut; "
                "prune with strategy='ddp' and mode='mask', or on one device"
            )
        self._training.refuse(trainer.world_size)
        if not self._training.masks and (averaging := _averaging(trainer.callbacks)):
            raise ValueError(
                f"{averaging} keeps an average of the weights as they were before the cuts, of other shapes; give "
                "PruningCallback mode='mask', by which weights keep their shapes while training, or leave it out"
            )
        theirs = pl_module.on_load_checkpoint

        def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
            theirs(checkpoint)
            self._put_aside(pl_module, checkpoint)

        pl_module.on_load_checkpoint = on_load_checkpoint

    def _put_aside(self, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """The weights wait until there are optimisers to cut along with the module, which keeps its own so long."""
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state:
            self._aside = state, checkpoint["state_dict"]
            checkpoint["state_dict"] = pl_module.state_dict()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin, where it is known with what; Lightning restores the optimisers' state afterwards."""
        pl_module.__dict__.pop("on_load_checkpoint", None)
        pl_module.optimizer_step = _backward_first(pl_module.optimizer_step)
        if self._aside is not None:
            (state, weights), self._aside = self._aside, None
            self._training.resume(
                state,
                lambda: self._begin(trainer, pl_module),
                lambda: pl_module.load_state_dict(weights, strict=pl_module.strict_loading),
            )
        elif self._training.example_inputs is not None:
            self._begin(trainer, pl_module)

    def _begin(self, trainer: Any, pl_module: Any) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._training.begin(pl_module.get_submodule(self.module), trainer.optimizers, scaler)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Count steps from here."""
        self._steps = trainer.global_step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begin with the first batch, if not before."""
        if self.pruner is None:
            self._training.example_inputs = _example(batch)
            self._begin(trainer, pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Step, where an optimiser has."""
        if trainer.global_step == self._steps:
            return
        self._steps = trainer.global_step
        if self._training.step():
            self.log_dict(self._training.figures())
        if self.stop and self._training.begun.done:
            trainer.should_stop = True

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the module as it was."""
        pl_module.__dict__.pop("optimizer_step", None)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Cut what is masked, where training took place: Lightning has moved the module away from there."""
        away = pl_module.device
        pl_module.to(trainer.strategy.root_device)
        self._training.finish()
        pl_module.to(away)


def _averaging(callbacks: Iterable[Any]) -> str:
    """The first of them that averages weights, by the name of its class, or ""."""
    kinds = [type(each) for each in callbacks]
    return next((kind.__name__ for kind in kinds if AVERAGING & {base.__name__ for base in kind.__mro__}), "")


def _backward_first(optimizer_step: Callable[..., None]) -> Callable[..., None]:
    """The hook, but with the first forward and backward before the optimiser's step, not within it.

    A step sees what was accumulated before it. What runs within it is a minibatch of its own.
    """

    def step(epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any]) -> None:
        first = [optimizer_closure()]
        optimizer_step(epoch, batch_idx, optimizer, lambda: first.pop() if first else optimizer_closure())

    return step


def _example(batch: Any) -> Any:
    """The first two samples of what a module is given of ``batch``.

    >>> import torch
    >>> _example((torch.zeros(8, 3), torch.zeros(8))).shape
    torch.Size([2, 3])
    """
    if isinstance(batch, Sequence) and len(batch):
        batch = batch[0]
    return converted(batch, lambda t: t[:2].detach().clone() if t.dim() else t)
