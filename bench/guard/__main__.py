"""The guard: fails where the CPU kernels have become slower than a stated margin allows.

    python -m bench.guard [instructions] [ratios] [--update]

instructions  what callgrind counts per element for each kernel, within 3 % of the baseline either way
ratios        scored and fused against eager, at most 50 % above the baseline in the best of three attempts

With --update what is measured becomes the baseline, in ``bench/results/guard-*.json``. A check that this machine can't
make is told, with the reason, and does not fail.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass

from bench.guard import instructions, ratios
from bench.guard.baseline import UPDATE, NotRunError, Rule


@dataclass(frozen=True)
class Check:
    rule: Rule
    complaints: Callable[[], list[str]]
    update: Callable[[], str]

    def passes(self, name: str) -> bool:
        found = self.complaints()
        told = [*found, f"mend what has grown; what is meant to be so becomes the baseline by {UPDATE}"]
        well = [f"all within {self.rule.margin:.0%} of the baseline"]
        print(*(f"guard: {name}: {line}" for line in (told if found else well)), sep="\n", flush=True)
        return not found


CHECKS = {
    "instructions": Check(instructions.RULE, instructions.check, instructions.update),
    "ratios": Check(ratios.RULE, ratios.check, ratios.update),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.guard", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checks", nargs="*", metavar="check", help=f"of {', '.join(CHECKS)}; all by default")
    parser.add_argument("--update", action="store_true", help="record what is measured as the baseline")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.checks if name not in CHECKS]
    if unknown:
        parser.error(f"there is no check {unknown[0]!r}; known are {', '.join(CHECKS)}")
    good = True
    for name in options.checks or CHECKS:
        try:
            if options.update:
                print(f"guard: {name}: {CHECKS[name].update()}", flush=True)
            else:
                good = CHECKS[name].passes(name) and good
        except NotRunError as reason:
            print(f"guard: {name}: NOT RUN: {reason}", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
