"""Everything the study of sets measures on one trained network, as plain numbers."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from bench.study.networks import LAYER
from bench.study.removal import accuracy, masked, pools
from taylorkern.demo.data import Digits
from taylorkern.surgery import cut

from .plan import Plan
from .prediction import foretold
from .thinning import Thinning
from .tuning import tuned
from .ways import CURVES, CURVES_OF_WHOLE, RIVALS, SURGEON, variants

# A folded gate rounds once more than one that is multiplied with; in float32, through a dozen layers.
TOLERANCE = 1e-3


def record(network: str, seed: int, model: nn.Module, plan: Plan, data: Digits) -> dict[str, Any]:
    """Curves and fine-tuning; of the first ``plan.compared_seeds`` seeds variants, rivals and rounds of other sizes."""
    thinning = Thinning(model, plan, data, seed)
    found = pools(thinning.scores, LAYER[network])
    inner, whole = found["inner channels"], found["whole network"]
    result = {
        "network": network,
        "seed": seed,
        "units": {"inner channels": len(inner), "whole network": len(whole)},
        "accuracy": accuracy(thinning.model, data),
        "curves": _curves(thinning, inner, whole),
        "cut": as_cut(thinning, model, inner),
        "prediction": foretold(thinning, inner),
        "tuning": tuned(model, plan, data, seed),
    }
    return result | (_comparisons(thinning, inner) if seed < plan.compared_seeds else {})


def _curves(thinning: Thinning, inner: Tensor, whole: Tensor) -> dict[str, dict[str, Any]]:
    plan = thinning.plan
    curves = {"inner channels": {n: thinning.curve(w, inner, plan.fractions, plan.step) for n, w in CURVES.items()}}
    if len(whole) > len(inner):
        ways = {name: CURVES[name] for name in CURVES_OF_WHOLE}
        curves["whole network"] = {n: thinning.curve(w, whole, plan.fractions, plan.step) for n, w in ways.items()}
    return {pool: {name: curve for name, curve in of.items() if curve} for pool, of in curves.items()}


def _comparisons(thinning: Thinning, inner: Tensor) -> dict[str, Any]:
    plan = thinning.plan

    def steps(*sizes: float) -> dict[str, dict[str, Any]]:
        return {f"{s:g}": {n: thinning.curve(w, inner, plan.compared, s) for n, w in RIVALS.items()} for s in sizes}

    return {
        "variants": {n: thinning.curve(w, inner, plan.compared, plan.step) for n, w in variants(plan).items()},
        "rounds": {f"{s:g}": thinning.curve(SURGEON, inner, plan.compared, s) for s in plan.other_steps},
        "rivals": steps(plan.rival_step, 1.0),
    }


def as_cut(thinning: Thinning, model: nn.Module, pool: Tensor) -> dict[str, float]:
    """Accuracy behind gates and really cut, the surgeon's way, with the middle one of the compared fractions gone.

    Raises AssertionError where the cut network computes something else.
    """
    plan = thinning.plan
    thinning.restore()
    fraction = plan.compared[len(plan.compared) // 2]
    behind = thinning.curve(SURGEON, pool, (fraction,), plan.step)
    assert behind is not None
    thin = copy.deepcopy(model).eval()
    gone = (~thinning.stays).nonzero().flatten()
    cut(thin, thinning.coupling, gone, thinning.batches[0][0][:1], gates=thinning.gates.double())
    with torch.no_grad(), masked(thinning.model, thinning.coupling.layers, thinning.gates):
        want = thinning.model(thinning.data.test_images)
    with torch.no_grad():
        distance = float((thin(thinning.data.test_images) - want).abs().max() / want.abs().max())
    really = accuracy(thin, thinning.data)
    images = len(thinning.data.test_labels)
    if distance > TOLERANCE or abs(really - behind["accuracy"][0]) * images > 1.5:  # one image on the border
        raise AssertionError(f"the cut network is another one: logits differ by {distance:.1e}, accuracy {really:.4f}")
    return {"fraction": fraction, "gated": behind["accuracy"][0], "cut": really, "logits": distance}
