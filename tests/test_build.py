"""The build: compiled once however many processes start, and no cache, lock or compiler can make it hang or crash."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import filelock
import pytest

from taylorkern.backends import build, native, recipe, toolchain
from taylorkern.backends.recipe import AUTOGRAD, CUDA, KERNELS, PARTS

# The first use of the kernels in a fresh process: what served, what was warned, and right answers of both libraries
FIRST_USE = """
import json, sys, warnings
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import taylorkern.ops
    from taylorkern.backends import native
    before = native.status().reason
    for _ in range(3):
        s = taylorkern.ops.channel_scores(torch.ones(2, 3, 4), torch.full((2, 3, 4), 0.5))
    assert torch.equal(s, torch.full((2, 3), 2.0)), s
    layer, x = taylorkern.convert(torch.nn.BatchNorm1d(3)), torch.tensor([[1.0] * 3, [3.0] * 3])
    scores = taylorkern.Scores(layer, None)
    layer(x).backward(x)
    (s,) = layer.gate.drain()
    assert torch.allclose(s, torch.tensor([[-1.0] * 3, [3.0] * 3]), atol=1e-4), s
texts = [str(w.message) for w in caught if "taylorkern" in str(w.message)]
status = native.status()
print(json.dumps({"usable": status.usable, "before": before, "reason": status.reason, "warnings": texts,
                  "caller": status.detail.get("called from")}))
"""

# A compiler that logs every object it is asked for, and makes each one only once for all tests; but it fails at the
# file FAILING, and comes to no end at ENDLESS.
COMPILER = """#!/bin/sh
source= object= previous=
for argument; do
  case "$argument" in *.cpp) source=$argument ;; esac
  [ "$previous" = -o ] && object=$argument
  previous=$argument
done
[ -n "$source" ] || exec g++ "$@"
echo "$source" >> "$LOG"
case "$source" in
  */"$FAILING") echo "error: no such header"; exit 1 ;;
  */"$ENDLESS") sleep 99 ;;
