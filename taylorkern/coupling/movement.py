"""Rules for operations that move elements without changing them: executed on the labels themselves."""

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor

from .labels import Plane, Strip
from .rules import Call, Strips, not_understood, rule, varying, wrapped


@rule("view", "_unsafe_view", "_reshape_alias", "unsqueeze", "squeeze")
def reshape(call: Call) -> list[Strips]:
    if not call.outputs[0].numel():
        return not_understood(call)  # nothing tells which dimensions correspond
    asked = call.arguments.get("size") or ()
    flexible = list(asked).index(-1) if -1 in asked else None
    blocks = _blocks(call.shape, call.outputs[0].shape)
    renamed = _renamed(blocks, call.shape, call.outputs[0].shape)
    new: Strips = []
    for strip in call.laid(call["self"]):
        if strip.plane and renamed.keys() >= set(strip.plane.dims):
            new.append(strip.moved(renamed.__getitem__))
            continue
        olds, news = next(block for block in blocks if strip.dim in block[0])
        line = call.strip_of(strip)
        new += _regroup(call, line, [call.shape[d] for d in olds], strip.dim - olds[0], news, flexible)
    return [new]


def _renamed(blocks: list[tuple[range, range]], before: Sequence[int], after: Sequence[int]) -> dict[int, int]:
    """Old dimension → new one, of those that stay as they are but for others of size 1."""
    pairs = [([d for d in olds if before[d] > 1], [d for d in news if after[d] > 1]) for olds, news in blocks]
    return {olds[0]: news[0] for olds, news in pairs if len(olds) == len(news) == 1}


def _blocks(before: Sequence[int], after: Sequence[int]) -> list[tuple[range, range]]:
    """The shortest runs of old and new dimensions that hold the same elements.

    >>> _blocks([2, 6, 5, 5], [2, 3, 2, 25])
    [(range(0, 1), range(0, 1)), (range(1, 2), range(1, 3)), (range(2, 4), range(3, 4))]
    """
    blocks, i, j = [], 0, 0
    while i < len(before) and j < len(after):
        first_i, first_j = i, j
        size_i, size_j = before[i], after[j]
        i, j = i + 1, j + 1
        while size_i != size_j:
            if size_i < size_j:
                size_i, i = size_i * before[i], i + 1
            else:
                size_j, j = size_j * after[j], j + 1
        blocks.append((range(first_i, i), range(first_j, j)))
    return blocks


def _regroup(call: Call, strip: Strip, sizes: list[int], position: int, news: range, flexible: int | None) -> Strips:
    """Lay the labels of one old dimension over a run of new ones."""
    outer, inner = prod(sizes[:position]), prod(sizes[position + 1 :])
    line = strip.labels.repeat_interleave(inner).repeat(outer)
    shape = call.outputs[0].shape
    block = line.view([shape[d] for d in news])
    varying = [d for d in news if shape[d] > 1 and not _constant(block, d - news[0])]
    if not varying:
        varying = [d for d in news if shape[d] > 1][-1:]
    at = tuple(d - news[0] for d in varying)
    plane = Plane(tuple(varying), block[tuple(slice(None) if d in at else 0 for d in range(block.dim()))])
    if len(varying) == 1:
        return [strip.relabelled(plane.labels, varying[0])]
    stays = call.choose(_options(varying, shape, flexible, call.owned), plane)
    return [Strip(stays, plane.line(stays), strip.axes, plane)]


def _options(varying: list[int], shape: Sequence[int], flexible: int | None, owned: frozenset[int]) -> list[int]:
    """Which two of the new dimensions may become shorter, the likelier first.

    Heads go as a whole, where the module counts them in an attribute, which can follow. Other code that splits a
    dimension fixes the number of parts and computes their length, unless it says otherwise by a -1.
    """
    kept = [d for d in reversed(varying) if shape[d] in owned]
    said = [flexible] if flexible in varying else []
    return list(dict.fromkeys([*kept, *said, *reversed(varying)]))[:2]


def _constant(block: Tensor, dim: int) -> bool:
    return bool((block == block.narrow(dim, 0, 1)).all())


@rule("permute", "transpose", "t")
def permute(call: Call) -> list[Strips]:
    order = _order(call, call["self"].dim())
    return [[s.moved(order.index) for s in call.laid(call["self"])]]


def _order(call: Call, rank: int) -> list[int]:
    if "dims" in call.arguments:
        return [wrapped(d, rank) for d in call["dims"]]
    order = list(range(rank))
    a, b = (wrapped(call["dim0"], rank), wrapped(call["dim1"], rank)) if "dim0" in call.arguments else (0, rank - 1)
    order[a], order[b] = order[b], order[a]
    return order


@rule("as_strided")
def as_strided(call: Call) -> list[Strips]:
    """Understood only where it renames the strides of single-element dimensions, as pooling in channels_last does."""
    new = call.outputs[0]
    same = new.shape == call.shape and all(
        a == b for n, a, b in zip(new.shape, new.stride(), call.stride, strict=True) if n > 1
    )
    return [call.strips(call["self"])] if same else not_understood(call)


