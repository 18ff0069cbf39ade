"""Files made to break loading: each is refused with a StoreError that leaves everything alone, or loads what was saved.

Offsets, lengths and JSON by hand; what is signed anew holds a checksum that is good and contents that are not.
"""

import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import taylorkern as tk
from taylorkern import container, store
from taylorkern import plan as plans
from tests.stored import (
    as_format_1,
    assert_same_values,
    assert_untouched,
    build,
    header,
    refuses,
    rewrite,
    sign,
    snapshot,
    write,
)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "pruned.safetensors"
    tk.save(build(5, seed=1), path)
    return path


def tiny(width, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(1, width, bias=False), nn.PReLU())


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "tiny.safetensors"
    tk.save(tiny(2, seed=1), path)
    return path


def refused_or_right(path, content, dense, right):
    """Whether the file with this content is refused, and leaves all as it was, or else loads exactly ``right``."""
    path.write_bytes(content)
    before = snapshot(dense)
    try:
        tk.load(path, dense)
    except tk.StoreError:
        assert_untouched(dense, before)
        return True
    assert_same_values(dense, right)
    return False


def test_every_byte_altered(small):
    whole, right, dense = small.read_bytes(), tiny(2, seed=1), tiny(3)
    loaded = []
    for place in range(len(whole)):
        for flip in (1, 0x20, 0xFF):
            broken = bytearray(whole)
            broken[place] ^= flip
            if not refused_or_right(small, broken, dense, right):
                loaded.append(place)
                dense = tiny(3)
    assert not loaded


def test_every_truncation_and_trailing_junk(small):
    whole, dense = small.read_bytes(), tiny(3)
    for length in range(len(whole)):
        small.write_bytes(whole[:length])
        refuses(small, dense, "truncated")
    for junk in (b"\0", b" ", whole):
        small.write_bytes(whole + junk)
        refuses(small, dense, "truncated")


def test_random_splices(small, saved):
    rng, whole, other = random.Random(0), small.read_bytes(), saved.read_bytes()
    right, dense = tiny(2, seed=1), tiny(3)
    for _ in range(400):
        a, b = sorted(rng.choices(range(len(whole) + 1), k=2))
        source = rng.choice([whole, other, bytes(200), rng.randbytes(200)])
        start = rng.randrange(len(source))
        inserted = source[start : start + rng.choice([0, 1, b - a, 50])]
        content = whole[:a] + inserted + whole[b:]
        if not refused_or_right(small, content, dense, right):
            assert content == whole
            dense = tiny(3)


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1])
def test_header_lengths_that_lie(small, length):
    small.write_bytes(length.to_bytes(8, "little") + small.read_bytes()[8:])
    refuses(small, tiny(3), "truncated, altered or not")


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 100_000,
        b'{"a":' * 40_000 + b"1" + b"}" * 40_000,
        b"\xff\xfe{}",
        b"\xef\xbb\xbf{}",
        '{"0.weight": 1}'.encode("utf-16"),
        b"null",
        b"[]",
        b'"text"',
        b'{"__metadata__": []}',
        b'{"__metadata__": {"taylorkern.plan": 1}}',
        b'{"__metadata__": {"taylorkern.plan": "\\ud800", "taylorkern.plan.sha256": ""}}',
        b'{"a": NaN}',
        b'{"a": 1' + b"0" * 5000 + b"}",
    ],
)
def test_headers_of_another_form(small, text):
    write(small, text, b"")
    refuses(small, tiny(3), r"truncated, altered or not|plan of another form")


def test_keys_that_stand_twice(small):
    head, data = header(small)
    text = json.dumps(head)
    doubled = text[:-1] + ", " + text[1:]
    write(small, doubled.encode(), data)
    refuses(small, tiny(3), "a key stands twice")
    plan = head["__metadata__"][plans.PLAN]
    write(small, head, data)
    sign(small, plan[:-1] + ', "format": 2}')
    refuses(small, tiny(3), "plan of another form.*twice")


@pytest.mark.parametrize(
    "offsets", [[0, 4], [4, 8], [-8, 0], [0, 8.0], [True, 8], [0, 2**64], [8, 0], [0], [0, 8, 8], "08", None, [0, "8"]]
)
def test_offsets(small, offsets):
    head, data = header(small)
    names = [name for name in head if name != container.METADATA]
    first = next(name for name in names if head[name]["data_offsets"][0] == 0)
    head[first]["data_offsets"] = offsets
    write(small, head, data)
    refuses(small, tiny(3), "truncated, altered or not")


