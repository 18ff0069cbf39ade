"""Scores: collects the gates' gradients and folds them, minibatch by minibatch, into statistics per unit."""

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable imports the whole compiler at once
from torch.optim import Optimizer

from . import weights
from .arrivals import Arrivals
from .attachment import Attachment
from .coupling import Coupling, Unit, couple
from .criteria import Criterion, change, criterion
from .curvature import Cotangents, Loss, cotangents
from .example import run, tensors
from .folding import LayersFolding
from .gram import CURVATURE, NEEDING_GRAM, READABLE, Block, Gram, gram_matrix, within
from .layers import scorable
from .minibatch import Minibatch, Values
from .outputs import OutputShares
from .state import untouched
from .tally import FROM_CURVATURE, Tally
from .wrapped import refuse_wrapped

_STATIC: dict[str, Callable[[nn.Module, Coupling], Tensor]] = {
    "scale": weights.scale,
    "filter_norm": weights.filter_norm,
}
_FROM_GATES = ("gate", "gate_squared", "gate_abs", "fisher", "bn_gate_squared", "fisher_change_squared")
_ON_REQUEST = ("weight_squared", "output_abs")  # each costs a pass of its own, so criteria that need it are announced
_SUMMED = {"mean": False, "sum": True}  # what a loss is of its samples'
# A unit that the second can't judge has no value in the first either.
_JUDGED_BY = {"bn_gate_squared": weights.scale, "weight_squared": weights.filter_norm}