@rule("expand")
def expand(call: Call) -> list[Strips]:
    more = call.outputs[0].dim() - call["self"].dim()
    return [[s.moved(lambda d: d + more) for s in call.laid(call["self"])]]


@rule("repeat")
def repeat(call: Call) -> list[Strips]:
    before, times = call["self"], call["repeats"]
    new = len(times) - before.dim()
    return [[s.relabelled(s.labels.repeat(times[s.dim + new]), s.dim + new) for s in call.strips(before)]]


@rule("slice")
def slice_(call: Call) -> list[Strips]:
    x = call["self"]
    dim = wrapped(call["dim"], x.dim())
    start, _, step = slice(call["start"], call["end"], call["step"]).indices(x.shape[dim])
    length = call.outputs[0].shape[dim]
    return [_taken(call, x, dim, start, length, step)]


def _taken(call: Call, x: Tensor, dim: int, start: int, length: int, step: int = 1) -> Strips:
    """The labels of a slice along ``dim``, of a plane's other dimensions those that are in it."""
    if length == x.shape[dim] and step == 1:
        return call.laid(x)
    new: Strips = []
    for strip in call.laid(x):
        if strip.plane and dim in strip.plane.dims and dim != strip.dim and length:
            at = strip.plane.dims.index(dim)
            labels = strip.plane.labels.movedim(at, 0)[start : start + length * step : step].movedim(0, at)
            new.append(strip.on(Plane(strip.plane.dims, labels)))
        else:
            line = call.strip_of(strip) if strip.dim == dim or not length else strip
            new += _replace([line], dim, lambda s: _part(call, s, start, length, step))
    return new


def _replace(strips: Strips, dim: int, change: Callable[[Strip], Strips]) -> Strips:
    return [new for s in strips for new in (change(s) if s.dim == dim else [s])]


def _part(call: Call, strip: Strip, start: int, length: int, step: int) -> Strips:
    """A slice of labelled channels. Equal parts are tied index by index; of any other slice the channels freeze."""
    labels = strip.labels
    size = len(labels)
    block = step == 1 and length > 1 and size % length == 0 and start % length == 0
    stripes = step > 1 and size % step == 0 and length == size // step and length > 1
    if block:
        call.ledger.tie(labels.view(-1, length))
    elif stripes:
        call.ledger.tie(labels.view(-1, step).t())
    else:
        call.freeze([strip])
    return [strip.relabelled(labels[start : start + length * step : step])] if length > 1 else []


@rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes")
def split(call: Call) -> list[Strips]:
    x = call["self"]
    dim = wrapped(call["dim"], x.dim())
    start, parts = 0, []
    for part in call.outputs:
        parts.append(_taken(call, x, dim, start, part.shape[dim]))
        start += part.shape[dim]
    return parts


@rule("select", "unbind")
def select(call: Call) -> list[Strips]:
    x = call["self"]
    dim = wrapped(call["dim"], x.dim())
    kept = call.keep_unless(call.laid(x), [dim])
    first = call.arguments.get("index", 0) % x.shape[dim]
    return [[_at_index(s, dim, first + i) for s in kept] for i in range(len(call.outputs))]


def _at_index(strip: Strip, dim: int, index: int) -> Strip:
    """What is left of ``strip`` where another dimension ``dim`` goes, of which ``index`` is taken."""
    if strip.plane and dim in strip.plane.dims:
        dims = tuple(d for d in strip.plane.dims if d != dim)
        strip = strip.on(Plane(dims, strip.plane.labels.select(strip.plane.dims.index(dim), index)))
    return strip.moved(lambda d: d - (d > dim))


@rule("cat")
def cat(call: Call) -> list[Strips]:
    # torch lets empty tensors of shape [0] take part in any concatenation.
    pieces = [t for t in call["tensors"] if t.dim() > 1 or t.numel()]
    dim = wrapped(call["dim"], pieces[0].dim())
    shape = list(call.outputs[0].shape)
    shape[dim] = 1
    beside = [([1 if d == dim else n for d, n in enumerate(t.shape)], call.strips(t)) for t in pieces]
    met = call.meet(beside, shape)
    along = [[s for s in call.strips(t) if s.dim == dim] for t in pieces]
    for layer in range(max(map(len, along))):
        labels = [
            strips[layer].labels if layer < len(strips) else torch.zeros(t.shape[dim], dtype=torch.int64)
            for strips, t in zip(along, pieces, strict=True)
        ]
        met.append(Strip(dim, torch.cat(labels)))
    return [met]


@rule("stack")
def stack(call: Call) -> list[Strips]:
    pieces = call["tensors"]
    dim = wrapped(call["dim"], pieces[0].dim() + 1)
    met = call.meet([(t.shape, call.strips(t)) for t in pieces], pieces[0].shape)
    return [[s.at(s.dim + (s.dim >= dim)) for s in met]]


