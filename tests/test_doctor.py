import json

import pytest
import torch

from taylorkern import backends, cli, doctor


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    """Nothing built, nothing loaded: as on a new machine."""
    monkeypatch.setenv("TAYLORKERN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(backends.native, "_outcome", None)
    return tmp_path / "cache"


def test_answers_are_what_the_provider_table_does():
    operations = doctor.examine()["operations"]
    for operation in backends.OPERATIONS:
        for dtype in doctor.DTYPES:
            serving = backends.provider(operation, torch.ones(1, 1, dtype=dtype)).__name__.rpartition(".")[2]
            assert operations[operation]["cpu"][str(dtype).removeprefix("torch.")]["backend"] == serving


def test_every_answer_has_a_reason():
    for devices in doctor.examine()["operations"].values():
        assert devices.keys() == backends.PROVIDERS.keys()
        assert all(serving["why"] for dtypes in devices.values() for serving in dtypes.values())


def test_looks_only(empty_cache, capsys):
    facts = doctor.examine()
    assert not empty_cache.exists()
    assert facts["cache"] == {"folder": str(empty_cache), "builds": 0, "state": "writable"}


def test_without_a_compiler(empty_cache, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(backends.build, "PREBUILT", empty_cache)
    facts = doctor.examine()
    assert "no-such-compiler" in facts["compiler"]["missing"]
    serving = facts["operations"]["channel_scores"]["cpu"]["float32"]
    assert serving["backend"] == "reference"
    assert "no-such-compiler" in serving["why"]
    assert "no-such-compiler" in doctor.tell(facts)


def test_kernels_that_are_loaded_are_called_from_somewhere():
    if backends.provider("channel_scores", torch.ones(1, 1)) is not backends.native:
        pytest.skip("no kernels here")
    caller = "C++" if backends.native.autograd() else "Python"
    why = doctor.examine()["operations"]["batch_norm_act"]["cpu"]["float32"]["why"]
    assert f"called from {caller}" in why and why in doctor.tell(doctor.examine())


def test_json_on_stdout_and_in_a_file(capsys, tmp_path):
    assert cli.main(["doctor", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["versions"]["torch"] == torch.__version__
    assert cli.main(["doctor", "--json", str(tmp_path / "facts.json")]) == 0
    assert json.loads((tmp_path / "facts.json").read_text())["versions"] == printed["versions"]


def test_text_names_operations_and_backends(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert all(operation in out for operation in backends.OPERATIONS)
    assert "float16: reference, native can't: it has no float16" in out
