"""The ``taylorkern`` command: results on stdout, progress on stderr, an error in one line and exit code 1."""

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import taylorkern as tk
from taylorkern.backends.toolchain import BuildError

STDOUT = "-"


class CommandError(RuntimeError):
    """What the user asked for can't be done; the message says why and what to do."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 failed, 130 interrupted (argparse exits with 2)."""
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], None] = options.command
    try:
        if options.json not in (None, STDOUT):
            _check_writable(Path(options.json))
        command(options)
    except (BuildError, CommandError, OSError, tk.StoreError, tk.SurgeryError) as error:
        print(f"taylorkern: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("taylorkern: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="taylorkern", description="Score and prune channels.")
    parser.add_argument("--version", action="version", version=f"taylorkern {tk.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(command=command)
        added.add_argument(
            "--json", nargs="?", const=STDOUT, metavar="FILE",
            help="write the result as JSON to FILE, or to stdout in place of the text",
        )  # fmt: skip
        return added

    demo = add("demo", _demo, "train, score, prune and fine-tune a small network on digits, and compare")
    demo.add_argument("--out", type=Path, metavar="DIR", help="keep the summary, network and pictures here")
    demo.add_argument("--quick", action="store_true", help="a shorter training, under a minute")
    demo.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and batches (default 0)")
    add("doctor", _doctor, "say which backend serves each operation, and why")
    build = add("build", _build, "compile the kernels now, ahead of their first use")
    build.add_argument("--out", type=Path, metavar="DIR", help="compile into DIR instead of the cache")
    return parser


def _demo(options: argparse.Namespace) -> None:
    missing = [name for name in ("sklearn", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(f"the demo needs {' and '.join(missing)}: pip install 'taylorkern[demo]'")
    from taylorkern.demo.run import run

    summary = run(quick=options.quick, seed=options.seed, out=options.out)
    quick = " --quick" if options.quick else ""
    summary["command"] = f"taylorkern demo{quick} --seed {options.seed}"
    if options.out:
        _write(options.out / "summary.json", summary)
    _answer(options.json, summary, _table)
    if options.out:
        print(f"summary.json, pruned.safetensors and pictures are in {options.out}", file=sys.stderr)


def _doctor(options: argparse.Namespace) -> None:
    from taylorkern import doctor

    _answer(options.json, doctor.examine(), doctor.tell)


def _build(options: argparse.Namespace) -> None:
    from taylorkern.backends.build import build_ahead

    path = build_ahead(options.out)
    _answer(options.json, {"library": str(path)}, lambda result: f"kernels are ready in {result['library']}")


def _answer(target: str | None, result: Mapping[str, Any], text: Callable[[Mapping[str, Any]], str]) -> None:
    """Text on stdout, unless JSON is wanted there; JSON into the file where one is named."""
    if target == STDOUT:
        print(json.dumps(result, indent=2))
        return
    if target is not None:
        _write(Path(target), result)
    print(text(result))


def _write(path: Path, result: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(result, indent=2) + "\n")


def _check_writable(path: Path) -> None:
    """Fails before minutes of work, not after."""
    with path.open("a"):
        pass


def _table(summary: Mapping[str, Any]) -> str:
    dense, pruned, ratios = summary["dense"], summary["pruned"], summary["ratios"]
    channels = [point["channels"] for point in (summary["history"][0], summary["history"][-1])]
    rows = [
        ("", "dense", "pruned", "pruned / dense"),
        ("held-out accuracy", f"{dense['accuracy']:.2%}", f"{pruned['accuracy']:.2%}",
         f"{-100 * summary['accuracy_lost']:+.2f} points"),
        ("held-out loss", f"{dense['loss']:.4f}", f"{pruned['loss']:.4f}", ""),
        ("prunable channels", *(f"{count:,}" for count in channels), f"{channels[1] / channels[0]:.2f}"),
        ("parameters", f"{dense['params']:,}", f"{pruned['params']:,}", f"{ratios['params']:.2f}"),
        ("FLOPs per image", f"{dense['flops']:,}", f"{pruned['flops']:,}", f"{ratios['flops']:.2f}"),
        (f"latency, batch {summary['latency_batch']}", f"{dense['latency_ms']:.2f} ms",
         f"{pruned['latency_ms']:.2f} ms", f"{ratios['latency_ms']:.2f}"),
    ]  # fmt: skip
    return "\n".join(f"{row[0]:<20}{row[1]:>14}{row[2]:>14}{row[3]:>18}".rstrip() for row in rows)
