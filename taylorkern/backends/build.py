"""Finds, compiles, stores and loads the library of CPU kernels.

A build lives in ``<root>/<key>/taylorkern-<checksum>.so`` beside ``build.json``, where the root is the package's
own ``_prebuilt`` folder or the user's cache. The checksum in its name is verified before it is loaded, and it
appears there by one rename, so neither a damaged nor a half-written file is ever loaded.
"""

import hashlib
import importlib.machinery
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import filelock
import pybind11

from . import toolchain
from .toolchain import BuildError, Toolchain

PREBUILT = Path(__file__).resolve().parent.parent / "_prebuilt"
USUAL_SECONDS = 15  # of a compilation on two cores
COMPILE_TIMEOUT = 240  # seconds
LOCK_TIMEOUT = 300  # seconds that another process's compilation is waited for
QUIET_WAIT = 5  # seconds of waiting before a line says so
TEMPORARY_ROOTS = ("/dev/shm", "/var/tmp")  # tried where the usual one can't hold programs


@dataclass(frozen=True)
class Library:
    """A loaded build.

    ``origin``: "package", "cache", "compiled" (into the cache, now) or "private" (for this process alone).
    """

    module: ModuleType
    path: Path
    origin: str


@dataclass(frozen=True)
class Wanted:
    """The build that this machine would make. With no toolchain, any compiler's build of the facts serves."""

    facts: dict[str, str | None]
    toolchain: Toolchain | None
    missing: BuildError | None = None

    @classmethod
    def here(cls) -> "Wanted":
        facts = toolchain.host_facts()
        try:
            return cls(facts, toolchain.find_toolchain())
        except BuildError as error:
            return cls(facts, None, error)

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
        fitting = (path for folder in folders if self._fits(folder) for path in _libraries(folder))
        return next(filter(_sound, fitting), None)

    def locate(self) -> tuple[Path, str] | None:
        """The library that a load would take without compiling, and its origin."""
        for root, origin in ((PREBUILT, "package"), (cache_root(), "cache")):
            if path := self.find(root):
                return path, origin
        return None

    def _fits(self, folder: Path) -> bool:
        try:
            return json.loads((folder / "build.json").read_text()) == self.facts
        except (OSError, ValueError):
            return False


def cache_root() -> Path:
    """TAYLORKERN_CACHE_DIR, or taylorkern in XDG_CACHE_HOME, or ~/.cache/taylorkern."""
    if chosen := os.environ.get("TAYLORKERN_CACHE_DIR"):
        return Path(chosen).absolute()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).absolute() / "taylorkern"
    # Without a home, "~" stays as it is: a relative path, which is refused where it is written.
    return Path(os.path.expanduser("~")) / ".cache" / "taylorkern"


def load() -> Library:
    """The kernels: from the package, from the cache, or compiled now.

    Raises BuildError where there is no way to have them.
    """
    wanted = Wanted.here()
    if found := wanted.locate():
        return _load(*found)
    try:
        path = compile_into(cache_root(), wanted)
    except OSError as error:
        return _load_private(wanted, error)
    return _load(path, "compiled")


def build_ahead(out: Path | None = None) -> Path:
    """Compiles into the folder ``out`` (the cache if None) unless a sound build is there.

    Returns the library's path. Raises BuildError where it can't be compiled, OSError where it can't be written.
    """
    return compile_into(cache_root() if out is None else Path(out).absolute(), Wanted.here())


def compile_into(root: Path, wanted: Wanted) -> Path:
    """The library under ``root``, compiled by one process while others wait for it.

    Raises BuildError where it can't be compiled, OSError where it can't be written.
    """
    key = wanted.key
    if not root.is_absolute():
        raise FileNotFoundError("there is no home directory")
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root / f"{key}.lock"):
        if found := wanted.find(root):
            return found
        for leftover in root.glob(f"{key}.*.tmp"):  # of a process that was killed: the lock is ours now
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(".tmp", f"{key}.", root, ignore_cleanup_errors=True) as work:
            _compile(wanted.tools, _module_name(key), Path(work))
            return _install(Path(work) / "taylorkern.so", root / key, wanted.facts)


