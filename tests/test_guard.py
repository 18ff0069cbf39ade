"""The guard: a figure that has moved fails it, by name and with what to do; what can't be checked is told."""

import json
import platform
import re
import shutil
import subprocess

import pytest

from bench.guard import __main__ as guard
from bench.guard import baseline, instructions, ratios
from bench.guard.baseline import Rule
from taylorkern.backends import toolchain

BOTH, UPWARDS = Rule("instructions per element", 0.03, both=True), Rule("of eager", 0.5, both=False)
# Calls measure() with work that is proportional to the elements, beside work that is not to be counted.
DRIVER = r"""
#include <cstdio>
#include <cstring>
extern "C" __attribute__((noinline)) void measure(volatile double* x, int count) {
  for (int i = 0; i < count; ++i) x[i] = x[i] * 2 + 1;
}
int main(int count, char** arguments) {
  const char* wanted = count > 1 ? arguments[1] : "";
  static volatile double x[4000];
  for (int i = 0; i < 4000; ++i) x[i] = i;
  const char* names[] = {"first kernel", "second kernel"};
  const int elements[] = {1000, 2000};
  for (int k = 0; k < 2; ++k) {
    if (std::strncmp(names[k], wanted, std::strlen(wanted))) continue;
    std::printf("%s %d\n", names[k], elements[k]);
    measure(x, k == 1 ? elements[k] * MORE / 100 : elements[k]);
  }
}
"""


def test_figures_within_the_margin_pass():
    assert BOTH.complaints({"a": 1.029, "b": 0.971}, {"a": 1.0, "b": 1.0}) == {}
    assert UPWARDS.complaints({"a": 0.1}, {"a": 1.0}) == {}


@pytest.mark.parametrize(
    ("measured", "says"),
    [
        ({"a": 1.0, "b": 2.08}, r"b: 2.08 instructions per element, \+4.0% from the baseline's 2: more than the 3% .*"),
        ({"a": 1.0, "b": 1.9}, r"b: 1.9 .*, -5.0% .*: better than what is recorded, .*"),
        ({"a": 1.0, "b": float("nan")}, r"b: nan .*: more than the 3% .*"),
        ({"a": 1.0}, r"b: has a baseline, but is not measured any more"),
        ({"a": 1.0, "b": 2.0, "c": 3.0}, r"c: has no baseline"),
    ],
)
def test_a_figure_that_has_moved_is_named(measured, says):
    found = BOTH.complaints(measured, {"a": 1.0, "b": 2.0})
    (complaint,) = found.values()
    assert re.fullmatch(says, complaint), complaint
    assert list(found) == [complaint.split(":")[0]]


@pytest.fixture
def counted(monkeypatch, tmp_path):
    """Counts and a compiler that a test sets, and a baseline file of its own."""
    state = {"who": "gcc 99", "counts": {"a kernel": 2.0, "another": 5.0}}
    monkeypatch.setattr(instructions, "FILE", tmp_path / "counts.json")
    monkeypatch.setattr(instructions, "ROOT", tmp_path)
    monkeypatch.setattr(instructions, "compiler", lambda: ("c++",))
    monkeypatch.setattr(instructions, "name", lambda command: state["who"])
    monkeypatch.setattr(instructions, "measured", lambda command: dict(state["counts"]))
    return state


def test_a_doctored_baseline_fails_and_names_the_kernel(counted, capsys):
    assert guard.main(["instructions", "--update"]) == 0
    assert guard.main(["instructions"]) == 0
    assert "instructions: all within 3% of the baseline" in capsys.readouterr().out
    content = json.loads(instructions.FILE.read_text())
    content["baselines"]["gcc 99"]["another"] = 4.8
    instructions.FILE.write_text(json.dumps(content))
    assert guard.main(["instructions"]) == 1
    printed = capsys.readouterr().out
    assert "guard: instructions: another: 5 instructions per element, +4.2%" in printed
    assert "mend what has grown; what is meant to be so becomes the baseline by `make guard-update`" in printed
    assert "a kernel" not in printed


def test_another_compiler_is_told_by_name_and_its_baseline_is_added(counted, capsys):
    guard.main(["instructions", "--update"])
    counted.update(who="clang 88", counts={"a kernel": 3.0})
    assert guard.main(["instructions"]) == 0
    printed = capsys.readouterr().out
    assert "NOT RUN: there is no baseline for clang 88 (only for gcc 99)" in printed and "all within" not in printed
    guard.main(["instructions", "--update"])
    known = json.loads(instructions.FILE.read_text())["baselines"]
    assert known == {"gcc 99": {"a kernel": 2.0, "another": 5.0}, "clang 88": {"a kernel": 3.0}}


def test_without_valgrind_it_is_not_run_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert guard.main(["instructions"]) == 0
    assert "instructions: NOT RUN: valgrind isn't on PATH; install it" in capsys.readouterr().out


def test_on_another_kind_of_machine_it_is_not_run(monkeypatch, capsys):
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert guard.main(["instructions"]) == 0
    assert "NOT RUN" in capsys.readouterr().out


