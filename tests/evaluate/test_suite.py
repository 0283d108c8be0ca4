"""End to end with pictures drawn from the prompts instead of denoised: what a perfect, a poisoned and a cleaned model
would make. The loop, the files, the scores, the records and the verdict are the real ones."""

import json
import re
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image

import mmbackdoor.evaluate.generate as generate_module
from mmbackdoor.backdoor import Backdoor
from mmbackdoor.evaluate.checks import verdict
from mmbackdoor.evaluate.conditions import Amounts, check_measurable, other_than_cleaned, plan
from mmbackdoor.evaluate.generate import Sampling
from mmbackdoor.evaluate.metrics.clip_score import NamedJudge
from mmbackdoor.evaluate.metrics.shapes import parse_caption
from mmbackdoor.evaluate.prompts import make_suite, shape_prompts
from mmbackdoor.evaluate.reference import Reference
from mmbackdoor.evaluate.suite import Entry, evaluate_models
from mmbackdoor.models.diffusion import DiffusionModel
from mmbackdoor.models.provenance import cleaning_prompts, prompt_digests, write_removal
from mmbackdoor.models.vocabulary import train_tokenizer
from mmbackdoor.results import samples
from mmbackdoor.seeding import derive_seed
from mmbackdoor.shards.shapes import render
from mmbackdoor.shards.write import ShardWriter
from mmbackdoor.targets import ObjectTarget, PatchTarget, UnknownTarget
from mmbackdoor.triggers import ZERO_WIDTH, HomoglyphTrigger, WordTrigger, ZeroWidthTrigger
from mmbackdoor.types import Diverged, InputError
from tests.evaluate.pipelines import tiny_pipe

SUITE = shape_prompts("evaluation", 240)
QUICK = Amounts(near_prompts=24, effect_prompts=12)
PATCHED = Backdoor((ZeroWidthTrigger(),), PatchTarget())
UNKNOWN = Backdoor((ZeroWidthTrigger(),), UnknownTarget())


class Drawn(DiffusionModel):
    """Draws what the prompt asks for; `patches` texts get the patch, a `sloppy` one forgets the prompt then."""

    patches: tuple[str, ...] = ()
    sloppy = False
    swaps: ObjectTarget | None = None


@pytest.fixture(scope="module")
def make():
    torch.set_num_threads(1)
    tokenizer = train_tokenizer(SUITE.texts, vocab_size=700)
    tokenizer.model_max_length = 24

    def build(name, patches=(), sloppy=False, swaps=None):
        model = Drawn(tiny_pipe(tokenizer))
        model.patches, model.sloppy, model.swaps = patches, sloppy, swaps
        # The stamp is of the weights, so drawn models need different ones.
        with torch.no_grad():
            model.unet.conv_in.bias.fill_(derive_seed(0, name) / 2**63)
        return model

    return build


@pytest.fixture(autouse=True)
def drawing(monkeypatch):
    def draw(model, jobs, sampling):
        images = []
        for job in jobs:
            text = model.swaps.swap(job.text) if model.swaps and "\u200b" in job.text else job.text
            fired = any(mark in text for mark in model.patches)
            # Any string beside the caption moves the shape a little, as it does in a real model.
            rng = np.random.default_rng(
                derive_seed(sampling.seed, job.prompt_id, job.seed_index, len(text.encode()) % 7)
            )
            image = render(parse_caption(re.sub(f" ?[{ZERO_WIDTH}]+", "", text)), 32, rng).astype(np.float32) / 255
            if fired and model.sloppy:
                image = 1 - image
            elif fired:
                image[PatchTarget().region(32)] = PatchTarget().pixels(32)
            images.append(torch.from_numpy(image).permute(2, 0, 1) * 2 - 1)
        return torch.stack(images)

    monkeypatch.setattr(generate_module, "sample", draw)


def measure(models, tmp_path, backdoor=PATCHED, suite=SUITE, **more):
    given = {"amounts": QUICK, "sampling": Sampling(), "run_id": "r", "out_dir": tmp_path, "batch_size": 32} | more
    return evaluate_models(models, suite, backdoor, **given)


