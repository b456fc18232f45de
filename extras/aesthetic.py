"""LAION's aesthetic score: how much people liked pictures like this one, whatever the prompt."""
from torch import nn

from rewards import ClipScore, build, fill, place, renamed


def linear_head():
    """No activations, as published; the dropouts only keep the published numbers 0 2 4 6 7."""
    return nn.Sequential(nn.Linear(768, 1024), nn.Dropout(), nn.Linear(1024, 128), nn.Dropout(),
                         nn.Linear(128, 64), nn.Dropout(), nn.Linear(64, 16), nn.Linear(16, 1))


class Aesthetic(nn.Module):
    """LAION's linear head on CLIP's image feature."""
    def __init__(self, device, folder=""):
        super().__init__()
        where = place("trl-lib/ddpo-aesthetic-predictor", folder)
        self.head = fill(linear_head(), renamed(where, "aesthetic-model.pth", {r"^layers\.": ""}))
        self.clip = build(ClipScore, device, folder)

    def forward(self, images, prompts, metadata):
        return self.head(self.clip.images(images)).squeeze(-1)
