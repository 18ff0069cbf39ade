"""A job that is stopped anywhere and started again ends with the same bits."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from taylorkern import StoreError
from taylorkern.errors import CommandError
from taylorkern.files import replace
from taylorkern.job import learner, run
from tests import tiny_job


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return tiny_job.folder(tmp_path_factory.mktemp("digits"))


class Stopped(BaseException):
    """As KeyboardInterrupt: nothing catches it on its way."""


def results(out):
    return [(Path(out) / name).read_bytes() for name in (run.NETWORK, run.HISTORY)]


def undisturbed(data, out, **options):
    summary = run.run(tiny_job.settings(data, out, **options))
    return summary["history"][-1]["step"], results(out)


def stop_after(monkeypatch, steps):
    whole, left = learner.Learner.learn, iter(range(steps))

    def learn(*arguments):
        if next(left, None) is None:
            raise Stopped
        return whole(*arguments)

    monkeypatch.setattr(learner.Learner, "learn", learn)


def stopped_and_gone_on(monkeypatch, data, out, stops, **options):
    """Stopped after so many steps of each attempt, then left to its end."""
    for steps in stops:
        with pytest.raises(Stopped), monkeypatch.context() as patched:
            stop_after(patched, steps)
            run.run(tiny_job.settings(data, out, **options))
    torch.manual_seed(99)  # what a new process has
    run.run(tiny_job.settings(data, out, **options))
    return results(out)


@pytest.mark.parametrize(
    "options",
    [
        {"augment": True},
        {"amp": "fp16", "optimizer": "adamw", "channels_last": True},
        {"amp": "bf16", "criterion": "surgeon"},
        {"of": "params", "step": 1, "criterion": "taylor_so", "epochs": 0},
    ],
    ids=" ".join,
)
def test_a_job_that_is_stopped_ends_with_the_same_bits(options, digits, tmp_path, monkeypatch):
    expected = undisturbed(digits, tmp_path / "whole", **options)[1]
    assert stopped_and_gone_on(monkeypatch, digits, tmp_path / "parts", [4, 7, 5], **options) == expected


@pytest.mark.parametrize("function", ["batches", "own_batches"])
def test_data_of_a_function_that_shuffles_and_a_network_that_drops_out_go_on_too(function, tmp_path, monkeypatch):
    data = f"{tiny_job.FILE}:{function}"
    steps, expected = undisturbed(data, tmp_path / "whole", epochs=2, finetune_epochs=2)
    assert steps > 20
    stops = [4, 9, 6]
    options = {"epochs": 2, "finetune_epochs": 2}
    assert stopped_and_gone_on(monkeypatch, data, tmp_path / "parts", stops, **options) == expected


def test_the_number_of_workers_changes_nothing(tmp_path):
    data = tiny_job.folder(tmp_path / "digits")
    (data / "train/3/001.png").write_bytes(b"no image")
    alone = undisturbed(data, tmp_path / "alone", augment=True)
    assert undisturbed(data, tmp_path / "two", augment=True, workers=2) == alone


def test_minibatches_of_one_image_are_learned_from(tmp_path):
    summary = run.run(tiny_job.settings(f"{tiny_job.FILE}:single_images", tmp_path / "out"))
    assert summary["empty"] == 0 and summary["history"][0]["train_loss"] is not None


@pytest.mark.parametrize("lost", [run.NETWORK, run.REPORT, run.HISTORY])
def test_results_that_are_gone_are_made_again_from_the_last_checkpoint(lost, digits, tmp_path, monkeypatch):
    _, expected = undisturbed(digits, tmp_path / "out")
    (tmp_path / "out" / lost).unlink()
    monkeypatch.setattr(learner.Learner, "learn", None)
    run.run(tiny_job.settings(digits, tmp_path / "out"))
    assert results(tmp_path / "out") == expected and (tmp_path / "out" / lost).exists()


def test_results_that_are_gone_and_have_no_checkpoint_are_told_of(digits, tmp_path, monkeypatch):
    undisturbed(digits, tmp_path / "out")
    (tmp_path / "out" / run.NETWORK).unlink()
    shutil.rmtree(tmp_path / "out" / "checkpoints")
    with pytest.raises(CommandError, match=f"lacks {run.NETWORK}.*--restart"):
        run.run(tiny_job.settings(digits, tmp_path / "out"))


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_damaged_summary_is_named_with_what_to_do(content, digits, tmp_path):
    undisturbed(digits, tmp_path / "out")
    (tmp_path / "out" / run.SUMMARY).write_text(content)
    with pytest.raises(CommandError, match=f"{run.SUMMARY} is damaged; remove it"):
        run.run(tiny_job.settings(digits, tmp_path / "out"))


def test_training_that_diverges_stops_and_its_checkpoint_stays(digits, tmp_path):
    with pytest.raises(CommandError, match=r"diverged; --restart with a lower --lr than 1e\+3"):
        run.run(tiny_job.settings(digits, tmp_path / "out", lr=1e30, checkpoint_every=1))
    assert list((tmp_path / "out").glob("checkpoints/dense/step-*.pt"))
    assert not (tmp_path / "out" / run.SUMMARY).exists()


def test_points_and_skipped_files_are_not_told_twice(tmp_path, monkeypatch):
    data = tiny_job.folder(tmp_path / "digits")
    (data / "train/0/002.png").write_bytes(b"")
    (data / "val/1/005.png").write_text("text")
    stopped_and_gone_on(monkeypatch, data, tmp_path / "out", [5, 6])
    points = [json.loads(line) for line in (tmp_path / "out/history.jsonl").read_text().splitlines()]
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert points == summary["history"]
    assert len({(point["phase"], point["step"]) for point in points}) == len(points)
    assert {skip["file"] for skip in summary["images"]["skipped"]} <= {"train/0/002.png", "val/1/005.png"}
    assert len(summary["images"]["skipped"]) == len({skip["file"] for skip in summary["images"]["skipped"]}) == 2


def test_results_that_can_not_be_written_are_written_by_the_next_start(digits, tmp_path, monkeypatch):
    _, expected = undisturbed(digits, tmp_path / "whole")
    out = tmp_path / "out"
    with pytest.raises(Stopped):
        stop_after(monkeypatch, 5)
        run.run(tiny_job.settings(digits, out))
    monkeypatch.undo()
    for name in (run.NETWORK, run.REPORT, run.SUMMARY):
        (out / name).mkdir()  # in the file's place
        with pytest.raises((CommandError, StoreError), match=name):
            run.run(tiny_job.settings(digits, out))
        (out / name).rmdir()
    run.run(tiny_job.settings(digits, out))
    assert results(out) == expected


def test_a_checkpoint_that_can_not_be_written_does_not_stop_the_run(digits, tmp_path, capsys):
    _, expected = undisturbed(digits, tmp_path / "whole")
    out = tmp_path / "out"
    out.mkdir()
    (out / "checkpoints").write_text("a file in the folder's place")
    replace(out / "settings.json", (tmp_path / "whole/settings.json").read_bytes())
    run.run(tiny_job.settings(digits, out))
    assert results(out) == expected
    assert capsys.readouterr().err.count("no checkpoint at step") == 1
