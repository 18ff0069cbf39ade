"""Every example in a docstring, of the package and of its benchmarks, runs and gives what it says."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WITH_EXAMPLES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for package in ("taylorkern", "bench")
    for path in sorted((ROOT / package).rglob("*.py"))
    if ">>> " in path.read_text()
]


NEEDING = {"taylorkern.integrations.torch_pruning": "torch_pruning"}  # what the test extra does not install


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_docstrings_say_what_happens(module):
    if module in NEEDING:
        pytest.importorskip(
            NEEDING[module], reason=f"{NEEDING[module]} is not installed: pip install 'taylorkern[bench]'"
        )
    found = doctest.testmod(import_module(module))
    assert found.attempted
    assert not found.failed
