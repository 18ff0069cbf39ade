"""Finds, compiles, stores and loads the libraries of a build (see ``recipe``).

They live in ``<root>/<key>/<name>-<checksum>.so`` beside ``build.json``, where the root is the package's own
``_prebuilt`` folder or the user's cache. The checksum in a name is verified before the file is loaded, and it appears
there by one rename, so neither a damaged nor a half-written file is ever loaded. ``build.json`` holds what the build
depends on, and which libraries it has: one without the autograd library, which could not be compiled, serves too.
"""

import hashlib
import importlib.machinery
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from types import ModuleType

import filelock

from . import toolchain
from .recipe import CPU, PARTS, Part, Recipe, ninja_file
from .toolchain import BuildError, Toolchain

PREBUILT = Path(__file__).resolve().parent.parent / "_prebuilt"
COMPILE_TIMEOUT = 240  # seconds, times a recipe's patience
LOCK_TIMEOUT = 300  # seconds that another process's compilation is waited for, times a recipe's patience
QUIET_WAIT = 5  # seconds of waiting before a line says so
TEMPORARY_ROOTS = ("/dev/shm", "/var/tmp")  # tried where the usual one can't hold programs


@dataclass(frozen=True)
class Library:
    """A loaded build: the kernels, which are in ``path``, and the CPU's library of autograd functions if it is there.

    ``origin``: "package", "cache", "compiled" (into the cache, now) or "private" (for this process alone).
    """

    module: ModuleType
    path: Path
    origin: str
    autograd: ModuleType | None = None


@dataclass(frozen=True)
class Wanted:
    """The build that this machine would make. With no toolchain, any compiler's build that fits the facts serves."""

    recipe: Recipe
    facts: dict[str, str | None]
    toolchain: Toolchain | None
    missing: BuildError | None = None

    @classmethod
    def here(cls, recipe: Recipe = CPU) -> "Wanted":
        """Raises BuildError where the machine has nothing to build for."""
        facts = recipe.facts()
        try:
            return cls(recipe, facts, recipe.tools())
        except BuildError as error:
            return cls(recipe, facts, None, error)

    @property
    def tools(self) -> Toolchain:
        """Raises BuildError naming what is missing."""
        if self.toolchain is None:
            raise self.missing or BuildError("there is no toolchain")
        return self.toolchain

    @property
    def key(self) -> str:
        return toolchain.key(self.facts, self.tools)

    def find(self, root: Path) -> Path | None:
        """A sound library under ``root``."""
        try:
            folders = [root / self.key] if self.toolchain else sorted(root.iterdir())
        except OSError:
            return None
        return next((found for folder in folders if (found := self._complete(folder))), None)

    def locate(self) -> tuple[Path, str] | None:
        """The library that a load would take without compiling, and its origin."""
        for root, origin in ((PREBUILT, "package"), (cache_root(), "cache")):
            if path := self.find(root):
                return path, origin
        return None

    def _complete(self, folder: Path) -> Path | None:
        """The kernels in ``folder``, where this build is there with all its libraries, each of them sound."""
        try:
            description = json.loads((folder / "build.json").read_text())
            # What can't be compiled anew may lack what is not needed.
            there = [part for part in self.recipe.parts if part.name in description["libraries"]]
            asked = [part for part in there if part.needed or self.toolchain]
            found = {part.name: _sound_library(folder, part) for part in asked}
            fits = all(found.values()) and self.recipe.fits(description["facts"], self.facts)
        except (BuildError, OSError, ValueError, KeyError, TypeError):
            return None
        return found.get(self.recipe.kernels.name) if fits else None


def cache_root() -> Path:
    """TAYLORKERN_CACHE_DIR, or taylorkern in XDG_CACHE_HOME, or ~/.cache/taylorkern."""
    if chosen := os.environ.get("TAYLORKERN_CACHE_DIR"):
        return Path(chosen).absolute()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).absolute() / "taylorkern"
    # Without a home, "~" stays as it is: a relative path, which is refused where it is written.
    return Path(os.path.expanduser("~")) / ".cache" / "taylorkern"


