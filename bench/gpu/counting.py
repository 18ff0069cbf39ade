"""A pytest plugin that writes each test's outcome to the file of ``--outcomes``, a line each, as it ends."""

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, help="write outcomes there, one in each line")


class Outcomes:
    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":  # a set-up that skips or fails is the whole test
            with self.path.open("a") as lines:
                lines.write(f"{report.outcome}\n")


def pytest_configure(config: pytest.Config) -> None:
    if path := config.getoption("outcomes"):
        config.pluginmanager.register(Outcomes(path), "taylorkern's outcomes")
