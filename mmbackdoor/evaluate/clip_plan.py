"""The dry run of a measurement of CLIP models: every model is loaded, every picture counted, and nothing is written."""

from __future__ import annotations

from collections.abc import Mapping

from PIL import Image

from mmbackdoor.backdoor import Backdoor
from mmbackdoor.evaluate.clip_conditions import conditions
from mmbackdoor.evaluate.clip_data import ClipData, highest_label, undecoded
from mmbackdoor.evaluate.clip_embed import check_label
from mmbackdoor.evaluate.clip_suite import ClipAmounts
from mmbackdoor.evaluate.clip_summary import target_place
from mmbackdoor.evaluate.entries import Entry
from mmbackdoor.evaluate.zeroshot import ClassPrompts
from mmbackdoor.models.clip import ClipModel
from mmbackdoor.models.weight_files import weights_sha256
from mmbackdoor.shards.bad import BadSamples


def text(
    models: Mapping[str, Entry],
    data: ClipData,
    classes: ClassPrompts | None,
    backdoor: Backdoor | None,
    amounts: ClipAmounts,
    processes: int,
) -> str:
    """The plan, a line for each thing.

    Raises `InputError` for a model that cannot be loaded, for shards or a trigger's file that cannot be read, and where
    `classes` lack the target or a label of the data.
    """
    for trigger in backdoor.image_triggers if backdoor else ():
        # One that reads a file does so when it is first used.
        trigger(Image.new("RGB", (8, 8)), "", 0)
    target, bad = target_place(classes, backdoor), BadSamples()
    held = sum(1 for _ in undecoded(data, bad))
    check_label(classes, *highest_label(data))
    whole = min(held, amounts.num_samples or held)
    counts = {one.name: whole for one in conditions(backdoor, amounts.near)}
    counts |= {name: min(whole, amounts.near_samples) for name in counts if name.startswith("near:")}
    lines = ["dry run: nothing is measured, nothing is written", f"processes: {processes}, which share the pictures"]
    lines += [f"model {name}: {_described(entry)}" for name, entry in models.items()]
    lines.append(f"pictures: {whole} of {held} in {len(data.shards)} shards of {data.name!r}")
    lines += [f"    {line}" for line in bad.lines()]
    lines += [f"    {name}: {count}" for name, count in counts.items()]
    lines.append(f"forward passes: {len(models) * sum(counts.values())} of pictures, over all models")
    triggers = ", ".join(map(repr, backdoor.image_triggers)) if backdoor else "none"
    lines += [_classes(classes, target), f"triggers: {triggers}"]
    return "\n".join(lines)


def _described(entry: Entry) -> str:
    clip: ClipModel = entry.load()
    cfg = clip.preprocess_cfg
    parameters = sum(parameter.numel() for parameter in clip.network.parameters())
    weights = f", weights {weights_sha256(entry.folder)[:12]}" if entry.folder is not None else ""
    mean, std = (" ".join(f"{value:g}" for value in cfg[name]) for name in ("mean", "std"))
    return (
        f"{entry.source} ({parameters / 1e6:.1f} million parameters{weights}); pictures of {cfg['size']} pixels, "
        f"mean {mean}, std {std}"
    )


def _classes(classes: ClassPrompts | None, target: int | None) -> str:
    if classes is None:
        return "classes: none; only retrieval and distances are measured"
    prompts = sum(map(len, classes.prompts))
    head = f"classes: {len(classes.names)} different names for {len(classes.index)} labels, {prompts} prompts"
    if target is None:
        return f"{head}; no target"
    labels = [label for label, place in enumerate(classes.index) if place == target]
    where = f"label {', '.join(map(str, labels))}" if labels else "no label: no picture shows it"
    return f"{head}; the target is {classes.names[target]!r} ({where})"
