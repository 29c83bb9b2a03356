"""A network that sees amplitude and phase of an object in its diffraction pattern.

After PtychoNN (Cherukara et al., "AI-enabled high-resolution scanning coherent diffraction imaging", 2020): one
convolutional encoder, two decoders. It is narrower, shows the lit middle of the window only, and has a dense layer
between encoder and decoders: every pixel of the object is spread over the whole pattern.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from scripts.studies.diffraction import DARKEST, Condition, empty_pattern

__all__ = ["PtychoNet", "reconstruction_loss"]


class PtychoNet(nn.Module):
    """Patterns `[batch, 32, 32]` to amplitudes and phases in radians `[batch, 16, 16]`.

    Args:
        width: Channels of the first layers; doubled with every halving of the resolution.
    """

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        # Calibrated once, before any drift: what there is to see is the difference to a beam without texture.
        mean = (1 + DARKEST) / 2
        self.empty = nn.Parameter(mean * torch.from_numpy(empty_pattern(Condition().photons)), requires_grad=False)
        self.encoder = nn.Sequential(
            *_convolutions(1, width),
            nn.MaxPool2d(2),
            *_convolutions(width, 2 * width),
            nn.MaxPool2d(2),
            *_convolutions(2 * width, 4 * width),
            nn.MaxPool2d(2),
            nn.Flatten(),
            _shaped(nn.Linear(64 * width, 64 * width)),
            nn.ReLU(),
            nn.Unflatten(1, (4 * width, 4, 4)),
        )
        self.amplitude, self.phase = _decoder(width, math.log(mean / (1 - mean))), _decoder(width, 0.0)

    def forward(self, diffraction: Tensor) -> tuple[Tensor, Tensor]:
        """Both maps; the amplitude lies between 0 and 1, the phase between -pi and pi."""
        features = self.encoder((diffraction - self.empty).unsqueeze(1))
        amplitude, phase = self.amplitude(features).squeeze(1), self.phase(features).squeeze(1)
        return amplitude.sigmoid(), torch.pi * phase.tanh()


def reconstruction_loss(outputs: tuple[Tensor, Tensor], amplitude: Tensor, phase: Tensor) -> Tensor:
    """Mean absolute error of the amplitude plus that of the phase in radians."""
    return functional.l1_loss(outputs[0], amplitude) + functional.l1_loss(outputs[1], phase)


def _decoder(width: int, start: float) -> nn.Sequential:
    """`[batch, 4 width, 4, 4]` to `[batch, 1, 16, 16]`, near `start` at first."""
    last = nn.Conv2d(2 * width, 1, 3, padding=1)
    nn.init.normal_(last.weight, std=0.01)
    nn.init.constant_(cast(Tensor, last.bias), start)
    return nn.Sequential(
        *_convolutions(4 * width, 4 * width),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        *_convolutions(4 * width, 2 * width),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        last,
    )


def _convolutions(inputs: int, outputs: int) -> list[nn.Module]:
    convolutions = [nn.Conv2d(channels, outputs, 3, padding=1) for channels in (inputs, outputs)]
    return [layer for one in convolutions for layer in (_shaped(one), nn.ReLU())]


def _shaped(layer: nn.Conv2d | nn.Linear) -> nn.Module:
    """PyTorch's own start shrinks the signal at every layer, so that hardly any is left at the end of twelve."""
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return layer
