"""The GPU bench's pieces, each tried on the processor with tiny sizes: what is wrong is found, and not timed."""

import re

import pytest
import torch

from bench import operations as cpu
from bench import steps as cpu_steps
from bench.gpu import (
    choice,
    compiled_steps,
    contenders,
    determinism,
    device,
    facts,
    operations,
    precision,
    providers,
    sanitizer,
    small_run,
    steps,
    testing,
    timing,
)
from bench.gpu.task import FoundError, Task
from bench.pairs import WrongError
from taylorkern import backends
from taylorkern.backends import reference
from tests.wrong import corrupt

JOB = operations.Job("BN+ReLU", "channels_last", "float32", (4, 3, 5, 5))


class Traced(device.Processor):
    """A processor whose clock counts what is called, and that captures calls."""

    def __init__(self):
        self.log = []

    def stamp(self):
        self.log.append("stamp")
        return len(self.log)

    def between(self, start, end):
        return float(end - start)

    def synchronize(self):
        self.log.append("synchronize")

    def captured(self, call):
        call()
        return lambda: self.log.append("replay")

    def cache(self):
        return 4000


class Refusing(device.Processor):
    def between(self, start, end):
        pytest.fail("timed although it is wrong")


def task(tmp_path, on=None, seconds=100.0):
    return Task(on or device.Processor(), True, seconds, tmp_path / "part.json")


def test_a_timed_call_follows_an_untimed_one_and_a_round_is_waited_for_once():
    on = Traced()
    found = timing.Stamped({name: lambda name=name: on.log.append(name) for name in "ab"}, on)
    found.run(["b", "a"])
    assert on.log == ["b", "stamp", "b", "stamp", "a", "stamp", "a", "stamp", "synchronize"]
    assert found.times == {"a": [2.0], "b": [2.0]}  # the call and the stamp behind it
    assert all(len(found.launches[name]) == 1 for name in "ab")


def test_rounds_end_with_their_time_but_three_are_always_made():
    found = timing.stamped({"a": lambda: None}, 50, device.Processor(), until=0.0)
    assert len(found.times["a"]) == len(found.launches["a"]) == timing.LEAST
    assert len(timing.stamped({"a": lambda: None}, 5, device.Processor()).times["a"]) == 5


def test_facts_tell_versions_backends_and_copies(tmp_path):
    at = task(tmp_path)
    facts.run(at)
    assert at.found["facts"]["torch"] == torch.__version__
    assert {row["backend"] for row in at.found["backends"]} == {"native", "reference"}
    assert all(row["serves"] and row["why"] for row in at.found["backends"])
    assert [copy["bytes"] for copy in at.found["copies"]] == facts.COPIED_QUICK
    assert all(copy["GB/s"] > 0 for copy in at.found["copies"])
    assert at.path.exists()


def test_a_backend_that_breaks_is_told_and_stops_nothing(tmp_path, monkeypatch):
    def broken(a, g):
        raise OSError("no such library")

    monkeypatch.setattr(reference, "channel_scores", broken)
    native, plain = facts.served(task(tmp_path))
    assert native["serves"] and not plain["serves"] and "no such library" in plain["why"]


def test_a_forced_backend_serves_alone_and_the_table_is_put_back():
    table = backends.PROVIDERS["cpu"]
    a = torch.ones(2, 3, 4, 4)
    with providers.serving("cpu", reference):
        assert backends.provider("channel_scores", a) is reference
    assert backends.PROVIDERS["cpu"] is table
    assert reference not in providers.listed("cpu")


def test_same_bits_are_found_and_another_bit_is_told(tmp_path, monkeypatch):
    at = task(tmp_path)
    determinism.run(at)
    assert {row["operation"] for row in at.found["rows"]} == set(cpu.OPERATIONS)
    assert all(row.get("different") == 0 for row in at.found["rows"] if "refused" not in row)
    values = iter([1.0, 1.0, 2.0, 1.0])
    assert determinism.differing(lambda: [torch.tensor([next(values), float("nan")])], 3) == 1
    monkeypatch.setattr(determinism, "differing", lambda call, runs: 2)
    with pytest.raises(FoundError, match="differ"):
        determinism.run(task(tmp_path))


def test_precision_is_told_and_a_wrong_s_is_found(tmp_path, monkeypatch):
    at = task(tmp_path)
    precision.run(at)
    ran = [row for row in at.found["rows"] if "refused" not in row]
    assert {"bfloat16", "float32"} <= {row["dtype"] for row in ran}
    assert all(row["distance"]["ours"] <= 2 * row["distance"]["torch"] + 1e-6 for row in ran)
    corrupt(monkeypatch, "batch_norm_act_backward", output=4)
    wrong = task(tmp_path)
    with pytest.raises(FoundError, match="from float64"):
        precision.run(wrong)
    assert [row["operation"] for row in wrong.found["rows"] if "wrong" in row]


