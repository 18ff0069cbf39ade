"""Rules for operations that sum over channels: convolutions and matrix products."""

from collections.abc import Sequence

from torch import Tensor

from .labels import Strip
from .rules import Call, Strips, rule


@rule("mm", "bmm")
def matrix_product(call: Call) -> list[Strips]:
    return [_contract(call, *call.inputs)]


@rule("addmm", "baddbmm")
def biased_product(call: Call) -> list[Strips]:
    bias, a, b = call.inputs
    shape = call.outputs[0].shape
    return [call.meet([(shape, _contract(call, a, b)), (bias.shape, call.strips(bias))], shape)]


def _contract(call: Call, a: Tensor, b: Tensor) -> Strips:
    """[..., n, k] times [..., k, m]: k is summed over, n and m are carried on, what comes before goes together."""
    k, m = a.dim() - 2, a.dim() - 1
    strips_a, strips_b = call.strips(a), call.strips(b)
    if not any(s.axes for s in (*strips_a, *strips_b)):
        call.mixed += tuple(s.labels for s in (*strips_a, *strips_b))
    _sum_over(call, (a, b), [s for s in strips_a if s.dim == m], [s for s in strips_b if s.dim == k])
    free = [s for s in strips_a if s.dim == k] + [s for s in strips_b if s.dim == m]
    before = [(t.shape[:-2], [s for s in call.strips(t) if s.dim < k]) for t in (a, b)]
    batch = call.meet(before, a.shape[:-2])
    for strip in free:
        call.evidence.filters |= strip.axes
    call.vectors += [s.labels for s in (*batch, *free)]
    call.consume()
    return [Strip(s.dim, s.labels) for s in (*batch, *free)]


def _sum_over(call: Call, factors: tuple[Tensor, Tensor], a: Strips, b: Strips) -> None:
    """The contracted channels of both factors go together, provided that one factor is a weight that can mask them."""
    weight = [s for s in (*a, *b) if s.axes]
    for strip in weight:
        call.evidence.contracted |= strip.axes
    if len(a) != len(b) or not weight:
        given = any(call.carried(t) is None for t in factors)
        call.ledger.freeze([*a, *b], "model input" if given else None)
        return
    for x, y in zip(a, b, strict=True):
        call.ledger.unite(x.labels, y.labels)
        call.vectors.append(x.labels)
    for strip in weight:
        call.evidence.consumers |= strip.axes


@rule("convolution")
def convolution(call: Call) -> list[Strips]:
    """Input [N, C, *S], weight [O, C/groups, *K], or [C, O/groups, *K] where transposed."""
    x, weight, bias, shape = call["input"], call["weight"], call["bias"], call.outputs[0].shape
    call.ledger.freeze_quietly(s for s in call.strips(weight) if s.dim > 1)
    carried = call.keep_unless(call.strips(x), range(2, x.dim()))
    groups = call["groups"]
    spread = _dense if groups == 1 else _depthwise if groups == x.shape[1] else _grouped
    out = spread(call, call.single(carried, 1))
    met = [Strip(s.dim, s.labels) for s in carried if s.dim == 0]
    beside: list[tuple[Sequence[int], Strips]] = [(shape, [Strip(1, out.labels)] if out else [])]
    if bias is not None:
        beside.append(((*bias.shape, *[1] * (len(shape) - 2)), call.strips(bias)))
    return [met + call.meet(beside, shape)]


def _weight_strips(call: Call) -> tuple[Strip | None, Strip | None]:
    """The weight's strips along its input and its output dimension."""
    strips = call.strips(call["weight"])
    into, out = (0, 1) if call["transposed"] else (1, 0)
    return call.single(strips, into), call.single(strips, out)


def _dense(call: Call, inputs: Strip | None) -> Strip | None:
    """Every output channel sums over every input channel."""
    into, out = _weight_strips(call)
    _sum_over(call, (call["input"], call["weight"]), [inputs] if inputs else [], [into] if into else [])
    call.consume()
    return _filters(call, out)


def _depthwise(call: Call, inputs: Strip | None) -> Strip | None:
    """Output channel i·m + j is made of input channel i alone."""
    into, out = _weight_strips(call)
    multiplier = call.outputs[0].shape[1] // call["groups"]
    if call["transposed"]:
        call.ledger.freeze_quietly([out] if out else [])
        out = into.relabelled(into.labels.repeat_interleave(multiplier), 1) if into else None
    if inputs is None or out is None:
        call.freeze(s for s in (inputs, out) if s)
    else:
        call.ledger.unite(inputs.labels.repeat_interleave(multiplier), out.labels)
    return _passed_on(call, out)


def _grouped(call: Call, inputs: Strip | None) -> Strip | None:
    """Groups stay whole: all input and output channels of a group go together, and its inner width is fixed."""
    into, out = _weight_strips(call)
    within, across = (out, into) if call["transposed"] else (into, out)
    call.ledger.freeze_quietly([within] if within else [])
    if inputs is None or across is None:
        call.freeze(s for s in (inputs, across) if s)
        return _passed_on(call, None)
    groups = call["groups"]
    group = call.ledger.tie(across.labels.view(groups, -1).t())  # [groups]
    call.ledger.unite(inputs.labels, group.repeat_interleave(len(inputs.labels) // groups))
    if call["transposed"]:
        across = across.relabelled(group.repeat_interleave(call.outputs[0].shape[1] // groups))
    return _passed_on(call, across)


def _passed_on(call: Call, out: Strip | None) -> Strip | None:
    """Channels go through one by one; only a layer that can carry a gate takes over the place for it."""
    if call.layer is None:
        call.consume()
    call.makers = {}
    return _filters(call, out)


def _filters(call: Call, out: Strip | None) -> Strip | None:
    if out:
        call.evidence.filters |= out.axes
        call.vectors.append(out.labels)
    return out