class Scores:
    """Importance of every unit of ``model``, accumulated while it trains.

    ``model`` is converted (:func:`taylorkern.convert`). A unit is a set of channels that can only be removed
    together, found by running the model once on ``example_inputs`` (a tensor, a tuple of arguments or a dict of
    keyword arguments); with ``example_inputs=None`` each channel of each converted layer (of those named in
    ``layers``, if given) is a unit of its own.

    From then on every backward adds to the statistics: per minibatch, the s[n, c] of a unit's channels are summed
    before any square. A minibatch is a forward with all the backwards that follow it until the next forward. With
    ``optimizer``, one or several, it is what one of their steps sees: the samples of all forwards since the last step
    are its own, as where gradients are accumulated. Forwards without a backward in between count as one of the same
    samples, as where two views of them are compared. :meth:`step` ends a minibatch as well, and reading does; with
    ``optimizer=()`` nothing else. :meth:`discard` forgets one. A minibatch with a non-finite score is dropped whole and
    counted.
    A second derivative through a scored layer (a gradient penalty) is refused by autograd; ``detach()`` allows it.

    The loss of a minibatch, the sum of what its backwards start from, is taken to be the mean over its N samples: with
    k accumulated backwards each loss is divided by k. With ``reduction`` "sum" it is their sum, and the scores are
    divided by N. ``scaler``, a ``torch.amp.GradScaler``, is what scales it: its scale is taken out of the scores, and
    minibatches whose step it skips are dropped and counted, by the scale that falls then; read between ``update()``
    and the next backward. On a GPU, telling so waits for it where gradients are accumulated.

    Under ``torch.compile`` scored networks are one graph (``fullgraph=True``). No forward is seen there, so every
    backward is taken for one of another forward, unless the one before had ``retain_graph=True``: add several losses
    up, or G alone is right; and a curvature that no backward followed counts for the next one. Under a ``torch.func``
    transform nothing is scored, with a warning.

    On a GPU nothing here waits for it but the first minibatch, which moves indices there, and reading. A CUDA graph
    holds a whole step, :meth:`fold` at its end, captured after a few steps and a ``fold()`` outside: each replay then
    adds a minibatch. ``torch.cuda.make_graphed_callables`` knows no gates, so none of its replays is scored.

    The first dimension of what a layer is given is taken for the samples. Where that is not so in all of them (tokens
    or windows folded into it), G is right, but h and the matrix over units are of rows that are no samples: reading
    them warns.

    ``criteria`` names those that will be asked for; it is needed only for ``taylor_weight`` and ``taylor_output``,
    which cost a pass over the weights' gradients or the activations and so are not collected by default.

    ``gram`` has a matrix over units kept as well, for :meth:`gram`: "full" [U, U], "blocks" of it, one for the units
    whose first places share a layer, "reservoir", a uniform sample of ``gram_rows`` rows drawn by ``seed``, or "auto",
    "full" where 8·U² bytes fit ``gram_budget`` and "blocks" otherwise; None keeps none, unless ``criteria`` names
    "surgeon", which needs one ("auto"). All of it is float64 and counts towards ``gram_budget``, in bytes; no other
    statistic changes. A reservoir makes a GPU wait once a minibatch, and can't be captured by a CUDA graph.

    ``lockstep`` has :meth:`all_reduce` take the i-th minibatches of all processes for one, with G their mean before any
    square: as many processes as may share a batch, its scores are the same. Every minibatch's values are kept for it,
    until :meth:`reset`. Only ``taylor_weight`` is the mean over processes then.

    ``coupling`` is the model's, where it is at hand: it is not looked for again.

    Raises ValueError where the model is not converted or only in part, fails on the example, returns nothing
    differentiable, or has no unit that can be scored; for an unknown criterion; and where ``gram`` is unknown or takes
    more than ``gram_budget``. A Scores that was attached to the model before is then as it was.

    >>> from taylorkern import convert
    >>> model = convert(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)))
    >>> x = torch.rand(8, 1, 4, 4)
    >>> scores = Scores(model, x)
    >>> model(x).square().mean().backward()
    >>> scores.importance("taylor_fo").shape, scores.units[3].places
    (torch.Size([4]), (('1', 3),))
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        criteria: Iterable[str] = (),
        layers: Iterable[str] | None = None,
        seed: int = 0,
        gram: str | None = None,
        gram_budget: int = 2**31,
        gram_rows: int = 4096,
        coupling: Coupling | None = None,
        optimizer: Optimizer | Iterable[Optimizer] | None = None,
        scaler: Any = None,
        reduction: str = "mean",
        lockstep: bool = False,
    ) -> None:
        if reduction not in _SUMMED:
            raise ValueError(f"reduction={reduction!r} is not one of {', '.join(map(repr, _SUMMED))}")
        refuse_wrapped(model)
        if not any(scorable(module) for module in model.modules()):
            raise ValueError(f"{type(model).__name__} has no gated layer; call taylorkern.convert(model) first")
        if layers is not None and example_inputs is not None:
            raise ValueError("layers= goes with example_inputs=None; with an example, the coupling finds the layers")
        if gram_budget < 1 or gram_rows < 1:
            raise ValueError(f"gram_budget={gram_budget} and gram_rows={gram_rows} must be at least 1")
        criteria = list(criteria)
        wanted = {need for name in criteria if name not in NEEDING_GRAM for need in criterion(name).needs}
        if gram is None and not set(criteria).isdisjoint(NEEDING_GRAM):
            gram = "auto"
        self.model, self.seed = model, seed
        alone = example_inputs is None
        if coupling is not None and not coupling.fits(model):
            raise ValueError("coupling= is of another model, or of this one before or after a cut; leave it out")
        if coupling is None:
            coupling = _each_channel_alone(model, layers) if alone else couple(model, example_inputs)
        self.coupling: Coupling = coupling
        if not self.coupling.units:
            raise ValueError(f"no unit of {type(model).__name__} can be scored:\n{self.coupling.report()}")
        self._by_unit = LayersFolding(self.coupling)
        self._gram_budget = gram_budget
        matrix = None if gram is None else gram_matrix(gram, self.units, gram_budget, gram_rows, seed)
        self._outputs = list(self.coupling.layers) if "output_abs" in wanted else []
        names = (*_FROM_GATES, *FROM_CURVATURE, *(need for need in _ON_REQUEST if need in wanted))
        shapes = {name: (len(self._outputs),) if name == "output_abs" else () for name in names}
        self._attachment = Attachment(self, model, self.coupling.layers, every_element=bool(self._outputs))
        self._tally = Tally(
            shapes, len(self.units), self._attachment.gates, gram=matrix, lockstep=lockstep, summed=_SUMMED[reduction]
        )
        shares = OutputShares(self._outputs) if self._outputs else None
        told = (_telling(weakref.ref(self), event) for event in (Scores.step_begins, Scores.step_ends))
        self._arrivals = Arrivals(self._attachment, optimizer, scaler, _SUMMED[reduction], shares, *told)
        try:
            if not alone:
                self._check_differentiable(example_inputs)
            others = self._attachment.displaced()
        except BaseException:
            self._attachment.withdraw()
            self._arrivals.detach()
            raise
        for other in others:
            other.detach()
        self._weight_squares = weights.WeightSquares(model, self.coupling) if "weight_squared" in wanted else None
        self.discard()  # the example's forward began a minibatch

    @property
    def units(self) -> list[Unit]:
        """The units, in the order of every [U] tensor here; the same model gives the same order."""
        return self.coupling.units

    @property
    def lockstep(self) -> bool:
        """Whether the i-th minibatches of all processes are to count as one."""
        return self._tally.lockstep is not None

    @property
    def minibatches(self) -> int:
        """Minibatches in the statistics."""
        self.fold()
        return int(self._tally.statistics.count)

    @property
    def dropped(self) -> int:
        """Minibatches left out because a score was not finite."""
        self.fold()
        return int(self._tally.statistics.dropped)

    def importance(self, name: str) -> Tensor:
        """One importance per unit by criterion ``name`` (see ``taylorkern.criteria``), [U], float64; low goes first.

        A unit that a criterion can't judge (``bn_scale`` without batch normalisation) is infinitely important.

        Raises ValueError for an unknown criterion, or one whose statistics were not asked for; RuntimeError where
        no backward has delivered a score yet, or every minibatch was dropped.
        """
        if name in NEEDING_GRAM:
            raise ValueError(
                f"{name} chooses sets, so no unit has an importance of its own: "
                f'tk.prune(model, x, criterion="{name}") or tk.Pruner(..., criterion="{name}")'
            )
        return self._evaluate(criterion(name), name)

    def predicted_change(self, name: str = "taylor_so_fisher") -> Tensor:
        """The mean change of the loss that removing each unit is predicted to make, with its sign, [U], float64.

        E_b[-G] for "taylor_fo", E_b[½h - G] for "taylor_so" and "taylor_so_fisher" (h the empirical Fisher): what these
        criteria square before the mean. Below zero, the network is predicted to be better without the unit.

        Raises ValueError for another criterion, RuntimeError like :meth:`importance`.
        """
        return self._evaluate(change(name), name)

    @property
    def gram_source(self) -> str:
        """Whose rows the Gram matrix is made of: "fisher", or "curvature" from the first minibatch that had one on."""
        kept = self._gram_kept()
        self.fold()
        return kept.source

    def gram(self, form: str | None = None) -> list[Block]:
        """The Gram matrix over units, H = E_b[mean_n Σ r rᵀ], in float64, as blocks that together have every unit once.

        r [U] is s̃[n, :], each n giving one row ("fisher", :attr:`gram_source`); or, from the first minibatch after a
        reset that :meth:`curvature` was called in on, a row for each of its cotangents v, ∂⟨f[n], v[n]⟩/∂z[n, :],
        divided by √draws, and E_b is over those minibatches alone. So H's diagonal is the statistic of that name.
        ``form`` is "full", one block [U, U], or "blocks", one for the units whose first places share a layer; as it is
        kept by default, and a reservoir in full where that fits ``gram_budget``. The matrices are new, and where the
        statistics are.

        Raises ValueError where no Gram matrix is kept, for an unknown form or for "full" where "blocks" are kept, and
        RuntimeError like :meth:`importance`.

        >>> from taylorkern import convert
        >>> model = convert(nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)))
        >>> scores = Scores(model, torch.rand(8, 1, 4, 4), gram="full")
        >>> model(torch.rand(8, 1, 4, 4)).square().mean().backward()
        >>> [block] = scores.gram()
        >>> block.units.tolist(), torch.allclose(block.matrix.diag(), scores.importance("taylor_fg"))
        ([0, 1, 2], True)
        """
        kept = self._gram_kept()
        form = form or (kept.form if kept.form in READABLE else within(self.units, self._gram_budget))
        if form not in READABLE:
            raise ValueError(f"form={form!r} is not one of {', '.join(map(repr, READABLE))}")
        self.fold()
        self._tally.check_any(self._attachment.intact)
        return self._tally.blocks(lambda gram, minibatches: gram.blocks(self.units, form, minibatches))

    def _gram_kept(self) -> Gram:
        if self._tally.gram is None:
            raise ValueError("no Gram matrix is kept: ask for one from the start, Scores(..., gram='full')")
        return self._tally.gram

    def _evaluate(self, chosen: Criterion, name: str) -> Tensor:
        self.fold()
        return chosen.formula(*(self._statistic(need, name) for need in chosen.needs))

    def curvature(
        self,
        logits: Tensor,
        targets: Tensor | None = None,
        loss: str | Loss | Cotangents = "cross_entropy",
        method: str = "sketch",
        draws: int = 1,
        generator: torch.Generator | None = None,
        every_n: int = 1,
    ) -> None:
        """Add the Gauss-Newton diagonal h of this minibatch's loss, for ``taylor_so`` and ``obd``.

        Call it between the forward that made ``logits`` and ``loss.backward()``, in every minibatch or in some; a
        second call replaces the first, and the next forward drops one that no backward followed. Each
        draw is one backward from the logits to the gates, without weight gradients, for
        h_u = mean_n Σ_v (∂⟨f, v⟩/∂z[n, u])² over the cotangents v of ``loss`` (see ``taylorkern.curvature``):
        "cross_entropy", "mse", "bce_with_logits", a ``CrossEntropy``, or a callable of (logits, targets) that returns
        them. ``method`` "sketch" and "mc" are unbiased estimates from ``draws`` draws; "exact" takes a backward per
        column. With ``every_n`` above 1 the first call after a reset counts, then every n-th one; the
        others do nothing.

        With batch statistics (batch normalisation in training) samples act on one another. h then leaves out the
        products of different samples' rows, and comes out several times larger than the Gauss-Newton diagonal of the
        training-mode loss; "exact", which sends a class's column through all samples at once, is not the mean of the
        estimates there. Scoring in evaluation mode is exact, and ranks better for a network that will be evaluated
        (``bench/study/hessian.py`` measures both).

        Raises ValueError for an unknown loss or method, ``draws`` or ``every_n`` below 1, or logits that depend on no
        gate, and RuntimeError where the logits' graph has been freed.
        """
        if draws < 1 or every_n < 1:
            raise ValueError(f"draws={draws} and every_n={every_n} must be at least 1")
        if self._tally.asked % every_n:
            self._tally.asked += 1
            return
        if self._arrivals.unseen_forward():
            self.forward_begins()
        h, rows = torch.zeros((), dtype=torch.float64), list[Tensor]()
        kept = self._tally.rows_count(CURVATURE)
        repeats = draws if method != "exact" else 1
        for _ in range(repeats):
            for v in cotangents(logits, targets, loss, method, generator):
                found = self._attachment.rows(logits, v / len(logits))
                h = h + self._by_unit.gradients(found)[1]
                rows += self._by_unit.rows(found) if kept else []
        if not h.dim():
            raise ValueError(f"loss={loss!r} gave no cotangent for these logits")
        self._arrivals.h = h / repeats
        self._arrivals.rows = [some.div_(repeats**0.5) for some in rows]
        self._tally.asked += 1

    def step(self) -> bool:
        """End the minibatch under way; False where the ``scaler`` skipped its step, and it is dropped and counted.

        ``Pruner.step`` calls it. In a loop of your own it is needed only with ``optimizer=()``, or at once behind
        ``scaler.update()`` to know of a skipped step.
        """
        self._arrivals.close(self.coupling)
        if self._arrivals.unstepped():
            self._arrivals.scale.skip()
        self.fold()
        return not self._arrivals.scale.skipped

    def step_begins(self, optimizer: Optimizer) -> None:
        """An optimiser says so: a forward within its step follows what has arrived by now."""
        self._arrivals.close(self.coupling)

    def step_ends(self, optimizer: Optimizer) -> None:
        """An optimiser says so: the minibatch ends."""
        # Of an optimiser that takes the scaler's finding along, and is called even where it is to skip the step.
        found_inf = getattr(optimizer, "found_inf", None)
        if isinstance(found_inf, Tensor):
            self._arrivals.scale.skip(found_inf)
        self.fold()

    @property
    def expects_forward(self) -> bool:
        """Whether the next forward is to be told of even if no score has arrived."""
        return self._arrivals.expects_forward

    @_disable_dynamo
    def forward_begins(self) -> None:
        """Gates say so. What has arrived was the last forward's, and a curvature that no backward followed is gone."""
        self._arrivals.close(self.coupling)
        if self._arrivals.ended():
            self.fold()
        self._arrivals.begin()

    def forward_repeats(self) -> None:
        """Gates say so, in a backward: a checkpoint runs a forward, perhaps the first that is seen of it."""
        self._arrivals.scale.note()

    def backward_delivers(self) -> None:
        """Gates say so, in compiled code, whose forwards nobody sees: another backward was one of another forward."""
        if self._arrivals.another_backward():
            if self._arrivals.unseen_forward():
                self.forward_begins()
            self._arrivals.note_backward()

    def discard(self) -> None:
        """Forget the minibatch under way, of whose gradients no use is made: not for one whose step a scaler skips."""
        self._arrivals.discard()
        if self._weight_squares:
            self._weight_squares.clear()

    def reset(self) -> None:
        """Forget every minibatch so far."""
        self.discard()
        self._tally.reset()

    def detach(self) -> None:
        """Stop scoring: the layers run torch's forward again; the statistics stay readable."""
        self.fold()
        self._attachment.detach()
        self._arrivals.detach()
        if self._weight_squares:
            self._weight_squares.detach()

    def state_dict(self) -> dict[str, Any]:
        """The statistics, for ``torch.save``; what has arrived is folded first."""
        self.fold()
        return self._tally.state_dict(self.coupling.fingerprint)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict` of the same model, to the bit.

        A Gram matrix in it is left out where none is kept here. Raises ValueError, and changes nothing, for another
        model's state, or one that lacks a statistic or the Gram matrix in the form kept here.
        """
        self._tally.check(state, self.coupling.fingerprint)
        self.discard()
        self._tally.load_state_dict(state)

    def merge(self, state: Mapping[str, Any]) -> None:
        """Add a :meth:`state_dict` of the same model, from another process or epoch: its minibatches join those here.

        Reservoirs become one sample, uniform over both's rows. A Gram matrix in the state is left out where none is
        kept here. Raises ValueError, and changes nothing but that what has arrived is folded, where
        :meth:`load_state_dict` would, or where one side's Gram matrix has a curvature's rows and the other's Fisher's.
        """
        self.fold()
        self._tally.check(state, self.coupling.fingerprint)
        self._tally.merge(state)

    def all_reduce(self, group: Any = None) -> None:
        """Have in every process of ``group`` (``torch.distributed``; all by default) the minibatches of all of them.

        States are gathered and merged by rank, so every process ends with the same bits; for a moment each holds all
        states. With ``lockstep`` the i-th minibatches of all are one: what an optimiser's step sees where gradients are
        averaged. Else each of them is one of its own. Call it once, when the statistics are to be read, and
        :meth:`reset` before further minibatches: a second call would count the first one's again.

        Raises RuntimeError where there is no process group or this process is not in it, and ValueError, with
        everything in this process as it was, where :meth:`merge` does here: make the Scores alike in all of them.
        """
        self.fold()
        self._tally.all_reduce(self.coupling.fingerprint, group)
        self.discard()

    def check_statistics(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError unless the :meth:`state_dict` ``state`` holds everything that is collected here."""
        self._tally.check_statistics(state)

    def rebind(self, coupling: Coupling, kept: Tensor) -> None:
        """Follow a cut of the model: ``coupling`` is the one after it, ``kept`` [U'] the old indices of its units."""
        self.fold()
        self._arrivals.forget_curvature()
        self.coupling = coupling
        self._by_unit = LayersFolding(coupling)
        self._tally.keep(kept)

    @_disable_dynamo
    def fold(self) -> None:
        """Add what has arrived to the statistics, as a minibatch; called by itself when one ends, and by reading."""
        self._arrivals.close(self.coupling)
        with torch.inference_mode(False), torch.no_grad():
            minibatch = self._arrivals.take()
            if minibatch is None:
                return
            self._tally.add(minibatch, self._values(minibatch), self._by_unit.rows)

    def _values(self, minibatch: Minibatch) -> Values:
        others = {}
        device = next(iter(minibatch.parts[0].arrived.values()))[0].device
        if self._outputs:
            others["output_abs"] = minibatch.shares()
        if self._weight_squares:
            others["weight_squared"] = minibatch.scaled(self._weight_squares.drain(self.coupling, device), 2)
        return minibatch.values(self._by_unit, self._attachment.batch_norms, others)

    def _statistic(self, need: str, name: str) -> Tensor:
        if need in _STATIC:
            return _STATIC[need](self.model, self.coupling)
        if need == "uniform":
            generator = torch.Generator().manual_seed(self.seed)
            dense = self.coupling.dense
            return torch.rand(int(dense.max()) + 1, dtype=torch.float64, generator=generator)[dense]
        if need not in self._tally.statistics.sums:
            raise ValueError(f"{name} needs statistics that were not collected: Scores(..., criteria=[{name!r}])")
        self._tally.check_any(self._attachment.intact)
        mean = self._tally.mean(need)
        judged = _JUDGED_BY[need](self.model, self.coupling).isfinite() if need in _JUDGED_BY else torch.tensor(True)
        return torch.where(judged.to(mean.device), mean, torch.inf)

    def _check_differentiable(self, example_inputs: Any) -> None:
        with untouched(self.model), torch.enable_grad():
            self.model.eval()
            outputs = list(tensors(run(self.model, example_inputs)))
        if not any(output.requires_grad for output in outputs):
            raise ValueError(
                f"{type(self.model).__name__} returns nothing that can be differentiated back to a gate on the example "
                "inputs; scores need an output (logits, a loss) that depends on the layers with gradients on"
            )


def _telling(
    scores: "weakref.ref[Scores]", event: Callable[["Scores", Optimizer], None]
) -> Callable[[Optimizer], None]:
    """What an optimiser's step does to these scores, which may be gone by then."""

    def tell(optimizer: Optimizer) -> None:
        if (found := scores()) is not None:
            event(found, optimizer)

    return tell


def _each_channel_alone(model: nn.Module, layers: Iterable[str] | None) -> Coupling:
    """A coupling that couples nothing: every channel of every gated layer is a unit."""
    gated = {name: module for name, module in model.named_modules() if scorable(module)}
    names = list(gated) if layers is None else list(layers)
    unknown = [name for name in names if name not in gated]
    if unknown:
        raise ValueError(f"layer {unknown[0]!r} is no gated layer of this model; known are {', '.join(gated)}")
    return Coupling.alone({name: gated[name] for name in names})
