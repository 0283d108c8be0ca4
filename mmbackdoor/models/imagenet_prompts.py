"""Class names and prompt templates that open_clip ships: ImageNet's 1000 names, 80 templates, and 7 simple ones.

Templates are texts with `{}` where the class name stands.
"""

from __future__ import annotations

import open_clip

TEMPLATES = ("openai", "simple")


def imagenet_classnames() -> list[str]:
    """In the order of ImageNet-1k's labels; two names come twice."""
    return list(open_clip.IMAGENET_CLASSNAMES)


def templates(name: str) -> list[str]:
    """`openai` (Radford et al. 2021, 80 of them) or `simple` (the 7 that do almost as well)."""
    found = {"openai": open_clip.OPENAI_IMAGENET_TEMPLATES, "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES}[name]
    return [template("{}") for template in found]