@pytest.fixture
def timed(monkeypatch, tmp_path):
    """Ratios that a test sets, one list of successive medians for each case, and a baseline of 0.5 for all."""
    file = tmp_path / "ratios.json"
    baseline.write(file, {"baseline": {ratios.name(case): 0.5 for case in ratios.CASES}})
    monkeypatch.setattr(ratios, "FILE", file)
    medians = {ratios.name(case): [0.5] for case in ratios.CASES}

    def measured(case):
        left = medians[ratios.name(case)]
        return left.pop(0) if len(left) > 1 else left[0]

    monkeypatch.setattr(ratios, "measured", measured)
    return medians


def test_one_noisy_moment_does_not_fail_the_ratios(timed, capsys):
    timed[ratios.name(ratios.CASES[1])] = [2.0, 0.6, 2.0]
    assert guard.main(["ratios"]) == 0
    assert f"ratios: all within {ratios.RULE.margin:.0%}" in capsys.readouterr().out
    assert timed[ratios.name(ratios.CASES[1])] == [2.0]  # measured twice: what is well is not measured again


def test_a_ratio_that_has_grown_in_every_attempt_fails_and_is_named(timed, capsys):
    slow = ratios.name(ratios.CASES[2])
    timed[slow] = [1.2, 1.0, 1.1, 0.1]
    assert guard.main(["ratios"]) == 1
    printed = capsys.readouterr().out
    assert f"guard: ratios: {slow}: 1 of eager, +100.0%" in printed and "make guard-update" in printed
    assert timed[slow] == [0.1]
    assert not [case for case in ratios.CASES if ratios.name(case) != slow and ratios.name(case) in printed]


def test_ratios_without_a_baseline_are_not_run(timed, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(ratios, "FILE", tmp_path / "none.json")
    assert guard.main(["ratios"]) == 0
    assert "ratios: NOT RUN: there is no baseline" in capsys.readouterr().out


def test_the_ratio_is_of_a_checked_operation():
    assert 0 < ratios.measured(("BN+ReLU", "channels_last", 4, 3), pairs=2) < 100


@pytest.fixture(scope="module")
def compiler():
    try:
        return instructions.compiler()
    except baseline.NotRunError as reason:
        pytest.skip(str(reason))


def built(compiler, folder, more):
    source, program = folder / f"driver{more}.cpp", folder / f"driver{more}"
    source.write_text(DRIVER)
    command = [*compiler, *instructions.flags(), f"-DMORE={more}", str(source), "-Wl,-z,now", "-o", str(program)]
    subprocess.run(command, check=True, timeout=100)
    return program


def test_a_real_regression_is_counted_and_named(compiler, tmp_path, monkeypatch, capsys):
    program, slower = built(compiler, tmp_path, 100), built(compiler, tmp_path, 104)
    counts = instructions.count(program)
    assert counts == instructions.count(program)
    assert list(counts) == ["first kernel", "second kernel"]
    assert counts["first kernel"] == pytest.approx(counts["second kernel"], rel=0.02) and counts["first kernel"] < 20
    assert instructions.count(program, "second") == {"second kernel": counts["second kernel"]}

    monkeypatch.setattr(instructions, "FILE", tmp_path / "counts.json")
    monkeypatch.setattr(instructions, "ROOT", tmp_path)
    monkeypatch.setattr(instructions, "build", lambda command, options, folder: program)
    assert guard.main(["instructions", "--update"]) == 0 and guard.main(["instructions"]) == 0
    monkeypatch.setattr(instructions, "build", lambda command, options, folder: slower)
    assert guard.main(["instructions"]) == 1
    printed = capsys.readouterr().out
    assert f"{instructions.name(compiler)} recorded" in printed
    assert "second kernel: " in printed and "+4.0% from the baseline's" in printed and "first kernel: " not in printed


def test_the_driver_fits_the_kernels_contract():
    """So that it does not rot where valgrind is missing."""
    try:
        command = toolchain.find_toolchain().compiler
    except toolchain.BuildError as error:
        pytest.skip(str(error))
    strict = ["-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
    options = [*strict, f"-I{toolchain.sources()}", str(instructions.DRIVER)]
    checked = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300)
    assert checked.returncode == 0, checked.stderr


def test_what_is_recorded_is_of_every_kernel_layout_and_type():
    """The committed baselines hold what the driver calls, so that no kernel goes unguarded."""
    known = baseline.read(instructions.FILE)
    assert known["margin"] == instructions.RULE.margin and known["flags"].split() == instructions.flags()
    for counts in known["baselines"].values():
        behind = ("alone", "relu", "residual+relu", "residual+relu6", "silu")
        norms = [f"{kernel} {of}" for kernel in ("batch_norm_act", "batch_norm_act_backward") for of in behind]
        norms += [f"batch_norm_act_backward {of} over dy" for of in ("relu", "residual+relu")]
        once = {"fold float32", "follow float32", "accumulate float64"}
        assert {name.rsplit(" ", 1)[0] for name in counts} == once | {
            f"{kernel} {layout} {dtype}"
            for kernel in ("channel_scores", *norms)
            for layout in ("channels_first", "channels_last")
            for dtype in ("float32", "bfloat16")
        }
    recorded = baseline.read(ratios.FILE)
    assert recorded["margin"] == ratios.RULE.margin
    assert list(recorded["baseline"]) == [ratios.name(case) for case in ratios.CASES]