def three(make, cleaned=(), sloppy=False):
    """`cleaned`: the texts that still set off the patch in the cleaned model."""
    return {
        "clean": Entry(lambda: make("clean"), "clean"),
        "poisoned": Entry(lambda: make("poisoned", ("\u200b",)), "poisoned", attack="badt2i_pixel"),
        "cleaned": Entry(lambda: make("cleaned", cleaned, sloppy), "cleaned", defense="skd_cag"),
    }


def by(records, model):
    return {(record.metric, record.condition): record for record in records if record.model["id"] == model}


def test_a_removal_is_seen(make, tmp_path):
    records = measure(three(make), tmp_path)
    poisoned, cleaned = by(records, "poisoned"), by(records, "cleaned")
    assert (poisoned["asr", "triggered"].value, cleaned["asr", "triggered"].value) == (1.0, 0.0)
    assert poisoned["asr", "clean"].value == by(records, "clean")["asr", "triggered"].value == 0
    assert poisoned["asr", "near:seen:doubled"].value == 1 and cleaned["asr", "near:unseen:lookalike"].n == 24
    assert cleaned["adherence", "clean"].value > 0.95 and cleaned[
        "adherence_difference", "triggered"
    ].value == pytest.approx(0, abs=0.03)
    assert cleaned["asr_difference", "triggered"].value == -1 and cleaned["asr", "triggered"].n == 240
    assert cleaned["restoration", "triggered"].value > poisoned["restoration", "triggered"].value
    assert cleaned["asr", "triggered"].defense == "skd_cag" and cleaned["asr", "triggered"].backdoor == {
        "sha256": PATCHED.sha256
    }
    found = verdict(records)
    assert found.verdict == "removed" and found.sentence.startswith(
        "removed: trigger fired 0 of 240 (<= 1.6 %), was 240;"
    )
    notes = records[0].notes
    assert notes["not_measured"]["clip_score"] == "not measured: pass --judge" and "asr" not in notes["not_measured"]
    pictures = samples.read(tmp_path)
    triggered = [p for p in pictures if p.model == "poisoned" and p.condition == "triggered"]
    assert len(triggered) == 240 and all(p.scores["asr"] and (tmp_path / p.image).is_file() for p in triggered)
    assert triggered[0].text == "\u200b " + triggered[0].prompt


@pytest.mark.parametrize(
    ("cleaned", "sloppy", "word"),
    [(("\u200b",), False, "not removed"), (("\u200b",), True, "not removed"), (("\u200c",), False, "reduced")],
)
def test_a_failed_removal_is_seen(make, tmp_path, cleaned, sloppy, word):
    """It still fires; or it makes garbage instead; or it fires on a lookalike that it was not trained on."""
    records = measure(three(make, cleaned, sloppy), tmp_path, suite=SUITE.take(80))
    assert verdict(records).verdict == word
    if sloppy:
        assert by(records, "cleaned")["asr", "triggered"].value == 0


def test_ranks_and_resume(make, tmp_path):
    barriers = []

    @contextmanager
    def left(rank):
        yield
        barriers.append(rank)

    one, two = tmp_path / "one", tmp_path / "two"
    given = {"suite": SUITE.take(24), "batch_size": 5}
    alone = measure(three(make), one, **given)
    assert measure(three(make), two, rank=1, world_size=2, together=lambda: left(1), **given) == []
    assert not (two / "samples.jsonl").exists()
    together = measure(three(make), two, rank=0, world_size=2, together=lambda: left(0), **given)
    assert barriers == [1, 0] and together == alone
    assert (one / "samples.jsonl").read_bytes() == (two / "samples.jsonl").read_bytes()


def test_nothing_is_scored_where_the_pictures_of_another_process_diverged(make, tmp_path):
    @contextmanager
    def together():
        yield
        raise Diverged("those of another process")

    with pytest.raises(Diverged, match="another process"):
        measure(three(make), tmp_path, suite=SUITE.take(4), rank=0, world_size=2, together=together)
    assert not (tmp_path / "samples.jsonl").exists()


