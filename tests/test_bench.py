"""The bench suite as a whole: its rounds, the machine's name, and a run of everything on a tiny network."""

import json
import mmap
import platform
import subprocess
import sys

import pytest

from bench import faults, machine, pairs, readme


def test_every_round_runs_every_way_once_and_in_orders_of_its_own():
    ran = []
    found = pairs.interleaved({name: lambda name=name: ran.append(name) for name in "abcd"}, 30)
    rounds = [tuple(ran[i : i + 4]) for i in range(0, len(ran), 4)]
    assert len(rounds) == 30
    assert all(sorted(order) == list("abcd") for order in rounds)
    assert len(set(rounds)) > 10
    assert {name: len(times) for name, times in found.items()} == dict.fromkeys("abcd", 30)


def test_ratios_pair_what_ran_in_one_round():
    assert pairs.ratios([1.0, 20.0, 3.0], [2.0, 40.0, 6.0]) == [0.5, 0.5, 0.5]
    assert pairs.quartiles([3.0, 1.0, 2.0]) == {"p25": 1.0, "median": 2.0, "p75": 3.0}
    assert pairs.geometric([0.5, 0.5, 4.0]) == pytest.approx(1.0)


def test_faults_are_those_of_the_call():
    pages = 512

    def touch():
        with mmap.mmap(-1, pages * mmap.PAGESIZE) as memory:
            for page in range(pages):
                memory[page * mmap.PAGESIZE] = 1

    counted, idle = faults.Counted(touch), faults.Counted(lambda: None)
    for run in (counted, idle, counted, idle):
        run()
    assert counted.median() >= pages
    assert idle.median() < pages


def test_a_machine_is_named_by_its_processor_and_by_nothing_else():
    facts = machine.facts()
    assert facts["machine"] == machine.slug(facts["processor"], facts["cores"])
    assert {"torch", "threads", "caches", "date"} <= set(facts)
    assert platform.node() not in json.dumps(facts) or platform.node() in facts["processor"]
    assert machine.slug("AMD EPYC(TM) 7B13", 1) == "amd-epyc-7b13-1-core"


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The whole suite on a tiny network, as make bench runs it."""
    for needed in ("pytest_benchmark", "torch_pruning", "backpack"):
        pytest.importorskip(needed, reason="not installed: pip install -c constraints.txt -e '.[bench]'")
    path = tmp_path_factory.mktemp("quick") / "result.json"
    command = [sys.executable, "-m", "bench", "--quick", "--json", str(path)]
    done = subprocess.run(command, cwd=readme.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text()), done.stdout


def test_the_whole_suite_leaves_one_json_with_all_fields(quick):
    found, printed = quick
    assert set(found) == {"machine", "facts", "quick", "ways", "bars", "rows"}
    assert found["quick"] is True
    assert all(bar["met"] is None for bar in found["bars"])  # a tiny network can't meet one
    suites = {row["suite"] for row in found["rows"]}
    assert suites == {"operations", "steps", "memory", "pruning"}
    assert not [row for row in found["rows"] if "failed" in row]
    for row in found["rows"]:
        assert {"suite", "subject", "way"} <= set(row)
        if row["suite"] != "memory":
            assert row["pairs"] == 3 and row["checked"] is not None
        if "to" in row and row["suite"] != "memory":
            assert set(row["ratio"]) == {"p25", "median", "p75"}
    stepped = {row["way"] for row in found["rows"] if row["suite"] == "steps"}
    assert stepped == set(found["ways"])
    assert platform.node() not in json.dumps(found["rows"])
    assert printed.startswith("# What scoring costs") and "tiny" in printed


def test_a_part_that_fails_keeps_nothing(tmp_path, monkeypatch):
    pytest.importorskip("pytest_benchmark", reason="not installed: pip install -c constraints.txt -e '.[bench]'")
    from bench import __main__ as run

    monkeypatch.setattr(run, "parts", lambda quick: ["test_nothing_of_that_name"])
    path = tmp_path / "result.json"
    with pytest.raises(SystemExit, match="nothing is kept"):
        run.main(["--quick", "--json", str(path)])
    assert not path.exists()