@pytest.mark.parametrize(
    "change", [{"dtype": "F31"}, {"dtype": "I32"}, {"dtype": 3}, {"shape": [1, 2]}, {"shape": [2]}, {"extra": 1}]
)
def test_header_and_plan_must_agree(small, change):
    head, data = header(small)
    head["0.weight"].update(change)
    write(small, head, data)
    refuses(small, tiny(3), r"tell different things|truncated, altered or not")


@pytest.mark.parametrize(
    "shape",
    [[4, 2**62], [2**32, 2**32], [0, 8], [4], [4, 8, 1], [4.0, 8.0], [True, 8], [-4, -8], ["4", 8], [[4], 8],
     [10**4000, 8], None, {}, "48", [None, 8]],
)  # fmt: skip
def test_absurd_shapes(saved, shape):
    rewrite(saved, lambda plan: plan["tensors"]["7.weight"].update(shape=shape))
    refuses(saved, build(), r"7.weight has shape|plan of another form")


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999", "-1", "1e3"])
def test_numbers_that_are_no_sizes(saved, text):
    plan = header(saved)[0]["__metadata__"][plans.PLAN]
    sign(saved, plan.replace('"shape": [4, 5]', f'"shape": [4, {text}]'))
    refuses(saved, build(), "plan of another form")


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: plan.pop("tied"),
        lambda plan: plan.update(tied=[]),
        lambda plan: plan.update(tied={"7.weight": "7.bias"}),
        lambda plan: plan.update(tied={"x": ["7.bias"]}),
        lambda plan: plan.update(tied={"x": "nowhere"}),
        lambda plan: plan.update(tensors=None),
        lambda plan: plan.update(more=1),
        lambda plan: plan.pop("format"),
        lambda plan: plan.update(format="2"),
        lambda plan: plan.update(format=2.0),
        lambda plan: plan.update(format=True),
        lambda plan: plan.update(format=0),
        lambda plan: plan.update(format=-1),
        lambda plan: plan.update(format=1),
        lambda plan: plan["tensors"]["7.weight"].pop("sha256"),
        lambda plan: plan["tensors"]["7.weight"].update(sha256=None),
        lambda plan: plan["tensors"]["7.weight"].update(dtype="torch.nn"),
        lambda plan: plan["tensors"]["7.weight"].update(dtype="__import__('os')"),
        lambda plan: plan["tensors"]["7.weight"].update(dtype=["torch.float32"]),
        lambda plan: plan["tensors"].update({"7.weight": []}),
    ],
)
def test_malformed_plans(saved, change):
    rewrite(saved, change)
    refuses(saved, build(), "plan of another form")


@pytest.mark.parametrize("text", ["[" * 100_000, "", "7", "[]", "null", '{"format": 2}', "{", "\0"])
def test_plans_that_are_none(saved, text):
    sign(saved, text)
    refuses(saved, build(), "plan of another form")


def test_newer_formats(saved):
    rewrite(saved, lambda plan: plan.update(format=3, taylorkern="9.0", tensors="elsewhere"))
    refuses(saved, build(), "taylorkern 9.0 in format 3")
    rewrite(saved, lambda plan: plan.update(format=10**4000, taylorkern="\x1b[2J" * 1000))
    with pytest.raises(tk.StoreError, match=r"in format 1000") as caught:
        tk.load(saved, build())
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


def test_plan_and_tensors_must_agree(saved):
    head, _ = header(saved)
    save_file({"7.bias": torch.zeros(4)}, saved, head["__metadata__"])
    refuses(saved, build(), "tensors of its own plan")


def test_values_of_another_file(saved, tmp_path):
    tk.save(build(5, seed=2), tmp_path / "other")
    write(saved, header(saved)[0], header(tmp_path / "other")[1])
    refuses(saved, build(), "not what was saved")


def test_names_are_shown_short_and_printable(saved):
    evil = "\x1b[31m\ud800\u202e" + "n" * 10_000

    def rename(plan):
        plan["tensors"][evil] = plan["tensors"].pop("7.weight")

    rewrite(saved, rename)
    with pytest.raises(tk.StoreError, match="the model lacks") as caught:
        tk.load(saved, build())
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


