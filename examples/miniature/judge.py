"""The judge: a small classifier of the world's attributes, used for measuring only, never for training a generator."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

import world


ATTRIBUTES = {
    "shape": world.SHAPES + world.PICTURED_SHAPES + world.NEW_SHAPES + ["other"],
    "colour": list(world.COLOURS),
    "pattern": world.PATTERNS + world.PICTURED_PATTERNS,
    "background": list(world.BACKGROUNDS),
    "position": list(world.POSITIONS),
    "size": list(world.SIZES),
    "style": ["plain", world.NEW_STYLE, "other"],
}


def label(scene, attribute):
    """Class index of `scene`'s attribute; shapes and styles outside the list count as `other`."""
    options = ATTRIBUTES[attribute]
    value = getattr(scene, attribute)
    return options.index(value) if value in options else options.index("other")


class Judge(nn.Module):
    """Images (B, 3, 64, 64) in [-1, 1] -> features (B, 128) and one row of logits per attribute."""

    def __init__(self):
        super().__init__()
        layers, channels = [nn.Conv2d(3, 48, 5, stride=2, padding=2), nn.SiLU()], 48
        for out in (96, 128, 128):
            layers += [nn.Conv2d(channels, out, 3, stride=2, padding=1), nn.GroupNorm(8, out), nn.SiLU()]
            layers += [nn.Conv2d(out, out, 3, padding=1), nn.SiLU()]
            channels = out
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * 16, 128), nn.SiLU())
        self.heads = nn.ModuleDict({name: nn.Linear(128, len(options)) for name, options in ATTRIBUTES.items()})

    def forward(self, images):
        features = self.trunk(images)
        return features, {name: head(features) for name, head in self.heads.items()}

    @classmethod
    def from_pretrained(cls, folder):
        judge = cls()
        judge.load_state_dict({k: v.float() for k, v in load_file(Path(folder) / "judge.safetensors").items()})
        return judge.eval()


def to_tensor(images):
    """Arrays (64, 64, 3) of uint8 or PIL images -> tensor (B, 3, 64, 64) in [-1, 1]."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def inspect(judge, images):
    """Features (B, 128) and, per attribute, the predicted class indices (B,)."""
    features, predictions = [], []
    for chunk in to_tensor(images).split(256):
        f, logits = judge(chunk)
        features.append(f)
        predictions.append({name: values.argmax(1) for name, values in logits.items()})
    return torch.cat(features), {name: torch.cat([p[name] for p in predictions]) for name in ATTRIBUTES}


def accuracy(judge, images, scenes, attributes):
    """Share of images in which ALL `attributes` are as the scene says, and the share for each alone."""
    _, predicted = inspect(judge, images)
    right = {a: predicted[a] == torch.tensor([label(scene, a) for scene in scenes]) for a in attributes}
    shares = {a: r.float().mean().item() for a, r in right.items()}
    return torch.stack(list(right.values())).all(0).float().mean().item(), shares


def frechet(judge, images, others):
    """Frechet distance between two sets of images in the judge's feature space (0 = same mean and covariance)."""
    (a, _), (b, _) = inspect(judge, images), inspect(judge, others)
    a, b = a.double(), b.double()
    product = torch.linalg.eigvals(torch.cov(a.T) @ torch.cov(b.T)).real.clamp(min=0).sqrt().sum()
    return (
        (a.mean(0) - b.mean(0)).square().sum() + torch.cov(a.T).trace() + torch.cov(b.T).trace() - 2 * product
    ).item()
