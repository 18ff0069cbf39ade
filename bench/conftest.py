"""pytest-benchmark's rounds as the bench's: each times all ways of a comparison, in an order of its own."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.pairs import Rounds, Times, Ways

ROWS = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("taylorkern's bench")
    group.addoption("--quick", action="store_true", help="a tiny network and few rounds, to try the bench itself")
    group.addoption("--rows", type=Path, help="write what was measured there, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("rows")
    if path:
        path.write_text(json.dumps(session.config.stash[ROWS]))


@pytest.hookimpl(trylast=True, optionalhook=True)  # without pytest-benchmark nobody asks
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """The name of the host is nobody's business."""
    machine_info.pop("node", None)


class Suite:
    """What a benchmark gets: whether to be quick, a timer, and where its rows go."""

    def __init__(self, benchmark: Any, config: pytest.Config) -> None:
        self.benchmark, self.config = benchmark, config
        self.quick = bool(config.getoption("quick"))

    def pairs(self, usual: int) -> int:
        return 3 if self.quick else usual

    def timer(self, ways: Ways, rounds: int) -> Times:
        """Like :func:`bench.pairs.interleaved`, with pytest-benchmark's rounds."""
        found = Rounds(ways)
        self.benchmark.pedantic(found.run, setup=lambda: ((found.draw(),), {}), rounds=rounds)
        return found.times

    def add(self, rows: list[dict[str, Any]]) -> None:
        self.config.stash[ROWS].extend(rows)
        self.benchmark.extra_info["rows"] = rows


@pytest.fixture
def suite(benchmark: Any, request: pytest.FixtureRequest) -> Iterator[Suite]:
    yield Suite(benchmark, request.config)
