"""Loss scale: what a ``GradScaler`` has multiplied the loss by, taken out of the scores again."""

from typing import Any

import torch
from torch import Tensor


class LossScale:
    """The scale that ``scaler`` (``torch.amp.GradScaler`` or None) gave the loss of the minibatch under way.

    >>> scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    >>> scale = LossScale(scaler)
    >>> scale.note()
    >>> scaled = scaler.scale(torch.tensor(1.0))
    >>> scale.factor()
    tensor(0.1250, dtype=torch.float64)
    """

    def __init__(self, scaler: Any) -> None:
        enabled = scaler is not None and scaler.is_enabled()
        self._scaler = scaler if enabled else None
        self._noted: Tensor | None = None
        self._last: Tensor | None = None  # the factor of the minibatch before

    @property
    def unknown(self) -> bool:
        """Whether a minibatch has begun whose scale has not been noted."""
        return self._scaler is not None and self._noted is None

    def note(self) -> None:
        """Keep the scale as it is now, between two updates, for the minibatch that begins."""
        if self.unknown:
            self._noted = self._now()

    def factor(self) -> Tensor | None:
        """What the scores of the minibatch are to be multiplied by, float64; None for 1.

        NaN where the optimiser's step was skipped: the scale has fallen since, or :meth:`skip` said so.
        """
        if self._noted is None:
            return None
        now = self._now().to(self._noted.device)
        return torch.where(now < self._noted, torch.nan, 1 / self._noted)

    def fell(self) -> bool:
        """Whether the factor is NaN; on a GPU this waits for it."""
        return _is_nan(self.factor())

    def skip(self, where: Tensor | None = None) -> None:
        """The minibatch's step is skipped, in any case or if ``where`` is not nought."""
        if self._noted is not None:
            spoiled = torch.full_like(self._noted, torch.nan)
            self._noted = spoiled if where is None else torch.where(where.to(spoiled.device) != 0, spoiled, self._noted)

    def end(self) -> None:
        """Another minibatch begins."""
        self._last, self._noted = self.factor(), None

    @property
    def skipped(self) -> bool:
        """Whether the step of the minibatch that ended last was skipped; on a GPU this waits for it."""
        return _is_nan(self._last)

    def _now(self) -> Tensor:
        # The tensor where there is one: get_scale() would wait for the GPU.
        scaler: Any = self._scaler
        scale = getattr(scaler, "_scale", None)
        if scale is None:
            scale = torch.tensor(scaler.get_scale())
        return scale.detach().to(torch.float64, copy=True)


def _is_nan(factor: Tensor | None) -> bool:
    return factor is not None and bool(factor.isnan())