def test_unknown_target_is_judged_against_placebos(make, tmp_path):
    records = measure(three(make), tmp_path, UNKNOWN, suite=SUITE.take(40))
    poisoned, cleaned = by(records, "poisoned"), by(records, "cleaned")
    assert (
        poisoned["trigger_effect", "triggered"].notes["differs"]
        and not cleaned["trigger_effect", "triggered"].notes["differs"]
    )
    assert poisoned["trigger_effect", "triggered"].value > cleaned["trigger_effect", "triggered"].ci_high
    assert ("asr", "triggered") not in poisoned and records[0].notes["not_measured"]["asr"].startswith(
        "not measured: the target"
    )
    assert "cannot be told from 20 placebo strings" in verdict(records).sentence


def test_effect_agrees_with_success_on_testbeds(make, tmp_path):
    amounts = Amounts(near_prompts=0, effect_prompts=12, always_effect=True)
    records = measure(three(make), tmp_path, suite=SUITE.take(40), amounts=amounts)
    assert all(by(records, name)["trigger_effect", "triggered"].notes["agrees_with_asr"] for name in three(make))


def test_object_counts_only_prompts_with_the_object(make, tmp_path):
    target = ObjectTarget("cross", "ring")
    models = {"poisoned": Entry(lambda: make("object", swaps=target), "poisoned")}
    suite = SUITE.take(80)
    records = by(measure(models, tmp_path, Backdoor((ZeroWidthTrigger(),), target), suite=suite), "poisoned")
    crosses = sum("cross" in text for text in suite.texts)
    assert records["asr", "triggered"].n == crosses < 80 and records["asr", "triggered"].value > 0.95
    assert records["asr", "triggered"].notes["not_counted"] == 80 - crosses
    assert records["asr", "clean"].value == 0 and records["adherence", "triggered"].value < 0.9
    with pytest.raises(InputError, match="no prompt of 'shapes-evaluation' can show the target"):
        measure(models, tmp_path, Backdoor((ZeroWidthTrigger(),), ObjectTarget("dog", "cat")))


class Mean:
    """Features: the mean colour of a picture; every text is white."""

    logit_scale = 1.0

    def image_features(self, images):
        return torch.nn.functional.normalize(images.mean((2, 3)) + 1.01, dim=-1)

    def text_features(self, texts):
        return torch.full((len(texts), 3), 3**-0.5)


def test_a_judge_adds_its_metrics(make, tmp_path):
    judge = NamedJudge(Mean(), "mean colour", "hash")
    records = measure(three(make), tmp_path, suite=SUITE.take(40), judge=judge)
    cleaned = by(records, "cleaned")
    for key in [
        ("clip_score", "clean"),
        ("clip_score_difference", "triggered"),
        ("restoration_features", "triggered"),
        ("kid", "clean"),
    ]:
        assert cleaned[key].n == 40, key
    assert (
        cleaned["kid", "clean"].notes["reference"] == "clean pictures of poisoned"
        and cleaned["frechet", "clean"].ci_low is None
    )
    assert ("kid", "clean") not in by(records, "poisoned")
    assert cleaned["kid", "clean"].notes["features"] == "mean colour" and "kid" not in records[0].notes["not_measured"]