esac
if [ -n "$DAWDLE" ]; then sleep "$DAWDLE"; fi
kept=$OBJECTS/$(basename "$source").o
[ -e "$kept" ] || { g++ "$@" && mv "$object" "$kept"; } || exit 1
cp "$kept" "$object"
"""


def start(cache: Path | str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", FIRST_USE],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"TAYLORKERN_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"} | environment,
    )


def finish(process: subprocess.Popen[str]) -> dict:
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1]) | {"stderr": err}


def first_use(cache: Path | str, **environment: str) -> dict:
    return finish(start(cache, **environment))


def script(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


@pytest.fixture(scope="module", autouse=True)
def compiler(tmp_path_factory):
    """CXX for this process and those it starts, with a space in its path; returns the log of what it compiled."""
    try:
        toolchain.find_toolchain()
    except build.BuildError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("a compiler")
    command = script(folder / "compiler", COMPILER)
    log = folder / "log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", f"'{command}'")
        patch.setenv("OBJECTS", str(folder))
        patch.setenv("LOG", str(log))
        yield log


@pytest.fixture(scope="module")
def built(compiler, tmp_path_factory) -> Path:
    """A cache folder, with a space in its name, that holds a sound build."""
    cache = tmp_path_factory.mktemp("a cache")
    build.build_ahead(cache)
    return cache


@pytest.fixture
def cache(built, tmp_path) -> Path:
    """A copy of the sound cache, to be damaged."""
    return Path(shutil.copytree(built, tmp_path / "a cache"))


def library(cache: Path, part: recipe.Part = KERNELS) -> Path:
    (folder,) = (path.parent for path in cache.glob("*/build.json"))
    (path,) = part.libraries(folder)
    return path


def units() -> list[str]:
    """Every file that is compiled by itself, once."""
    return sorted(str(unit) for part in PARTS for unit in part.units())


def test_eight_processes_compile_once(built, compiler, tmp_path):
    compiler.unlink()
    processes = [start(tmp_path / "cache", DAWDLE="2") for _ in range(8)]
    results = [finish(process) for process in processes]
    assert all(result["usable"] and not result["warnings"] for result in results)
    assert all(result["caller"] == "C++" for result in results)
    assert sorted(compiler.read_text().split()) == units()
    assert sum("compiling" in result["stderr"] for result in results) == 1
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_second_start_loads_in_silence(built):
    result = first_use(built)
    assert result["usable"]
    assert result["before"] == "built, not loaded yet (cache)"
    assert "loaded from the cache" in result["reason"]
    assert "taylorkern" not in result["stderr"]
    assert result["caller"] == "C++"


def test_lock_file_of_a_dead_process_does_not_block(cache):
    library(cache).unlink()
    (lock,) = cache.glob("*.lock")
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import filelock, time; filelock.FileLock({str(lock)!r}).acquire(); print(1, flush=True); time.sleep(99)",
        ],
        stdout=subprocess.PIPE,
    )
    assert holder.stdout.readline()
    holder.kill()
    holder.wait()
    path = build.build_ahead(cache)
    assert path == library(cache)


def test_living_lock_holder_is_waited_for_and_then_reported(cache, monkeypatch, capsys):
    library(cache).unlink()
    (lock,) = cache.glob("*.lock")
    monkeypatch.setattr(build, "QUIET_WAIT", 0.1)
    monkeypatch.setattr(build, "LOCK_TIMEOUT", 0.3)
    with filelock.FileLock(lock), pytest.raises(build.BuildError, match="another process has held"):
        build.build_ahead(cache)
    assert "waiting for another process" in capsys.readouterr().err


DAMAGES = {
    "truncated": lambda content: content[: len(content) // 2],
    "garbage": lambda content: content[::-1],
    "empty": lambda content: b"",
    "gone": None,
}


def assert_compiled_anew(cache, contents, monkeypatch):
    """Nothing in ``cache`` serves; a build that gives ``contents`` puts them there, and nothing else."""
    wanted = build.Wanted.here()
    assert wanted.find(cache) is None
    compiled = []

    def compile_(tools, key, work):
        compiled.append(key)
        for part, content in contents.items():
            (work / f"{part.name}.so").write_bytes(content)

    monkeypatch.setattr(build, "_compile", compile_)
    assert build.build_ahead(cache) == library(cache) == wanted.find(cache)
    assert compiled == [library(cache).parent.name]
    assert all(library(cache, part).read_bytes() == content for part, content in contents.items())


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_library_is_compiled_anew(cache, damage, part, monkeypatch):
    contents = {part: library(cache, part).read_bytes() for part in PARTS}
    victim = library(cache, part)
    if damage == "gone":
        victim.unlink()
    else:
        victim.write_bytes(DAMAGES[damage](contents[part]))
    assert_compiled_anew(cache, contents, monkeypatch)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", "null", '{"facts": null, "libraries": []}', '{"facts": {}}', '"libraries"']
)
def test_a_build_with_another_description_is_compiled_anew(cache, text, monkeypatch):
    contents = {part: library(cache, part).read_bytes() for part in PARTS}
    (library(cache).parent / "build.json").write_text(text)
    assert_compiled_anew(cache, contents, monkeypatch)


def test_kernels_serve_where_the_library_that_calls_them_can_not_be_compiled(built, tmp_path):
    first, second = (first_use(tmp_path / "cache", FAILING="autograd.cpp") for _ in range(2))
    (warning,) = first["warnings"]
    assert "Python calls them" in warning
    assert f"Remove {library(tmp_path / 'cache').parent} to have" in warning
    assert "no such header" in warning
    assert "reference serves" not in warning
    assert "compiled in" in first["stderr"]
    for result in (first, second):
        assert result["usable"] and result["caller"] == "Python"
    assert not second["warnings"]
    assert "compiling" not in second["stderr"]
    assert json.loads((library(tmp_path / "cache").parent / "build.json").read_text())["libraries"] == [KERNELS.name]


def test_the_first_error_is_what_is_told():
    said = build._first_failure("\n".join(["[1/9] c++ a", "FAILED: b.o", "b.cpp:1: error", *["[2/9] c++ c"] * 40]))
    assert said == "FAILED: b.o\nb.cpp:1: error"
    assert build._first_failure("ninja: error: no such file") == "ninja: error: no such file"


def test_cache_that_cannot_be_written_is_replaced_by_a_private_build(built, tmp_path):
    obstacle = tmp_path / "a file"
    obstacle.write_text("")
    result = first_use(obstacle / "cache")
    assert result["usable"]
    assert "this process alone" in result["reason"]
    (warning,) = result["warnings"]
    assert "can't be written" in warning
    assert "TAYLORKERN_CACHE_DIR" in warning


def test_sound_build_in_a_read_only_cache_is_used(cache):
    folders = [cache, library(cache).parent]
    for folder in folders:
        folder.chmod(0o555)
    try:
        result = first_use(cache)
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert result["usable"]
    assert not result["warnings"]
    assert "compiling" not in result["stderr"]


@pytest.mark.parametrize(
    ("compiler", "says"),
    [
        ("/nowhere/g++", "named by CXX"),
        ("false", "doesn't run"),
        ("broken", "no space left for jokes"),
    ],
)
def test_without_a_working_compiler_the_reference_serves(tmp_path, compiler, says):
    if compiler == "broken":
        answer = '#!/bin/sh\n[ "$1" = --version ] && echo 1 && exit\necho no space left for jokes\nexit 1\n'
        compiler = script(tmp_path / "broken", answer)
    result = first_use(tmp_path / "cache", CXX=compiler)
    assert not result["usable"]
    (warning,) = result["warnings"]
    assert says in warning
    assert "reference serves" in warning
    assert "CXX" in warning


def test_no_compiler_at_all_is_named(tmp_path):
    result = first_use(tmp_path, PATH="", CXX="")
    (warning,) = result["warnings"]
    assert "no C++ compiler on PATH" in warning
    assert result["before"] in warning


def test_build_made_elsewhere_serves_without_a_compiler(cache):
    result = first_use(cache, PATH="", CXX="")
    assert result["usable"]
    assert not result["warnings"]


def test_hanging_compiler_is_ended(tmp_path, monkeypatch):
    pid = tmp_path / "pid"
    compiler = script(
        tmp_path / "slow", f'#!/bin/sh\n[ "$1" = --version ] && echo 1 && exit\necho $$ > {pid}\nsleep 99\n'
    )
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(build, "COMPILE_TIMEOUT", 1.0)
    with pytest.raises(build.BuildError, match="didn't finish"):
        build.build_ahead(tmp_path / "cache")
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid.read_text().strip()}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid.read_text().strip()}").exists()


def test_a_library_that_takes_too_long_is_done_without(built, tmp_path, monkeypatch):
    monkeypatch.setenv("ENDLESS", "autograd.cpp")
    monkeypatch.setattr(build, "COMPILE_TIMEOUT", 10.0)
    with pytest.warns(RuntimeWarning, match="didn't finish"):
        path = build.build_ahead(tmp_path / "cache")
    assert path == library(tmp_path / "cache")
    assert not AUTOGRAD.libraries(path.parent)


def test_killed_build_leaves_nothing_that_is_loaded(built, compiler, tmp_path):
    compiler.unlink()
    cache = tmp_path / "cache"
    process = start(cache, DAWDLE="3")
    while not compiler.exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert list(cache.glob("*.tmp"))
    assert not list(cache.glob("*/*.so"))
    result = first_use(cache)
    assert result["usable"]
    assert not result["warnings"]
    assert not list(cache.glob("*.tmp"))


def test_prebuilt_library_in_the_package_comes_first(built, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "PREBUILT", built)
    monkeypatch.setenv("TAYLORKERN_CACHE_DIR", str(tmp_path))
    loaded = build.load()
    assert loaded.origin == "package"
    assert loaded.path == library(built)
    assert loaded.module.register_bytes in (32, 64)
    assert callable(loaded.autograd.fused)


def test_libraries_in_a_folder_that_refuses_programs_are_loaded_from_another(built, monkeypatch, recwarn):
    path = library(built)
    real, refused = build._import, []

    def refuse(original, copy):
        if copy.parent == path.parent:
            refused.append(copy)
            raise ImportError("failed to map segment from shared object")
        return real(original, copy)

    monkeypatch.setattr(build, "_import", refuse)
    loaded = build._load(path, "cache")
    assert refused == [library(built, part) for part in PARTS]
    assert loaded.origin == "private"
    assert loaded.module.max_threads() >= 1
    assert callable(loaded.autograd.fused)
    assert not recwarn.list


def test_kernels_serve_where_the_library_that_calls_them_can_not_be_loaded(built, monkeypatch):
    real = build._import

    def refuse(name, path):
        if path.name.startswith(AUTOGRAD.name):
            raise ImportError("undefined symbol")
        return real(name, path)

    monkeypatch.setattr(build, "_import", refuse)
    with pytest.warns(RuntimeWarning, match="Python calls the kernels.*undefined symbol.*remove it"):
        loaded = build._load(library(built), "cache")
    assert loaded.autograd is None
    assert loaded.origin == "cache"
    assert loaded.module.max_threads() >= 1
    monkeypatch.setattr(native, "_outcome", loaded)
    assert native.status().detail["called from"] == "Python"
    assert native.autograd() is None


@pytest.mark.parametrize("fact", ["taylorkern", "sources", "torch", "cuda", "python", "pybind11", "isa", "flags"])
def test_key_depends_on_every_fact(fact):
    facts, tools = toolchain.host_facts(), toolchain.find_toolchain()
    assert toolchain.key(facts, tools) == toolchain.key(dict(facts), tools)
    assert toolchain.key(facts | {fact: "another"}, tools) != toolchain.key(facts, tools)


@pytest.mark.parametrize("flags", ["FLAGS", "AUTOGRAD_FLAGS"])
def test_key_depends_on_the_flags_of_both_libraries(flags, monkeypatch):
    tools, before = toolchain.find_toolchain(), toolchain.host_facts()
    monkeypatch.setattr(toolchain, flags, [*getattr(toolchain, flags), "-DANOTHER"])
    assert toolchain.key(toolchain.host_facts(), tools) != toolchain.key(before, tools)


def test_every_unit_is_compiled_with_the_flags_of_its_library():
    text = recipe.ninja_file(toolchain.find_toolchain(), "key")
    for part, flags in ((KERNELS, toolchain.FLAGS), (AUTOGRAD, toolchain.AUTOGRAD_FLAGS)):
        (rule,) = (line for line in text.splitlines() if f"-DTAYLORKERN_MODULE=_{part.name}_key " in line)
        assert {*flags} <= {*rule.split()}
        assert text.count(f": compile_{part.name} ") == len(part.units())
    assert {unit.name for unit in AUTOGRAD.units()} == {"autograd.cpp"}
    sources = {path for path in toolchain.sources().rglob("*.cpp")}
    units = {unit for part in (*PARTS, *CUDA.parts) for unit in part.units()}
    assert {unit for unit in units if unit.suffix == ".cpp"} == sources


def test_key_depends_on_the_compiler():
    facts, tools = toolchain.host_facts(), toolchain.find_toolchain()
    for other in (("/bin/other",), tools.version), (tools.compiler, "another version"):
        assert toolchain.key(facts, toolchain.Toolchain(*other, tools.ninja)) != toolchain.key(facts, tools)


def test_key_depends_on_every_source(tmp_path):
    folder = Path(shutil.copytree(toolchain.sources(), tmp_path / "csrc"))
    before = toolchain._hash_of_sources(folder)
    for path in [p for p in folder.rglob("*") if p.suffix in toolchain.SOURCE_SUFFIXES]:
        path.write_text(path.read_text() + "\n")
        after = toolchain._hash_of_sources(folder)
        assert after != before, path
        before = after


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"TAYLORKERN_CACHE_DIR": "/a b/c", "XDG_CACHE_HOME": "/x"}, "/a b/c"),
        ({"XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/x/taylorkern"),
        ({"HOME": "/h"}, "/h/.cache/taylorkern"),
    ],
)
def test_cache_root(environment, expected, monkeypatch):
    for name in ("TAYLORKERN_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert build.cache_root() == Path(expected)


def test_compiler_may_have_arguments(monkeypatch):
    monkeypatch.setenv("CXX", "g++ -DWITH_ARGUMENT='a b'")
    tools = toolchain.find_toolchain()
    assert tools.compiler[0].endswith("g++")
    assert tools.compiler[1:] == ("-DWITH_ARGUMENT=a b",)