def test_booleans_are_booleans(tmp_path):
    model = nn.Module()
    model.register_buffer("flags", torch.tensor([True, False]))
    tk.save(model, tmp_path / "flags")
    assert tk.load(tmp_path / "flags", model).flags.tolist() == [True, False]
    head, _ = header(tmp_path / "flags")
    write(tmp_path / "flags", head, b"\x02\x00")
    digest = store.hashlib.sha256(b"\x02\x00").hexdigest()
    rewrite(tmp_path / "flags", lambda plan: plan["tensors"]["flags"].update(sha256=digest))
    refuses(tmp_path / "flags", model, "no booleans")


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path), os.mkdir])
def test_what_is_no_regular_file(tmp_path, make):
    make(tmp_path / "odd")
    model, raised = build(), []
    before = snapshot(model)

    def load():
        try:
            tk.load(tmp_path / "odd", model)
        except tk.StoreError as error:
            raised.append(str(error))

    loading = threading.Thread(target=load, daemon=True)
    loading.start()
    loading.join(60)
    assert len(raised) == 1 and "no regular file" in raised[0]  # and it did not hang
    assert_untouched(model, before)


def test_paths_that_are_none(tmp_path):
    refuses("", build(), "without a name")
    refuses("a\0b", build(), "can't read|truncated")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refuses(tmp_path / "loop", build(), "can't read")


def test_a_sparse_terabyte(small, tmp_path):
    head, _ = header(small)
    write(tmp_path / "huge", head, b"")
    os.truncate(tmp_path / "huge", 2**40)
    refuses(tmp_path / "huge", tiny(3), "truncated")


def test_a_file_that_shrinks_while_it_is_read(saved, monkeypatch):
    read = container.Container.read

    def shrinking(self, *arguments):
        os.truncate(self.path, 2000)
        return read(self, *arguments)

    monkeypatch.setattr(container.Container, "read", shrinking)
    refuses(saved, build(), "truncated.*early")


def test_format_1_is_still_read(saved):
    as_format_1(saved)
    assert "attributes" not in header(saved)[0]["__metadata__"][plans.PLAN]
    dense = tk.load(saved, build())
    assert_same_values(dense, build(5, seed=1))
    assert (dense[3].in_channels, dense[7].in_features) == (5, 5)


REFUSING = """
import os, resource, sys
import torch
from torch import nn
import taylorkern as tk

model = nn.Linear(1000, 1000)
before = model.weight.detach().clone()
tk.save(model, sys.argv[2])
tk.load(sys.argv[2], nn.Linear(1000, 1000))
used = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGESIZE")
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[1]),) * 2)
for path in sys.argv[3:]:
    try:
        tk.load(path, model)
    except tk.StoreError as error:
        print("refused:", error)
assert torch.equal(model.weight, before)
"""


SPARE = 16 * 2**20  # bytes of address space


def absurd_files(folder):
    """Files that would take far more memory than a model of 4 MB, if they were believed."""
    tk.save(nn.Linear(1000, 1000), folder / "right")
    head, data = header(folder / "right")
    write(folder / "header of 100 MB", json.dumps(head).encode() + b" " * 10**8, data)
    write(folder / "50 MB of brackets", b'{"a": [' + b"[]," * 17 * 10**6 + b"[]]}", data)
    write(folder / "plan of 50 MB", head | {"__metadata__": {plans.PLAN: "[" * 50_000_000, plans.DIGEST: ""}}, data)
    wide = {"dtype": "F32", "shape": [1000, 10**9], "data_offsets": [0, 4 * 10**12]}
    write(folder / "tensor of 4 TB", {**head, "weight": wide}, b"")
    os.truncate(folder / "tensor of 4 TB", (folder / "tensor of 4 TB").stat().st_size + 4 * 10**12 + 4000)
    write(folder / "240 kB of brackets", b'{"a": [' + b"[]," * 80_000 + b"[]]}", data)
    (folder / "right").unlink()
    return sorted(folder.iterdir())


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the address space's size is read from /proc")
def test_refusing_takes_little_memory(tmp_path):
    (tmp_path / "absurd").mkdir()
    paths = absurd_files(tmp_path / "absurd")
    run = [sys.executable, "-c", REFUSING, str(SPARE), str(tmp_path / "own"), *map(str, paths)]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["refused:"] * len(paths)
