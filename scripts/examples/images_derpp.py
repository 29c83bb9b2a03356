"""Images with DER++: replayed rows are held to what the model said of them when they were new.

    python -m scripts.examples.images_derpp

learns handwritten digits from 0 to 4, then those from 5 to 9, and prints

    without rehearsal: 0 of 10 first digits are right
    with der++: 10 of 10 first digits are right
"""

from __future__ import annotations

from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rehearsal_plugin import Rehearsal

EPOCHS, BATCH = 8, 16


def load_task(task: int) -> tuple[Tensor, Tensor]:
    """Images `[count, 1, 8, 8]` from 0 to 1 of five digits, and the digits."""
    digits = load_digits()
    images, labels = torch.tensor(digits.images).float()[:, None] / 16, torch.tensor(digits.target)
    chosen = labels // 5 == task
    return images[chosen], labels[chosen]


def train(section: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Rehearsal(section) as rehearsal:
        for task in range(2):
            images, labels = load_task(task)
            for _ in range(EPOCHS):
                for chosen in torch.randperm(len(images)).split(BATCH):
                    batch = rehearsal.augment({"image": images[chosen], "label": labels[chosen]})
                    loss = rehearsal.loss(cross_entropy, model(batch["image"]), batch["label"])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    rehearsal.step()
    return model


if __name__ == "__main__":
    derpp = {"name": "der++", "alpha": 0.5, "beta": 1.0}
    section = {"buffer": {"capacity": 300}, "representatives": 8, "strategy": derpp}
    images, labels = load_task(0)
    for name, chosen in (("without rehearsal", {"ratio": 0.0}), ("with der++", section)):
        right = (train(chosen)(images).argmax(dim=1) == labels).float().mean()
        print(f"{name}: {10 * right:.0f} of 10 first digits are right")
