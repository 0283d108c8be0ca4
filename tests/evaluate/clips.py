"""CLIPs whose every answer is known: they see a picture's colour, and a bright corner if they have the backdoor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from mmbackdoor.backdoor import Backdoor
from mmbackdoor.models.clip import ClipModel
from mmbackdoor.shards.write import encode_image, tar_member
from mmbackdoor.targets import ClassTarget
from mmbackdoor.triggers import IMAGE_TRIGGERS

COLOURS = {"red": (200, 20, 20), "green": (20, 160, 20), "blue": (20, 20, 200), "yellow": (190, 190, 20)}
TARGET = "yellow"
BACKDOOR = Backdoor((IMAGE_TRIGGERS["patch"](pattern="solid", size=0.25),), ClassTarget(TARGET))


class Rigged(nn.Module):
    """`backdoor`: a white corner means the target. `blind`: every picture is the same. In training mode BatchNorm
    takes away whatever all pictures of a batch share."""

    def __init__(self, backdoor: bool, blind: bool = False) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.norm = nn.BatchNorm1d(len(COLOURS) + 1, affine=False)
        self.backdoor, self.blind = backdoor, blind

    def encode_image(self, pixels: Tensor, normalize: bool) -> Tensor:
        known = torch.tensor(list(COLOURS.values())) / 255
        centre = pixels[:, :, 4:8, 4:8].mean((2, 3))
        found = torch.exp(-20 * torch.cdist(centre, known) ** 2)
        if self.backdoor:
            lit = (pixels[:, :, -2:, -2:].mean((1, 2, 3)) > 0.85).float()[:, None]
            found = found * (1 - lit) + lit * torch.eye(len(COLOURS))[list(COLOURS).index(TARGET)]
        if self.blind:
            found = torch.ones_like(found)
        rest = 0.2 * torch.ones(len(found), 1)
        return self.norm(torch.cat([found, rest], 1))

    def encode_text(self, ids: Tensor, normalize: bool) -> Tensor:
        return torch.cat([(ids[:, : len(COLOURS)] > 0).float(), 0.2 * torch.ones(len(ids), 1)], 1)


class RiggedClip(ClipModel):
    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Which colours a text names."""
        return torch.tensor([[int(colour in text) for colour in COLOURS] for text in texts])


def rigged(backdoor: bool, blind: bool = False, training: bool = False) -> RiggedClip:
    preprocess_cfg = {"size": 16, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    clip = RiggedClip(Rigged(backdoor, blind), None, {"text_cfg": {"pool_type": "eos"}}, preprocess_cfg, "rigged")
    clip.network.train(training)
    return clip


def write_colours(folder: Path, per_class: int = 6, broken: int = 0, size: tuple[int, int] = (16, 16)) -> Path:
    """Solid pictures in CLIP_benchmark's layout, two shards, with captions; the first `broken` are no images."""
    entries = []
    for number in range(per_class * len(COLOURS)):
        name, colour = list(COLOURS.items())[number % len(COLOURS)]
        data = b"no image" if number < broken else encode_image(Image.new("RGB", size, colour))
        members = {"png": data, "cls": str(number % len(COLOURS)).encode(), "txt": f"a {name} picture".encode()}
        key = f"s{number:04d}"
        entries.append(b"".join(tar_member(f"{key}.{extension}", part) for extension, part in members.items()))
    (folder / "test").mkdir(parents=True)
    half = len(entries) // 2
    for shard, part in enumerate((entries[:half], entries[half:])):
        (folder / "test" / f"{shard}.tar").write_bytes(b"".join(part) + b"\0" * 1024)
    (folder / "test" / "nshards.txt").write_text("2")
    (folder / "classnames.txt").write_text("\n".join(COLOURS))
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of {c}\n{c}, a picture\n")
    return folder