def _libraries(folder: Path) -> list[Path]:
    return sorted(folder.glob("taylorkern-*.so"))


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def _sound(path: Path) -> bool:
    try:
        return path.stem == f"taylorkern-{_checksum(path)}"
    except OSError:
        return False


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """An operating system's lock: it ends with its process, so a dead one never blocks."""
    lock = filelock.FileLock(path)
    try:
        try:
            lock.acquire(timeout=QUIET_WAIT)
        except filelock.Timeout:
            _say("waiting for another process that compiles the CPU kernels")
            lock.acquire(timeout=LOCK_TIMEOUT)
    except filelock.Timeout:
        raise BuildError(
            f"another process has held {path} for over {LOCK_TIMEOUT} s; end it, or choose another TAYLORKERN_CACHE_DIR"
        ) from None
    except NotImplementedError as error:
        raise OSError(f"no file locks in {path.parent}") from error
    try:
        yield
    finally:
        lock.release()


def _compile(tools: Toolchain, module: str, work: Path) -> None:
    _say(f"compiling the CPU kernels (once, about {USUAL_SECONDS} s on two cores) ...")
    start = time.monotonic()
    (work / "build.ninja").write_text(_ninja_file(tools, module))
    jobs = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        status, output = toolchain.run([tools.ninja, "-j", str(jobs)], work, COMPILE_TIMEOUT)
    except subprocess.TimeoutExpired:
        command = shlex.join(tools.compiler)
        raise BuildError(f"{command} didn't finish in {COMPILE_TIMEOUT} s; try another CXX") from None
    if status:
        tail = "\n".join(output.strip().splitlines()[-20:])
        raise BuildError(f"{shlex.join(tools.compiler)} failed; repair it or set CXX to another. It said:\n{tail}")
    _say(f"compiled in {time.monotonic() - start:.0f} s")


def _ninja_file(tools: Toolchain, module: str) -> str:
    def escaped(path: Path) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    includes = [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_paths()['include']}"]
    command = shlex.join([*tools.compiler, *toolchain.FLAGS]).replace("$", "$$")
    defines = shlex.join([f"-DTAYLORKERN_MODULE={module}", *includes]).replace("$", "$$")
    units = toolchain.units(toolchain.sources())
    objects = [f"{number}.o" for number in range(len(units))]
    return "\n".join(
        [
            f"rule compile\n  command = {command} {defines} -c $in -o $out",
            f"rule link\n  command = {command} -shared $in -o $out",
            *(f"build {o}: compile {escaped(unit)}" for o, unit in zip(objects, units, strict=True)),
            f"build taylorkern.so: link {' '.join(objects)}",
            "",
        ]
    )


def _install(library: Path, folder: Path, facts: dict[str, str | None]) -> Path:
    folder.mkdir(exist_ok=True)
    for damaged in _libraries(folder):
        damaged.unlink(missing_ok=True)
    description = library.with_name("build.json")
    description.write_text(json.dumps(facts, indent=1))
    os.replace(description, folder / "build.json")
    path = folder / f"taylorkern-{_checksum(library)}.so"
    os.replace(library, path)
    return path


def _load(path: Path, origin: str) -> Library:
    try:
        return Library(_import(path, path), path, origin)
    except ImportError as error:
        return _load_copy(path, error)


def _load_copy(path: Path, reason: ImportError) -> Library:
    """Loads a sound library from another folder where its own refuses, as one mounted "noexec" does."""
    for root in (None, *TEMPORARY_ROOTS):
        try:
            with _temporary_folder(root) as folder:
                return Library(_import(path, Path(shutil.copy(path, folder))), path, "private")
        except (OSError, ImportError):
            continue
    raise BuildError(f"{path} can't be loaded ({reason}); remove it to have it compiled anew") from reason


def _load_private(wanted: Wanted, reason: OSError) -> Library:
    try:
        with _temporary_folder() as folder:
            library = _load(compile_into(Path(folder), wanted), "private")
    except OSError as error:
        raise BuildError(
            f"neither the cache ({reason}) nor a temporary folder ({error}) can be written; "
            "set TAYLORKERN_CACHE_DIR to a folder that can"
        ) from error
    warnings.warn(
        f"taylorkern: the cache of compiled kernels can't be written ({reason}), so that every process compiles "
        "its own; set TAYLORKERN_CACHE_DIR to a folder that can",
        RuntimeWarning,
        stacklevel=2,
    )
    return library


def _temporary_folder(root: str | None = None) -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="taylorkern-", dir=root, ignore_cleanup_errors=True)


def _import(path: Path, copy: Path) -> ModuleType:
    """The library ``path``, read from ``copy``."""
    name = _module_name(path.parent.name)
    loader = importlib.machinery.ExtensionFileLoader(name, str(copy))
    spec = importlib.util.spec_from_file_location(name, copy, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _module_name(key: str) -> str:
    return f"_taylorkern_{key}"


def _say(message: str) -> None:
    print(f"taylorkern: {message}", file=sys.stderr, flush=True)