def load(recipe: Recipe = CPU) -> Library:
    """The kernels: from the package, from the cache, or compiled now.

    Raises BuildError where there is no way to have them.
    """
    wanted = Wanted.here(recipe)
    if found := wanted.locate():
        return _load(*found, recipe)
    try:
        path = compile_into(cache_root(), wanted)
    except OSError as error:
        return _load_private(wanted, error)
    return _load(path, "compiled", recipe)


def build_ahead(out: Path | None = None, recipe: Recipe = CPU) -> Path:
    """Compiles into the folder ``out`` (the cache if None) unless a sound build is there.

    Returns the library's path. Raises BuildError where it can't be compiled, OSError where it can't be written.
    """
    return compile_into(cache_root() if out is None else Path(out).absolute(), Wanted.here(recipe))


def compile_into(root: Path, wanted: Wanted) -> Path:
    """The library under ``root``, compiled by one process while others wait for it.

    Raises BuildError where it can't be compiled, OSError where it can't be written.
    """
    key = wanted.key
    if not root.is_absolute():
        raise FileNotFoundError("there is no home directory")
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root / f"{key}.lock", wanted.recipe):
        if found := wanted.find(root):
            return found
        for leftover in root.glob(f"{key}.*.tmp"):  # of a process that was killed: the lock is ours now
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(".tmp", f"{key}.", root, ignore_cleanup_errors=True) as work:
            _compile(wanted, key, Path(work))
            return _install(Path(work), root / key, wanted)


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def _sound(path: Path) -> bool:
    try:
        return path.stem.rpartition("-")[2] == _checksum(path)
    except OSError:
        return False


def _sound_library(folder: Path, part: Part) -> Path | None:
    return next(filter(_sound, part.libraries(folder)), None)


@contextmanager
def _locked(path: Path, recipe: Recipe) -> Iterator[None]:
    """An operating system's lock: it ends with its process, so a dead one never blocks."""
    lock, longest = filelock.FileLock(path), LOCK_TIMEOUT * recipe.patience
    try:
        try:
            lock.acquire(timeout=QUIET_WAIT)
        except filelock.Timeout:
            _say(f"waiting for another process that compiles the {recipe.device} kernels")
            lock.acquire(timeout=longest)
    except filelock.Timeout:
        raise BuildError(
            f"another process has held {path} for over {longest} s; end it, or choose another TAYLORKERN_CACHE_DIR"
        ) from None
    except NotImplementedError as error:
        raise OSError(f"no file locks in {path.parent}") from error
    try:
        yield
    finally:
        lock.release()


def _compile(wanted: Wanted, key: str, work: Path) -> None:
    recipe, tools, longest = wanted.recipe, wanted.tools, COMPILE_TIMEOUT * wanted.recipe.patience
    _say(f"compiling the {recipe.device} kernels (once, about {recipe.usual_seconds} s on two cores) ...")
    start = time.monotonic()
    (work / "build.ninja").write_text(ninja_file(tools, key, recipe.parts))
    jobs = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    command, failure = [tools.ninja, "-j", str(jobs), "-k", str(len(recipe.parts))], ""
    try:
        status, output = toolchain.run(command, work, longest)
    except subprocess.TimeoutExpired:
        failure = f"{tools.command} didn't finish in {longest} s; try another {recipe.advice}"
    else:
        if status:
            said = _first_failure(output, parts=recipe.parts)
            failure = f"{tools.command} failed; repair it or set {recipe.advice} to another. It said:\n{said}"
    if failure:
        _judge(failure, work, work.parent / key, recipe)
    _say(f"compiled in {time.monotonic() - start:.0f} s")


def _first_failure(output: str, length: int = 20, parts: Sequence[Part] = PARTS) -> str:
    """What ninja says of the first failure, of a needed part's if there is one, or its last words."""
    lines = output.strip().splitlines()
    failed = [i for i, line in enumerate(lines) if line.startswith("FAILED")]
    needed = [i for i in failed if any(f"{part.name}." in lines[i] for part in parts if part.needed)]
    begin = next(iter(needed + failed), max(0, len(lines) - length))
    told = lines[begin : begin + length]
    return "\n".join(takewhile(lambda line: not line.startswith("["), told))


