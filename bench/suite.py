"""The bench suite, for pytest-benchmark: python -m pytest bench/suite.py --benchmark-only [--quick] [-k ...]

``python -m bench`` runs it in several processes and keeps the results.
"""

import pytest

from bench import building, operations, pruning, steps
from bench.compiled import compiled
from bench.conftest import Suite
from bench.rivals import HEAVY
from bench.ways import Way
from bench.workload import QUICK, WHOLE, Workload

OPERATIONS = list(operations.cases(list(operations.OPERATIONS), list(operations.DTYPES)))
TINY = list(dict.fromkeys((*case[:3], 3, 5) for case in OPERATIONS))
BATCH = 8


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """--quick has parameters of its own."""
    quick = metafunc.config.getoption("quick")
    rivalled = steps.rivalled(QUICK if quick else WHOLE)
    names = metafunc.fixturenames
    if "operation" in names:
        cases = TINY if quick else OPERATIONS
        metafunc.parametrize("operation", cases, ids=["-".join(map(str, case)) for case in cases])
    if "way" in names:
        metafunc.parametrize("workload, way", WAYS[metafunc.function.__name__](rivalled))
    elif "workload" in names:
        metafunc.parametrize("workload", QUICK if quick else WHOLE, ids=str)


def _heavy(workloads: list[Workload]) -> list:
    return [pytest.param(w, way, id=f"{w}-{way.name}") for w in workloads for way in HEAVY]


def _compiled(workloads: list[Workload]) -> list:
    ways = [(w, steps.BY_NAME[name]) for w in workloads for name in steps.COMPILED[w.network]]
    return [pytest.param(w, way, id=f"{w}-{way.name}") for w, way in ways]


WAYS = {"test_heavy": _heavy, "test_compiled": _compiled}


def test_operation(operation: tuple[str, str, str, int, int], suite: Suite) -> None:
    name, layout, dtype, channels, side = operation
    shape = (BATCH, channels, side, side)
    suite.add(operations.measured(name, layout, dtype, shape, suite.pairs(15), suite.timer))


def test_step(workload: Workload, suite: Suite) -> None:
    suite.add(steps.measured(workload, steps.MAIN, suite.pairs(workload.pairs), suite.timer, memory=True))


def test_heavy(workload: Workload, way: Way, suite: Suite) -> None:
    suite.add(steps.attempted(workload, way, suite.pairs(5), suite.timer))


def test_compiled(workload: Workload, way: Way, suite: Suite) -> None:
    under = compiled(way, "aot_eager" if suite.quick else "inductor")
    suite.add(steps.attempted(workload, under, suite.pairs(5), suite.timer))


def test_build(suite: Suite) -> None:
    if suite.quick:
        pytest.skip("four builds take longer than all the rest of --quick")
    suite.add(building.measured(suite.pairs(3), suite.timer))


def test_pruning(suite: Suite) -> None:
    network, size = ("resnet18", 64) if suite.quick else ("densenet201", 224)
    suite.add(pruning.measured(network, size, suite.pairs(3), suite.timer))


def test_ranking(suite: Suite) -> None:
    suite.add(pruning.ranked(5000 if suite.quick else 100_000, BATCH, suite.pairs(15), suite.timer))
