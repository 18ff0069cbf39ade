"""The GPU check as a whole: its budget, pieces that fail, one JSON of all parts, bars, the page, and what is kept."""

import json
import sys
import time

import pytest
import torch

from bench import readme
from bench.gpu import __main__ as check
from bench.gpu import bars, choice, page, result
from bench.gpu.pieces import BUDGET, PIECES
from bench.operations import OPERATIONS
from taylorkern.backends.choice import MEASURED

DEVICE = "NVIDIA H100 80GB HBM3"


def test_all_pieces_fit_into_nine_minutes():
    assert BUDGET < 9 * 60
    makefile = (readme.ROOT / "Makefile").read_text()
    assert "gpu-check:" not in makefile or "bench.gpu" in makefile


def test_what_a_piece_leaves_of_its_time_the_others_get():
    names = list(PIECES)
    assert sum(PIECES[name].seconds for name in names) == BUDGET
    assert check.shared(BUDGET / 2, names) == PIECES[names[0]].seconds / 2
    assert check.shared(300.0, names[-1:]) == 300.0
    assert check.shared(BUDGET, names[1:]) > PIECES[names[1]].seconds


def test_pieces_run_in_turn_and_one_that_fails_stops_no_other(capsys):
    got, kept = [], {}

    def attempt(name, seconds):
        got.append((name, seconds))
        return (
            {"status": "failed", "why": "broke", "last": ["its last line"]} if name == "tests" else {"status": "done"}
        )

    assert not check.run(["tests", "choice"], 100.0, attempt, kept.__setitem__)
    assert [name for name, _ in got] == ["tests", "choice"] == list(kept)
    assert got[1][1] == pytest.approx(100.0, abs=1)  # the first took none of it
    told = capsys.readouterr().err
    assert "tests: failed, broke" in told and "its last line" in told
    for status, well in {"done": True, "not run": True, "failed": False, check.NOT_STARTED: False}.items():
        assert check.run(["facts"], 9.0, lambda name, s, status=status: {"status": status}, kept.__setitem__) is well


def test_a_process_that_outruns_its_time_is_stopped_with_all_it_has_started(tmp_path):
    alive = tmp_path / "alive"
    child = f"import time; time.sleep(2); open({str(alive)!r}, 'w')"
    program = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    ended, output = check.ran([sys.executable, "-c", program], 1.0)
    assert ended == "stopped after its 1 s" and output == "begun\n"
    time.sleep(2.0)
    assert not alive.exists()


def test_a_process_ends_well_or_with_its_status():
    assert check.ran([sys.executable, "-c", "import bench.gpu.device; print('here')"], 30.0) == ("", "here\n")
    ended, output = check.ran([sys.executable, "-c", "raise SystemExit('why it ended')"], 30.0)
    assert ended == "ended with 1" and output == "why it ended\n"


def test_what_a_piece_had_found_before_it_failed_is_kept(monkeypatch):
    def ran(command, seconds):
        with open(command[command.index("--part") + 1], "w") as part:
            part.write(json.dumps({"device": "here", "rows": [1, 2]}))
        return "ended with 1", f"{readme.ROOT}/bench/gpu/steps.py: first\n" + "line\n" * 100 + "last"

    monkeypatch.setattr(check, "ran", ran)
    part = check.attempted("steps", 50.0, "cpu", quick=True)
    assert part["status"] == "failed" and part["why"] == "ended with 1" and part["rows"] == [1, 2]
    assert len(part["last"]) == check.KEPT and part["last"][-1] == "last"
    assert check.nameless(f"{readme.ROOT}/bench/gpu/steps.py") == "bench/gpu/steps.py"
    assert check.attempted("steps", 1.0, "cpu", quick=True)["status"] == check.NOT_STARTED


