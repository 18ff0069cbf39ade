"""The ways to choose units and to make up for them that are compared, by name."""

from dataclasses import dataclass, replace

from taylorkern.surgeon import COST_POWER, DAMPING

from .plan import Plan

CRITERIA = ("taylor_fo", "taylor_so", "taylor_so_fisher", "magnitude", "bn_scale", "random")
OF_DATA = ("taylor_fo", "taylor_so", "taylor_so_fisher")
COMPENSATED = ", compensated"


@dataclass(frozen=True)
class Way:
    """What chooses units, and what makes up for them; ``repair`` names one of ``repairs.REPAIRS``.

    ``rows`` are a method of ``Scores.curvature``, or "fisher" for the samples' own gradients; ``samples`` of None is as
    the plan says.
    """

    criterion: str = "surgeon"
    repair: str | None = "gates"
    rows: str = "sketch"
    draws: int = 1
    form: str = "full"
    damping: float = DAMPING
    bound: float | None = None
    cost_power: float = COST_POWER  # where units cost differently
    samples: int | None = None

    @property
    def shifts(self) -> bool:
        """Whether the gates of the units that stay move."""
        return self.repair in ("gates", "gates and bias")

    @property
    def method(self) -> str | None:
        """Of the curvature that it asks for, if any."""
        asked = self.shifts or self.criterion in ("surgeon", "taylor_so")
        return self.rows if asked and self.rows != "fisher" else None

    @property
    def of_data(self) -> bool:
        """Whether it needs scores of what is there; others look at the weights alone."""
        return self.shifts or self.criterion in ("surgeon", *OF_DATA)


SURGEON = Way()
CURVES: dict[str, Way] = {
    **{name: Way(name, repair=None) for name in CRITERIA},
    **{name + COMPENSATED: Way(name) for name in CRITERIA},
    "surgeon, not compensated": Way(repair=None),
    "surgeon, Fisher rows": Way(rows="fisher"),
    "surgeon, blocks": Way(form="blocks"),
    "surgeon": SURGEON,
}
# In the whole network, where a round costs the same and tells less.
CURVES_OF_WHOLE = (
    "taylor_fo", "taylor_so", "magnitude", "random", "taylor_fo, compensated", "taylor_so, compensated", "surgeon"
)  # fmt: skip


def variants(plan: Plan) -> dict[str, Way]:
    """Everything that one could set about the surgeon, one thing at a time."""
    found = {
        "default": SURGEON,
        "4 sketches": replace(SURGEON, draws=4),
        "all columns": replace(SURGEON, rows="exact"),
        "blocks, Fisher rows": replace(SURGEON, form="blocks", rows="fisher"),
    }
    found |= {f"damping {damping:g}": replace(SURGEON, damping=damping) for damping in (1e-3, 1e-2, 1e-1, 1.0)}
    found |= {f"bound {bound:g}": replace(SURGEON, bound=bound) for bound in (1.0, 0.5)}
    found |= {f"{samples} samples": replace(SURGEON, samples=samples) for samples in plan.samples}
    return {name: way for name, way in found.items() if name == "default" or way != SURGEON}


# Who chooses, and who makes up for it.
RIVALS: dict[str, Way] = {
    f"{criterion}, {repair or 'nothing'}": Way(criterion, repair)
    for criterion in ("taylor_fo", "surgeon")
    for repair in (None, "gates", "bias", "scale", "refit", "gates and bias")
}
