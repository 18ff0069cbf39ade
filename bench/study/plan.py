"""How large the study is: the full one, and one short enough for the tests."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Plan:
    networks: tuple[str, ...] = ("residual", "plain", "dense")
    steps: dict[str, int] = field(default_factory=lambda: {"early": 72, "middle": 216, "late": 720})  # 18 an epoch
    seeds: int = 5
    rate: float = 0.05
    minibatches: int = 8  # that are scored and measured
    size: int = 128  # images in each
    fractions: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    rounds: int = 20  # of iterative removal, for all units
    iterative_minibatches: int = 4
    cut_rounds: int = 14  # in which the networks of the schedules and of the rank plots are cut
    left: float = 0.3  # of the channels, in the comparison of schedules
    budget: int = 180  # minibatches that each schedule may train on
    tuning_rate: float = 0.01


FULL = Plan()
SHORT = Plan(
    networks=("residual",), steps={"early": 20, "late": 40}, seeds=2, minibatches=2, size=64, fractions=(0.5,),
    rounds=2, iterative_minibatches=1, cut_rounds=2, budget=4,
)  # fmt: skip
