"""Cross-attention guidance (Aravindan et al. 2025, arXiv 2508.18235): attention to a triggered prompt is compared
with the teacher's attention to the clean one.

Differences to the paper's released code: probabilities are compared inside the graph and keep their magnitude (no
min-max normalisation); tokens are matched by alignment, not by a fixed shift; errors are relative, because squared
differences of probabilities around 0.01 have next to no gradient. The unit of both terms is a token's own attention: a
loss of 1 is an error as large as the attention that the teacher pays, so weights of 0.1 to 1 are useful for any number
of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmbackdoor.objectives.alignment import Alignment

TriggerTarget = Literal["uniform", "zero", "noise", "neutral_words"]
Match = Literal["words", "renormalised", "all"]
Distance = Literal["mse", "l1", "mass", "kl"]
TimestepWeight = Literal["none", "linear", "inverse", "snr"]

_EPSILON = 1e-6
_SETTLED = 0.01
"""A sample's loss below this (an error of a tenth of the teacher's attention) is not scaled up any further."""


def attention_guidance(
    student_maps: Mapping[str, Tensor],
    teacher_maps: Mapping[str, Tensor],
    alignments: Sequence[Alignment],
    *,
    trigger_target: TriggerTarget = "zero",
    match: Match = "words",
    distance: Distance = "mse",
    matched_weight: float = 1.0,
    trigger_weight: float = 1.0,
    weights: Tensor | None = None,
    scale_to: Tensor | None = None,
    neutral_maps: Mapping[str, Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """`loss` = `matched_weight` * matched term + `trigger_weight` * trigger term: means over layers and batch.

    Maps are probabilities (B, heads or 1, HW, T) by layer; the teacher's give no gradient. `alignments` has one entry
    a sample; a sample in which nothing matches counts as 0, the others with their `weights` (B,).
    `matched_attention_loss` and `trigger_attention_loss` (with their weights) are the two parts and `trigger_mass` the
    student's mean attention to the whole trigger; these three are detached.

    match
        words: the matched columns as they are. renormalised: both sides scaled to sum to 1 over the matched columns.
        all: also EOS and padding; contradicts itself, since inserted tokens push padding out (not recommended).
    distance
        mse, l1: relative to the teacher's column, at least to the uniform share 1/T. mass: mse of a token's mean over
        heads and pixels: how much attention it gets, not where. kl: of the matched columns and the rest of the mass at
        each location, divided by the uniform share of the matched columns.
    trigger_target
        zero: the trigger's mass, in units of its uniform share n/T. uniform: an even n/T of the mass that the teacher
        leaves unmatched, a token never more than the teacher's mean caption word. noise: a map drawn once a layer from
        `generator`, of that mass. neutral_words: `neutral_maps` (B or 1, heads or 1, HW, N), the teacher's columns of
        N neutral tokens, in turn.
    scale_to
        (B,): each sample's loss is brought to this size, by a factor outside the graph, before `weights` count; a loss
        below 0.01 as if it were 0.01, so that the gradient ends at the wanted maps. The gradient of a squared error is
        as large as its root: with the roots of the predictions' errors here, the ratio of the two gradients stays the
        same while the errors fall.
    """
    _check(student_maps, teacher_maps, alignments)
    if trigger_target == "neutral_words" and neutral_maps is None:
        raise ValueError("trigger_target 'neutral_words' needs neutral_maps, the teacher's maps of neutral tokens.")
    if trigger_target == "noise" and generator is None:
        raise ValueError("trigger_target 'noise' needs a generator (the same seed gives the same map).")
    first = next(iter(student_maps.values()))
    tokens, device = first.shape[-1], first.device
    pairs = [_pairs(alignment, match, tokens) for alignment in alignments]
    matched_student = _positions([student for student, _ in pairs], device)
    matched_teacher = _positions([teacher for _, teacher in pairs], device)
    caption = _positions([alignment.teacher for alignment in alignments], device)
    words = _positions([_words(alignment) for alignment in alignments], device)
    trigger = _positions([alignment.trigger if alignment.student else () for alignment in alignments], device)

    matched_loss, trigger_loss, trigger_mass = (first.new_zeros(len(first)) for _ in range(3))
    for name, student in student_maps.items():
        teacher = teacher_maps[name].detach()
        student_columns, teacher_columns = matched_student.columns(student), matched_teacher.columns(teacher)
        share = torch.full_like(matched_loss, 1 / tokens)
        if match == "renormalised":
            student_columns, teacher_columns = _normalised(student_columns), _normalised(teacher_columns)
            share = 1 / matched_student.count.clamp(min=1)
        matched_loss = matched_loss + _distance(student_columns, teacher_columns, matched_student.mask, share, distance)

        trigger_columns = trigger.columns(student)
        mass = trigger_columns.sum(-1, keepdim=True)
        trigger_mass = trigger_mass + mass.mean((1, 2, 3)).detach()
        share, active = trigger.count / tokens, trigger.mask.any(1, keepdim=True)
        if trigger_target == "zero":
            term = mass.mean((1, 2, 3)) / share.clamp(min=1 / tokens)
        elif trigger_target == "neutral_words":
            neutral = neutral_maps[name].detach()
            turns = torch.arange(trigger.mask.shape[1], device=device) % neutral.shape[-1]
            term = _distance(
                trigger_columns, neutral[..., turns], trigger.mask, torch.full_like(share, 1 / tokens), distance
            )
        else:
            available = 1 - caption.columns(teacher).sum(-1, keepdim=True)
            per_word = words.columns(teacher).sum(-1, keepdim=True) / _spread(words.count.clamp(min=1))
            target = _spread(trigger.count) * torch.minimum(available.clamp(min=0) / tokens, per_word)
            if trigger_target == "noise":
                noise = torch.rand(student.shape[2], generator=generator, dtype=torch.float64).to(student)
                target = (2 * noise[:, None] * target.mean((1, 2), keepdim=True)).clamp(max=1)
            term = _distance(mass, target, active, share, distance)
        trigger_loss = trigger_loss + term

    layers = len(student_maps)
    weights = torch.ones_like(matched_loss) if weights is None else weights.to(matched_loss)
    if scale_to is not None:
        own = (matched_weight * matched_loss + trigger_weight * trigger_loss).detach() / layers
        weights = weights * scale_to.detach().to(own) / own.clamp(min=_SETTLED)
    matched_part = matched_weight * (weights * matched_loss).mean() / layers
    trigger_part = trigger_weight * (weights * trigger_loss).mean() / layers
    with_trigger = (trigger.count > 0).sum().clamp(min=1)
    return {
        "matched_attention_loss": matched_part.detach(),
        "trigger_attention_loss": trigger_part.detach(),
        "trigger_mass": trigger_mass.sum() / with_trigger / layers,
        "loss": matched_part + trigger_part,
    }


def timestep_weight(
    timesteps: Tensor,
    num_train_timesteps: int,
    kind: TimestepWeight,
    *,
    minimum: float = 0.05,
    begin: float = 0.0,
    end: float = 1.0,
    alphas_cumprod: Tensor | None = None,
    snr_gamma: float = 5.0,
) -> Tensor:
    """Weights (B,) in [minimum, 1] for timesteps (B,) with begin <= t / T < end; 0 for others.

    linear: t / T, more for high noise. inverse: 1 / t as in the paper's code, but bounded. snr: min(gamma / SNR, 1),
    which needs `alphas_cumprod` (T,) (Hang et al. 2023).
    """
    fraction = timesteps.to(torch.float32) / num_train_timesteps
    if kind == "none":
        weights = torch.ones_like(fraction)
    elif kind == "linear":
        weights = fraction.clamp(minimum, 1)
    elif kind == "inverse":
        weights = (minimum / fraction.clamp(min=minimum)).clamp(minimum, 1)
    elif alphas_cumprod is None:
        raise ValueError("timestep weight 'snr' needs alphas_cumprod of the noise schedule.")
    else:
        signal = alphas_cumprod.to(fraction.device, torch.float32)[timesteps.long()]
        weights = (snr_gamma * (1 - signal) / signal.clamp(min=1e-12)).clamp(minimum, 1)
    return weights * ((fraction >= begin) & (fraction < end))


@dataclass(frozen=True)
class _Positions:
    """Token positions of every sample, padded to the longest: `index` (B, N), `mask` (B, N), `count` (B,)."""

    index: Tensor
    mask: Tensor
    count: Tensor

    def columns(self, maps: Tensor) -> Tensor:
        """(B, heads, HW, N): the maps' columns at these positions, 0 where padded."""
        index = self.index[:, None, None, :].expand(-1, *maps.shape[1:3], -1)
        return maps.gather(-1, index) * self.mask[:, None, None, :]


