"""Instructions of every CPU kernel, counted by valgrind's callgrind: the same number on every machine.

The kernels are compiled as for the package, but for one instruction set that valgrind knows, and called on one thread
(``tests/cpp/single_calls.cpp``). A count still depends on the compiler, so there is a baseline for each compiler that
one was recorded with, by name and major version; with another nothing is compared.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.guard import baseline
from bench.guard.baseline import UPDATE, NotRunError, Rule
from taylorkern.backends import toolchain

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "bench" / "results" / "guard-instructions.json"
DRIVER = ROOT / "tests" / "cpp" / "single_calls.cpp"
ISA = "-march=x86-64-v3"  # valgrind knows no AVX-512
RULE = Rule("instructions per element", 0.03, both=True)
TIMEOUT = 600  # seconds for one file to compile, or all calls to be counted


def flags() -> list[str]:
    """The package's own, for :data:`ISA`."""
    if "-march=native" not in toolchain.FLAGS:
        raise NotRunError(f"the package's flags hold no -march=native for {ISA} to replace; mend {Path(__file__).name}")
    return [ISA if flag == "-march=native" else flag for flag in toolchain.FLAGS]


def compiler() -> tuple[str, ...]:
    """The command that compiles the package's kernels; raises NotRunError where there is none, or no valgrind."""
    if platform.machine() not in ("x86_64", "AMD64"):
        raise NotRunError(f"instructions are counted for {ISA}, which this {platform.machine()} machine can't run")
    if shutil.which("valgrind") is None:
        raise NotRunError("valgrind isn't on PATH; install it (apt install valgrind)")
    try:
        return toolchain.find_toolchain().compiler
    except toolchain.BuildError as error:
        raise NotRunError(str(error)) from error


def name(command: Sequence[str]) -> str:
    """The compiler as baselines know it: "gcc 12"."""
    macros = _run([*command, "-dM", "-E", "-x", "c++", os.devnull])
    found = dict(re.findall(r"#define (__clang_major__|__GNUC__) (\d+)", macros))
    if "__clang_major__" in found:
        return f"clang {found['__clang_major__']}"
    return f"gcc {found['__GNUC__']}" if "__GNUC__" in found else shlex.join(command)


def build(command: Sequence[str], options: Sequence[str], folder: Path) -> Path:
    """The driver, linked with the kernels."""
    sources = [DRIVER, *sorted((toolchain.sources() / "cpu").glob("*.cpp"))]
    objects = [folder / f"{source.stem}.o" for source in sources]

    def compiled(source: Path, to: Path) -> None:
        _run([*command, *options, f"-I{toolchain.sources()}", "-c", str(source), "-o", str(to)])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compiled, sources, objects))
    program = folder / "single_calls"
    # Bound at the start, so that no call is charged with looking up what it calls.
    _run([*command, *options, *map(str, objects), "-Wl,-z,now", "-o", str(program)])
    return program


def count(program: Path, wanted: str = "") -> dict[str, float]:
    """Instructions per element of each case whose name starts with ``wanted``."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "calls"
        tool = ["valgrind", "--tool=callgrind", "--toggle-collect=measure", "--dump-after=measure"]
        printed = _run([*tool, f"--callgrind-out-file={out}", str(program), wanted])
        cases = [line.rsplit(" ", 1) for line in printed.splitlines()]
        # callgrind numbers what it writes after each call from 1.
        return {case: _total(Path(f"{out}.{i}")) / int(elements) for i, (case, elements) in enumerate(cases, 1)}


def measured(command: Sequence[str]) -> dict[str, float]:
    """Instructions per element of every case."""
    with tempfile.TemporaryDirectory() as folder:
        return count(build(command, flags(), Path(folder)))


def check() -> list[str]:
    """What is wrong, line by line; raises NotRunError where nothing can be compared."""
    command = compiler()
    who, known = name(command), baseline.read(FILE).get("baselines", {})
    if who not in known:
        raise NotRunError(f"there is no baseline for {who} (only for {', '.join(known) or 'none'}); {UPDATE} adds one")
    return list(RULE.complaints(measured(command), known[who]).values())


def update() -> str:
    """Record a baseline for this compiler; those of others stay. Returns what was done."""
    command = compiler()
    who, found = name(command), {case: round(value, 4) for case, value in measured(command).items()}
    content: dict[str, Any] = {
        "unit": RULE.unit,
        "margin": RULE.margin,
        "flags": shlex.join(flags()),
        "baselines": baseline.read(FILE).get("baselines", {}) | {who: found},
    }
    baseline.write(FILE, content)
    return f"{len(found)} counts for {who} recorded in {FILE.relative_to(ROOT)}"


def _total(dump: Path) -> int:
    found = re.search(r"^totals: (\d+)$", dump.read_text(), re.MULTILINE)
    if not found or not int(found[1]):
        raise RuntimeError(f"callgrind counted nothing in {dump.name}: is measure() still what the driver calls?")
    return int(found[1])


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout
