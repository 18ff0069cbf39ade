"""Chooses timm's distinct architectures: the smallest network of each class and of each family of names.

    python -m bench.zoo.choosing

A family is what a module's names begin with, up to the first number or underscore (tf_mixnet, mobilenetv2, regnety).
Some that share a family and not their layers are added by hand. The input is the smallest square that the network
takes, and those of very many parameters are taken with fewer blocks. Everything is built on the meta device. Writes
bench/zoo/timm_choice.json.
"""

import json
import re
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from torch import nn

from .timm_networks import CHOICE, timm

FAMILY = re.compile(r"(?:(?:dm|ese|gc|eca|legacy|nf|test|tf)_)?[a-z]+(?:(?<=v)\d)?")
LARGE = 150_000_000  # parameters, of more than which a network is taken with fewer blocks
SHALLOW = {"depth": 4}
SIZES = (64, 96, 128, 160, 192, 224, 256)
# The same family, other layers: normalisation over groups, registers, rotary positions, attention late in the network.
ADDED = """
    coatnet_rmlp_nano_rw_224 convmixer_1024_20_ks9_p14 convnext_atto_ols crossvit_15_dagger_240 dla34 ecaresnet50t
    efficientnet_b0 efficientnet_es fastvit_mci0 fastvit_sa12 inception_next_tiny maxvit_tiny_tf_224
    mobilenetv3_large_100 mobilenetv4_hybrid_medium naflexvit_base_patch16_gap regnetz_c16 repvgg_d2se res2net50_14w_8s
    resnet18d resnet50_gn resnet50d resnetv2_50d_evos resnetv2_50d_gn resnetv2_50x1_bit sam2_hiera_tiny swin_s3_tiny_224
    vit_medium_patch16_reg4_gap_256 vit_small_patch16_36x1_224 vit_small_patch16_18x2_224 vit_small_patch16_rope_224
    vit_relpos_small_patch16_224 vit_small_r26_s32_224 vit_tiny_patch16_dinov3 xcit_tiny_12_p16_224
""".split()


@dataclass
class Candidate:
    name: str
    module: str
    architecture: str  # its class
    family: str
    parameters: int


@dataclass
class Choice(Candidate):
    arguments: dict[str, Any]
    shape: tuple[int, ...]  # of an image
    stands_for: int  # networks of this class and family


def candidate(name: str) -> Candidate:
    model = _on_meta(name)
    family = FAMILY.match(name)
    assert family
    module = timm().model_entrypoint(name).__module__.rpartition(".")[2]
    parameters = sum(p.numel() for p in model.parameters())
    return Candidate(name, module, type(model).__name__, family.group(), parameters)


def _on_meta(name: str, **arguments: Any) -> nn.Module:
    with torch.device("meta"):
        return timm().create_model(name, pretrained=False, num_classes=10, **arguments).eval()


def smallest(candidates: list[Candidate]) -> list[Candidate]:
    """Of each class and of each family in a module, and those added by hand; by module and name."""
    best: dict[tuple[str, str, str], Candidate] = {}
    for c in sorted(candidates, key=lambda c: (c.parameters, c.name)):
        best.setdefault((c.module, "class", c.architecture), c)
        best.setdefault((c.module, "family", c.family), c)
    chosen = {c.name: c for c in (*best.values(), *(c for c in candidates if c.name in ADDED))}
    return sorted(chosen.values(), key=lambda c: (c.module, c.name))


def choice(chosen: Candidate, stands_for: int) -> Choice:
    """With the smallest input that it runs on, or else its own."""
    own = timm().get_pretrained_cfg(chosen.name).input_size
    depths = (SHALLOW, {}) if chosen.parameters > LARGE else ({},)
    for size in (*(size for size in SIZES if size < own[-1]), None):
        shape = own if size is None else (own[0], size, size)
        for arguments, depth in product(({} if size is None else {"img_size": size}, {}), depths):
            if _runs(chosen.name, arguments | depth, shape):
                return Choice(**asdict(chosen), arguments=arguments | depth, shape=shape, stands_for=stands_for)
    return Choice(**asdict(chosen), arguments={}, shape=own, stands_for=stands_for)


def _runs(name: str, arguments: dict[str, Any], shape: tuple[int, ...]) -> bool:
    try:
        _on_meta(name, **arguments)(torch.randn(2, *shape, device="meta"))
    except Exception:  # whatever says that the size does not suit it
        return False
    return True


def main() -> None:
    candidates = [candidate(name) for name in timm().list_models()]
    counts = Counter((c.module, c.architecture, c.family) for c in candidates)
    choices = []
    for chosen in smallest(candidates):
        choices.append(choice(chosen, counts[chosen.module, chosen.architecture, chosen.family]))
        print(f"{chosen.module} {chosen.name} {choices[-1].arguments} {choices[-1].shape}", file=sys.stderr)
    rows = ",\n".join(json.dumps(asdict(c)) for c in choices)
    CHOICE.write_text(f'{{"timm": "{timm().__version__}", "networks": {len(candidates)}, "chosen": [\n{rows}\n]}}\n')


if __name__ == "__main__":
    main()
