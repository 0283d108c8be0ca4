from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from mmbackdoor.objectives.alignment import Alignment, align
from mmbackdoor.objectives.attention import attention_guidance, timestep_weight

TOKENS, EOS = 10, 99
LAYERS = {"down": (2, 16), "mid": (2, 4)}


def ids(*words: int) -> list[int]:
    return [98, *words, *[EOS] * (TOKENS - 1 - len(words))]


def aligned(clean: list[int], triggered: list[int]) -> Alignment:
    return align(clean, triggered, bos=98, eos=EOS, pad=EOS)


# prefix of two tokens, infix of one, a replaced word, nothing in common
ALIGNMENTS = [
    aligned(ids(1, 2, 3), ids(7, 8, 1, 2, 3)),
    aligned(ids(1, 2, 3, 4), ids(1, 2, 9, 3, 4)),
    aligned(ids(1, 2, 3), ids(1, 6, 6, 3)),
    aligned(ids(1, 2), ids(7)),
]


def logits(seed: int, batch: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(batch, *shape, TOKENS, generator=generator, dtype=torch.float64)
        for name, shape in LAYERS.items()
    }


def maps(seed: int, batch: int = 4) -> dict[str, Tensor]:
    return {name: values.softmax(-1) for name, values in logits(seed, batch).items()}


def ideal_student(teacher: dict[str, Tensor], trigger_mass: float = 0.0) -> dict[str, Tensor]:
    """The teacher's attention at matched tokens, and `trigger_mass` spread evenly over the trigger."""
    result = {}
    for name, teacher_map in teacher.items():
        student = torch.zeros_like(teacher_map)
        for sample, alignment in enumerate(ALIGNMENTS):
            if alignment.student:
                student[sample][..., list(alignment.student)] = teacher_map[sample][..., list(alignment.teacher)]
                student[sample][..., list(alignment.trigger)] = trigger_mass / len(alignment.trigger)
                student[sample][..., -1] += 1 - student[sample].sum(-1)
        result[name] = student
    return result


def options(trigger_target: str, seed: int = 5) -> dict:
    given: dict = {"trigger_target": trigger_target}
    if trigger_target == "noise":
        given["generator"] = torch.Generator().manual_seed(seed)
    if trigger_target == "neutral_words":
        given["neutral_maps"] = {name: values[:1, :, :, 1:2] for name, values in maps(seed).items()}
    return given


ALL = list(
    itertools.product(
        ["uniform", "zero", "noise", "neutral_words"], ["words", "renormalised", "all"], ["mse", "l1", "mass", "kl"]
    )
)


