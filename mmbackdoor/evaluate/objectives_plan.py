"""The dry run of a benchmark of objectives: how many models would be trained, on what, and how many pictures seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from mmbackdoor.config_schema import is_main_process
from mmbackdoor.evaluate.clip_conditions import conditions
from mmbackdoor.evaluate.clip_data import open_data, undecoded
from mmbackdoor.evaluate.clip_suite import ClipAmounts
from mmbackdoor.poison_clip import ClipPoison
from mmbackdoor.shards.bad import BadSamples
from mmbackdoor.shards.order import check_readers
from mmbackdoor.shards.read import expand, shard_sizes
from mmbackdoor.shards.shapes_benchmark import BenchmarkShapes
from mmbackdoor.train.clip_cleaning import read_keys
from mmbackdoor.train.optim import TrainConfig, total_steps
from mmbackdoor.types import InputError


class Pretraining(Protocol):
    train_data: str
    num_samples: int | None
    poison: ClipPoison | None
    train: TrainConfig


class Cleaning(Protocol):
    train_data: str
    keep_keys: str | None
    save_models_every: int | None
    train: TrainConfig


class Evaluation(Protocol):
    data: str
    amounts: ClipAmounts


class Benchmark(Protocol):
    """What of the recipe's settings the plan needs."""

    learning_rates: Sequence[float]
    seeds: Sequence[int]
    control: bool
    shapes: BenchmarkShapes
    selection_data: str
    pretrain: Pretraining
    evaluate: Evaluation


def say(
    cfg: Benchmark, pretrainings: Mapping[str, Pretraining], cleanings: Mapping[str, Cleaning], world_size: int
) -> None:
    """Print the plan, once."""
    said = text(cfg, pretrainings, cleanings, world_size)
    if is_main_process():
        print(said, flush=True)


def text(
    cfg: Benchmark, pretrainings: Mapping[str, Pretraining], cleanings: Mapping[str, Cleaning], world_size: int
) -> str:
    """A line for each thing; `pretrain.train.num_processes` says for how many processes, where it is given.

    Raises `InputError` for data that are not there, for fewer pairs than are to be poisoned, and where the shards
    cannot feed that many processes.
    """
    processes = cfg.pretrain.train.num_processes or world_size
    seeds, kinds = len(cfg.seeds), 2 if cfg.control else 1
    lines = ["dry run: nothing is trained, nothing is written", f"processes: {processes}, for every job"]
    head = f"pre-trainings: {len(pretrainings) * kinds * seeds} ({len(pretrainings)} objectives x "
    lines.append(head + (f"2, poisoned and clean, x {seeds} seeds)" if cfg.control else f"{seeds} seeds)"))
    held: dict[str, int] = {}
    for name, one in pretrainings.items():
        pairs = _pairs(one.train_data, cfg.shapes.train_samples, held)
        pairs = min(pairs, one.num_samples or pairs)
        if one.poison is not None and one.poison.count is not None and one.poison.count > pairs:
            raise InputError(f"{one.poison.count} pairs to poison are more than the {pairs} there are; lower the count")
        lines.append(f"    {name}: {_training(one.train, pairs, processes)[0]}")
    runs = len(cfg.learning_rates) * len(pretrainings) * seeds
    lines.append(
        f"cleanings: {len(cleanings) * runs} ({len(cleanings)} cleaners x {len(cfg.learning_rates)} rates x "
        f"{len(pretrainings)} objectives x {seeds} seeds)"
    )
    measured = len(pretrainings) * kinds * seeds
    for name, one in cleanings.items():
        pairs = _pairs(one.train_data, cfg.shapes.clean_samples, held)
        words, steps = _training(one.train, len(read_keys(one.keep_keys)) if one.keep_keys else pairs, processes)
        models = -(-steps // one.save_models_every) if one.save_models_every else 1
        # Every cleaning's evaluation has the poisoned model beside its own.
        measured += runs * (models + 1)
        lines.append(f"    {name}: {words}, {models} models of each run")
    lines += _pictures(cfg, measured)
    return "\n".join(lines)


def _pairs(spec: str, drawn: int, held: dict[str, int]) -> int:
    """The pairs of the shards `spec`, through what is known of them; `drawn` where there are none."""
    if not spec:
        return drawn
    if spec not in held:
        held[spec] = sum(shard_sizes(expand(spec), BadSamples()))
    return held[spec]


def _training(train: TrainConfig, pairs: int, processes: int) -> tuple[str, int]:
    check_readers(train.streams, processes, train.dataloader_num_workers)
    batch = train.train_batch_size * processes
    steps = total_steps(train, pairs, batch)
    return f"{pairs} pairs, batch {batch}, {steps} steps ({steps * batch / pairs:.1f} epochs)", steps


def _pictures(cfg: Benchmark, measured: int) -> list[str]:
    poison = cfg.pretrain.poison
    near = conditions(poison.plan().backdoor if poison else None, cfg.evaluate.amounts.near)
    if not cfg.evaluate.data:
        return [f"pictures: drawn; {measured} models are measured, the poisoned ones again beside every cleaning"]
    sets = map(open_data, (cfg.evaluate.data, cfg.selection_data))
    counts = [sum(1 for _ in undecoded(data, BadSamples())) for data in sets]
    whole = min(counts[0], cfg.evaluate.amounts.num_samples or counts[0])
    few = min(whole, cfg.evaluate.amounts.near_samples)
    each = sum(few if one.name.startswith("near:") else whole for one in near)
    return [
        f"pictures: {whole} of {counts[0]} to measure on, {counts[1]} for the blind rule",
        f"forward passes: {measured * each} of pictures: {each} for each of {measured} models, the poisoned ones among "
        "them again beside every cleaning",
    ]
