import json
import shlex
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch

import taylorkern as tk
from taylorkern import cli
from taylorkern.backends import build, nvcc
from taylorkern.backends.recipe import CPU
from taylorkern.oracle import Minibatch
from taylorkern.resolve import ResolveError, resolve


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


def test_demo_says_how_to_repeat_its_choice(no_job, tmp_path):
    options = ["--criterion", "taylor_fo", "--compensate"]
    assert cli.main(["demo", *options, "--json", str(tmp_path / "s.json")]) == 0
    command = json.loads((tmp_path / "s.json").read_text())["command"]
    assert command == "taylorkern demo --seed 0 --criterion taylor_fo --compensate"


def test_demo_refuses_an_unknown_criterion_before_it_trains(monkeypatch, capsys):
    def trains(*_):
        raise AssertionError("trained for nothing")

    monkeypatch.setattr("taylorkern.demo.run.Demo", trains)
    assert cli.main(["demo", "--criterion", "surgeom"]) == 1
    assert "known are taylor_fo" in one_line_error(capsys)


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


def test_build_names_the_libraries_and_says_what_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(
        build, "build_ahead", lambda out, recipe=CPU: (out or Path("/cache")) / f"{recipe.parts[0].name}.so"
    )

    def nothing():
        raise build.BuildError("there is no nvcc")

    monkeypatch.setattr(nvcc, "find_toolchain", nothing)
    assert cli.main(["build"]) == 0
    told = capsys.readouterr()
    assert "/cache/taylorkern.so" in told.out and "no CUDA kernels are compiled: there is no nvcc" in told.err
    assert cli.main(["build", "--out", "/image", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"library": "/image/taylorkern.so"}
    monkeypatch.setattr(nvcc, "find_toolchain", lambda: None)
    assert cli.main(["build", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "library": "/cache/taylorkern.so",
        "cuda": "/cache/taylorkern_cuda.so",
    }


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


USERS = """
import torch
from beside import WIDTH

def model(seed):
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, WIDTH, 3), torch.nn.BatchNorm2d(WIDTH), torch.nn.ReLU(), torch.nn.Conv2d(WIDTH, 5, 3),
        torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(80, 3),
    )

def data():
    while True:
        yield torch.randn(16, 1, 8, 8), torch.randint(0, 3, (16,))
"""


@pytest.fixture
def users(tmp_path):
    """A user's file, which imports from its own folder."""
    (tmp_path / "beside.py").write_text("WIDTH = 7")
    (tmp_path / "users.py").write_text(USERS)
    return tmp_path / "users.py"


def of_user(users, *more):
    return ["oracle", "--model", f"{users}:model", "--data", f"{users}:data", "--minibatches", "2", *more]


def test_oracle_of_a_users_network(users, capsys, tmp_path):
    assert cli.main(of_user(users, "--seeds", "2", "--out", str(tmp_path / "out"), "--methods", "sketch,exact")) == 0
    out, err = capsys.readouterr()
    assert "12 of 12 units, 2 minibatches, cross_entropy" in out
    assert "bootstrap interval" in out and "[" in out
    assert {"taylor_fo", "taylor_so", "taylor_so (exact)", "random"} <= {
        line.split("  ")[0] for line in out.split("\n")
    }
    assert "oracle: 100%" in err and "24/24" in err
    written = {path.name for path in (tmp_path / "out").iterdir()}
    files = {
        f"{name}-seed{seed}.{kind}" for name, kind in [("oracle", "safetensors"), ("scatter", "png")] for seed in (0, 1)
    }
    assert written == {"comparison.json", "table.txt", *files}
    assert (tmp_path / "out" / "table.txt").read_text() == out
    assert (tmp_path / "out" / "scatter-seed1.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [network["seed"] for network in result["networks"]] == [0, 1]
    assert result["networks"][0]["truth"] != result["networks"][1]["truth"]
    for kind, value in result["summary"]["all"]["taylor_so"].items():
        assert value["low"] <= value["mean"] <= value["high"], kind
    again = cli._parser().parse_args(shlex.split(result["command"])[1:])
    assert (again.model, again.seeds, again.minibatches, again.methods) == (f"{users}:model", 2, 2, ["sketch", "exact"])


def test_oracle_options_reach_the_comparison(users, capsys):
    assert cli.main(of_user(users, "--units", "5", "--criteria", "magnitude, taylor_fo", "--json")) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["facts"]["criteria"] == ["magnitude", "taylor_fo"]
    assert len(result["networks"]) == 1 and len(result["networks"][0]["units"]) == 5
    assert result["summary"]["all"]["magnitude"]["pearson"]["low"] is None
    assert cli.main(of_user(users, "--criteria", "magnitude")) == 0
    assert "there is no interval" in capsys.readouterr().out


def test_oracle_of_the_embedded_network(capsys, monkeypatch):
    from taylorkern.demo import trained

    monkeypatch.setattr(trained, "NARROW", (4, 4, 4))
    assert (
        cli.main(["oracle", "--quick", "--units", "8", "--minibatches", "1", "--criteria", "taylor_fo", "--json"]) == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert [network["seed"] for network in result["networks"]] == [0, 1, 2]
    assert result["networks"][0]["model"] == "DigitsNet"
    again, other = trained.network(0, quick=True), trained.network(1, quick=True)
    assert torch.equal(trained.network(0, quick=True).classifier.weight, again.classifier.weight)
    assert not torch.equal(other.classifier.weight, again.classifier.weight)


def test_an_interrupted_oracle_command_goes_on(users, capsys, tmp_path, monkeypatch):
    command = of_user(users, "--seeds", "2", "--together", "3", "--criteria", "taylor_fo")
    assert cli.main([*command, "--out", str(tmp_path / "whole")]) == 0
    measure, calls = Minibatch.losses, []

    def stopped(self, removed):
        calls.append(len(removed))
        if len(calls) == 15:
            raise KeyboardInterrupt
        return measure(self, removed)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Minibatch, "losses", stopped)
        assert cli.main([*command, "--out", str(out)]) == 130
    assert "the same command goes on there" in capsys.readouterr().err
    kept = {name: safetensors.torch.load_file(out / f"oracle-seed{name}.safetensors") for name in (0, 1)}
    assert kept[0]["measured"].all() and kept[1]["measured"].any() and not kept[1]["measured"].all()
    assert cli.main([*command, "--out", str(out)]) == 0
    results = [json.loads((folder / "comparison.json").read_text()) for folder in (out, tmp_path / "whole")]
    assert results[0] == results[1]


def test_an_oracle_process_that_is_interrupted_keeps_what_it_measured(users, tmp_path):
    slow = users.read_text().replace("def data", "torch.nn.Flatten.forward = slow\n\ndef data")
    users.write_text("import time\n\ndef slow(self, x):\n    time.sleep(0.2)\n    return x.flatten(1)\n" + slow)
    command = [sys.executable, "-m", "taylorkern", *of_user(users, "--together", "1", "--out", str(tmp_path / "out"))]
    # Where the tests themselves run in the background of a shell, a child would ignore the signal.
    heeds = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heeds) as process:
        shown = ""
        while " 2/24" not in shown:
            shown += process.stderr.read(1) or pytest.fail(shown)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130
    assert "interrupted" in rest and "Traceback" not in rest
    measured = safetensors.torch.load_file(tmp_path / "out" / "oracle-seed0.safetensors")["measured"]
    assert measured.any() and not measured.all()


def test_what_can_not_be_measured_is_said_in_one_line(users, capsys, tmp_path):
    (tmp_path / "none.py").write_text(
        "import torch\nnumber = 3\n"
        "def linear(): return torch.nn.Linear(8, 2)\n"
        "def short(seed=0): return []\n"
        "def broken(seed): return {}[seed]\n"
        "def two(a, b): pass\n"
        "from users import model\n"
        "def diverged(): (m := model(0))[0].weight.data.fill_(float('nan')); return m\n"
    )
    (tmp_path / "syntax.py").write_text("def (:\n")
    (tmp_path / "missing.py").write_text("import no_such_module\n")
    own, none = f"{users}:model", f"{tmp_path}/none.py"
    for arguments, message in [
        (["--model", f"{tmp_path}/nowhere.py:model"], "there is no file"),
        (["--model", "model"], "write FILE.py:FUNCTION"),
        (["--model", f"{users}:modle"], "has no 'modle'; it has model, data"),
        (["--model", f"{none}:number"], "is a int, not a function"),
        (["--model", f"{none}:two"], "wants a, b"),
        (["--model", f"{none}:broken"], "failed at none.py:5: KeyError: 0"),
        (["--model", f"{tmp_path}/syntax.py:model"], "importing syntax.py failed: SyntaxError"),
        (["--model", f"{tmp_path}/missing.py:model"], "failed at missing.py:1: ModuleNotFoundError"),
        (["--model", f"{none}:linear"], "no unit of Linear"),
        (["--model", own, "--data", f"{none}:short"], "no minibatch"),
        (["--model", f"{none}:diverged"], "non-finite gradients"),
        (["--model", own, "--criteria", "taylor"], "unknown criterion 'taylor'"),
        (["--model", own, "--loss", "hinge"], "no loss 'hinge'"),
        (["--model", own, "--methods", "guess"], "method 'guess'"),
    ]:
        data = [] if "--data" in arguments else ["--data", f"{users}:data"]
        assert cli.main(["oracle", *arguments, *data]) == 1, message
        assert message in one_line_error(capsys)


def test_a_folder_of_another_network_is_left_alone(users, capsys, tmp_path):
    out = tmp_path / "out"
    assert cli.main(of_user(users, "--out", str(out))) == 0
    before = (out / "oracle-seed0.safetensors").read_bytes()
    capsys.readouterr()
    assert cli.main(of_user(users, "--units", "3", "--out", str(out))) == 1
    out_text, err = capsys.readouterr()
    assert out_text == "" and "other units (12 of them; this call asks for 3)" in err.splitlines()[-1]
    assert (out / "oracle-seed0.safetensors").read_bytes() == before


def test_oracle_says_which_package_is_missing(users, monkeypatch, capsys):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    assert cli.main(of_user(users)) == 1
    assert "the oracle needs scipy: pip install" in one_line_error(capsys)
    assert cli.main(["oracle", "--out", "x"]) == 1
    assert "needs scipy and matplotlib and sklearn" in one_line_error(capsys)


@pytest.mark.parametrize("arguments", [["--units", "0"], ["--seeds", "-1"], ["--minibatches", "many"]])
def test_wrong_numbers_for_the_oracle(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["oracle", *arguments])
    assert stopped.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_a_function_gets_the_seed_where_it_takes_one(tmp_path):
    (tmp_path / "takes.py").write_text(
        "open(__file__ + '.runs', 'a').write('.')\n"
        "def named(width=8, seed=None): return width, seed\n"
        "def needed(number, width=8): return number, width\n"
        "def none(width=8): return width\n"
        "def many(*args, **kwargs): return args, kwargs\n"
        "class Made:\n    def __init__(self, seed): self.seed = seed\n"
    )

    def call(name):
        return resolve(f"{tmp_path}/takes.py:{name}")(5)

    assert call("named") == (8, 5)
    assert call("needed") == (5, 8)
    assert call("none") == 8
    assert call("many") == ((), {})
    assert call("Made").seed == 5
    assert (tmp_path / "takes.py.runs").read_text() == "."
    with pytest.raises(ResolveError):
        resolve(f"{tmp_path}/takes.py:")
