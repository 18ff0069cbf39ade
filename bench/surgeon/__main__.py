"""Sets of channels on scikit-learn's digits: which go, what makes up for them, over architectures and seeds.

    python -m bench.surgeon [--short] [--seeds N] [--out DIR] [--processes N]

Accuracy is that of held-out images, and but for the last table without any fine-tuning. Each network's record is kept
in DIR, and a study that was interrupted goes on from there. The full study writes bench/results/surgeon.json and
docs/surgeon-*.png; a short one, or one of other seeds, writes into DIR only.
"""

from typing import Any

from bench.study.command import ROOT, Study, asked, carry_out


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = asked(arguments, __doc__, ROOT / "study-out/surgeon")

    from .pictures import draw
    from .plan import FULL, SHORT
    from .summary import summarise
    from .tables import tables
    from .work import all_records

    return carry_out(Study("surgeon", FULL, SHORT, all_records, summarise, draw, tables), options)


if __name__ == "__main__":
    main()