def test_operations_have_a_row_for_every_contender(tmp_path):
    at = task(tmp_path, Traced())
    rows = {row["way"]: row for row in operations.measured(JOB, at)}
    assert rows.pop("timm BatchNormAct2d")  # told as failed where timm is missing
    assert list(rows) == ["eager", "ours", "ours by native", "eager, native batch norm"]
    for row in rows.values():
        assert row["pairs"] == 3
        for seen in (row, row["graph"]):
            assert set(seen["ratio"]) == {"p25", "median", "p75"}
            assert seen["GB/s"]["median"] > 0 and seen["of copy"]["median"] > 0
        assert row["checked"]["distance from float64"] < 1e-5
    assert rows["eager"]["passes"] == 13 and rows["ours"]["passes"] == 8
    assert "replay" in at.device.log


def test_the_share_of_a_copy_is_that_of_the_bytes_moved():
    found = operations._compared("ours", 800, 100, {"ours": [2.0] * 3, "eager": [4.0] * 3, "copy": [0.25] * 3})
    assert found["ratio"]["median"] == 0.5
    assert found["of copy"]["median"] == 0.5  # four times the bytes of the copy, in eight times its time
    assert found["GB/s"]["median"] == pytest.approx(4e-7)


def test_inputs_take_turns_only_where_the_cache_could_hold_them():
    operation = cpu.OPERATIONS["BN+ReLU"]
    small = operations._cases(JOB, operation, Traced())
    assert len(small) == timing.sets_needed(2 * 4 * 3 * 25 * 4, 4000) == 5
    assert not torch.equal(small[0].dy, small[1].dy)
    assert len(operations._cases(JOB, operation, device.Processor())) == 1


def test_a_graph_that_is_refused_leaves_its_reason(tmp_path):
    rows = operations.measured(JOB, task(tmp_path))
    assert "NotImplementedError" in rows[0]["graph"]["failed"]


@pytest.mark.parametrize("output", range(5))
def test_a_wrong_operation_is_not_timed(tmp_path, monkeypatch, output):
    corrupt(monkeypatch, "batch_norm_act_backward", output)
    job = operations.Job("BN+add+ReLU", "channels_last", "bfloat16", (4, 3, 5, 5))
    with pytest.raises(WrongError, match="not timed"):
        operations.measured(job, task(tmp_path, Refusing()))


def test_a_wrong_rival_is_not_timed_and_one_that_refuses_is_told(tmp_path, monkeypatch):
    def halved(operation, case):
        right = contenders.eager(operation, case)
        return lambda: [0.5 * t for t in right()]

    def refusing(operation, case):
        raise ImportError("no such  package")

    monkeypatch.setattr(operations, "RIVALS", [contenders.Contender("rival", refusing, refusals=Exception)])
    rows = operations.measured(JOB, task(tmp_path))
    assert [row["failed"] for row in rows if row["way"] == "rival"] == ["ImportError: no such package"]
    monkeypatch.setattr(operations, "RIVALS", [contenders.Contender("rival", refusing)])
    with pytest.raises(ImportError):
        operations.measured(JOB, task(tmp_path, Refusing()))
    monkeypatch.setattr(operations, "RIVALS", [contenders.Contender("rival", halved, refusals=Exception)])
    with pytest.raises(WrongError, match="rival"):
        operations.measured(JOB, task(tmp_path, Refusing()))


def test_the_compilers_turn_has_its_row_alone(tmp_path):
    job = operations.Job("channel_scores", "contiguous", "float32", (4, 3, 5, 5), under_compiler=True)
    (row,) = operations.measured(job, task(tmp_path))
    assert row["way"] == "compiled eager" and row["ratio"]["median"] > 0


def test_the_most_telling_jobs_come_first_and_what_time_does_not_allow_is_told(tmp_path, monkeypatch):
    found = list(operations.jobs(quick=False))
    main = sum(len(operation.shapes) for operation in cpu.OPERATIONS.values())
    assert all((job.layout, job.dtype) == ("channels_last", "bfloat16") for job in found[:main])
    assert not any(job.under_compiler for job in found[:main])
    assert {(job.layout, job.dtype) for job in found} == {(at, d) for at in cpu.LAYOUTS for d in operations.DTYPES}
    assert all(job.shape[0] == 256 for job in found)
    late = task(tmp_path, Refusing(), seconds=0.0)
    operations.run(late)
    assert len(late.found["left"]) == len(list(operations.jobs(quick=True))) and "rows" not in late.found