def test_a_piece_for_which_no_time_was_left_does_not_replace_what_was_measured(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    parts = iter([{"status": "done", "rows": []}, {"status": check.NOT_STARTED, "why": "0 s were left"}])
    monkeypatch.setattr(check, "attempted", lambda *_: next(parts))
    arguments = ["--device", "cpu", "--quick", "--only", "facts", "--json", str(path)]
    assert check.main(arguments) == 0
    assert check.main(arguments) == 1
    assert result.read(path)["pieces"]["facts"]["status"] == "done"


def test_a_piece_in_a_process_of_its_own_leaves_its_part(tmp_path, capsys):
    path = tmp_path / "result.json"
    arguments = ["--device", "cpu", "--quick", "--json", str(path)]
    assert check.main([*arguments, "--only", "facts"]) == 0
    assert check.main([*arguments, "--only", "determinism", "sanitizer"]) == 0
    found = result.read(path)
    assert found["quick"] and all(bar["met"] is None for bar in found["bars"])
    assert {name: part["status"] for name, part in found["pieces"].items()} == {
        "facts": "done",
        "determinism": "done",
        "sanitizer": "not run",
    }
    assert all(part["device"] == found["device"] and part["date"] for part in found["pieces"].values())
    assert "A trial" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_nothing_is_measured(capsys):
    assert check.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_parts_of_another_device_or_of_a_trial_are_not_mixed():
    old = result.merged(None, DEVICE, False, {"facts": {"status": "done"}})
    assert list(result.merged(old, DEVICE, False, {"tests": {"status": "failed"}})["pieces"]) == ["facts", "tests"]
    for device, trial in ((DEVICE, True), ("another", False)):
        with pytest.raises(SystemExit, match="name another"):
            result.merged(old, device, trial, {})


def operation_rows(ratio=0.5, share=0.9):
    q = {"p25": ratio - 0.01, "median": ratio, "p75": ratio + 0.01}
    of_copy = {"p25": share, "median": share, "p75": share}
    seen = {"ratio": q, "of copy": of_copy, "GB/s": of_copy}
    checked = {"distance from float64": 1e-3, "torch's own": 1e-3}
    return [
        {
            "suite": "operations",
            "subject": {"operation": name, **bars.MAIN, "shape": [256, channels, side, side]},
            "way": way,
            "to": "eager",
            "launching": q,
            "peak": 1000,
            "graph": seen if way == "ours" else {"failed": "RuntimeError: not in a capture"},
            "checked": checked,
        }
        | seen
        for name in ("BN+ReLU", "channel_scores")
        for channels, side in OPERATIONS[name].shapes
        for way in ("eager", "ours")
    ]


def step_row(way, median, batch=256, to="plain", precision=bars.AMP, memory=1.0):
    q = {"p25": median, "median": median, "p75": median}
    subject = {"network": "resnet50", "size": 224, "batch": batch, "layout": "channels_last", "precision": precision}
    return {"subject": subject, "way": way, "to": to, "ratio": q, "launching": q, "launched": q, "memory": memory}


def verdict(pieces, name):
    (found, *_) = (bar for bar in bars.judged(pieces) if bar["name"].startswith(name))
    return found["value"], found["met"]


def test_bars_are_met_missed_or_not_measured():
    assert all(bar["value"] is None and bar["met"] is None for bar in bars.judged({}))
    name, share = "BN+ReLU, fused and scored", "channel_scores, share"
    rows = operation_rows(0.62, 0.85)
    assert verdict({"operations": {"rows": rows}}, name) == (0.62, True)
    assert verdict({"operations": {"rows": rows}}, share) == (0.85, True)
    assert verdict({"operations": {"rows": operation_rows(0.63, 0.84)}}, name) == (0.63, False)
    assert verdict({"operations": {"rows": operation_rows(0.63, 0.84)}}, share) == (0.84, False)
    assert verdict({"operations": {"rows": rows[2:]}}, name) == (None, None)  # a shape is missing
    others = [row | {"subject": row["subject"] | {"dtype": "float32"}} for row in rows]
    assert verdict({"operations": {"rows": others}}, name) == (None, None)


def test_an_operation_is_judged_by_the_geometric_mean_over_its_shapes():
    rows = [row for row in operation_rows() if row["way"] == "ours" and row["subject"]["operation"] == "BN+ReLU"]
    for row, median in zip(rows, [0.25, 1.0] * 4, strict=True):
        row["ratio"] = {"median": median}
    assert (
        verdict({"operations": {"rows": rows}}, "BN+ReLU, fused and scored, of eager unscored, batch 256, by events")[0]
        == 0.5
    )


def test_steps_are_judged_by_batch_and_precision_and_memory_by_the_worst():
    rows = [step_row("fused, scored", 0.95, memory=1.01), step_row("fused, scored", 0.96, 128, memory=1.02)]
    name = "ResNet-50 AMP step, batch"
    pieces = {"steps": {"rows": rows}}
    assert verdict(pieces, f"{name} 256") == (0.95, True)
    assert verdict(pieces, f"{name} 128") == (0.96, False)
    assert verdict(pieces, "peak memory of a fused") == (1.02, False)
    assert verdict({"steps": {"rows": [step_row("fused, scored", 0.5, precision="float32")]}}, f"{name} 256") == (
        None,
        None,
    )
    compiled = {
        "rows": [step_row("compiled fused, scored", 1.2), step_row("compiled fused, scored", 0.9, to="compiled plain")]
    }
    assert verdict({"compiled": compiled}, "the same, compiled") == (0.9, True)


def choice_rows():
    row = {"operation": "channel_scores", "dtype": "bfloat16", "layout": "channels_last", "backend": "cuda"}
    return [row | {"log2_numel": size, "ratio_to_next": 0.9, "spread": {}} for size in (14, 28)] + [
        {key: row[key] for key in ("operation", "dtype", "layout")} | {"log2_numel": 16, "refused": {"cuda": "no"}}
    ]


def whole(trial=False):
    failed = {"subject": step_row("x", 1.0)["subject"], "way": "rival", "to": "plain", "failed": "Error: no"}
    parts = {
        "facts": {
            "facts": {"driver": "580", "cuda": "13.0", "torch": "2.11", "triton": None},
            "copies": [{"bytes": 1, "GB/s": 2000.0}, {"bytes": 2, "GB/s": 3000.0}],
            "backends": [{"backend": "cuda", "serves": False, "why": "no nvcc"}],
        },
        "operations": {"rows": operation_rows(), "left": ["one", "two"]},
        "steps": {"rows": [step_row("plain", 1.0), step_row("fused, scored", 0.8), failed]},
        "tests": {
            "outcomes": {"passed": 9, "failed": 1},
            "backends": {"channel_scores by cuda": 3},
            "why": "ended with 1",
        },
        "sanitizer": {"memcheck": {"found": 0}, "racecheck": {"ended": "not within 9 s"}},
        "determinism": {"rows": [{"different": 0}, {"different": 2}, {"refused": "no"}]},
        "precision": {"rows": [{"distance": {}}, {"wrong": "off"}]},
        "choice": {"rows": choice_rows(), "capability": [9, 0]},
    }
    parts = {name: part | {"status": "failed" if "why" in part else "done"} for name, part in parts.items()}
    return result.merged(None, DEVICE, trial, parts)


def test_the_page_shows_all_that_was_found():
    text = page.whole(whole())
    for told in (
        f"`make gpu-check` on {DEVICE}, driver 580, cuda 13.0, torch 2.11, copy 3,000 GB/s",
        "eager unscored, batch 256, by events | at most 0.62 (goal 0.45) | 0.500 | yes |",
        "| channel_scores, share of a copy's speed, by graphs | at least 0.85 | 0.900 | yes |",
        "9 passed; 1 failed; channel_scores by cuda: 3 calls; ended with 1",
        "memcheck: 0 found; racecheck: not within 9 s",
        "2 cases, 1 that differ",
        "2 cases, 1 beyond twice torch's own error",
        "left out for want of time: 2",
        "cuda: serves nothing, no nvcc",
        "| AMP bfloat16, batch 256 | fused, scored | plain | 0.80 (0.80 to 0.80) | 1.000 | 0.80 | 0.80 |",
        "Error: no",
        "RuntimeError: not in a capture",
        "| channel_scores | bfloat16 | channels_last | cuda 2 (0.90) |",
        "256x64x112x112",
    ):
        assert told in text, told
    assert "| compiled | training steps under torch.compile | not run |" in text
    ending = page.ending(whole())
    assert "256x64x112x112" not in ending and ending.index("## Pieces") < ending.index("## What was asked for")
    assert "A trial" in page.whole(whole(trial=True))


def test_the_section_shows_the_bars_of_every_device_or_that_there_is_none(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["page", "--results", str(tmp_path)])
    page.main()
    assert capsys.readouterr().out.strip() == page.UNMEASURED_YET == page.section(tmp_path)
    assert page.UNMEASURED_YET == "Not yet measured on a GPU: run `make gpu-check` on a machine that has one."
    result.write(tmp_path / f"{result.slug(DEVICE)}.json", whole())
    assert DEVICE in page.section(tmp_path) and "0.500 | yes" in page.section(tmp_path)
    page.main()
    assert "## Pieces" in capsys.readouterr().out
    assert not readme.results(tmp_path)  # the bench of the processor takes it for none of its own


def test_a_result_that_is_kept_reads_as_it_was_written(tmp_path):
    path = tmp_path / "result.json"
    assert result.read(path) is None
    result.write(path, whole())
    assert result.read(path) == whole()
    assert result.place(DEVICE).name == "gpu-nvidia-h100-80gb-hbm3.json"


def test_the_choice_is_kept_for_the_provider_table(tmp_path):
    path = tmp_path / "measured.json"
    other = {"capability": [8, 0], "rows": [{"backend": "cuda"}]}
    path.write_text(json.dumps({"devices": {"another": other, DEVICE: {"capability": [9, 0], "rows": []}}}))
    assert choice.keep(whole(), path) == 2
    kept = json.loads(path.read_text())["devices"]
    assert kept["another"] == other and kept[DEVICE]["capability"] == [9, 0]
    assert kept[DEVICE]["rows"][0] == {
        "operation": "channel_scores",
        "dtype": "bfloat16",
        "layout": "channels_last",
        "log2_numel": 14,
        "backend": "cuda",
        "ratio_to_next": 0.9,
    }
    before = path.read_text()
    for nothing in (whole(trial=True), result.merged(None, DEVICE, False, {})):
        with pytest.raises(SystemExit, match="no choice"):
            choice.keep(nothing, path)
    assert path.read_text() == before


def test_the_table_that_is_shipped_has_devices_by_name():
    devices = json.loads(MEASURED.read_text())["devices"]
    for of in devices.values():
        assert len(of["capability"]) == 2
        assert all(set(row) == set(choice.KEYS) for row in of["rows"])


@pytest.mark.parametrize("name", PIECES)
def test_a_page_can_be_made_of_any_piece_alone(name):
    found = whole()
    alone = {name: found["pieces"][name]} if name in found["pieces"] else {}
    for part in (alone, {name: {"status": "failed", "why": "it broke", "last": []}}):
        assert page.whole(found | {"pieces": part}).startswith("# What scoring costs on a GPU")


def test_readme_says_what_the_results_say(tmp_path):
    """The part between README's markers is what ``python -m bench.gpu.page --into README.md`` writes."""
    text = (readme.ROOT / "README.md").read_text()
    assert readme.between(text, page.section(), readme.GPU) == text


def test_the_page_goes_into_readme(tmp_path, monkeypatch):
    target = tmp_path / "README.md"
    target.write_text("before <!-- gpu --> old <!-- /gpu --> behind")
    monkeypatch.setattr(sys, "argv", ["page", "--results", str(tmp_path), "--into", str(target)])
    page.main()
    assert target.read_text() == f"before <!-- gpu -->\n{page.UNMEASURED_YET}\n<!-- /gpu --> behind"
