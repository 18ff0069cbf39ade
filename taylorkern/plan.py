"""The JSON plan of a saved network: what its file must contain, checked for its form before anything is made of it.

Format 2 holds, beside format 1's tensors and ties, the attributes by which modules count channels and heads.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ._version import __version__
from .container import DTYPES, StoreError, shown, strict, whole
from .widths import KNOWN

FORMAT = 2
PLAN = "taylorkern.plan"
DIGEST = "taylorkern.plan.sha256"
TYPES = {str(dtype): dtype for dtype in DTYPES.values()}


@dataclass(frozen=True)
class Entry:
    """What the plan says of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True)
class Plan:
    """Tensors by their first names, the first names of the further names of tied ones, attributes by module.

    >>> plan = Plan({"weight": Entry(torch.float32, (2, 3), 64 * "0")}, attributes={"": {"out_features": 2}})
    >>> read(Path("a file"), plan.metadata()) == plan
    True
    """

    tensors: dict[str, Entry]
    tied: dict[str, str] = field(default_factory=dict)
    attributes: dict[str, dict[str, int]] | None = None  # None: of a format without them

    def metadata(self) -> dict[str, str]:
        """The plan and its checksum, as the metadata of a safetensors file."""
        text = json.dumps(
            {
                "format": FORMAT,
                "taylorkern": __version__,
                "tensors": {
                    name: {"dtype": str(entry.dtype), "shape": list(entry.shape), "sha256": entry.sha256}
                    for name, entry in self.tensors.items()
                },
                "tied": self.tied,
                "attributes": self.attributes,
            }
        )
        return {PLAN: text, DIGEST: hashlib.sha256(text.encode()).hexdigest()}


def read(path: Path, metadata: dict[str, str]) -> Plan:
    """The plan of the file at ``path``; StoreError where there is none, or it is altered, malformed or newer."""
    if PLAN not in metadata or DIGEST not in metadata:
        raise StoreError(
            f"{path} is a safetensors file but holds no taylorkern plan: not written by taylorkern.save; "
            "load plain weights with load_state_dict"
        )
    try:
        if hashlib.sha256(metadata[PLAN].encode()).hexdigest() != metadata[DIGEST]:
            raise StoreError(f"{path}: the plan is not what was saved (checksum); get the file again")
        return _parsed(path, strict(metadata[PLAN]))
    except (RecursionError, ValueError) as error:
        why = shown(str(error))
        raise StoreError(f"{path} holds a plan of another form ({why}); save it again with taylorkern") from error


def _parsed(path: Path, plan: Any) -> Plan:
    _must(type(plan) is dict and type(plan.get("format")) is int, "it gives no format")
    if plan["format"] > FORMAT:
        raise StoreError(
            f"{path} was written by taylorkern {shown(str(plan.get('taylorkern')))} in format "
            f"{shown(str(plan['format']))}; taylorkern {__version__} reads formats up to {FORMAT}: use a newer one"
        )
    _must(plan["format"] in _FIELDS, "its format never was")
    fields = _FIELDS[plan["format"]]
    _must(plan.keys() == {"format", "taylorkern", *fields}, "it has other fields")
    for name in fields:
        _must(type(plan[name]) is dict, f"{name} is no JSON object")
        _CHECKS[name](plan)
    return Plan(
        {name: Entry(TYPES[e["dtype"]], tuple(e["shape"]), e["sha256"]) for name, e in plan["tensors"].items()},
        plan["tied"],
        plan.get("attributes"),
    )


def _check_tensors(plan: dict[str, Any]) -> None:
    for name, entry in plan["tensors"].items():
        formed = type(entry) is dict and entry.keys() == {"dtype", "shape", "sha256"}
        texts = formed and type(entry["dtype"]) is str and type(entry["sha256"]) is str
        _must(texts and whole(entry["shape"]), f"the entry of {name} is malformed")
        _must(entry["dtype"] in TYPES, f"{name} is of an unknown type, {entry['dtype']}")


def _check_tied(plan: dict[str, Any]) -> None:
    for name, first in plan["tied"].items():
        known = type(first) is str and first in plan["tensors"] and name not in plan["tensors"]
        _must(known, f"{name} is tied to nothing")


def _check_attributes(plan: dict[str, Any]) -> None:
    for module, attributes in plan["attributes"].items():
        _must(type(attributes) is dict, f"the attributes of {module} are no JSON object")
        for name, value in attributes.items():
            _must(name in KNOWN, f"{name} of {module} is no attribute that a cut changes")
            _must(type(value) is int and value >= 1, f"{name} of {module} is no number from 1 on")


_FIELDS = {1: ("tensors", "tied"), 2: ("tensors", "tied", "attributes")}
_CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "tensors": _check_tensors,
    "tied": _check_tied,
    "attributes": _check_attributes,
}


def _must(holds: bool, why: str) -> None:
    if not holds:
        raise ValueError(why)