def test_steps_have_a_row_for_every_way(tmp_path):
    at = task(tmp_path)
    w = steps.QUICK[1]  # under autocast
    rows = {row["way"]: row for row in steps.measured(w, steps.WAYS, at)}
    assert list(rows) == [way.name for way in steps.WAYS]
    assert rows["plain"]["subject"]["precision"] == "AMP bfloat16"
    assert rows["plain"]["ratio"]["median"] == rows["plain"]["memory"] == 1.0
    assert rows["gates [1, C]"]["memory"] > 1.0
    for name in ("scored", "fused, scored", "hooks"):
        assert rows[name]["checked"]["float64"] < 1e-9
        assert 0 < rows[name]["checked"]["layers"] <= 2 * rows[name]["checked"]["layers' own"] + steps.FLOOR


@pytest.fixture
def fresh():
    """What ways are compared with is kept for a whole process; not what a wrong kernel made of it."""
    steps._plumbing.cache_clear()
    cpu_steps.reference.cache_clear()
    yield
    steps._plumbing.cache_clear()
    cpu_steps.reference.cache_clear()


def test_wrong_scores_of_a_step_stop_it_before_it_is_timed(tmp_path, monkeypatch, fresh):
    corrupt(monkeypatch, "batch_norm_act_backward", output=4)
    with pytest.raises(WrongError, match="nothing is timed"):
        steps.measured(steps.QUICK[0], [steps.BY_NAME["plain"], steps.BY_NAME["scored"]], task(tmp_path, Refusing()))


def test_every_layer_is_compared_with_what_the_dtype_allows():
    want = {"a": torch.ones(2, 3), "b": torch.ones(2, 3)}
    own = {"a": 1.2 * want["a"], "b": want["b"]}
    assert steps.agreeing("way", {"a": 1.4 * want["a"], "b": 1.04 * want["b"]}, want, own)["layers"] == pytest.approx(
        0.22
    )
    for wrong in ({"a": 1.5 * want["a"], "b": want["b"]}, {"a": want["a"], "b": 1.1 * want["b"]}):
        with pytest.raises(WrongError, match="nothing is timed"):
            steps.agreeing("way", wrong, want, own)
    with pytest.raises(WrongError, match="nothing is timed"):
        steps.agreeing("way", {"a": want["a"], "b": want["b"] * torch.nan}, want, own)


def test_the_workloads_are_those_that_were_asked_for():
    assert [(w.batch, w.autocast, w.layout) for w in steps.WORKLOADS] == [
        (256, torch.bfloat16, "channels_last"),
        (128, torch.bfloat16, "channels_last"),
        (64, None, "channels_last"),
    ]
    assert {w.device for w in steps.WORKLOADS} == {"cuda"}


def test_compiled_steps_are_compared_with_each_other(tmp_path, monkeypatch):
    at = task(tmp_path)
    rows = compiled_steps.measured(steps.TINY, at)
    assert [(row["way"], row["to"]) for row in rows] == [
        ("plain", "plain"),
        (compiled_steps.PLAIN, "plain"),
        (compiled_steps.OURS, "plain"),
        (compiled_steps.OURS, compiled_steps.PLAIN),
    ]
    assert rows[2]["checked"]["layers"] < 1e-3

    def refuse(model, backend):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", refuse)
    refused = compiled_steps.measured(steps.TINY, at)
    assert [row["way"] for row in refused if "failed" in row] == [compiled_steps.PLAIN, compiled_steps.OURS]


def test_the_fastest_backend_is_found_by_operation_and_size(tmp_path):
    at = task(tmp_path)
    rows = list(choice.measured("channels_last", "float32", 10, at))
    assert [row["operation"] for row in rows] == list(backends.OPERATIONS)
    for row in rows:
        assert row["log2_numel"] == 10 and row["backend"] in ("native", "reference")
        assert row["ratio_to_next"] > 0 and set(row["to first"]) == {"native", "reference"}
    (row, *_) = choice.measured("contiguous", "float16", 10, at)
    assert "backend" not in row and row["refused"] == {"native": "not served"}
    assert choice._ranked({"slow": [4.0] * 3, "fast": [2.0] * 3})["backend"] == "fast"
    assert choice._ranked({"slow": [4.0] * 3, "fast": [2.0] * 3})["ratio_to_next"] == 0.5