@rule("constant_pad_nd")
def pad(call: Call) -> list[Strips]:
    x, amounts = call["self"], call["pad"]

    def padded(strip: Strip) -> Strips:
        k = 2 * (x.dim() - 1 - strip.dim)
        before, after = amounts[k : k + 2] if k < len(amounts) else (0, 0)
        if min(before, after) < 0:
            call.freeze([strip])
            return []
        return [strip.relabelled(torch.nn.functional.pad(strip.labels, (before, after)))]

    return [[new for strip in call.strips(x) for new in padded(strip)]]


@rule("flip")
def flip(call: Call) -> list[Strips]:
    x = call["self"]
    flipped = {wrapped(d, x.dim()) for d in call["dims"]}
    return [[s.relabelled(s.labels.flip(0)) if s.dim in flipped else s for s in call.strips(x)]]


@rule("roll")
def roll(call: Call) -> list[Strips]:
    """A shift is a number in the code: rolled channels would no longer meet the same partners."""
    x = call["self"]
    dims = [wrapped(d, x.dim()) for d in call["dims"]] or range(x.dim())
    return [call.freeze_along(call.strips(x), dims)]


@rule("index_select", "embedding")
def index_select(call: Call) -> list[Strips]:
    x, indices = call.inputs
    dim = wrapped(call.arguments.get("dim", 0), x.dim())
    call.freeze(call.strips(indices))
    more = call.outputs[0].dim() - x.dim()
    return [[s.at(s.dim + more * (s.dim > dim)) for s in call.keep_unless(call.strips(x), [dim])]]


@rule("index")
def index(call: Call) -> list[Strips]:
    """Indexed dimensions keep their size; the others move as torch's advanced indexing lays them out."""
    x, indices = call["self"], call["indices"]
    taken = [d for d, i in enumerate(indices) if i is not None]
    for i in indices:
        call.freeze(call.strips(i))
    if any(i is not None and i.dtype == torch.bool for i in indices):
        call.freeze(call.strips(x))
        return []
    kept = call.keep_unless(call.strips(x), taken)
    rank = max(indices[d].dim() for d in taken)
    together = taken == list(range(taken[0], taken[0] + len(taken)))
    first = taken[0] if together else 0

    def moved(strip: Strip) -> Strip:
        rest = sum(d not in taken for d in range(strip.dim))
        return strip.at(rest + (rank if rest >= first else 0))

    return [[moved(s) for s in kept]]


@rule("pixel_shuffle")
def pixel_shuffle(call: Call) -> list[Strips]:
    x, area = call["self"], call["upscale_factor"] ** 2
    rank = x.dim()
    kept = call.keep_unless(call.strips(x), [rank - 2, rank - 1])
    return [_replace(kept, rank - 3, lambda s: [s.relabelled(call.ledger.tie(s.labels.view(-1, area).t()))])]


@rule("pixel_unshuffle")
def pixel_unshuffle(call: Call) -> list[Strips]:
    x, area = call["self"], call["downscale_factor"] ** 2
    rank = x.dim()
    kept = call.keep_unless(call.strips(x), [rank - 2, rank - 1])
    return [_replace(kept, rank - 3, lambda s: [s.relabelled(s.labels.repeat_interleave(area))])]


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(call: Call) -> list[Strips]:
    def shuffled(strip: Strip) -> Strips:
        parts = strip.labels.view(call["groups"], -1)
        call.ledger.tie(parts)
        return [strip.relabelled(parts.t().reshape(-1))]

    return [_replace(call.strips(call["self"]), call["self"].dim() - 3, shuffled)]


@rule("unfold")
def unfold(call: Call) -> list[Strips]:
    """Windows along one dimension, laid out along a new last one."""
    x = call["self"]
    return [call.keep_unless(call.strips(x), [wrapped(call["dimension"], x.dim())])]


@rule("gather")
def gather(call: Call) -> list[Strips]:
    """Takes along one dimension by indices of their own for every place in the others, which go together."""
    x, indices = call["self"], call["index"]
    dim = wrapped(call["dim"], x.dim())
    others = call.keep_unless(call.strips(x), [dim])
    shape = [1 if d == dim else size for d, size in enumerate(indices.shape)]
    given = [1 if d == dim else size for d, size in enumerate(varying(indices, call))]
    call.freeze(s for s in call.strips(indices) if s.dim == dim)
    return [call.meet([(x.shape, others), (given, call.strips(indices))], shape)]


@rule("im2col")
def im2col(call: Call) -> list[Strips]:
    x = call["self"]
    kept = call.keep_unless(call.strips(x), [x.dim() - 2, x.dim() - 1])
    taps = prod(call["kernel_size"])
    return [_replace(kept, x.dim() - 3, lambda s: [s.relabelled(s.labels.repeat_interleave(taps))])]


@rule("glu")
def glu(call: Call) -> list[Strips]:
    x = call["self"]
    dim = wrapped(call["dim"], x.dim())
    return [_taken(call, x, dim, 0, x.shape[dim] // 2)]
