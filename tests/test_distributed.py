"""Pruning in several processes: all remove the same units, those one process would, or none does."""

import pytest
import torch

import taylorkern as tk
from tests.distributed.launch import finished, left, started
from tests.distributed.rounds import KINDS, STEPS
from tests.distributed.training import X, loss, network, sgd, weights


def run(folder, program, processes, *arguments):
    finished(started(program, processes, str(folder), *arguments))
    return left(folder, processes)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run(tmp_path_factory.mktemp("two"), "rounds", 2, *KINDS)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return run(tmp_path_factory.mktemp("four"), "rounds", 4, "cut")


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
    return run(tmp_path_factory.mktemp("failed"), "failures", 2)


def by_one_process(processes, criterion="taylor_fo"):
    """What goes in each step, and the weights, where one process accumulates every rank's gradients."""
    model = network()
    optimizer = sgd(model)
    options = {"every": 3, "step": 2, "target": 0.3, "of": "channels", "criterion": criterion}
    pruner = tk.Pruner(model, X, optimizer=optimizer, **options)
    removed = []
    for step in STEPS:
        optimizer.zero_grad()
        for rank in range(processes):
            (loss(model, step, rank) / processes).backward()
        optimizer.step()
        removed.append([unit.places for unit in pruner.step()])
    return removed, weights(model)


def assert_alike(found, kind):
    first, *others = (process[kind] for process in found)
    assert sum(map(len, first["removed"])) == 6
    for other in others:
        assert other["removed"] == first["removed"] and other["left"] == first["left"]
        for name, tensor in first["weights"].items():
            assert torch.equal(other["weights"][name], tensor), name


@pytest.mark.parametrize("kind", KINDS)
def test_all_processes_remove_the_same_units_and_keep_the_same_bits(two, kind):
    assert_alike(two, kind)


def test_four_processes_do_so_too(four):
    assert_alike(four, "cut")


@pytest.mark.parametrize("processes", [2, 4])
def test_the_units_are_those_of_one_process_with_all_minibatches(processes, two, four):
    removed, expected = by_one_process(processes)
    found = {2: two, 4: four}[processes][0]["cut"]
    assert found["removed"] == removed
    for name, tensor in expected.items():
        torch.testing.assert_close(found["weights"][name], tensor, rtol=1e-9, atol=1e-12)


def test_a_mask_removes_what_a_cut_does(two):
    masked, cut = two[0]["mask"], two[0]["cut"]
    assert masked["kept"] == cut["kept"]
    assert [len(units) for units in masked["removed"]] == [len(units) for units in cut["removed"]]
    assert masked["removed"][2] == cut["removed"][2]


@pytest.mark.parametrize("kind", KINDS)
def test_processes_speak_in_rounds_and_in_the_first_step_after_a_cut_only(two, kind):
    told = two[0][kind]["told"]
    spoken = [step for step in STEPS if told[step] > (told[step - 1] if step else 0)]
    assert spoken == ([2, 5, 8] if kind.startswith("mask") else [2, 3, 5, 6, 8, 9])


@pytest.mark.parametrize("case", ["cut", "mask", "choice"])
def test_what_fails_in_one_process_changes_nothing_in_any(failed, case):
    guilty = 0 if case == "choice" else 1
    for rank, process in enumerate(failed):
        found = process[case]
        assert found["same"] and found["minibatches"] == 3
        assert found["then"] == process["undisturbed"]["then"] != []
        if rank != guilty:
            assert f"changed nothing, for process {guilty} of the group failed" in found["told"]
    own = failed[guilty][case]["told"]
    assert own.startswith("RuntimeError: target" if case == "choice" else "SurgeryError")


@pytest.mark.parametrize(
    "case,why",
    [
        ("drifted", "the parameters are not the same in all processes"),
        ("arguments", "chose different units"),
        ("old wrapper", "has to be wrapped anew"),
        ("old wrapper, unused", "has to be wrapped anew"),
    ],
)
def test_what_would_differ_raises_in_all_processes(failed, case, why):
    for process in failed:
        assert process[case]["told"].startswith("RuntimeError") and why in process[case]["told"]
        assert process[case]["same"]


def test_a_process_by_itself_speaks_to_nobody(failed):
    for process in failed:
        assert process["by itself"] == {"told": "", "calls": 0, "minibatches": 0}


def test_a_group_is_for_its_members(failed):
    for process in failed:
        assert process["own group"]["told"] == ""
        assert "not in the group" in process["own group"]["other"]


def test_a_group_by_another_name_is_refused():
    with pytest.raises(ValueError, match="group='all' is no process group"):
        tk.Pruner(network(), X, group="all")
