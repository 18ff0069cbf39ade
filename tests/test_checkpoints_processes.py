"""Several processes keep files of their own, and go on from the same step, all or none."""

import copy
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

import taylorkern as tk
from taylorkern import sealed


def raised(act: Callable[[], object]) -> tuple[str, str]:
    try:
        act()
    except (OSError, RuntimeError, ValueError) as error:
        return type(error).__name__, str(error)
    return "", ""


class Run:
    def __init__(self, folder: Path, **options) -> None:
        self.model = nn.Linear(1, 1)
        self.checkpoints = tk.Checkpoints(folder, model=self.model, **options)

    def saved(self, *steps: int) -> "Run":
        self.checkpoints.load()
        for step in steps:
            nn.init.constant_(self.model.weight, 10 * step + distributed.get_rank())
            self.checkpoints.save(step)
        return self


def random_states(folder: Path, rank: int) -> dict[str, object]:
    torch.manual_seed(rank)
    run = Run(folder).saved(3)
    want = torch.rand(2)
    loaded = run.checkpoints.load()
    return {"loaded": loaded, "goes on": torch.equal(torch.rand(2), want), "weight": int(run.model.weight)}


def damaged_in_one(folder: Path, rank: int) -> dict[str, object]:
    Run(folder).saved(3, 6)
    if rank == 1:
        (folder / "step-6.rank1-of-2.pt").write_bytes(b"damaged")
    distributed.barrier()
    run = Run(folder)
    return {"loaded": run.checkpoints.load(), "weight": int(run.model.weight)}


def failing_in_one(folder: Path, rank: int) -> dict[str, object]:
    run, write = Run(folder).saved(3, 6), sealed.write

    def full(path: Path, state: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    sealed.write = full if rank == 1 else write
    try:
        told = raised(lambda: run.checkpoints.save(9))
    finally:
        sealed.write = write
    files = sorted(name for name in os.listdir(folder) if f"rank{rank}" in name)
    return {"raised": told, "files": files, "loaded": Run(folder).checkpoints.load()}


def first_unfinished_in_one(folder: Path, rank: int) -> dict[str, object]:
    Run(folder).saved(3)
    if rank == 1:
        (folder / "step-3.rank1-of-2.pt").unlink()
    distributed.barrier()
    return {"loaded": Run(folder).checkpoints.load()}


def lost_in_one(folder: Path, rank: int) -> dict[str, object]:
    Run(folder).saved(3, 6)
    for path in folder.glob("*rank1*") if rank == 1 else ():
        path.unlink()
    distributed.barrier()
    return {"raised": raised(Run(folder).checkpoints.load)}


def by_itself(folder: Path, rank: int) -> dict[str, object]:
    Run(folder / str(rank), group=None).saved(rank + 1)
    wrapped = DistributedDataParallel(nn.Linear(1, 1))
    told = raised(lambda: tk.Checkpoints(folder, model=wrapped))
    alone = distributed.new_group([0])
    outside = raised(Run(folder / "group", group=alone).checkpoints.load)
    return {"files": os.listdir(folder / str(rank)), "wrapped": told, "outside": outside}


SCENES = [random_states, damaged_in_one, failing_in_one, first_unfinished_in_one, lost_in_one, by_itself]


def play(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {scene.__name__: scene(Path(folder) / scene.__name__, rank) for scene in SCENES}
    torch.save(found, Path(folder) / f"found-{rank}")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    folder = tmp_path_factory.mktemp("played")
    multiprocessing.spawn(play, (str(folder),), nprocs=2)
    both = [torch.load(folder / f"found-{rank}", weights_only=True) for rank in (0, 1)]
    return folder, {scene.__name__: [found[scene.__name__] for found in both] for scene in SCENES}


def test_each_has_its_own_file_and_random_states(played):
    found = played[1]["random_states"]
    assert found == [{"loaded": {"step": 3}, "goes on": True, "weight": 30 + rank} for rank in (0, 1)]


def test_all_go_on_from_the_newest_step_that_each_has_whole(played):
    assert played[1]["damaged_in_one"] == [{"loaded": {"step": 3}, "weight": 30 + rank} for rank in (0, 1)]


def test_where_one_can_not_write_all_raise_and_nothing_is_removed(played):
    first, second = played[1]["failing_in_one"]
    assert first["raised"][0] == second["raised"][0] == "OSError"
    assert "process 1 of 2 failed: OSError: [Errno 28] No space left" in first["raised"][1]
    assert first["files"] == [f"step-{step}.rank0-of-2.pt" for step in (3, 6, 9)]
    assert second["files"] == [f"step-{step}.rank1-of-2.pt" for step in (3, 6)]
    assert first["loaded"] == second["loaded"] == {"step": 6}


def test_a_first_checkpoint_that_not_all_have_is_none(played):
    assert played[1]["first_unfinished_in_one"] == [{"loaded": None}] * 2


def test_where_one_has_lost_everything_all_raise(played):
    for found in played[1]["lost_in_one"]:
        assert found["raised"][0] == "StoreError" and "none of them whole in every process" in found["raised"][1]


def test_a_process_by_itself_or_outside_the_group(played):
    first, second = played[1]["by_itself"]
    assert first["files"] == ["step-1.pt"] and second["files"] == ["step-2.pt"]
    assert first["outside"] == ("", "") and "not in the group=" in second["outside"][1]
    for found in (first, second):
        assert "model= is a DistributedDataParallel; give the model inside, model.module" in found["wrapped"][1]


def test_another_number_of_processes_is_refused(played):
    folder = played[0] / "damaged_in_one"
    before = sorted(os.listdir(folder))
    run = Run(folder)
    state = copy.deepcopy(run.model.state_dict())
    with pytest.raises(ValueError, match="newer than any checkpoint of 1 process and of another number"):
        run.checkpoints.load()
    assert run.model.state_dict() == state and sorted(os.listdir(folder)) == before