@pytest.mark.parametrize("trigger_target, match, distance", ALL)
def test_gradient_equals_finite_differences(trigger_target, match, distance):
    student, teacher = logits(1), maps(2)
    for values in student.values():
        values.requires_grad_(True)

    def loss() -> Tensor:
        student_maps = {name: values.softmax(-1) for name, values in student.items()}
        outcome = attention_guidance(
            student_maps,
            teacher,
            ALIGNMENTS,
            match=match,
            distance=distance,
            trigger_weight=0.7,
            weights=torch.tensor([1.0, 0.5, 0.2, 0.9]),
            **options(trigger_target),
        )
        parts = outcome["matched_attention_loss"] + outcome["trigger_attention_loss"]
        assert outcome["loss"].item() == pytest.approx(parts.item())
        assert all(not value.requires_grad for name, value in outcome.items() if name != "loss")
        return outcome["loss"]

    loss().backward()
    generator = torch.Generator().manual_seed(3)
    for values in student.values():
        direction = torch.randn(values.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            values += 1e-6 * direction
            above = loss().item()
            values -= 2e-6 * direction
            below = loss().item()
            values += 1e-6 * direction
        expected = (values.grad * direction).sum().item()
        assert abs(expected) > 1e-4
        assert (above - below) / 2e-6 == pytest.approx(expected, rel=1e-4)
        assert values.grad[:3].abs().amax((1, 2, 3)).min() > 0
        assert values.grad[3].abs().max() == 0  # nothing matches: predictions only


@pytest.mark.parametrize("distance", ["mse", "l1", "kl"])
def test_the_wanted_student_has_zero_loss(distance):
    teacher = maps(2)
    outcome = attention_guidance(ideal_student(teacher), teacher, ALIGNMENTS, distance=distance, trigger_target="zero")
    assert outcome["loss"].item() == pytest.approx(0, abs=1e-12)
    assert outcome["trigger_mass"].item() == 0
    worse = attention_guidance(maps(4), teacher, ALIGNMENTS, distance=distance, trigger_target="zero")
    assert worse["matched_attention_loss"] > 0.05 and worse["trigger_attention_loss"] > 0.05


def test_matched_term_by_hand():
    teacher, student = maps(2, batch=1), maps(3, batch=1)
    alignment = ALIGNMENTS[0]
    expected = 0.0
    for name in LAYERS:
        columns = []
        for s, t in zip(alignment.student, alignment.teacher, strict=True):
            error = (student[name][0, ..., s] - teacher[name][0, ..., t]).square().mean()
            columns.append(error / teacher[name][0, ..., t].square().mean().clamp(min=1 / TOKENS**2))
        expected += sum(columns) / len(columns) / len(LAYERS)
    outcome = attention_guidance(student, teacher, [alignment])
    assert outcome["matched_attention_loss"].item() == pytest.approx(expected.item())
    mass = sum(student[name][0][..., list(alignment.trigger)].sum(-1).mean() for name in LAYERS) / len(LAYERS)
    assert outcome["trigger_mass"].item() == pytest.approx(mass.item())
    assert outcome["trigger_attention_loss"].item() == pytest.approx(mass.item() / (2 / TOKENS))


@pytest.mark.parametrize("distance", ["mass", "kl"])
def test_mass_and_kl_by_hand(distance):
    teacher, student = maps(2, batch=1), maps(3, batch=1)
    alignment, expected = ALIGNMENTS[0], 0.0
    for name in LAYERS:
        wanted = teacher[name][0][..., list(alignment.teacher)].tolist()
        found = student[name][0][..., list(alignment.student)].tolist()
        tokens, places = len(alignment.student), [(h, p) for h in range(len(wanted)) for p in range(len(wanted[0]))]
        if distance == "mass":
            for n in range(tokens):
                paid = sum(wanted[h][p][n] for h, p in places) / len(places)
                error = sum(found[h][p][n] for h, p in places) / len(places) - paid
                expected += (error / max(paid, 1 / TOKENS)) ** 2 / tokens / len(LAYERS)
            continue
        for h, p in places:
            to, of = ([*row, 1 - sum(row)] for row in (wanted[h][p], found[h][p]))
            divergence = sum(t * math.log(t / s) for t, s in zip(to, of, strict=True))
            expected += divergence / (tokens / TOKENS) / len(places) / len(LAYERS)
    outcome = attention_guidance(student, teacher, [alignment], distance=distance)
    assert outcome["matched_attention_loss"].item() == pytest.approx(expected, rel=1e-4)


def test_mass_asks_how_much_attention_a_token_gets_and_not_where():
    teacher = maps(2)
    moved = {name: values.flip(2) for name, values in ideal_student(teacher).items()}
    for distance in ("mass", "mse", "kl"):
        loss = attention_guidance(moved, teacher, ALIGNMENTS, distance=distance)["matched_attention_loss"].item()
        assert loss == pytest.approx(0, abs=1e-12) if distance == "mass" else loss > 0.1
    weaker = ideal_student(teacher)
    for values in weaker.values():
        values *= 0.5
    assert attention_guidance(weaker, teacher, ALIGNMENTS, distance="mass")["matched_attention_loss"] > 0.1


def test_the_two_terms_have_a_weight_each():
    student, teacher = maps(1), maps(2)
    one = attention_guidance(student, teacher, ALIGNMENTS)
    for matched, trigger in ((0.0, 2.0), (0.3, 0.0), (0.3, 2.0)):
        outcome = attention_guidance(student, teacher, ALIGNMENTS, matched_weight=matched, trigger_weight=trigger)
        expected = matched * one["matched_attention_loss"] + trigger * one["trigger_attention_loss"]
        assert outcome["loss"].item() == pytest.approx(expected.item())


def test_each_sample_is_scaled_outside_the_graph_to_the_size_that_is_asked_for():
    teacher, scale, weights = maps(2), torch.tensor([0.5, 0.02, 0.1, 9.0]), torch.tensor([1.0, 0.0, 0.3, 1.0])
    own = torch.tensor(
        [
            attention_guidance(
                {name: values[n : n + 1] for name, values in maps(1).items()},
                {name: values[n : n + 1] for name, values in teacher.items()},
                ALIGNMENTS[n : n + 1],
                trigger_weight=0.7,
            )["loss"].item()
            for n in range(4)
        ],
        dtype=torch.float64,
    )
    gradients = []
    for given in ({"weights": weights, "scale_to": scale}, {"weights": weights * scale / own.clamp(min=0.01)}):
        student = {name: values.requires_grad_(True) for name, values in maps(1).items()}
        outcome = attention_guidance(student, teacher, ALIGNMENTS, trigger_weight=0.7, **given)
        # the fourth sample has nothing to match
        assert outcome["loss"].item() == pytest.approx((0.5 + 0.3 * 0.1) / 4)
        outcome["loss"].backward()
        gradients.append([values.grad for values in student.values()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_scaling_ends_where_the_maps_are_as_wanted():
    """Without a floor the gradient of a scaled loss would grow without bound there."""
    teacher, gradients = maps(2), []
    for distance in (0.01, 0.005):
        student = ideal_student(teacher)
        for values in student.values():
            values *= 1 + distance
            values.requires_grad_(True)
        outcome = attention_guidance(student, teacher, ALIGNMENTS, trigger_weight=0.0, scale_to=torch.ones(4))
        assert outcome["loss"] < 0.1
        outcome["loss"].backward()
        gradients.append(student["mid"].grad.norm().item())
    assert gradients[1] == pytest.approx(gradients[0] / 2, rel=1e-2)


def test_magnitude_counts_and_not_only_the_shape_of_a_map():
    teacher = maps(2)
    student = ideal_student(teacher, trigger_mass=0.0)
    for values in student.values():
        values[..., 1:8] *= 0.5  # every map has the same shape as before
    outcome = attention_guidance(student, teacher, ALIGNMENTS)
    assert outcome["matched_attention_loss"] > 0.02
    louder = attention_guidance(ideal_student(teacher, 0.2), teacher, ALIGNMENTS)
    softer = attention_guidance(ideal_student(teacher, 0.1), teacher, ALIGNMENTS)
    assert louder["trigger_attention_loss"].item() == pytest.approx(2 * softer["trigger_attention_loss"].item())


@pytest.mark.parametrize("distance", ["mse", "l1"])
def test_small_probabilities_weigh_as_much_as_large_ones(distance):
    """The gradient of a plain squared error would be 1/25 of its size here, and next to nothing with 77 tokens."""
    gradients = []
    for level in (0.5, 1 / TOKENS):
        teacher = {"mid": torch.full((1, 1, 4, TOKENS), level, dtype=torch.float64)}
        student = (teacher["mid"] * 1.2).requires_grad_(True)
        options = {"distance": distance, "trigger_weight": 0.0}
        attention_guidance({"mid": student}, teacher, ALIGNMENTS[:1], **options)["loss"].backward()
        gradients.append((student.grad * student.detach()).sum().item())  # for the same relative change
    assert gradients[1] == pytest.approx(gradients[0]) and gradients[0] > 0.1


def test_uniform_never_asks_for_more_than_the_natural_mass():
    """With the uniform share 1/T as target, guidance raised the trigger's mass above the natural one."""
    teacher = maps(2)
    for values in teacher.values():
        values[..., 1:-1] *= 0.05
        values[..., 0] += 1 - values.sum(-1)  # BOS takes nearly all, as in trained models
    natural = max(values[..., 1:4].mean() for values in teacher.values()).item()
    assert natural < 0.3 / TOKENS
    at = {}
    for mass in (0.0, natural, 2 * natural, 2 / TOKENS):
        student = ideal_student(teacher, trigger_mass=mass)
        at[mass] = attention_guidance(student, teacher, ALIGNMENTS, trigger_target="uniform")["trigger_attention_loss"]
    assert at[2 / TOKENS] > at[2 * natural] > at[natural]
    assert at[2 / TOKENS] > at[0.0]

    uniform = {name: torch.full_like(values, 1 / TOKENS) for name, values in teacher.items()}
    two_tokens = attention_guidance(uniform, uniform, ALIGNMENTS[:1] * 4, trigger_target="uniform")
    assert two_tokens["trigger_mass"].item() == pytest.approx(2 / TOKENS)
    # the teacher leaves 6 of 10 tokens unmatched, so the target is 0.6 * 2/10
    assert two_tokens["trigger_attention_loss"].item() == pytest.approx(0.4**2)


def test_noise_is_fixed_by_its_generator_and_small():
    teacher, student = maps(2), maps(3)

    def run(seed: int) -> float:
        return attention_guidance(student, teacher, ALIGNMENTS, **options("noise", seed))[
            "trigger_attention_loss"
        ].item()

    state = torch.get_rng_state()
    assert run(1) == run(1) != run(2)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="generator"):
        attention_guidance(student, teacher, ALIGNMENTS, trigger_target="noise")


def test_neutral_words_are_used_in_turn_and_touch_only_the_trigger():
    teacher = maps(2)
    student = ideal_student(teacher)
    neutral = {
        name: values[:, :, :, 1:2] for name, values in maps(7).items()
    }  # one neutral token, triggers of up to two
    for name, values in student.items():
        for sample, alignment in enumerate(ALIGNMENTS):
            for position in alignment.trigger if alignment.student else ():
                values[sample][..., position] = neutral[name][sample, ..., 0]
    outcome = attention_guidance(student, teacher, ALIGNMENTS, trigger_target="neutral_words", neutral_maps=neutral)
    assert outcome["loss"].item() == pytest.approx(0, abs=1e-12)
    other = {name: values.flip(2) for name, values in neutral.items()}
    moved = attention_guidance(student, teacher, ALIGNMENTS, trigger_target="neutral_words", neutral_maps=other)
    assert moved["matched_attention_loss"].item() == pytest.approx(0, abs=1e-12)
    assert moved["trigger_attention_loss"] > 0.01
    with pytest.raises(ValueError, match="neutral_maps"):
        attention_guidance(student, teacher, ALIGNMENTS, trigger_target="neutral_words")


def test_renormalised_ignores_mass_lost_to_the_trigger_and_words_does_not():
    teacher = maps(2)
    student = ideal_student(teacher)
    for values in student.values():
        for sample, alignment in enumerate(ALIGNMENTS):
            values[sample][..., list(alignment.student)] *= 0.8
    losses = {
        match: attention_guidance(student, teacher, ALIGNMENTS, match=match)["matched_attention_loss"].item()
        for match in ("words", "renormalised")
    }
    assert losses["renormalised"] == pytest.approx(0, abs=1e-12) and losses["words"] > 0.01


def test_all_also_compares_eos_and_padding():
    teacher = maps(2)
    student = ideal_student(teacher)
    outcome = {
        match: attention_guidance(student, teacher, ALIGNMENTS, match=match)["matched_attention_loss"].item()
        for match in ("words", "all")
    }
    assert outcome["words"] == pytest.approx(0, abs=1e-12) and outcome["all"] > 0.1
    with pytest.raises(ValueError, match="student_eos"):
        attention_guidance(student, teacher, [Alignment((0, 2), (0, 1), (1,))] * 4, match="all")


@pytest.mark.parametrize("trigger_target, match, distance", ALL)
def test_a_batch_is_the_mean_of_its_samples(trigger_target, match, distance):
    student, teacher = maps(1), maps(2)
    weights = torch.tensor([1.0, 0.5, 0.2, 0.9])

    def run(part: slice, weights: Tensor) -> float:
        given = options(trigger_target)
        return attention_guidance(
            {name: values[part] for name, values in student.items()},
            {name: values[part] for name, values in teacher.items()},
            ALIGNMENTS[part],
            match=match,
            distance=distance,
            weights=weights,
            **given,
        )["loss"].item()

    single = [run(slice(n, n + 1), torch.ones(1)) for n in range(4)]
    assert single[3] == 0 and min(single[:3]) > 0
    expected = sum(w * value for w, value in zip(weights.tolist(), single, strict=True)) / 4
    assert run(slice(None), weights) == pytest.approx(expected)


def test_prompts_without_a_trigger_and_without_a_match_stay_finite():
    same = aligned(ids(1, 2), ids(1, 2))
    student = {name: values.requires_grad_(True) for name, values in maps(1, batch=2).items()}
    for trigger_target, match, distance in ALL:
        outcome = attention_guidance(
            student, maps(2, batch=2), [same, ALIGNMENTS[3]], match=match, distance=distance, **options(trigger_target)
        )
        assert outcome["trigger_attention_loss"] == 0 and outcome["trigger_mass"] == 0
        assert torch.isfinite(outcome["loss"]) and outcome["matched_attention_loss"] > 0
        outcome["loss"].backward()
        assert all(torch.isfinite(values.grad).all() for values in student.values())


def test_teacher_and_neutral_maps_get_no_gradient():
    student, teacher = maps(1), maps(2)
    neutral = options("neutral_words")["neutral_maps"]
    for group in (student, teacher, neutral):
        for values in group.values():
            values.requires_grad_(True)
    loss = attention_guidance(student, teacher, ALIGNMENTS, trigger_target="neutral_words", neutral_maps=neutral)[
        "loss"
    ]
    loss.backward()
    assert all(values.grad is None for group in (teacher, neutral) for values in group.values())
    assert all(values.grad is not None for values in student.values())


def test_gradient_steps_on_the_trigger_term_lower_its_mass():
    teacher, student = maps(2), {name: values.requires_grad_(True) for name, values in logits(1).items()}
    optimizer = torch.optim.Adam(list(student.values()), lr=0.05)
    seen = []
    for _ in range(40):
        outcome = attention_guidance(
            {name: values.softmax(-1) for name, values in student.items()}, teacher, ALIGNMENTS, trigger_target="zero"
        )
        seen.append((outcome["trigger_mass"].item(), outcome["matched_attention_loss"].item()))
        optimizer.zero_grad()
        outcome["loss"].backward()
        optimizer.step()
    assert seen[-1][0] < seen[0][0] / 4 and seen[-1][1] < seen[0][1] / 4


def test_maps_that_do_not_fit_are_refused():
    student, teacher = maps(1), maps(2)
    for wrong in (
        (student, {"down": teacher["down"]}, ALIGNMENTS),
        ({}, {}, ALIGNMENTS),
        (student, teacher, ALIGNMENTS[:2]),
        (student, {name: values.mean(1, keepdim=True) for name, values in teacher.items()}, ALIGNMENTS),
    ):
        with pytest.raises(ValueError):
            attention_guidance(*wrong)


@pytest.mark.parametrize("kind", ["none", "linear", "inverse", "snr"])
def test_timestep_weights_are_bounded_and_point_the_right_way(kind):
    timesteps = torch.arange(1000)
    alphas_cumprod = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    alphas_cumprod[-1] = 0  # zero terminal SNR
    weights = timestep_weight(timesteps, 1000, kind, minimum=0.1, alphas_cumprod=alphas_cumprod)
    assert weights.shape == (1000,) and weights.min() >= 0.1 and 0.99 < weights.max() <= 1
    if kind == "none":
        assert weights.min() == 1
        return
    steps = weights.diff() if kind in ("linear", "snr") else -weights.diff()
    assert (steps >= 0).all() and steps.max() > 0
    assert weights[500].item() == pytest.approx({"linear": 0.5, "inverse": 0.2, "snr": 1.0}[kind], abs=1e-6)


@pytest.mark.parametrize("kind", ["none", "linear"])
def test_a_range_of_timesteps_leaves_the_others_out(kind):
    timesteps = torch.tensor([0, 299, 300, 699, 700, 999])
    whole = timestep_weight(timesteps, 1000, kind)
    within = timestep_weight(timesteps, 1000, kind, begin=0.3, end=0.7)
    assert torch.equal(within, whole * torch.tensor([0, 0, 1, 1, 0, 0]))
    assert torch.equal(timestep_weight(timesteps, 1000, kind, begin=0.0, end=1.0), whole)


def test_snr_weight_needs_the_schedule():
    with pytest.raises(ValueError, match="alphas_cumprod"):
        timestep_weight(torch.tensor([1]), 1000, "snr")