def _judge(failure: str, work: Path, folder: Path, recipe: Recipe) -> None:
    """Raise BuildError where a library is missing that is needed; warn of another."""
    if any(part.needed and not (work / f"{part.name}.so").exists() for part in recipe.parts):
        raise BuildError(failure)
    warnings.warn(
        "taylorkern: the kernels are compiled, but not the library that calls them from torch's autograd, so Python "
        f"calls them, which is slower. Remove {folder} to have both compiled again. {failure}",
        RuntimeWarning,
        stacklevel=2,
    )


def _install(work: Path, folder: Path, wanted: Wanted) -> Path:
    """Move what was made into ``folder``, the kernels last; their path."""
    parts = wanted.recipe.parts
    made = [part for part in reversed(parts) if (work / f"{part.name}.so").exists()]
    folder.mkdir(exist_ok=True)
    for damaged in (path for part in parts for path in part.libraries(folder)):
        damaged.unlink(missing_ok=True)
    description = work / "build.json"
    description.write_text(json.dumps({"facts": wanted.facts, "libraries": [part.name for part in made]}, indent=1))
    os.replace(description, folder / "build.json")
    for part in made:
        library = work / f"{part.name}.so"
        path = folder / f"{part.name}-{_checksum(library)}.so"
        os.replace(library, path)
    return path


def _load(path: Path, origin: str, recipe: Recipe = CPU) -> Library:
    """Load the kernels in ``path``, and the library beside them that calls them."""
    module, copied = _module(path, recipe.kernels)
    beside = (_caller(path.parent, part) for part in recipe.parts[1:])
    return Library(module, path, "private" if copied else origin, next(beside, None))


def _caller(folder: Path, part: Part) -> ModuleType | None:
    path = _sound_library(folder, part)
    try:
        return None if path is None else _module(path, part)[0]
    except BuildError as error:
        warnings.warn(f"taylorkern: Python calls the kernels, which is slower: {error}", RuntimeWarning, stacklevel=2)
        return None


def _module(path: Path, part: Part) -> tuple[ModuleType, bool]:
    """The module in ``path``, and whether a copy of it had to be loaded."""
    name = part.module(path.parent.name)
    try:
        return _import(name, path), False
    except ImportError as error:
        return _module_copied(name, path, error), True


def _module_copied(name: str, path: Path, reason: ImportError) -> ModuleType:
    """Loads a sound library from another folder where its own refuses, as one mounted "noexec" does."""
    for root in (None, *TEMPORARY_ROOTS):
        try:
            with _temporary_folder(root) as folder:
                return _import(name, Path(shutil.copy(path, folder)))
        except (OSError, ImportError):
            continue
    raise BuildError(f"{path} can't be loaded ({reason}); remove it to have it compiled anew") from reason


def _load_private(wanted: Wanted, reason: OSError) -> Library:
    try:
        with _temporary_folder() as folder:
            library = _load(compile_into(Path(folder), wanted), "private", wanted.recipe)
    except OSError as error:
        raise BuildError(
            f"neither the cache ({reason}) nor a temporary folder ({error}) can be written; "
            "set TAYLORKERN_CACHE_DIR to a folder that can"
        ) from error
    warnings.warn(
        f"taylorkern: the cache of compiled kernels can't be written ({reason}), so that every process compiles "
        f"its own {wanted.recipe.device} kernels; set TAYLORKERN_CACHE_DIR to a folder that can",
        RuntimeWarning,
        stacklevel=2,
    )
    return library


def _temporary_folder(root: str | None = None) -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="taylorkern-", dir=root, ignore_cleanup_errors=True)


def _import(name: str, path: Path) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _say(message: str) -> None:
    print(f"taylorkern: {message}", file=sys.stderr, flush=True)
