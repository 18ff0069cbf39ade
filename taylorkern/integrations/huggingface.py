"""Pruning as a callback of transformers' Trainer."""

import base64
import io
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..coupling import Unit
from ..pruner import Pruner
from .training import Training

_STATE = "pruning"


class PruningCallback(TrainerCallback, ExportableState):
    """Prunes a Trainer's model while it trains.

    ``example_inputs`` and the keyword arguments are those of :class:`taylorkern.Pruner`: a model that takes tokens is
    given a dict, ``{"input_ids": ids}``. The model is converted when training begins.

    A step is the optimiser's, so that accumulated batches count once. Each round adds ``pruning/units`` and
    ``pruning/kept`` to ``trainer.state.log_history``. When the target is met, training goes on, or ends with ``stop``.
    With mode="mask", what is masked is cut when training ends.

    ``trainer.train(resume_from_checkpoint=...)`` goes on where a checkpoint was made, with the model, the Trainer and
    this callback built as before: the pruner's state is in its ``trainer_state.json``. Give the callback to the Trainer
    from the start, ``Trainer(..., callbacks=[...])``: it takes a pruned network's weights from the Trainer, which
    reads them before anything else, and hands them on when the cuts have been repeated. Without it there, by
    ``add_callback``, torch finds a size mismatch in them. Of several processes only the
    first one's statistics of the round under way are in the checkpoint. ``model_init`` does not go with resuming.

    The pruned network is the Trainer's model after training: ``taylorkern.save(trainer.model, path)``, and
    ``taylorkern.load(path, model)`` of a model built anew. ``from_pretrained`` builds the dense network, which cut
    weights don't fit.

    ``pruner`` is the Pruner, None before; ``removed`` has the units of every round of this training.

    Making a Trainer, or training where the callback was added later, raises ValueError with several processes unless
    mode="mask", with DataParallel, FSDP, DeepSpeed, ``load_best_model_at_end`` or
    ``restore_callback_states_from_checkpoint``; training raises what Pruner refuses, ValueError for weights of a pruned
    network without a pruner's state or for resuming with a callback that was added later, and RuntimeError where this
    callback has pruned a training already.

    >>> PruningCallback({"input_ids": torch.zeros(1, 8, dtype=torch.int64)}, every=30, step=100).removed
    []
    """

    def __init__(self, example_inputs: Any, *, stop: bool = False, **arguments: Any) -> None:
        if example_inputs is None:
            raise ValueError("pruning needs example_inputs: without them nobody knows which channels go together")
        self.stop = stop
        self._training = Training(example_inputs, arguments)
        self._waiting = _Waiting()

    @property
    def pruner(self) -> Pruner | None:
        """The pruner, once training has begun."""
        return self._training.pruner

    @property
    def removed(self) -> list[list[Unit]]:
        """The units of every round."""
        return self._training.removed

    def state(self) -> dict[str, Any]:
        """For ``trainer_state.json``, which keeps text alone."""
        return {"args": {}, "attributes": {_STATE: _as_text(self._training.state_dict())}}

    def on_init_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Refuse what can't be pruned, and see weights before they are loaded."""
        self._refuse(args)
        self._waiting.watch(given["model"])

    def _refuse(self, args: Any) -> None:
        for name, wrong in _REFUSED.items():
            if wrong(args):
                raise ValueError(f"{name}: {_WHY[name]}")
        self._training.refuse(args.world_size)

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Make the pruner; in a resumed training, repeat the cuts and hand the weights on."""
        model, optimizer = given["model"], given["optimizer"]
        scaler, optimizer = getattr(optimizer, "scaler", None), getattr(optimizer, "optimizer", optimizer)
        self._refuse(args)
        # Kept where the checkpoint is of a training without this callback: the Trainer asks for it when it saves.
        entry = state.stateful_callbacks.setdefault(type(self).__name__, {})
        saved = _of_text(entry.get("attributes", {}).get(_STATE, ""))
        if saved and not self._waiting.watches(model):
            raise ValueError(
                "this callback was added to a Trainer that was made already, which has read the checkpoint's weights "
                "unseen; to resume, give it to the Trainer from the start: Trainer(..., callbacks=[callback])"
            )
        self._waiting.leave()
        if not saved:
            self._waiting.refuse()
            self._training.begin(model, [optimizer], scaler)
            return
        moments = optimizer.state_dict()  # the Trainer has loaded the cut network's
        optimizer.state.clear()
        self._training.resume(saved, lambda: self._training.begin(model, [optimizer], scaler), self._waiting.hand_on)
        optimizer.load_state_dict(moments)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Step."""
        if self._training.step():
            # The Trainer counts this step only afterwards.
            state.log_history.append(self._training.figures() | {"step": state.global_step + 1})
        if self.stop and self._training.begun.done:
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Cut what is masked."""
        self._training.finish()


_REFUSED = {
    "several GPUs in one process": lambda args: args.n_gpu > 1,
    "fsdp": lambda args: bool(args.fsdp),
    "deepspeed": lambda args: bool(args.deepspeed),
    "load_best_model_at_end": lambda args: args.load_best_model_at_end,
    "restore_callback_states_from_checkpoint": lambda args: args.restore_callback_states_from_checkpoint,
}
_SHARDED = "pieces of channels can't be scored or cut; prune in one process, or in several with mode='mask'"
_WHY = {
    "several GPUs in one process": "DataParallel copies the model in every step, and copies are not scored; start a "
    "process for each with torchrun, or let this one see one GPU alone (CUDA_VISIBLE_DEVICES)",
    "fsdp": _SHARDED,
    "deepspeed": _SHARDED,
    "load_best_model_at_end": "the best model's weights may be of a wider network than the one that is left; leave it "
    "out, and resume from the checkpoint that you want",
    "restore_callback_states_from_checkpoint": "this would make the callback anew without its arguments; leave it out, "
    "the callback restores itself",
}


class _Waiting:
    """Weights of a pruned network that were to be loaded into the dense one, which can't be run until they are."""

    def __init__(self) -> None:
        self._model: nn.Module | None = None
        self._weights: dict[str, Tensor] = {}
        self._hooks: list[Any] = []

    def watch(self, model: nn.Module) -> None:
        """See what is loaded into ``model``, in place of whoever does so far."""
        if (other := _WATCHED.get(model)) is not None:
            other.leave()
        _WATCHED[model] = self
        self._model = model
        self._hooks.append(model.register_load_state_dict_pre_hook(self._put_aside))

    def watches(self, model: nn.Module) -> bool:
        """Whether what is loaded into ``model`` is seen."""
        return self._model is model and bool(self._hooks)

    def _put_aside(self, model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
        own = model.state_dict()
        other = [key for key in own.keys() & state_dict.keys() if own[key].shape != state_dict[key].shape]
        if prefix or not other:
            return
        self._weights = dict(state_dict)
        state_dict.update(own)
        self._hooks.append(model.register_forward_pre_hook(self._refuse_forward))

    def _refuse_forward(self, *_: Any) -> None:
        raise RuntimeError(
            "the weights of a pruned network that were loaded wait for trainer.train(resume_from_checkpoint=...), "
            "which repeats the cuts first; to use a pruned network otherwise, tk.save and tk.load it"
        )

    def refuse(self) -> None:
        """Raise ValueError where weights wait that nobody can use."""
        if self._weights:
            raise ValueError(
                "the checkpoint's weights have other shapes than the model's, and its trainer_state.json holds no "
                "pruner's state; build the model as the checkpoint's was built before it was pruned, or resume from a "
                "checkpoint that was saved with this callback"
            )

    def hand_on(self) -> None:
        """Load what waits."""
        if not self._weights or self._model is None:
            return
        found = self._model.load_state_dict(self._weights, strict=False)
        own = self._model.state_dict(keep_vars=True)
        loaded = {id(own[key]) for key in self._weights if key in own}  # of tied weights a checkpoint has one
        lacking = [key for key in found.missing_keys if id(own[key]) not in loaded]
        if lacking or found.unexpected_keys:
            raise ValueError(
                f"the checkpoint is of another model: it lacks {lacking} and has {found.unexpected_keys} beside what "
                "this model has; build the model as it was built before"
            )
        self._weights = {}

    def leave(self) -> None:
        """Watch no longer."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


_WATCHED: "weakref.WeakKeyDictionary[nn.Module, _Waiting]" = weakref.WeakKeyDictionary()


def _as_text(state: dict[str, Any]) -> str:
    """``state`` in letters and digits, "" for nothing.

    >>> _of_text(_as_text({"steps": 3})), _as_text({})
    ({'steps': 3}, '')
    """
    content = io.BytesIO()
    if state:
        torch.save(state, content)
    return base64.b64encode(content.getvalue()).decode()


def _of_text(text: str) -> dict[str, Any]:
    return torch.load(io.BytesIO(base64.b64decode(text)), weights_only=True) if text else {}
