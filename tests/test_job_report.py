import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import taylorkern as tk
from taylorkern.job import figures, html, latency, progress, ranks
from taylorkern.job.svg import Axis
from tests.networks import residual

VOID = {"meta", "br", "img", "link"}


class Tags(HTMLParser):
    """Elements of a page, each with its attributes, and the text between them; fails where they don't nest."""

    def __init__(self, page):
        super().__init__()
        self.open, self.found, self.text = [], [], ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def point(phase, step, accuracy, kept=1.0, loss=0.5):
    return {"phase": phase, "step": step, "loss": loss, "accuracy": accuracy, "flops_kept": kept, "lr": 0.1}


def summary(layers=3, **changed):
    names = [f"block{number}.conv" for number in range(layers)]
    return {
        "command": "taylorkern prune --model net.py:build --out 'a & b'",
        "versions": {"taylorkern": "1.0"},
        "settings": {"model": "net.py:build", "weights": None, "lr": 0.05},
        "classes": ["cat", "dog"],
        "images": {"train": 1200, "val": 300, "skipped": []},
        "dense": {"accuracy": 0.95, "loss": 0.2, "params": 2_000_000, "flops": 4e9, "latency_ms": 8.0},
        "pruned": {"accuracy": 0.94, "loss": 0.25, "params": 500_000, "flops": 2e9, "latency_ms": 6.0},
        "ratios": {"params": 0.25, "flops": 0.5, "latency_ms": 0.75},
        "widths": {"dense": dict.fromkeys(names, 64), "pruned": dict.fromkeys(names, 21)},
        "history": [
            point("train", 10, 0.95), point("prune", 20, 0.9, 0.75), point("prune", 30, 0.85, 0.5),
            point("finetune", 40, 0.94, 0.5),
        ],
        "ranks": {name: [0.0, 0.25, 0.5, 0.75, 1.0] for name in names},
        "criterion": "taylor_fo", "target": 0.5, "of": "flops", "dropped": 3, "latency_batch": 8,
    } | changed  # fmt: skip


def drawn(picture, tag, class_):
    return [found for found in ElementTree.fromstring(picture).iter(tag) if found.get("class") == class_]


