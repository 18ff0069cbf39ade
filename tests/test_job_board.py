import math

import pytest

pytest.importorskip("tensorboard", reason="tensorboard is not installed")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from taylorkern.errors import CommandError
from taylorkern.job import board
from taylorkern.job.board import Board

HISTORY = [
    {"phase": "train", "step": 10, "loss": 1.5, "train_loss": None, "accuracy": 0.5, "channels": None, "lr": 0.1},
    {"phase": "prune", "step": 20, "loss": math.nan, "train_loss": 0.5, "accuracy": 0.75, "channels": 30, "lr": 0.01},
    {"phase": "prune", "step": 30, "loss": 0.5, "train_loss": 0.25, "accuracy": 1.0, "channels": 20, "lr": 0.01},
]


def read(folder):
    """Every scalar's points in all event files of ``folder``."""
    found = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def files(folder):
    return list(folder.glob(board.FILES))


def test_numbers_are_logged_at_their_steps_as_they_come(tmp_path):
    with Board(tmp_path) as log:
        log.follow(HISTORY[:1])
        assert read(tmp_path)["loss"] == [(10, 1.5)]
        log.follow(HISTORY[:2])
        log.follow(HISTORY)
        scalars = read(tmp_path)
    assert scalars["accuracy"] == [(10, 0.5), (20, 0.75), (30, 1.0)]
    assert scalars["channels"] == [(20, 30), (30, 20)]
    assert [step for step, _ in scalars["loss"]] == [10, 20, 30] and math.isnan(scalars["loss"][1][1])
    assert scalars["train_loss"] == [(20, 0.5), (30, 0.25)]
    assert set(scalars) == {"loss", "train_loss", "accuracy", "channels", "lr"}


def test_a_run_that_goes_on_has_every_point_once_and_none_of_those_it_lost(tmp_path):
    killed = Board(tmp_path)
    killed.follow(HISTORY[:1])
    killed.follow([HISTORY[0], HISTORY[1] | {"accuracy": 0.1}, HISTORY[2] | {"step": 29}])
    with Board(tmp_path) as log:
        log.follow(HISTORY[:2])
        log.follow(HISTORY)
    assert read(tmp_path)["accuracy"] == [(10, 0.5), (20, 0.75), (30, 1.0)]
    assert len(files(tmp_path)) == 1
    killed.close()


def test_nothing_is_taken_away_before_the_history_is_written_again(tmp_path):
    with Board(tmp_path) as log:
        log.follow(HISTORY)
    (before,) = files(tmp_path)
    Board(tmp_path)
    assert files(tmp_path) == [before]


def test_other_files_of_the_folder_stay(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with Board(tmp_path) as log:
        log.follow(HISTORY)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_full_disk_is_told_and_the_log_follows_when_there_is_room(tmp_path, monkeypatch, capsys):
    def full(self):
        raise OSError(28, "No space left on device")

    with Board(tmp_path) as log:
        log.follow(HISTORY[:1])
        with monkeypatch.context() as patch:
            patch.setattr("torch.utils.tensorboard.SummaryWriter.flush", full)
            log.follow(HISTORY[:2])
        assert "No space left on device" in capsys.readouterr().err
        log.follow(HISTORY)
    assert read(tmp_path)["accuracy"] == [(10, 0.5), (20, 0.75), (30, 1.0)]


def test_widths_are_a_table(tmp_path):
    with Board(tmp_path) as log:
        log.follow(HISTORY)
        log.widths({"stem": 8, "head": 4}, {"stem": 5})
    found = EventAccumulator(str(tmp_path)).Reload()
    (event,) = found.Tensors("widths/text_summary")
    assert b"| stem | 8 | 5 |\n| head | 4 | 0 |" in event.tensor_proto.string_val[0]


def test_without_tensorboard_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(board, "find_spec", lambda name: None)
    with pytest.raises(CommandError, match=r"pip install 'taylorkern\[tensorboard\]'"):
        Board(tmp_path / "log")
    assert not (tmp_path / "log").exists()
