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


NEEDING = {  # what the test extra does not install, and the extra that does
    "taylorkern.integrations.torch_pruning": ("torch_pruning", "bench"),
    "taylorkern.integrations.lightning": ("pytorch_lightning", "integrations"),
    "taylorkern.integrations.huggingface": ("accelerate", "integrations"),
}


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_docstrings_say_what_happens(module):
    if module in NEEDING:
        package, extra = NEEDING[module]
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'taylorkern[{extra}]'")
    found = doctest.testmod(import_module(module))
    assert found.attempted
    assert not found.failed
