"""Pruning by a callback of transformers' Trainer."""

from tempfile import TemporaryDirectory
from typing import Any

from taylorkern.integrations.huggingface import PruningCallback  # before transformers, for torchvision's sake

# isort: split
from digits import BATCH, PRUNING, example, network, optimiser, samples
from torch.optim.lr_scheduler import ConstantLR
from transformers import Trainer, TrainingArguments


def trainer(folder: str, pruning: PruningCallback | None = None, **settings: Any) -> Trainer:
    """A Trainer with the callback; without a schedule, and in the data's order, to be like the other examples."""
    pruning = pruning or PruningCallback(example(), **PRUNING)
    model = network()
    optimizer = optimiser(model)
    quiet = {"report_to": "none", "disable_tqdm": True, "logging_strategy": "no"}
    given = {"num_train_epochs": 2, "per_device_train_batch_size": BATCH, "save_strategy": "no", "use_cpu": True}
    arguments = TrainingArguments(folder, train_sampling_strategy="sequential", **(given | quiet | settings))
    return Trainer(
        model,
        arguments,
        train_dataset=samples(),
        optimizers=(optimizer, ConstantLR(optimizer, 1.0)),
        callbacks=[pruning],
    )


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        training = trainer(folder, gradient_accumulation_steps=2, bf16=True)
        training.train()
    rounds = [entry for entry in training.state.log_history if "pruning/units" in entry]
    print(f"units left after each of {len(rounds)} rounds: {[entry['pruning/units'] for entry in rounds]}")
    print(training.model)