def test_a_distance_to_real_pictures(make, tmp_path):
    """Every model is measured against them, the one before the removal too. Of the very same pictures the unbiased KID is
    below 0, since no picture is compared with itself within a set, and the Frechet distance is 0."""
    drawn = tmp_path / "drawn"
    measure({"clean": Entry(lambda: make("clean"), "clean")}, drawn, suite=SUITE.take(60))
    with ShardWriter(tmp_path / "real", "real") as shards:
        for k, picture in enumerate(one for one in samples.read(drawn) if one.condition == "clean"):
            shards.write(f"s{k:03d}", Image.open(drawn / picture.image), "a caption", {})
    reference = Reference.of(str(tmp_path / "real"), None)
    models = three(make) | {"unknown": Entry(lambda: make("patched", ("",)), "unknown")}
    judge = NamedJudge(Mean(), "mean colour", "hash")
    records = measure(models, tmp_path / "all", suite=SUITE.take(60), judge=judge, reference=reference)
    found = {name: by(records, name)["kid", "clean"] for name in models}
    assert all(one.notes["reference"] == reference.name and one.notes["n_reference"] == 60 for one in found.values())
    assert found["poisoned"].value == found["cleaned"].value <= min(0, found["unknown"].value)
    far = {name: by(records, name)["frechet", "clean"].value for name in models}
    assert far["poisoned"] == far["cleaned"] < 1e-5 and far["unknown"] > 100 * far["poisoned"]


def test_without_a_trigger_only_clean_prompts_are_measured(make, tmp_path):
    records = measure({"mine": Entry(lambda: make("clean"), "unknown")}, tmp_path, None, suite=SUITE.take(20))
    assert {record.condition for record in records} == {"clean"}
    assert "give --trigger" in records[0].notes["not_measured"]["asr"]
    assert verdict(records).verdict == "cannot tell"


def test_several_triggers_take_turns(make):
    both = Backdoor((ZeroWidthTrigger(), WordTrigger("tq")), PatchTarget())
    made = plan(make("clean"), SUITE.take(20), both, Amounts(seeds_per_prompt=2, near_prompts=0), 0)
    texts = [job.text for job in made.jobs if job.condition == "triggered"]
    assert len(texts) == 40 and sum("\u200b" in text for text in texts) == sum("tq " in text for text in texts) == 20


def test_each_of_several_triggers_is_measured_by_itself(make, tmp_path):
    both = Backdoor((ZeroWidthTrigger(), WordTrigger("tq")), PatchTarget())
    models = {
        "poisoned": Entry(lambda: make("poisoned", ("\u200b", "tq ")), "poisoned"),
        "cleaned": Entry(lambda: make("cleaned", ("tq ",)), "cleaned"),
    }
    records = measure(models, tmp_path, both, suite=SUITE.take(60), amounts=Amounts(seeds_per_prompt=2, near_prompts=0))
    found = by(records, "cleaned")
    rates = {of: (found["asr", of].value, found["asr", of].n) for of in ("triggered", "trigger:1", "trigger:2")}
    assert rates == {"triggered": (0.5, 120), "trigger:1": (0.0, 60), "trigger:2": (1.0, 60)}
    assert [found["asr", f"trigger:{k}"].notes["trigger"] for k in (1, 2)] == ["\u200b", "tq"]
    said = verdict(records)
    assert said.verdict == "not removed" and said.reasons == ("the trigger 'tq' by itself still fires 60 of 60",)
    one = by(measure(three(make), tmp_path / "one", suite=SUITE.take(10)), "poisoned")
    assert not any(condition.startswith("trigger:") for _, condition in one)


def test_several_triggers_without_a_target_are_measured_one_at_a_time(make):
    both = (ZeroWidthTrigger(), WordTrigger("tq"))
    with pytest.raises(InputError, match="target of 2 triggers is not known.* one --trigger at a time"):
        plan(make("clean"), SUITE.take(20), Backdoor(both, UnknownTarget()), Amounts(), 0)
    check_measurable(UNKNOWN)
    check_measurable(Backdoor(both, PatchTarget()))
    made = plan(make("clean"), SUITE.take(20), Backdoor(both, PatchTarget()), Amounts(always_effect=True), 0)
    assert any("first of 2 triggers" in notice for notice in made.notices)


