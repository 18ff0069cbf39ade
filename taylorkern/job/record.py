"""Where a run stands, beside the tensors: kept with each checkpoint as JSON, floats to the bit."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

PHASES = ("train", "prune", "finetune", "done")


@dataclass
class Record:
    """``step`` counts minibatches from the beginning, ``phase_step`` within ``phase``."""

    phase: str = PHASES[0]
    step: int = 0
    phase_step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # files and why
    dense: dict[str, float] = field(default_factory=dict)  # accuracy and loss
    units: int = 0  # of the dense network, and its FLOPs
    flops: float = 0.0
    ranks: dict[str, list[float]] = field(default_factory=dict)
    rounds: int = 0  # of pruning so far
    dropped: int = 0  # minibatches that gave no scores
    empty: int = 0  # minibatches of which too few images could be read
    loss_sum: float = 0.0  # since the last point of the history
    loss_count: int = 0

    def dumps(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str) -> "Record":
        """
        >>> Record.loads(Record(step=3).dumps()) == Record(step=3)
        True
        """
        return cls(**json.loads(text))

    def next_phase(self) -> None:
        self.phase, self.phase_step = PHASES[PHASES.index(self.phase) + 1], 0

    def take_loss(self) -> float | None:
        """The mean since the last call; None where there was no minibatch.

        >>> record = Record(loss_sum=3.0, loss_count=2)
        >>> record.take_loss(), record.take_loss(), record.loss_sum
        (1.5, None, 0.0)
        """
        mean = self.loss_sum / self.loss_count if self.loss_count else None
        self.loss_sum, self.loss_count = 0.0, 0
        return mean
