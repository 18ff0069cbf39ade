"""The options of ``taylorkern prune`` and ``taylorkern score``; their defaults are those of :class:`Settings`."""

from argparse import ArgumentParser, BooleanOptionalAction
from typing import Any

from taylorkern.arguments import above_zero, names, natural, not_negative, positive, share
from taylorkern.budget import MEASURES

from .settings import RATES, Settings


def add_prune(command: ArgumentParser) -> None:
    """All options of ``taylorkern prune``."""
    _add_network(command)
    _add_data(command)
    _add_pruning(command)
    _add_training(command)
    add = command.add_argument
    add("--out", default=Settings.out, metavar="DIR", help="keep results and checkpoints here; the same command "
        f"goes on there after an interruption (default {Settings.out})")  # fmt: skip
    add("--checkpoint-every", type=positive, default=Settings.checkpoint_every, metavar="STEPS",
        help=f"minibatches between two checkpoints (default {Settings.checkpoint_every})")  # fmt: skip
    add("--restart", action="store_true", help="throw away what --out holds of a run, and begin again")
    add("--tensorboard", action="store_true", help="log for TensorBoard as well, into DIR/tensorboard")


def add_score(command: ArgumentParser) -> None:
    """All options of ``taylorkern score``."""
    _add_network(command)
    _add_data(command)
    add = command.add_argument
    add("--criterion", type=names, default=[Settings.criterion], metavar="A,B,...",
        help=f"one or several criteria (default {Settings.criterion})")  # fmt: skip
    add("--batches", type=positive, default=50, metavar="N", help="minibatches of the training data, of an "
        "epoch at most (default 50)")  # fmt: skip
    add("--out", default="scores.json", metavar="FILE", help="a .safetensors or .json file (default scores.json)")


def _add_network(command: ArgumentParser) -> None:
    add = command.add_argument
    add("--model", required=True, metavar="SPEC", help="torchvision:NAME, timm:NAME or FILE.py:FUNCTION, which is "
        "called with the number of classes if it takes one")  # fmt: skip
    add("--weights", metavar="FILE", help="a state_dict to begin with, .safetensors or .pt (default: random weights)")
    add("--device", default=Settings.device, help="cpu, cuda ... (default auto: a GPU where there is one)")
    add("--seed", type=natural, default=Settings.seed, metavar="N", help="of weights and minibatches (default 0)")


def _add_data(command: ArgumentParser) -> None:
    add = command.add_argument
    add("--data", required=True, metavar="DIR|FILE.py:FUNCTION", help="a folder with train/CLASS/* and val/CLASS/*, or "
        "with CLASS/*; or a function that returns (train, val), iterables of (images, labels); what they shuffle by "
        "global random numbers or a DataLoader's generator is the same after an interruption")  # fmt: skip
    add("--val-share", type=share, default=Settings.val_share, metavar="X", help="the part of each class that is held "
        f"out where the folder holds CLASS/* (default {Settings.val_share})")  # fmt: skip
    add("--size", type=positive, default=Settings.size, metavar="PIXELS",
        help=f"images are resized to this square (default {Settings.size})")  # fmt: skip
    add("--batch", type=positive, default=Settings.batch, metavar="N",
        help=f"images in a minibatch (default {Settings.batch})")  # fmt: skip
    add("--workers", type=natural, default=Settings.workers, metavar="N",
        help=f"processes that read images (default {Settings.workers}); the result is the same")  # fmt: skip
    _add_switch(command, "augment", "mirror and move training images at random")


def _add_pruning(command: ArgumentParser) -> None:
    add = command.add_argument
    add("--criterion", default=Settings.criterion, metavar="NAME",
        help=f"what chooses the channels that go (default {Settings.criterion})")  # fmt: skip
    add("--target", type=share, default=Settings.target, metavar="X",
        help=f"the part that is kept (default {Settings.target})")  # fmt: skip
    add("--of", default=Settings.of, choices=list(MEASURES), help=f"of what (default {Settings.of})")
    add("--every", type=positive, default=Settings.every, metavar="STEPS",
        help=f"minibatches between two rounds (default {Settings.every})")  # fmt: skip
    add("--step", type=positive, metavar="UNITS", help="units that go in a round (default: as many as reach the target "
        "within --prune-epochs, roughly, in at least 8 rounds)")  # fmt: skip
    add("--prune-epochs", type=above_zero, default=Settings.prune_epochs, metavar="N",
        help="epochs that pruning takes, about (default 1)")  # fmt: skip
    _add_switch(command, "compensate", "have those that stay make up for those that go (default: with the surgeon)")


def _add_training(command: ArgumentParser) -> None:
    add = command.add_argument
    add("--epochs", type=natural, metavar="N", help="training before pruning (default 3, with --weights 0)")
    add("--finetune-epochs", type=natural, default=Settings.finetune_epochs, metavar="N",
        help=f"training afterwards (default {Settings.finetune_epochs})")  # fmt: skip
    add("--optimizer", default=Settings.optimizer, choices=sorted({name for name, _ in RATES}), help="default sgd")
    add("--lr", type=above_zero, metavar="X", help="the highest learning rate (default for sgd 0.05, 0.01 without "
        "training before; for adamw 0.001 and 0.0001)")  # fmt: skip
    add("--weight-decay", type=not_negative, metavar="X", help="default for sgd 0.0005, for adamw 0.05")
    add("--amp", default=Settings.amp, choices=["off", "bf16", "fp16"], help="mixed precision (default off)")
    _add_switch(command, "channels-last", "keep images and weights in channels_last")
    _add_switch(command, "compile", "compile the network, but while it is pruned")


def _add_switch(command: ArgumentParser, name: str, text: str) -> None:
    default: Any = getattr(Settings, name.replace("-", "_"))
    command.add_argument(f"--{name}", action=BooleanOptionalAction, default=default, help=text)
