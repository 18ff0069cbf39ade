"""How long the kernels, and the library that calls them, take to compile, cold, as multiples of what the reader knows.

    python -m bench.building [--rounds 3]

Both are compiled into an empty folder, as a first use does it; beside them, in the same rounds, stand a Python that
imports torch, and the compilation with the same compiler and flags of an empty pybind11 module and of a file that does
no more than include torch's autograd. Before anything is timed, a process of its own loads a fresh build and compares
it with the reference.
"""

import argparse
import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.pairs import Timer, WrongError, interleaved, quartiles, ratios
from taylorkern.backends import build, toolchain
from taylorkern.backends.recipe import AUTOGRAD, KERNELS, Part

EMPTY = "#include <pybind11/pybind11.h>\nPYBIND11_MODULE(empty, module) { (void)module; }\n"
INCLUDING = "#include <torch/csrc/autograd/custom_function.h>\n"
CHECK = """
import torch
from taylorkern import backends, ops
a, g = torch.randn(2, 4, 33, 17, 9).double()
assert backends.provider("channel_scores", a) is backends.native, "the fresh build does not serve"
assert backends.native.autograd(), "the fresh build has no library that calls the kernels"
print(float((ops.channel_scores(a, g) - backends.reference.channel_scores(a, g)).norm()))
"""


def kernels() -> None:
    """Compile the kernels into a folder that ends with the call."""
    with tempfile.TemporaryDirectory(prefix="bench-build-") as folder:
        build.build_ahead(Path(folder))


def import_torch() -> None:
    subprocess.run([sys.executable, "-c", "import torch"], check=True)


def empty_module() -> None:
    compile_one(KERNELS, EMPTY)


def empty_autograd() -> None:
    compile_one(AUTOGRAD, INCLUDING)


def compile_one(part: Part, text: str) -> None:
    """Compile a file of that ``text`` as a library of its own, as the units of ``part`` are compiled."""
    includes = [f"-isystem{path}" for path in (*part.headers, sysconfig.get_paths()["include"])]
    compiler = toolchain.find_toolchain().compiler
    with tempfile.TemporaryDirectory(prefix="bench-build-") as folder:
        source = Path(folder) / "empty.cpp"
        source.write_text(text)
        output = ["-shared", str(source), "-o", f"{folder}/empty.so"]
        subprocess.run([*compiler, *part.flags, *includes, *output, *part.links], check=True)


WAYS: dict[str, Callable[[], None]] = {
    "kernels": kernels,
    "import torch": import_torch,
    "empty pybind11 module": empty_module,
    "file that includes torch's autograd": empty_autograd,
}


def checked() -> dict[str, float]:
    """Distance of a fresh build from the reference, in float64; raises WrongError where it is too large."""
    with tempfile.TemporaryDirectory(prefix="bench-build-") as folder:
        build.build_ahead(Path(folder))
        environment = os.environ | {"TAYLORKERN_CACHE_DIR": folder}
        command = [sys.executable, "-c", CHECK]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ran.returncode or not float(ran.stdout) <= 1e-12:
        raise WrongError(f"{shlex.join(command[:2])} with a fresh build: {ran.stdout or ran.stderr}; nothing is timed")
    return {"float64": float(ran.stdout)}


def measured(rounds: int, timer: Timer = interleaved) -> list[dict[str, Any]]:
    agreement = checked()
    times = timer(dict(WAYS), rounds)
    return [
        {
            "suite": "build",
            "subject": {"what": "kernels"},
            "way": "kernels",
            "to": other,
            "pairs": rounds,
            "ratio": quartiles(ratios(times["kernels"], times[other])),
            "checked": agreement,
        }
        for other in WAYS
        if other != "kernels"
    ]


def line(row: dict[str, Any]) -> str:
    q = row["ratio"]
    return f"compiling the kernels takes {q['median']:.1f} ({q['p25']:.1f} to {q['p75']:.1f}) of {row['to']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    print(*map(line, measured(parser.parse_args().rounds)), sep="\n")


if __name__ == "__main__":
    main()