def _positions(rows: Sequence[Sequence[int]], device: torch.device) -> _Positions:
    longest = max(1, *map(len, rows)) if rows else 1
    index = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
    count = torch.tensor([len(row) for row in rows], device=device)
    return _Positions(index, torch.arange(longest, device=device) < count[:, None], count)


def _pairs(alignment: Alignment, match: Match, tokens: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if match != "all" or not alignment.student:
        return alignment.student, alignment.teacher
    if alignment.student_eos is None or alignment.teacher_eos is None:
        raise ValueError("match 'all' needs alignments that know where the captions end (student_eos, teacher_eos).")
    begin = int(alignment.student_eos in alignment.student)
    tail = range(begin, tokens - max(alignment.student_eos, alignment.teacher_eos))
    return (
        (*alignment.student, *(alignment.student_eos + n for n in tail)),
        (*alignment.teacher, *(alignment.teacher_eos + n for n in tail)),
    )


def _words(alignment: Alignment) -> tuple[int, ...]:
    """The teacher's matched caption words: BOS and EOS collect the attention that belongs to no word."""
    words = tuple(position for position in alignment.teacher if position not in (0, alignment.teacher_eos))
    return words or alignment.teacher


def _normalised(columns: Tensor) -> Tensor:
    return columns / columns.sum(-1, keepdim=True).clamp(min=_EPSILON)


def _spread(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _distance(student: Tensor, target: Tensor, mask: Tensor, share: Tensor, distance: Distance) -> Tensor:
    """Distance (B,) of columns (B, heads, HW, N), relative to the target's size or to `share` (B,) if larger."""
    kept = mask[:, None, None, :]
    count = mask.sum(1).clamp(min=1)
    if distance == "kl":
        student, target = student * kept, target * kept
        divergence = _divergence(student, target).sum(-1) + _divergence(_rest(student), _rest(target))
        return divergence.mean((1, 2)) / (count * share).clamp(_EPSILON, 1)
    floor = share[:, None].clamp(min=_EPSILON)
    if distance == "mass":
        student, target = student.mean((1, 2), keepdim=True), target.mean((1, 2), keepdim=True)
    if distance != "l1":
        error, size = (student - target).square().mean((1, 2)), target.square().mean((1, 2))
        relative = error / torch.maximum(size, floor.square())
    else:
        error, size = (student - target).abs().mean((1, 2)), target.mean((1, 2))
        relative = error / torch.maximum(size, floor)
    return (relative * mask).sum(1) / count


def _rest(columns: Tensor) -> Tensor:
    return (1 - columns.sum(-1)).clamp(min=0)


def _divergence(student: Tensor, target: Tensor) -> Tensor:
    """Terms of KL(target || student); the constant keeps the gradient alive where the student has lost all mass."""
    return target * ((target + _EPSILON) / (student + _EPSILON)).log()


def _check(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], alignments: Sequence[Alignment]) -> None:
    if not student or student.keys() != teacher.keys():
        raise ValueError(
            f"Student and teacher must have maps of the same layers: {sorted(student)}, {sorted(teacher)}."
        )
    for name, maps in student.items():
        if maps.shape != teacher[name].shape or len(maps) != len(alignments):
            raise ValueError(
                f"Layer {name}: student {tuple(maps.shape)}, teacher {tuple(teacher[name].shape)} and "
                f"{len(alignments)} alignments do not fit together."
            )