def test_backends_that_disagree_are_not_compared_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "channel_scores", lambda a, g: 1.5 * (a * g).sum((2, 3)))
    with pytest.raises(WrongError, match="channel_scores"):
        list(choice.measured("channels_last", "float32", 10, task(tmp_path, Refusing())))


def test_sizes_are_what_they_say():
    for size in [10, *choice.SIZES]:
        assert torch.Size(choice.shape(size)).numel() == 2**size
    assert sorted(choice.SIZES) == list(range(14, 29))


def test_the_small_run_calls_every_operation_and_says_what_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(small_run, "SHAPES", small_run.SHAPES[1:2])
    assert small_run.main(["--device", "cpu"]) == 0
    assert re.search(r"'native': \d\d", capsys.readouterr().out)
    corrupt(monkeypatch, "channel_scores")
    assert small_run.main(["--device", "cpu"]) == 1
    assert "native channel_scores" in capsys.readouterr().out


CLEAN = {
    "memcheck": "========= COMPUTE-SANITIZER\nsmall_run: {}\n========= ERROR SUMMARY: 0 errors\n",
    "racecheck": "========= COMPUTE-SANITIZER\n"
    "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n",
}
DIRTY = {
    "memcheck": (
        "========= Invalid __global__ write of size 4 bytes\n=========     at kernel(float *)+0x70\n"
        "========= ERROR SUMMARY: 12 errors\n========= ERROR SUMMARY: 10 errors were not printed.\n"
    ),
    "racecheck": (
        "========= Error: Race reported between Write access at kernel()+0x90\n"
        "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"
    ),
}


@pytest.mark.parametrize("tool", sanitizer.TOOLS)
def test_a_sanitizers_summary_is_read(tool):
    assert sanitizer.parsed(tool, CLEAN[tool], 0) == {"found": 0}
    assert sanitizer.parsed(tool, CLEAN[tool], 1).get("found") is None  # the program failed under it
    assert sanitizer.parsed(tool, "", 0).get("found") is None
    assert sanitizer.parsed(tool, DIRTY[tool], 0)["found"] > 0
    assert sanitizer.parsed(tool, CLEAN[tool] + DIRTY[tool], 0)["found"] > 0  # of two processes


def test_without_the_sanitizer_nothing_is_run(tmp_path):
    at = task(tmp_path)
    sanitizer.run(at)
    assert at.found["not run"]


def test_the_sanitizers_piece_fails_by_what_its_tools_find(tmp_path, monkeypatch):
    tool = tmp_path / sanitizer.TOOL
    tool.write_text(
        f'#!/bin/sh\nif [ $2 = memcheck ]; then echo "{CLEAN["memcheck"]}"; else echo "{DIRTY["racecheck"]}"; fi\n'
    )
    tool.chmod(0o755)
    on = device.Processor()
    on.kind = "cuda"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    at = task(tmp_path, on)
    monkeypatch.setattr(sanitizer, "PROGRAM", ["true"])
    with pytest.raises(FoundError, match="racecheck"):
        sanitizer.run(at)
    assert at.found["memcheck"] == {"found": 0} and at.found["racecheck"]["found"] == 1


def test_outcomes_are_counted_and_a_failing_test_fails_the_piece(tmp_path, monkeypatch):
    mixed = "import pytest\ndef test_a(): pass\ndef test_b(): pytest.skip('no')\n"
    (tmp_path / "test_mixed.py").write_text(mixed)
    monkeypatch.setattr(testing, "ROOT", tmp_path)
    monkeypatch.setattr(testing, "TESTS_QUICK", ["test_mixed.py"])
    at = task(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(operations.__file__).rpartition("/bench/")[0])
    testing.run(at)
    assert at.found["outcomes"] == {"passed": 1, "skipped": 1} and at.found["files"] == ["test_mixed.py"]
    (tmp_path / "test_mixed.py").write_text(mixed + "def test_c(): raise OSError('broken')\n")
    wrong = Task(device.Processor(), True, 100.0, tmp_path / "other.json")
    with pytest.raises(FoundError, match="broken"):
        testing.run(wrong)
    assert wrong.found["outcomes"]["failed"] == 1


def test_the_backends_that_ran_are_read_from_the_tests_report():
    report = "batch_norm_act by cuda: 12 calls\nchannel_scores by cuda resident: 3 calls\nno CUDA device: nothing"
    assert testing.BACKEND.findall(report) == [
        ("batch_norm_act", "cuda", "12"),
        ("channel_scores", "cuda resident", "3"),
    ]


def test_the_tests_that_are_run_exist():
    for pattern in testing.TESTS:
        assert list(testing.ROOT.glob(pattern)) or "*" in pattern, pattern
