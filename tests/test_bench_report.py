"""What is made of the suite's rows: verdicts on bars, tables, README, and whether they are current."""

import json
import random

import pytest

from bench import bars, machine, operations, picture, readme


def step_row(network, layout, way, median, spread=0.01):
    subject = {"network": network, "size": 32, "batch": 4, "layout": layout}
    ratio = {"p25": median - spread, "median": median, "p75": median + spread}
    row = {"suite": "steps", "subject": subject, "way": way, "to": "plain", "pairs": 15, "ratio": ratio}
    return row | {"first step": 3.0, "checked": {"float64": 1e-12}}


def memory_row(network, way, ratio):
    subject = {"network": network, "size": 32, "batch": 4, "layout": "contiguous"}
    return {"suite": "memory", "subject": subject, "way": way, "to": "plain", "ratio": ratio}


def verdict(rows, name):
    (found,) = (bar for bar in bars.judged(rows) if bar["name"].startswith(name))
    return found["value"], found["met"]


def test_bars_are_met_missed_or_not_measured():
    name = "ResNet-50 step"
    assert verdict([], name) == (None, None)
    assert verdict([step_row("resnet50", "channels_last", "fused, scored", 0.92)], name) == (0.92, True)
    assert verdict([step_row("resnet50", "channels_last", "fused, scored", 0.921)], name) == (0.921, False)
    assert verdict([step_row("resnet50", "contiguous", "fused, scored", 0.5)], name) == (None, None)
    failed = {"suite": "steps", "subject": {"network": "resnet50"}, "way": "fused, scored", "failed": "no"}
    assert verdict([failed], name) == (None, None)


def test_memory_and_noise_are_judged_by_the_worst_network():
    rows = [memory_row("resnet18", "scored", 0.9), memory_row("resnet50", "scored", 1.1)]
    assert verdict(rows, "peak memory of a scored step") == (1.1, False)
    rows = [
        step_row("resnet18", "contiguous", "plain again", 1.0, 0.05),
        step_row("resnet18", "contiguous", "converted", 1.04),
        step_row("resnet50", "contiguous", "plain again", 1.0, 0.01),
        step_row("resnet50", "contiguous", "converted", 1.03),
    ]
    assert verdict(rows, "converted and unscored") == (0.02, False)
    assert verdict(rows[:2], "converted and unscored") == (-0.01, True)


def test_an_operation_is_judged_by_the_geometric_mean_over_its_shapes():
    def row(side, median, part="whole", dtype="float32"):
        subject = {"operation": "BN+ReLU", "layout": "contiguous", "dtype": dtype, "shape": [8, 3, side, side]}
        return {"suite": "operations", "subject": subject | {"part": part}, "way": "ours", "ratio": {"median": median}}

    rows = [row(1, 0.5), row(2, 0.98), row(1, 9.0, "forward"), row(1, 9.0, dtype="bfloat16")]
    assert verdict(rows, "BN+ReLU, fused and scored, of eager unscored, contiguous") == (0.7, True)


def result(seed=0):
    """What a run over two networks would leave, with figures at random."""
    draw = random.Random(seed)
    rows = [
        step_row(network, layout, way, 1 + draw.random())
        for network in ("resnet18", "resnet50")
        for layout in ("channels_last", "contiguous")
        for way in ("plain", "plain again", "scored", "hooks")
    ]
    rows += [memory_row("resnet18", "scored", draw.random())]
    rows += operations.measured("BN+ReLU", "contiguous", "float32", (4, 3, 5, 5), 3)
    rows += [{"suite": "steps", "subject": rows[0]["subject"], "way": "rival", "to": "plain", "failed": "Error: no"}]
    facts = machine.facts()
    told = {way: {"computes": "s", "lacks": ""} for way in ("plain", "scored", "hooks", "rival")}
    kept = {"machine": facts["machine"], "facts": facts, "quick": False, "ways": told}
    return kept | {"bars": bars.judged(rows), "rows": rows}


@pytest.fixture
def folder(tmp_path):
    """A folder with a result, a README with markers, and the options that lead there."""
    (tmp_path / "other.json").write_text("[1, 2]")
    found = result()
    (tmp_path / f"{found['machine']}.json").write_text(json.dumps(found))
    (tmp_path / "README.md").write_text(f"before\n{readme.BEGIN}\n{readme.END}\nafter\n")
    options = ["--readme", "README.md", "--results", ".", "--picture", "steps.png"]
    return tmp_path, [str(tmp_path / option) if not option.startswith("--") else option for option in options]


def test_readme_shows_the_result_and_says_when_it_is_stale(folder, capsys):
    path, options = folder
    page, text = path / f"{machine.facts()['machine']}.md", path / "README.md"
    assert readme.main([*options, "--check"]) == 1
    assert not page.exists()
    assert readme.main(options) == 0
    assert readme.main([*options, "--check"]) == 0
    assert text.read_text().startswith("before\n") and text.read_text().endswith("after\n")
    median = result()["rows"][2]["ratio"]["median"]
    assert f"{median:.2f}" in text.read_text() and f"{median:.2f}" in page.read_text()
    assert "Error: no" in page.read_text()
    capsys.readouterr()
    for stale, change in ((text, " "), (page, " ")):
        kept = stale.read_text()
        stale.write_text(kept.replace("plain", "plain" + change))
        assert readme.main([*options, "--check"]) == 1
        assert str(stale) in capsys.readouterr().err
        stale.write_text(kept)
    picture.draw(result(seed=1), path / "steps.png")
    assert readme.main([*options, "--check"]) == 1
    assert "steps.png" in capsys.readouterr().err


def test_readme_without_markers_or_results_is_refused(folder, tmp_path_factory):
    path, options = folder
    (path / "README.md").write_text("nothing here")
    with pytest.raises(SystemExit, match="markers"):
        readme.main(options)
    empty = str(tmp_path_factory.mktemp("empty"))
    with pytest.raises(SystemExit, match="make bench"):
        readme.main([*options, "--results", empty])


def test_readme_of_this_repository_is_current():
    if readme.BEGIN not in (readme.ROOT / "README.md").read_text() or not readme.results(readme.RESULTS):
        pytest.skip("README has no part for the suite, or the suite has not run")
    assert readme.main(["--check"]) == 0