def test_the_file_is_one_page_that_needs_nothing_else(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("an old one")
    html.write(summary(), path)
    page = path.read_text(encoding="utf-8")
    tags = Tags(page)
    assert [child.name for child in tmp_path.iterdir()] == ["report.html"]
    names = {tag for tag, _ in tags.found}
    assert names.isdisjoint({"script", "link", "img", "iframe", "object"})
    assert not any({"src", "href"} & attributes.keys() for _, attributes in tags.found)
    assert not re.search(r"https?:|url\(|@import", page)


def test_headline_table_and_command_tell_the_figures():
    told = Tags(html.page(summary())).text
    assert "50 % of the FLOPs, accuracy 95.00 % → 94.00 %" in told
    for words in (
        "4,000,000,000",
        "from 4 G, × 0.50",
        "−1.00 points",
        "× 0.25",
        "8 ms",
        "× 0.75",
        "Latency of 8 images",
    ):
        assert words in told
    assert "taylorkern prune --model net.py:build --out 'a & b'" in told


def test_what_a_user_named_is_text_and_no_markup():
    nasty = "<script>alert('\"&')</script>$title"
    page = html.page(
        summary(
            classes=[nasty],
            images={"train": 1, "val": 1, "skipped": [{"file": nasty, "why": nasty}]},
            settings={"model": nasty, nasty: nasty},
            widths={"dense": {nasty: 4}, "pruned": {nasty: 2}},
            ranks={nasty: [0.5]},
            history=[point(nasty, 1, 0.5), point(nasty, 2, 0.5), point("prune", 3, 0.5)],
            command=nasty,
            criterion=nasty,
            of=nasty,
            warnings=[nasty],
        )
    )
    tags = Tags(page)
    assert "script" not in {tag for tag, _ in tags.found}
    assert tags.text.count(nasty) >= 11


def test_names_that_are_no_unicode_can_be_written(tmp_path):
    html.write(summary(images={"skipped": [{"file": "a\udcff.png", "why": "no image"}]}), tmp_path / "report.html")
    assert r"a\udcff.png" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_skipped_images_are_named_up_to_a_number():
    skipped = [{"file": f"<{number}>.png", "why": "truncated"} for number in range(html.NAMED + 5)]
    told = Tags(html.page(summary(images={"train": 1, "val": 1, "skipped": skipped}))).text
    assert told.count("truncated") == html.NAMED
    assert "and 5 more" in told and "<7>.png" in told


def test_values_that_are_missing_or_no_numbers_are_dashes():
    history = [
        point("train", 10, None, loss=math.nan),
        point("prune", 20, 0.9, 0.7),
        point("prune", 30, math.inf, None),
    ]
    pruned = {"accuracy": math.nan, "loss": None, "params": 5, "flops": math.inf}
    page = html.page(summary(pruned=pruned, ratios={"flops": math.nan}, history=history, dropped=None))
    Tags(page)
    assert not re.search(r"\b(nan|NaN|inf|Infinity|None|null)\b", page)
    assert "– of the FLOPs, accuracy 95.00 % → –" in page
    Tags(html.page({}))


@pytest.mark.parametrize("picture", [figures.descent, figures.curves, figures.widths, figures.ranks])
def test_without_anything_to_draw_a_picture_is_left_out(picture):
    assert picture(summary(history=[], widths={}, ranks={})) == ""


def test_a_run_without_a_round_says_why_there_are_no_ranks():
    assert "the target was met without a round of pruning" in html.page(summary(ranks={}, history=[]))
    assert "without a round of pruning" not in html.page(summary())


def test_the_report_says_how_latency_was_measured():
    assert "evaluation mode, in 32-bit floating point and contiguous memory, not compiled" in html.page(summary())


def test_the_bar_of_pruning_goes_by_the_part_that_went(capsys):
    with progress.Progress("prune", 100, 0) as bar:
        for done in (0.0, 0.4, 1.0):
            for _ in range(10):
                bar.step(0.5)
            bar.part(done)
    told = capsys.readouterr().err
    assert " 20/50 " in told and told.rstrip().splitlines()[-1].count("100%") and " 30/30 " in told


def test_every_round_is_a_dot_and_the_end_a_ring():
    picture = figures.descent(summary())
    dots = drawn(picture, "circle", "accuracy")
    (ring,) = drawn(picture, "circle", "end")
    assert len(dots) == 2
    assert float(dots[0].get("cx")) < float(dots[1].get("cx")) == float(ring.get("cx"))  # FLOPs fall to the right
    assert float(dots[0].get("cy")) < float(dots[1].get("cy"))
    assert float(ring.get("cy")) < float(dots[0].get("cy"))


def test_one_round_without_fine_tuning_is_drawn():
    run = summary(history=[point("prune", 5, 0.9, 0.5)])
    assert len(drawn(figures.descent(run), "circle", "accuracy")) == 1
    assert "without fine-tuning" in html.page(run)
    assert figures.curves(run) == ""


def test_phases_are_shaded_from_one_end_to_the_next_and_named():
    picture = figures.curves(summary())
    shades = [*drawn(picture, "rect", "shade0")[:2], drawn(picture, "rect", "shade1")[0]]
    widths = [round(float(shade.get("width"))) for shade in shades]
    assert widths[0] == widths[1] == pytest.approx(widths[2] / 2, abs=1)
    assert [text.text for text in drawn(picture, "text", "phase")] == ["train", "prune", "finetune"]


def test_a_curve_is_broken_where_a_value_is_missing():
    losses = [1.0, 0.9, math.nan, 0.8, 0.7, None, 0.6]
    history = [point("train", step, 0.5, loss=loss) for step, loss in enumerate(losses)]
    picture = figures.curves(summary(history=history))
    assert [len(line.get("points").split()) for line in drawn(picture, "polyline", "loss")] == [2, 2]
    assert len(drawn(picture, "circle", "loss")) == 5


@pytest.mark.parametrize("layers", [1, 300])
def test_pictures_grow_with_the_layers_and_every_name_stands_in_them(layers):
    run = summary(layers=layers)
    for picture in (figures.widths(run), figures.ranks(run)):
        names = [text.text for text in drawn(picture, "text", "layer")]
        assert names == list(run["ranks"])
        height = float(ElementTree.fromstring(picture).get("viewBox").split()[3])
        assert height == pytest.approx(figures.ROW * layers, abs=70)


def test_a_long_name_keeps_its_two_ends():
    name = f"encoder.layers.17.{'very.' * 20}dense"
    (label,) = drawn(figures.ranks(summary(ranks={name: [0.5]})), "text", "layer")
    assert label.text.startswith("encoder.layers.17.") and label.text.endswith("dense")
    assert len(label.text) == figures.LONGEST


def test_bars_are_as_long_as_the_layers_are_wide():
    picture = figures.widths(summary(widths={"dense": {"a": 100, "b": 50}, "pruned": {"a": 25, "b": 50}}))
    before, after = ([float(bar.get("width")) for bar in drawn(picture, "rect", kind)] for kind in ("before", "after"))
    assert before[1] == pytest.approx(before[0] / 2, abs=0.2)
    assert after == pytest.approx([before[0] / 4, before[0] / 2], abs=0.2)
    assert "25 of 100" in picture


def test_a_box_holds_the_middle_half():
    picture = figures.ranks(summary(ranks={"layer": [1.0, 0.0, 0.25, 0.75, 0.5]}))
    ((whisker,), (box,), (median,)) = (
        drawn(picture, tag, kind) for tag, kind in (("line", "whisker"), ("rect", "box"), ("line", "median"))
    )
    left, right = (float(whisker.get(end)) for end in ("x1", "x2"))
    assert float(box.get("x")) == pytest.approx(left + (right - left) / 4, abs=0.2)
    assert float(box.get("width")) == pytest.approx((right - left) / 2, abs=0.2)
    assert float(median.get("x1")) == pytest.approx((left + right) / 2, abs=0.2)


@pytest.mark.parametrize("values", [[0.1], [1e-9, 2e-9], [-3.0, 5e7], [0.0, 0.0], [math.nan, 1e12], [7.0, 7.0 + 1e-12]])
def test_an_axis_holds_its_values_and_has_ticks_within(values):
    axis = Axis.around(values, 0, 100)
    finite = [value for value in values if math.isfinite(value)]
    assert all(0 < axis(value) < 100 for value in finite)
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 12
    assert all(axis.low - 1e-9 <= value <= axis.high + 1e-9 for value in ticks)
    assert all(len(told) < 13 for told in ticks.values())


def test_latencies_take_turns_in_evaluation_mode_and_modes_are_put_back():
    calls = []

    class Noted(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name, self.frozen = name, nn.Identity().eval()

        def forward(self, x):
            calls.append((self.name, self.training))
            return x

    models = {"a": Noted("a"), "b": Noted("b")}
    times = latency.compare(models, torch.zeros(1), rounds=3)
    assert calls == [("a", False), ("b", False)] * (latency.WARM_UP + 3)
    assert all(model.training and not model.frozen.training for model in models.values())
    assert times.keys() == models.keys() and all(taken >= 0 for taken in times.values())


def test_latencies_of_no_round_are_refused():
    with pytest.raises(ValueError, match="rounds=0 must be at least 1"):
        latency.compare({"a": nn.Identity()}, torch.zeros(1), rounds=0)


def test_ranks_go_by_layer_and_linked_units_count_in_each_of_theirs():
    torch.manual_seed(0)
    model = tk.convert(residual())
    scores = tk.Scores(model, torch.rand(1, 2, 8, 8))
    nn.functional.cross_entropy(model(torch.rand(4, 2, 8, 8)), torch.tensor([0, 1, 2, 3])).backward()
    importance = scores.importance("taylor_fo")
    by_layer = ranks.by_layer(scores, "taylor_fo")
    own = ranks.importances(scores, "taylor_fo")
    assert by_layer.keys() == own.keys() == {layer for unit in scores.units for layer, _ in unit.places}
    assert sum(map(len, by_layer.values())) > len(scores.units)
    order = importance.argsort().argsort().double() / (len(importance) - 1)
    expected = dict(zip(importance.tolist(), order.tolist(), strict=True))
    for layer, inside in by_layer.items():
        assert inside == pytest.approx([expected[value] for value in own[layer]])


def test_equal_importances_share_a_rank():
    model = tk.convert(nn.Sequential(nn.Conv2d(1, 5, 1, bias=False), nn.ReLU(), nn.Conv2d(5, 1, 1)))
    model[0].weight.data.copy_(torch.tensor([2.0, 1.0, 2.0, 0.0, 2.0]).reshape(5, 1, 1, 1))
    assert ranks.by_layer(tk.Scores(model, torch.ones(1, 1, 2, 2)), "magnitude") == {"0": [0.75, 0.25, 0.75, 0.0, 0.75]}


def test_a_unit_that_is_alone_ranks_first():
    model = tk.convert(nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.Conv2d(1, 1, 1)))
    assert ranks.by_layer(tk.Scores(model, None, layers=["0"]), "magnitude") == {"0": [1.0]}
