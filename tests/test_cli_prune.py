import json

import pytest
import safetensors
import torch

from taylorkern import cli
from tests import odd_jobs, tiny_job

QUICK = "--size 8 --batch 10 --workers 0 --every 2 --epochs 1 --finetune-epochs 1".split()


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return tiny_job.folder(tmp_path_factory.mktemp("digits"))


def prune(data, out, *others):
    model = f"{tiny_job.FILE}:build"
    return cli.main(["prune", "--model", model, "--data", str(data), "--out", str(out), *QUICK, *others])


@pytest.fixture(scope="module")
def finished(digits, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "out"
    assert prune(digits, out) == 0
    return out


def error(capsys):
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("taylorkern: error: ")]
    assert len(lines) == 1 and "Traceback" not in err
    return lines[0]


def test_a_run_leaves_a_network_a_report_and_its_figures(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert {"pruned.safetensors", "report.html", "history.jsonl"} <= {path.name for path in finished.iterdir()}
    assert summary["pruned"]["flops"] <= 0.5 * summary["dense"]["flops"]
    assert summary["ratios"]["flops"] == pytest.approx(summary["history"][-1]["flops_kept"])
    assert summary["classes"] == list("0123456789")
    assert summary["widths"]["dense"] == {"0": 8, "3": 8, "8": 10}
    assert [len(ranks) for ranks in summary["ranks"].values()] == [8, 8]
    assert [point["phase"] for point in summary["history"]][:2] == ["train", "prune"]
    assert summary["history"][0]["channels"] == 16


def test_the_bar_of_pruning_ends_full_however_few_rounds_it_took(digits, tmp_path, capsys):
    assert prune(digits, tmp_path / "out", "--step", "4", "--prune-epochs", "9", "--epochs", "0") == 0
    bars = [bar for line in capsys.readouterr().err.splitlines() for bar in line.split("\r") if "prune:" in bar]
    assert "100%" in bars[-1] and "accuracy=" in bars[-1]


def test_a_finished_run_is_told_again_and_not_done_again(finished, digits, capsys, monkeypatch):
    monkeypatch.setattr("taylorkern.job.run.Learner", None)
    before = (finished / "summary.json").read_bytes()
    assert prune(digits, finished, "--workers", "1", "--json") == 0
    told = capsys.readouterr()
    assert json.loads(told.out) == json.loads(before)
    assert "finished run" in told.err


def test_the_command_in_the_summary_is_the_one_that_was_given(finished, digits):
    words = json.loads((finished / "summary.json").read_text())["command"].split()
    assert words[:2] == ["taylorkern", "prune"]
    options = cli._parser().parse_args(words[1:])
    assert (options.data, options.size, options.epochs, options.seed) == (str(digits), 8, 1, 0)


def test_other_options_are_refused_and_named(finished, digits, capsys):
    assert prune(digits, finished, "--target", "0.4", "--lr", "0.1") == 1
    told = error(capsys)
    assert "--target is 0.5 there and 0.4 here" in told and "--lr is None there and 0.1 here" in told
    assert "--restart" in told


def test_files_that_came_since_are_refused_and_restart_begins_again(tmp_path, capsys):
    data, out = tiny_job.folder(tmp_path / "digits", per_class=5), tmp_path / "out"
    assert prune(data, out) == 0
    (data / "train/3/new.png").write_bytes((data / "train/3/001.png").read_bytes())
    capsys.readouterr()
    assert prune(data, out) == 1
    assert "files of --data have changed" in error(capsys)
    assert prune(data, out, "--restart", "--target", "0.6") == 0
    assert json.loads((out / "summary.json").read_text())["target"] == 0.6


@pytest.mark.parametrize(
    "file", ["pruned.safetensors", "report.html", "history.jsonl", "tensorboard/events.out.tfevents.1"]
)
def test_a_folder_of_something_else_is_left_alone(file, digits, tmp_path, capsys):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("precious")
    assert prune(digits, tmp_path) == 1
    assert f"another's {file.split('/')[0]}" in error(capsys)
    assert (tmp_path / file).read_text() == "precious"


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "others",
    [["--model", "torchvision:nope"], ["--data", "missing"], ["--weights", "missing.pt"], ["--target", "0.001"]],
)
def test_restart_throws_nothing_away_where_the_new_run_can_not_begin(others, finished, digits, capsys):
    before = contents(finished)
    assert prune(digits, finished, "--restart", *others) == 1
    error(capsys)
    assert contents(finished) == before


