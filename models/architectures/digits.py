"""Two convolutional networks for handwritten digits: a narrow, shallow one and a wide, residual one.

Both take [batch, 1, side, side] with values normalised to about -1..1 and give [batch, 10] logits. The light
network answers from small patches of the picture (few layers, no downsampling before its average); the heavy
one sees the whole digit. That, and nothing artificial, is why their accuracies differ.
"""

import torch
from torch import Tensor, nn

CLASSES = 10


class DigitsLight(nn.Module):
    """`depth` plain 3x3 convolutions at full resolution, then the average over the picture."""

    def __init__(self, width: int = 40, depth: int = 4) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index in range(depth):
            layers += [_convolution(1 if index == 0 else width, width), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.features(images)
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits


class DigitsHeavy(nn.Module):
    """A residual network: two stages of `blocks` blocks, the second at half resolution and twice the width."""

    def __init__(self, width: int = 64, blocks: int = 2) -> None:
        super().__init__()
        self.stem = nn.Sequential(_convolution(1, width), nn.ReLU())
        self.first = nn.Sequential(*(_Residual(width) for _ in range(blocks)))
        self.down = nn.Sequential(_convolution(width, 2 * width, stride=2), nn.ReLU())
        self.second = nn.Sequential(*(_Residual(2 * width) for _ in range(blocks)))
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(2 * width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        features = self.second(self.down(self.first(self.stem(images))))
        logits: Tensor = self.head(self.dropout(features.mean(dim=(2, 3))))
        return logits


class _Residual(nn.Module):
    """x + two convolutions of x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_convolution(width, width), nn.ReLU(), _convolution(width, width))

    def forward(self, features: Tensor) -> Tensor:
        return torch.relu(features + self.body(features))


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """A 3x3 convolution that keeps the size (at stride 1), with batch normalisation."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(outputs))


class DigitsViews(nn.Module):
    """A network that looks at nine (or fewer) slightly moved copies of each picture and averages its logits."""

    def __init__(self, network: nn.Module, views: int, reach: int = 2) -> None:
        super().__init__()
        self.network = network
        moves = [(dy, dx) for dy in (0, -reach, reach) for dx in (0, -reach, reach)]
        self.moves = moves[:views]
        self.reach = reach

    def forward(self, images: Tensor) -> Tensor:
        side, reach = images.shape[-1], self.reach
        padded = nn.functional.pad(images, (reach, reach, reach, reach), value=-1.0)  # -1 is black paper
        moved = [padded[:, :, reach + dy : reach + dy + side, reach + dx : reach + dx + side] for dy, dx in self.moves]
        logits: Tensor = self.network(torch.cat(moved)).reshape(len(self.moves), -1, CLASSES).mean(dim=0)
        return logits
