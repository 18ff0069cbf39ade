"""The paper's experiments on scikit-learn's digits, over architectures, training stages and seeds.

    python -m bench.study [--short] [--seeds N] [--out DIR] [--processes N]

Each trained network's record is kept in DIR, and a study that was interrupted goes on from there. The full study writes
bench/results/study.json and docs/study-*.png; a short one, or one of other seeds, writes into DIR only.
"""

from typing import Any

from .command import ROOT, Study, asked, carry_out


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = asked(arguments, __doc__, ROOT / "study-out")

    from .pictures import draw
    from .plan import FULL, SHORT
    from .summary import summarise, table
    from .work import all_records

    return carry_out(Study("study", FULL, SHORT, all_records, summarise, draw, table), options)


if __name__ == "__main__":
    main()
