"""Training goes on after a cut, and under a mask, exactly as a masked dense run goes on: weights, moments, averages."""

import pytest
import torch

from taylorkern.masking import mask
from taylorkern.surgery import cut
from tests.goingon import AFTER, AS, BEFORE, NETWORKS, assert_same, batch, coupled, left, masked_by_hand, run, some

STEPS = range(BEFORE, BEFORE + AFTER)
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1, amsgrad=True),
}


def runs(network: str, kind: str, name: str, **options):
    def build():
        return AS[kind](NETWORKS[network]())

    dense, other = (run(build, OPTIMIZERS[name], **options) for _ in range(2))
    coupling = coupled(dense.model)
    return dense, other, coupling, some(coupling)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", AS)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_cut_run_goes_on_as_the_masked_dense_one(network, kind, name):
    dense, thin, coupling, removed = runs(network, kind, name)
    tensors = [*thin.model.parameters(), *thin.average.parameters(), *thin.average.buffers()]
    cut(thin.model, coupling, removed, batch(0)[0], [thin.optimizer], copies=thin.average)
    with masked_by_hand(dense.model, coupling, removed):
        expected = dense.train(STEPS)
    assert thin.train(STEPS) == pytest.approx(expected, rel=1e-9)
    assert_same(thin.tensors(), left(dense.tensors(), coupling, removed))
    now = [*thin.model.parameters(), *thin.average.parameters(), *thin.average.buffers()]
    assert all(a is b for a, b in zip(tensors, now, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("network", NETWORKS)
def test_so_does_a_masked_one(network, name):
    dense, masked, coupling, removed = runs(network, "converted", name)
    mask(masked.model, coupling, removed, batch(0)[0], [masked.optimizer], copies=masked.average)
    with masked_by_hand(dense.model, coupling, removed):
        expected = dense.train(STEPS)
    assert masked.train(STEPS) == pytest.approx(expected, rel=1e-9)
    assert_same(left(masked.tensors(), coupling, removed), left(dense.tensors(), coupling, removed))


@pytest.mark.parametrize("how", [cut, mask])
def test_clipping_by_the_norm_of_all_gradients_sees_no_difference(how):
    dense, other, coupling, removed = runs("mixed", "plain", "sgd", clip=0.05)
    how(other.model, coupling, removed, batch(0)[0], [other.optimizer], copies=other.average)
    with masked_by_hand(dense.model, coupling, removed):
        expected = dense.train(STEPS)
    assert other.train(STEPS) == pytest.approx(expected, rel=1e-9)
    assert_same(left(other.tensors(), coupling, removed), left(dense.tensors(), coupling, removed))


def test_an_average_that_keeps_the_buffers_it_was_made_with_goes_on():
    dense, thin, coupling, removed = runs("residual", "converted", "adamw", use_buffers=False)
    cut(thin.model, coupling, removed, batch(0)[0], [thin.optimizer], copies=[thin.average])
    with masked_by_hand(dense.model, coupling, removed):
        dense.train(STEPS)
    thin.train(STEPS)
    assert int(thin.average.n_averaged) == BEFORE + AFTER
    assert_same(thin.tensors(), left(dense.tensors(), coupling, removed))
    loader = [batch(step)[0] for step in range(3)]
    with masked_by_hand(dense.average.module, coupling, removed):
        torch.optim.swa_utils.update_bn(loader, dense.average)
        torch.optim.swa_utils.update_bn(loader, thin.average)
        x = batch(99)[0]
        torch.testing.assert_close(thin.average.eval()(x), dense.average.eval()(x), rtol=1e-9, atol=1e-12)
    assert_same(thin.tensors(), left(dense.tensors(), coupling, removed))


def test_an_average_by_a_function_of_one_tensor_goes_on():
    """And a schedule of learning rates is no part of the cut."""
    from torch.optim.swa_utils import SWALR, AveragedModel, get_swa_avg_fn

    pair = runs("mixed", "plain", "sgd")
    coupling, removed = pair[2:]
    for one in pair[:2]:
        one.average = AveragedModel(one.model, avg_fn=get_swa_avg_fn())
        one.average.update_parameters(one.model)
    dense, thin = pair[:2]
    schedules = [SWALR(one.optimizer, swa_lr=0.2, anneal_epochs=9) for one in (dense, thin)]
    cut(thin.model, coupling, removed, batch(0)[0], [thin.optimizer], copies=thin.average)
    with masked_by_hand(dense.model, coupling, removed):
        dense.train(STEPS, schedules[0].step)
    thin.train(STEPS, schedules[1].step)
    assert thin.optimizer.param_groups[0]["lr"] == dense.optimizer.param_groups[0]["lr"] != 0.05
    assert_same(thin.tensors(), left(dense.tensors(), coupling, removed))
