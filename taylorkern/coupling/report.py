"""What can be cut and what stops the rest, told to people and to programs."""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .labels import Axis, Frozen, Place

if TYPE_CHECKING:
    from .units import Coupling


def report(coupling: "Coupling", form: str) -> str:
    """``coupling`` as "text" or "json"; raises ValueError for another form."""
    if form not in _FORMS:
        raise ValueError(f"form={form!r} is not one of {', '.join(map(repr, _FORMS))}")
    return _FORMS[form](coupling)


def _text(coupling: "Coupling") -> str:
    gates = sum(len(unit.places) for unit in coupling.units)
    lines = [
        f"{len(coupling.units)} units with {gates} gates in {len(coupling.layers)} layers can be cut; "
        f"{coupling.stuck} more sets of channels can't",
        *(_told(alike) for alike in _by_cause(coupling.frozen)),
        *_following(coupling),
        *(f"{_axes(coupling.ungated)}: no place for a gate" for _ in coupling.ungated[:1]),
        *(f"{name} was not used in any run" for name in coupling.unreached),
    ]
    return "\n".join(lines)


def _by_cause(frozen: list[Frozen]) -> list[list[Frozen]]:
    """What the same operation on the same line of code froze, in different modules, together."""
    causes: dict[tuple[str, ...], list[Frozen]] = {}
    for entry in frozen:
        apart = () if entry.line else (entry.module,)
        causes.setdefault((entry.operation, entry.line, *apart), []).append(entry)
    return list(causes.values())


def _told(alike: list[Frozen]) -> str:
    first = alike[0]
    more = f" and {len(alike) - 1} more modules" if len(alike) > 1 else ""
    (name, dim), channels = first.axis, max(entry.labels for entry in alike)
    count = f"up to {channels}" if len(alike) > 1 else str(channels)
    where = Place(first.operation, f"{first.module or 'the model'}{more}", first.line)
    return f"{count} channels frozen by {where}, such as {name} dim {dim}"


def _following(coupling: "Coupling") -> list[str]:
    paths: dict[str, list[str]] = {}
    for path, name in coupling.attributes:
        paths.setdefault(name, []).append(path)
    return [
        f"{name} follows in {of[0] or 'the model'}{f' and {len(of) - 1} more modules' if len(of) > 1 else ''}"
        for name, of in paths.items()
    ]


def _axes(axes: tuple[Axis, ...]) -> str:
    (name, dim), more = axes[0], len(axes) - 1
    return f"{name} dim {dim}" + (f" and {more} more" if more else "")


def _json(coupling: "Coupling") -> str:
    return json.dumps(as_dict(coupling), indent=1)


def as_dict(coupling: "Coupling") -> dict[str, Any]:
    """Everything that the text tells, and every unit with its places."""
    return {
        "units": [[[layer, channel] for layer, channel in unit.places] for unit in coupling.units],
        "free_units": coupling.free_units,
        "layers": [
            {"name": name, "channels": len(units), "free": int((units >= 0).sum()), "gated": name in coupling.layers}
            for name, units in coupling.outputs.items()
        ],
        "frozen": [
            {
                "operation": entry.operation,
                "module": entry.module,
                "line": entry.line,
                "channels": entry.labels,
                "example": list(entry.axis),
            }
            for entry in coupling.frozen
        ],
        "attributes": [f"{path}.{name}" for path, name in coupling.attributes],
        "ungated": [list(axis) for axis in coupling.ungated],
        "unreached": list(coupling.unreached),
    }


_FORMS: dict[str, Callable[["Coupling"], str]] = {"text": _text, "json": _json}
