"""Small networks that the tests score and cut, and explicit gates on their units."""

import torch
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, width: int, stride: int = 1) -> None:
        super().__init__()
        into = width // stride
        self.conv1, self.bn1 = nn.Conv2d(into, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.down = nn.Sequential(nn.Conv2d(into, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        if stride == 1:
            self.down = nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.down(x)
        return self.relu(out)


def residual(width: int = 6) -> nn.Module:
    """A stem, an identity block, a down-sampling block and a classifier: linked units and inner ones."""
    stem = [nn.Conv2d(2, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 5)]
    return randomised(nn.Sequential(*stem, Block(width), Block(2 * width, 2), *head))


def plain(width: int = 6) -> nn.Module:
    """No batch normalisation: convolutions behind which an in-place ReLU runs, and a hidden linear layer."""
    layers = [nn.Conv2d(2, width, 3), nn.ReLU(inplace=True), nn.Conv2d(width, width, 3), nn.ReLU(inplace=True)]
    return randomised(nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * width, 9), nn.ReLU(), nn.Linear(9, 5)))


def randomised(model: nn.Module) -> nn.Module:
    """Batch normalisation as after some training, so that no two channels are alike."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, 0, 0.3)
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


def with_gates(model: nn.Module, units, z: Tensor):
    """Multiply every place of unit u, for sample n, by z[n, u]; returns the hooks' handles."""
    columns: dict[str, dict[int, int]] = {}
    for u, unit in enumerate(units):
        for layer, channel in unit.places:
            columns.setdefault(layer, {})[channel] = u

    def hook(layer):
        def multiply(module, inputs, output):
            gates = torch.ones(output.shape[:2], dtype=z.dtype)
            channels = torch.tensor(list(columns[layer]))
            gates = gates.index_copy(1, channels, z[:, list(columns[layer].values())])
            return output * gates.reshape(*output.shape[:2], *[1] * (output.dim() - 2))

        return multiply

    return [model.get_submodule(layer).register_forward_hook(hook(layer)) for layer in columns]


def gate_gradients(model: nn.Module, units, x: Tensor, target: Tensor) -> Tensor:
    """s[n, u] of the mean cross-entropy, [N, U], by float64 autograd with explicit gates."""
    z = torch.ones(len(x), len(units), dtype=torch.float64, requires_grad=True)
    hooks = with_gates(model, units, z)
    loss = nn.functional.cross_entropy(model(x), target)
    for handle in hooks:
        handle.remove()
    return torch.autograd.grad(loss, z)[0]
