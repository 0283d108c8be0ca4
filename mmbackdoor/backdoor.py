"""A backdoor: what sets it off and what it causes; and `backdoor.json`, its record beside a poisoned model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from PIL import Image
from pydantic import Field, TypeAdapter, ValidationError

from mmbackdoor.seeding import python_rng
from mmbackdoor.targets import Target
from mmbackdoor.triggers import IMAGE_TRIGGERS, ImageTrigger, TextTrigger, Trigger
from mmbackdoor.triggers.marking import Place
from mmbackdoor.types import InputError

FILE_NAME = "backdoor.json"
SCHEMA = 1


@dataclass(frozen=True)
class Backdoor:
    """Each of `triggers`, of texts or of pictures, sets off `target` alone."""

    triggers: tuple[Annotated[Trigger, Field(discriminator="name")], ...]
    target: Annotated[Target, Field(discriminator="name")]

    def __post_init__(self) -> None:
        if not self.triggers:
            raise InputError("a backdoor needs at least one trigger; give --trigger TEXT")

    @property
    def image_triggers(self) -> tuple[ImageTrigger, ...]:
        return tuple(trigger for trigger in self.triggers if trigger.name in IMAGE_TRIGGERS)

    @property
    def text_triggers(self) -> tuple[TextTrigger, ...]:
        return tuple(trigger for trigger in self.triggers if trigger.name not in IMAGE_TRIGGERS)

    @property
    def trigger_names(self) -> list[str]:
        """For messages: the texts of text triggers, the kinds of image triggers."""
        return [trigger.text for trigger in self.text_triggers] + [trigger.name for trigger in self.image_triggers]

    def apply(self, prompt: str, seed: int, *names: str | int, trigger: int | None = None) -> str:
        """`prompt` with one of the text triggers, drawn from (`seed`, `names`) where there are several.

        Raises `InputError` for a backdoor that has none.
        """
        triggers = self.text_triggers
        if not triggers:
            raise InputError(f"the triggers {self.trigger_names} mark pictures, not prompts; give --trigger TEXT")
        rng = python_rng(seed, "trigger", *names)
        chosen = rng.randrange(len(triggers))
        return triggers[chosen if trigger is None else trigger](prompt, rng)

    def image_trigger(self, key: str, seed: int) -> ImageTrigger:
        """The one of the image triggers that is drawn for `key`. Raises `InputError` for a backdoor that has none."""
        triggers = self.image_triggers
        if not triggers:
            raise InputError(f"the triggers {self.trigger_names!a} mark prompts, not pictures; name an image trigger")
        return triggers[python_rng(seed, "image_trigger", key).randrange(len(triggers))]

    def mark_image(self, image: Image.Image, key: str, seed: int, place: Place, draw: int = 0) -> Image.Image:
        """`image` with the image trigger of `key`, or as it is where that trigger belongs to another `place`."""
        trigger = self.image_trigger(key, seed)
        return trigger(image, key, seed, draw) if trigger.place == place else image

    def to_dict(self) -> dict[str, Any]:
        return _ADAPTER.dump_python(self, mode="json")

    @staticmethod
    def from_dict(values: Any, source: str = "the backdoor") -> Backdoor:
        """Raises `InputError` that names `source` where `values` do not describe a backdoor."""
        try:
            return _ADAPTER.validate_python(values)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "its top level"
            raise InputError(f"{source} does not describe a backdoor: {place}: {first['msg']}") from error

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


_ADAPTER = TypeAdapter(Backdoor)


@dataclass(frozen=True)
class BackdoorRecord:
    """The content of `backdoor.json`: the backdoor and how it got into the model."""

    backdoor: Backdoor
    attack: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)
    changed: tuple[str, ...] = ()
    parent_sha256: str | None = None
    model_sha256: str | None = None

    def save(self, folder: Path) -> None:
        content = {
            "schema": SCHEMA,
            "backdoor": self.backdoor.to_dict(),
            "attack": self.attack,
            "plan": self.plan,
            "seeds": self.seeds,
            "changed": list(self.changed),
            "parent_sha256": self.parent_sha256,
            "model_sha256": self.model_sha256,
        }
        part = folder / (FILE_NAME + ".part")
        part.write_text(json.dumps(content, indent=1, ensure_ascii=True) + "\n")
        part.replace(folder / FILE_NAME)

    @staticmethod
    def load(path: Path) -> BackdoorRecord:
        """Read `path`, or `path/backdoor.json` for a folder. Raises `InputError` for anything but our schema."""
        file = path / FILE_NAME if path.is_dir() else path
        try:
            content = json.loads(file.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{str(file)!r} is no readable backdoor.json ({error})") from error
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            raise InputError(f"{str(file)!r} is not a backdoor.json of schema {SCHEMA}")
        backdoor = Backdoor.from_dict(content.get("backdoor"), repr(str(file)))
        try:
            facts = {name: content[name] for name in _FACTS & content.keys()}
            return _RECORD.validate_python({"backdoor": backdoor} | facts)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise InputError(f"{str(file)!r}: {place}: {first['msg']}; take the file that the attack wrote") from error


_RECORD = TypeAdapter(BackdoorRecord)
_FACTS = {"attack", "plan", "seeds", "changed", "parent_sha256", "model_sha256"}
