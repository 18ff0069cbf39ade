"""How large the study of sets is: the full one, and one short enough for the tests."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Plan:
    networks: tuple[str, ...] = ("residual", "plain", "dense")
    steps: dict[str, int] = field(default_factory=lambda: {"late": 720})  # 18 an epoch
    seeds: int = 5
    rate: float = 0.05
    minibatches: int = 8  # that are scored, unless a variant says otherwise
    size: int = 128  # images in each
    fractions: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of the pool that go
    step: float = 0.05  # of the pool that goes in one round
    other_steps: tuple[float, ...] = (0.01, 0.2, 1.0)  # rounds of other sizes; 1: one-shot
    compared: tuple[float, ...] = (0.5, 0.7, 0.8)  # where variants, rounds of other sizes and rivals are looked at
    compared_seeds: int = 5  # the first so many seeds; the curves and the fine-tuning are of all
    samples: tuple[int, ...] = (64, 128, 256, 512, 1198)  # images that are scored, in variants
    rival_step: float = 0.1
    predicted: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)  # of the pool, one-shot
    left: float = 0.3  # of the FLOPs, in fine-tuning
    cut_step: float = 0.05  # of the FLOPs that goes in one round there
    epochs: tuple[int, ...] = (0, 1, 2, 3, 5, 7, 10, 14, 20)  # after which the accuracy is taken
    epoch: int = 18  # minibatches
    tuning_rate: float = 0.01


FULL = Plan()
SHORT = Plan(
    networks=("residual",), steps={"late": 30}, seeds=2, minibatches=1, size=64, fractions=(0.5,), step=0.25,
    other_steps=(1.0,), compared=(0.5,), compared_seeds=1, samples=(32,), rival_step=0.5, predicted=(0.2, 0.4, 0.6),
    left=0.6, cut_step=0.2, epochs=(0, 1), epoch=2,
)  # fmt: skip
