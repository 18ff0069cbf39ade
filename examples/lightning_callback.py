"""Pruning by a callback of Lightning's Trainer."""

from typing import Any

from taylorkern.integrations.lightning import PruningCallback  # before Lightning, for torchvision's sake

# isort: split
import pytorch_lightning
import torch
from digits import PRUNING, example, minibatches, network, optimiser
from torch import Tensor


class Classifier(pytorch_lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.network(**batch)["loss"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimiser(self)


def train(folder: str | None = None, **settings: Any) -> tuple[Classifier, PruningCallback]:
    """The pruned network, and the callback, which knows what every round removed."""
    pruning = PruningCallback(example(), module="network", **PRUNING)
    given = {"max_epochs": 2, "accelerator": "cpu", "gradient_clip_val": 1.0, "default_root_dir": folder}
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    model = Classifier()
    trainer = pytorch_lightning.Trainer(callbacks=[pruning], enable_checkpointing=False, **given, **quiet, **settings)
    trainer.fit(model, minibatches())
    return model, pruning


if __name__ == "__main__":
    model, pruning = train(accumulate_grad_batches=2, precision="bf16-mixed")
    print(f"{sum(map(len, pruning.removed))} units removed in {len(pruning.removed)} rounds; left:", model, sep="\n")