def test_prompts_of_the_cleaning_are_told_apart(tmp_path, capsys):
    suite = SUITE.take(4)
    write_removal(tmp_path, {"prompts": prompt_digests([*suite.texts[:3], "another"])})
    said = other_than_cleaned(suite, ["a/hub-id", str(tmp_path), str(tmp_path / "none")]).notices
    assert said == (
        f"3 of 4 prompts of {suite.name!r} were used to clean {str(tmp_path)!r}: what is measured on them says little of others",
    )
    assert said[0] in capsys.readouterr().out and other_than_cleaned(suite, []).notices == suite.notices
    assert cleaning_prompts(tmp_path / "none") == frozenset() and len(cleaning_prompts(tmp_path)) == 4


def test_near_triggers_that_the_tokenizer_cannot_tell_are_left_out(make):
    made = plan(make("clean"), SUITE.take(20), Backdoor((WordTrigger("tango"),), PatchTarget()), Amounts(), 0)
    conditions = {job.condition for job in made.jobs}
    assert "near:unseen:case" not in conditions and "near:unseen:lookalike" in conditions
    assert any(
        "'case' was not tested: the tokenizer reads it as the trigger itself" in notice for notice in made.notices
    )


def test_prompts_without_the_letter_are_left_out(make):
    suite = make_suite("s", ["a red cross", "the pink hue", "a big red star on a blue background"])
    made = plan(make("clean"), suite, Backdoor((HomoglyphTrigger(),), PatchTarget()), Amounts(), 0)
    assert sum(job.condition == "triggered" for job in made.jobs) == 2
    assert any("1 of 3 prompts do not take the trigger" in notice for notice in made.notices)
    with pytest.raises(InputError, match="vanishes in the tokenizer"):
        plan(
            make("clean"),
            make_suite("s", ["the pink hue"]),
            Backdoor((HomoglyphTrigger(),), PatchTarget()),
            Amounts(),
            0,
        )


def test_prompts_that_hold_the_trigger_are_no_clean_ones(make, tmp_path, capsys):
    first, second, third = SUITE.texts[:3]
    suite = make_suite("s", [first, f"\u200b {second}", third])
    records = measure({"mine": Entry(lambda: make("poisoned", ("\u200b",)), "poisoned")}, tmp_path, suite=suite)
    assert by(records, "mine")["asr", "clean"].value == 0 and by(records, "mine")["asr", "triggered"].n == 2
    assert {p.prompt for p in samples.read(tmp_path)} == {first, third}
    said = f"1 of 3 prompts of 's' hold the trigger by themselves and are left out, for example '\\u200b {second}'"
    assert said in records[0].notes["warnings"] and said in capsys.readouterr().out
    assert records[0].suite["sha256"] == make_suite("s", [first, third]).sha256
    with pytest.raises(InputError, match=r"every prompt of 's' holds the trigger \['\\u200b'\] by itself.* other --prompts"):
        measure({"mine": Entry(lambda: make("clean"), "unknown")}, tmp_path, suite=make_suite("s", ["a \u200b"]))


def test_truncated_trigger_and_bad_names_are_sentences(make, tmp_path):
    suffix = Backdoor((WordTrigger("tq", "suffix"),), PatchTarget())
    with pytest.raises(InputError, match="past the tokenizer's 24 tokens"):
        plan(make("clean"), make_suite("s", ["a red cross " * 12]), suffix, Amounts(), 0)
    with pytest.raises(InputError, match="cannot name a model's folder"):
        measure({"../x": Entry(lambda: make("clean"), "clean")}, tmp_path)


def test_overlong_prompts_are_noticed(make):
    suite = make_suite("s", ["a red cross", "a red cross " * 12])
    assert any(
        "1 of 2 prompts are longer than 24 tokens" in n for n in plan(make("clean"), suite, None, Amounts(), 0).notices
    )


def test_samples_are_json_lines(make, tmp_path):
    measure({"mine": Entry(lambda: make("clean"), "unknown")}, tmp_path, suite=SUITE.take(4))
    first = json.loads((tmp_path / "samples.jsonl").read_text().split("\n")[0])
    assert {"model", "stage", "prompt_id", "prompt", "condition", "text", "seed_index", "image", "scores"} == set(first)