def test_restart_throws_away_files_of_a_run_alone(digits, tmp_path, capsys):
    mine = [tmp_path / "out" / name for name in ("checkpoints/mine.pt", "checkpoints/dense/best.pt", "notes.txt")]
    for file in mine:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("precious")
    (tmp_path / "out/checkpoints/pruned").mkdir()
    (tmp_path / "out/checkpoints/pruned/step-99999.pt").write_text("old")
    assert prune(digits, tmp_path / "out", "--restart") == 0
    assert prune(digits, tmp_path / "out", "--restart") == 0
    assert [file.read_text() for file in mine] == ["precious"] * 3
    assert not (tmp_path / "out/checkpoints/pruned/step-99999.pt").exists()
    (tmp_path / "log/tensorboard").mkdir(parents=True)
    assert prune(digits, tmp_path / "log", "--restart") == 1
    assert "--restart leaves alone" in error(capsys)


@pytest.mark.parametrize(("option", "function"), [("model", "build"), ("data", "batches")])
def test_a_file_of_functions_that_changed_since_is_refused(option, function, digits, tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(f"from tests.tiny_job import {function}")
    asked = [f"--{option}", f"{file}:{function}"]
    assert prune(digits, tmp_path / "out", *asked) == 0
    file.write_text(f"from tests.tiny_job import {function}  # another")
    capsys.readouterr()
    assert prune(digits, tmp_path / "out", *asked) == 1
    assert f"the files of --{option} have changed" in error(capsys)


@pytest.mark.parametrize(
    ("others", "told"),
    [
        (["--criterion", "taylor"], "known are taylor_fo"),
        (["--target", "0.001"], "can't be reached"),
        (["--model", "resnet18"], "torchvision:NAME"),
        (["--weights", "missing.pt"], "no such file"),
        (["--data", "missing"], "no such folder"),
        (["--device", "abacus"], "abacus"),
        (["--device", "meta"], "--device meta can't be used"),
        (["--model", f"{odd_jobs.FILE}:two_outputs"], "gives [1, 2] for an input [1, 3, 8, 8], and there are 10"),
        (["--model", f"{odd_jobs.FILE}:many_outputs"], "so [1, 10] is needed"),
        (["--model", f"{odd_jobs.FILE}:in_a_tuple"], "gives a tuple; it must return the logits alone"),
        (["--model", f"{odd_jobs.FILE}:in_a_dict"], "gives a dict"),
        (["--model", f"{odd_jobs.FILE}:for_large_images"], "fails on an input [1, 3, 8, 8] (RuntimeError"),
        (["--model", f"{odd_jobs.FILE}:mistaken"], "(KeyError: 'logits')"),
        (["--data", f"{odd_jobs.FILE}:label_beyond"], "has the label 3 and 2 classes"),
        (["--data", f"{odd_jobs.FILE}:label_below"], "train has the label -1; classes are counted from 0"),
        (["--data", f"{odd_jobs.FILE}:labels_of_shares"], "train has labels of float32 [4, 2]"),
    ],
)
def test_what_can_not_be_done_is_said_before_anything_is_trained(others, told, digits, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("taylorkern.job.learner.Learner.learn", None)
    assert prune(digits, tmp_path / "out", *others) == 1
    assert told in error(capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA can be used here")
def test_a_gpu_that_is_not_there_is_an_error_in_one_line(digits, tmp_path, capsys):
    assert prune(digits, tmp_path / "out", "--device", "cuda") == 1
    assert "--device cuda can't be used" in error(capsys)
    assert not (tmp_path / "out").exists()
    assert score(digits, tmp_path / "s.json", "--device", "cuda") == 1
    assert "give cpu, or auto" in error(capsys)


@pytest.mark.parametrize(
    "option", ["--prune-epochs inf", "--weight-decay nan", "--weight-decay -1", "--lr inf", "--target nan"]
)
def test_numbers_that_are_none_are_refused(option, digits, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        prune(digits, tmp_path / "out", *option.split())
    assert caught.value.code == 2 and option.split()[0] in capsys.readouterr().err


def test_an_interruption_says_that_the_same_command_goes_on(digits, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("taylorkern.job.learner.Learner.learn", interrupted)
    assert prune(digits, tmp_path / "out") == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_a_second_run_in_one_folder_is_refused(digits, tmp_path, capsys, monkeypatch):
    from filelock import FileLock

    monkeypatch.setattr("taylorkern.job.run.WAIT", 0.1)
    with FileLock(tmp_path / ".lock"):
        assert prune(digits, tmp_path) == 1
    assert "another run is at work" in error(capsys)


def score(data, out, *others):
    model = f"{tiny_job.FILE}:build"
    options = ["--size", "8", "--batch", "10", "--workers", "0", "--batches", "3", *others]
    return cli.main(["score", "--model", model, "--data", str(data), "--out", str(out), *options])


def test_scores_are_the_same_in_both_kinds_of_files(digits, tmp_path, capsys):
    criteria = ["--criterion", "taylor_fo,magnitude,bn_scale,taylor_so"]
    assert score(digits, tmp_path / "s.json", *criteria) == 0
    assert score(digits, tmp_path / "s.safetensors", *criteria) == 0
    assert "16 units of 2 layers, 3 minibatches" in capsys.readouterr().out
    told = json.loads((tmp_path / "s.json").read_text())
    assert told["units"][3]["places"] == [["1", 3]] and len(told["units"]) == 16
    with safetensors.safe_open(tmp_path / "s.safetensors", "pt") as file:
        assert json.loads(file.metadata()["layers"]) == told["layers"] == ["1", "3"]
        for name in ("taylor_fo", "magnitude", "taylor_so"):
            assert file.get_tensor(name).tolist() == [unit[name] for unit in told["units"]]
        assert [unit["bn_scale"] is None for unit in told["units"]] == file.get_tensor("bn_scale").isinf().tolist()
        assert torch.equal(file.get_tensor("places")[:, 0], torch.arange(16))


def test_scores_of_nothing_known_are_refused(digits, tmp_path, capsys):
    assert score(digits, tmp_path / "s.txt") == 1
    assert "must end in" in error(capsys)
    assert score(digits, tmp_path / "s.json", "--criterion", "taylor") == 1
    assert "known are" in error(capsys)


@pytest.mark.parametrize(
    ("out", "others", "told"),
    [
        ("missing/s.json", [], "make the folder"),
        ("s.json", ["--criterion", "surgeon"], "surgeon chooses sets"),
        ("s.json", ["--criterion", "taylor_fo,surgeon"], "surgeon chooses sets"),
        ("s.json", ["--model", f"{odd_jobs.FILE}:two_outputs"], "so [1, 10] is needed"),
    ],
)
def test_what_can_not_be_scored_is_said_before_anything_is(out, others, told, digits, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("taylorkern.Scores", None)
    assert score(digits, tmp_path / out, *others) == 1
    assert told in error(capsys)


def test_no_criterion_is_refused(digits, tmp_path, capsys):
    with pytest.raises(SystemExit):
        score(digits, tmp_path / "s.json", "--criterion", ",")
    assert "names nothing" in capsys.readouterr().err


def test_scores_of_images_that_can_not_be_read_are_refused(tmp_path, capsys):
    data = tiny_job.folder(tmp_path / "digits", per_class=2)
    for image in (data / "train").rglob("*.png"):
        image.write_bytes(b"no image")
    assert score(data, tmp_path / "s.json", "--batch", "5") == 1
    assert "no image of --data" in error(capsys)
    assert not (tmp_path / "s.json").exists()


def test_scores_are_taken_of_an_epoch_at_most(digits, tmp_path, capsys):
    assert score(digits, tmp_path / "s.json", "--batches", "50") == 0
    assert "all 8 minibatches are taken, each once" in capsys.readouterr().err
    assert json.loads((tmp_path / "s.json").read_text())["minibatches"] == 8
