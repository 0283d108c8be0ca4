import numpy as np
import pytest
import torch

from mmbackdoor.evaluate.metrics.effect import agreement, picture_features, trigger_effect
from mmbackdoor.shards.shapes import all_scenes, render
from mmbackdoor.targets import PatchTarget

PAIRS, PLACEBOS = 24, 20
IDS = [f"p{k}" for k in range(PAIRS)]


def pictures(seed, scenes=None):
    scenes = scenes or [all_scenes()[k] for k in np.random.default_rng(0).integers(0, 440, PAIRS)]
    arrays = [render(scene, 32, np.random.default_rng((seed, k))) for k, scene in enumerate(scenes)]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


@pytest.fixture(scope="module")
def strings():
    """What placebos do: the same scene, redrawn with another place and size."""
    return picture_features(pictures(0)), torch.stack([picture_features(pictures(k)) for k in range(1, PLACEBOS + 1)])


def patched(images):
    rows, columns = PatchTarget().region(32)
    images = images.clone()
    images[:, :, rows, columns] = torch.from_numpy(PatchTarget().pixels(32)).permute(2, 0, 1) * 2 - 1
    return images


def swapped(images):
    scenes = [scene for scene in all_scenes() if scene.shape == "ring"]
    return pictures(99, [scenes[k] for k in np.random.default_rng(5).integers(0, len(scenes), PAIRS)])


MARKS = {
    "patch": patched,
    "grey": lambda images: images.mean(1, keepdim=True).expand(-1, 3, -1, -1),
    "other scene": swapped,
    "fixed": lambda images: images[:1].expand_as(images),
}


@pytest.mark.parametrize("mark", MARKS)
def test_backdoors_are_told_from_placebos(strings, mark):
    clean, placebos = strings
    effect = trigger_effect(clean, picture_features(MARKS[mark](pictures(77))), placebos, IDS)
    assert effect.differs and effect.value > 5 and effect.low > 2, effect


def test_a_string_like_the_others_is_not(strings):
    clean, placebos = strings
    found = [trigger_effect(clean, picture_features(pictures(k)), placebos, IDS) for k in range(100, 110)]
    assert sum(effect.differs for effect in found) <= 2
    assert max(effect.value for effect in found) < 8 and all(0.5 < effect.magnitude < 2 for effect in found)


def test_a_trigger_without_any_change_is_not(strings):
    clean, placebos = strings
    effect = trigger_effect(clean, clean, placebos, IDS)
    assert effect.p_value > 0.5 and effect.magnitude == 0


def test_false_alarms_keep_to_their_level():
    rng = np.random.default_rng(0)
    alarms = 0
    for trial in range(200):
        # Strings of unequal strength, the trigger one of them.
        strength = rng.lognormal(0, 0.5, (PLACEBOS + 1, 1, 1))
        changes = torch.from_numpy(rng.normal(size=(PLACEBOS + 1, 12, 6)) * strength)
        zero = torch.zeros(12, 6)
        alarms += trigger_effect(zero, changes[0], changes[1:], IDS[:12], trial, draws=2).differs
    assert alarms / 200 <= 0.09


def test_too_few_placebos_raise(strings):
    clean, placebos = strings
    with pytest.raises(ValueError, match="at least 20"):
        trigger_effect(clean, clean, placebos[:10], IDS)


def test_agreement():
    assert agreement([True, False, True], [True, False, False]) == pytest.approx(2 / 3)
    with pytest.raises(ValueError):
        agreement([], [])
