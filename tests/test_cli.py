import json
import subprocess
import sys
from pathlib import Path

import pytest

import taylorkern as tk
from taylorkern import cli
from taylorkern.backends import build


@pytest.fixture
def no_job(monkeypatch):
    """The demo's place is taken by a canned summary."""
    from taylorkern.demo import run

    figures = {"accuracy": 0.99, "loss": 0.03, "params": 2000, "flops": 4000, "latency_ms": 8.0}
    summary = {
        "dense": figures,
        "pruned": {**figures, "accuracy": 0.985, "flops": 1000},
        "ratios": {"params": 1.0, "flops": 0.25, "latency_ms": 1.0},
        "accuracy_lost": 0.005,
        "latency_batch": 64,
        "history": [{"channels": 100}, {"channels": 40}],
    }
    monkeypatch.setattr(run, "run", lambda **options: {**summary, "seed": options["seed"]})
    return summary


def test_demo_prints_a_table(no_job, capsys):
    assert cli.main(["demo"]) == 0
    out, _ = capsys.readouterr()
    assert "99.00%" in out
    assert "-0.50 points" in out
    assert "4,000" in out
    assert "0.25" in out


def test_demo_json_on_stdout_or_in_a_file(no_job, capsys, tmp_path):
    assert cli.main(["demo", "--seed", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["seed"] == 3
    assert cli.main(["demo", "--quick", "--json", str(tmp_path / "s.json")]) == 0
    assert json.loads((tmp_path / "s.json").read_text())["command"] == "taylorkern demo --quick --seed 0"
    assert "accuracy" in capsys.readouterr().out


def one_line_error(capsys):
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("taylorkern: error: ")
    assert err.count("\n") == 1
    return err


def test_unwritable_targets_fail_before_the_work(capsys, tmp_path):
    assert cli.main(["demo", "--json", str(tmp_path / "no" / "s.json")]) == 1
    assert "no/s.json" in one_line_error(capsys)
    (tmp_path / "file").write_text("")
    assert cli.main(["demo", "--out", str(tmp_path / "file")]) == 1
    assert "file" in one_line_error(capsys)


def test_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["demo"]) == 1
    assert "pip install 'taylorkern[demo]'" in one_line_error(capsys)


def test_build_names_the_library(monkeypatch, capsys):
    monkeypatch.setattr(build, "build_ahead", lambda out: (out or Path("/cache")) / "lib.so")
    assert cli.main(["build"]) == 0
    assert "/cache/lib.so" in capsys.readouterr().out
    assert cli.main(["build", "--out", "/image", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"library": "/image/lib.so"}


def test_build_without_a_compiler_is_a_users_error(monkeypatch, capsys):
    def nothing(out):
        raise build.BuildError("there is no C++ compiler on PATH; install one")

    monkeypatch.setattr(build, "build_ahead", nothing)
    assert cli.main(["build"]) == 1
    assert "no C++ compiler" in one_line_error(capsys)


def test_bugs_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(cli, "_answer", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["doctor"])


def test_interrupt(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_answer", interrupted)
    assert cli.main(["doctor"]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["fly"], ["demo", "--seed", "many"]])
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage: taylorkern" in capsys.readouterr().err


def test_module_and_version():
    command = [sys.executable, "-m", "taylorkern", "--version"]
    assert subprocess.run(command, capture_output=True, text=True).stdout == f"taylorkern {tk.__version__}\n"
