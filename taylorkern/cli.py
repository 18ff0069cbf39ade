"""The ``taylorkern`` command: results on stdout, progress on stderr, an error in one line and exit code 1."""

import argparse
import importlib.util
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import taylorkern as tk
from taylorkern.arguments import names, positive
from taylorkern.backends.toolchain import BuildError
from taylorkern.errors import CommandError, one_line
from taylorkern.job.options import add_prune, add_score
from taylorkern.resolve import ResolveError, resolve

STDOUT = "-"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 failed, 130 interrupted (argparse exits with 2)."""
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], None] = options.command
    try:
        if options.json not in (None, STDOUT):
            _check_writable(Path(options.json))
        command(options)
    except (BuildError, CommandError, OSError, ResolveError, tk.StoreError, tk.SurgeryError) as error:
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

    add_prune(add("prune", _prune, "train, score, prune and fine-tune a network on a folder of images, and report"))
    add_score(add("score", _score, "score every unit of a network on a folder of images"))
    demo = add("demo", _demo, "train, score, prune and fine-tune a small network on digits, and compare")
    demo.add_argument("--out", type=Path, metavar="DIR", help="keep the summary, network and pictures here")
    demo.add_argument("--quick", action="store_true", help="a shorter training, under a minute")
    demo.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and batches (default 0)")
    demo.add_argument("--criterion", metavar="NAME", help="what chooses the channels that go (default: taylor_fo)")
    demo.add_argument("--compensate", action=argparse.BooleanOptionalAction, help="whether the channels that stay make "
        "up for those that go (default: with the surgeon)")  # fmt: skip
    _add_oracle_options(
        add("oracle", _oracle, "measure what each channel's removal does, and correlate every criterion")
    )
    add("doctor", _doctor, "say which backend serves each operation, and why")
    build = add("build", _build, "compile the kernels now, ahead of their first use")
    build.add_argument("--out", type=Path, metavar="DIR", help="compile into DIR instead of the cache")
    return parser


def _add_oracle_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--model", metavar="FILE.py:FUNCTION", help="returns a trained torch.nn.Module, called with the seed if it "
        "takes one (default: a small residual network, trained on digits)")  # fmt: skip
    add("--data", metavar="FILE.py:FUNCTION", help="returns an iterable of (inputs, targets), called with the seed if "
        "it takes one (default: digits)")  # fmt: skip
    add("--loss", default="cross_entropy", metavar="NAME", help="cross_entropy (default), mse or bce_with_logits")
    add("--criteria", type=names, metavar="A,B,...", help="criteria to compare (default: all that apply)")
    add("--methods", type=names, default=["sketch"], metavar="A,B,...",
        help="curvature for the criteria that need it: sketch (default), mc, exact")  # fmt: skip
    add("--units", type=positive, metavar="K", help="a random sample of K units of each network (default: all)")
    add("--minibatches", type=positive, metavar="B", help="the first B of the data (default 8, with --quick 3)")
    add("--seeds", type=positive, metavar="N", help="networks, of seeds 0 to N-1 (default 3, with --model 1)")
    add("--together", type=positive, default=16, metavar="K", help="units measured in one forward (default 16)")
    add("--quick", action="store_true", help="a shorter training of the default network, fewer minibatches")
    add("--out", type=Path, metavar="DIR", help="keep measurements here, to go on from after an interruption, and "
        "comparison.json, table.txt and scatter plots")  # fmt: skip


def _oracle(options: argparse.Namespace) -> None:
    needed = {"scipy": True, "matplotlib": options.out, "sklearn": not (options.model and options.data)}
    _check_installed("the oracle", [name for name, wanted in needed.items() if wanted])
    from taylorkern import tables

    result = _compared(options)
    result["command"] = _repeating(options)
    if options.out:
        from taylorkern import report

        _write(options.out / "comparison.json", result)
        (options.out / "table.txt").write_text(tables.tell(result) + "\n")
        for network in result["networks"]:
            picture = options.out / f"scatter-seed{network['seed']}.png"
            report.scatter(network).savefig(picture, dpi=110, facecolor="white")
    _answer(options.json, result, tables.tell)
    if options.out:
        print(f"comparison.json, table.txt, pictures and measurements are in {options.out}", file=sys.stderr)


def _compared(options: argparse.Namespace) -> dict[str, Any]:
    from taylorkern.comparison import compare
    from taylorkern.demo import trained

    models = resolve(options.model) if options.model else partial(trained.network, quick=options.quick)
    data = resolve(options.data) if options.data else trained.batches
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    try:
        return compare(
            models,
            data,
            options.loss,
            seeds=range(options.seeds or (1 if options.model else 3)),
            criteria=options.criteria,
            methods=options.methods,
            units=options.units,
            minibatches=options.minibatches or (3 if options.quick else 8),
            together=options.together,
            folder=options.out,
            progress=True,
        )
    except (ValueError, RuntimeError) as error:  # torch's own as well: a model that does not fit its data
        raise CommandError("; ".join(str(error).splitlines())) from error
    except KeyboardInterrupt:
        if options.out:
            print(f"taylorkern: what is measured is in {options.out}; the same command goes on there", file=sys.stderr)
        raise


def _repeating(options: argparse.Namespace) -> str:
    """The command that makes this result again."""
    given = {
        "--model": options.model,
        "--data": options.data,
        "--loss": options.loss,
        "--criteria": options.criteria and ",".join(options.criteria),
        "--methods": ",".join(options.methods),
        "--units": options.units,
        "--minibatches": options.minibatches,
        "--seeds": options.seeds,
        "--together": options.together,
    }
    words = [word for name, value in given.items() if value is not None for word in (name, str(value))]
    return shlex.join(["taylorkern", "oracle", *words, *(["--quick"] if options.quick else [])])


def _prune(options: argparse.Namespace) -> None:
    from taylorkern.job import learner
    from taylorkern.job.run import run
    from taylorkern.job.settings import Settings

    settings = Settings.of_options(options)
    try:
        learner.device(settings.device)
        summary = run(settings, options.restart)
    except (ValueError, RuntimeError) as error:  # torch's own as well: a model that does not fit its data
        raise _as_command_error(error) from error
    except KeyboardInterrupt:
        print("taylorkern: the same command goes on from the last checkpoint", file=sys.stderr)
        raise
    _answer(options.json, summary, _table)
    print(f"pruned.safetensors, report.html and summary.json are in {settings.out}", file=sys.stderr)


def _score(options: argparse.Namespace) -> None:
    from taylorkern.job import score

    try:
        result = score.score(options)
    except (ValueError, RuntimeError) as error:
        raise _as_command_error(error) from error
    _answer(options.json, result, score.tell)
    print(f"the scores are in {options.out}", file=sys.stderr)


def _as_command_error(error: Exception) -> Exception:
    return error if isinstance(error, CommandError | ResolveError) else CommandError(one_line(error))


def _check_installed(what: str, packages: Sequence[str]) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(f"{what} needs {' and '.join(missing)}: pip install 'taylorkern[demo]'")


def _demo(options: argparse.Namespace) -> None:
    _check_installed("the demo", ["sklearn", "matplotlib"])
    from taylorkern.demo.run import run

    try:
        summary = run(
            quick=options.quick,
            seed=options.seed,
            out=options.out,
            criterion=options.criterion,
            compensate=options.compensate,
        )
    except ValueError as error:
        raise CommandError(str(error)) from error
    summary["command"] = _demo_command(options)
    if options.out:
        _write(options.out / "summary.json", summary)
    _answer(options.json, summary, _table)
    if options.out:
        print(f"summary.json, pruned.safetensors and pictures are in {options.out}", file=sys.stderr)


def _demo_command(options: argparse.Namespace) -> str:
    """The command that makes this summary again."""
    words = ["taylorkern", "demo", *(["--quick"] if options.quick else []), "--seed", str(options.seed)]
    words += ["--criterion", options.criterion] if options.criterion else []
    words += [] if options.compensate is None else ["--compensate" if options.compensate else "--no-compensate"]
    return shlex.join(words)


def _doctor(options: argparse.Namespace) -> None:
    from taylorkern import doctor

    _answer(options.json, doctor.examine(), doctor.tell)


def _build(options: argparse.Namespace) -> None:
    from taylorkern.backends import build, nvcc
    from taylorkern.backends.recipe import CUDA

    result = {"library": str(build.build_ahead(options.out))}
    try:
        nvcc.find_toolchain()
    except BuildError as error:
        print(f"taylorkern: no CUDA kernels are compiled: {error}", file=sys.stderr)
    else:
        result["cuda"] = str(build.build_ahead(options.out, CUDA))
    _answer(options.json, result, lambda made: "\n".join(f"kernels are ready in {path}" for path in made.values()))


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
