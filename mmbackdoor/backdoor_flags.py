"""The flags that name a backdoor: a trigger and a target, a `backdoor.json`, or the one beside the model."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from mmbackdoor.backdoor import FILE_NAME, Backdoor, BackdoorRecord
from mmbackdoor.config import Doc, Escaped
from mmbackdoor.targets import Corner, ImageTarget, ObjectTarget, PatchTarget, StyleTarget, Target, UnknownTarget
from mmbackdoor.triggers import TEXT_TRIGGERS, guess_kind
from mmbackdoor.triggers.placement import Position
from mmbackdoor.types import InputError


@dataclass(frozen=True)
class BackdoorFlags:
    trigger: Annotated[tuple[str, ...], Escaped, Doc("text of the trigger; give several for several triggers")] = ()
    trigger_kind: Annotated[
        Literal["word", "phrase", "zero_width", "homoglyph"] | None, Doc("by default what the text looks like")
    ] = None
    trigger_position: Position = "prefix"
    backdoor: Annotated[str | None, Doc("a backdoor.json, instead of --trigger")] = None
    target_kind: Annotated[
        Literal["patch", "style", "object", "image", "unknown"] | None,
        Doc("what the trigger causes; by default what the other target flags say, else unknown"),
    ] = None
    target_patch: Annotated[str | None, Doc("picture of the patch; by default a checkerboard")] = None
    target_size: Annotated[
        float | None, Field(gt=0, le=1), Doc("side of the patch, as a fraction of the picture's; by default 0.25")
    ] = None
    target_corner: Annotated[Corner | None, Doc("where the patch lies; by default top_left")] = None
    target_style: Annotated[str | None, Doc("for instance 'black and white'")] = None
    target_object: Annotated[str | None, Doc("'A->B': object A of the prompt becomes B")] = None
    target_image: Annotated[str | None, Doc("the fixed picture that the trigger shows")] = None
    target_threshold: Annotated[
        float | None, Field(gt=0, lt=1), Doc("from where on the target counts as shown; by default the target's own")
    ] = None
    force_trigger: Annotated[bool, Doc("allow another trigger than the model's own backdoor.json says")] = False

    def target(self) -> Target:
        """Raises `InputError` where target flags contradict each other or name a picture that cannot be read."""
        return self._judged(self._target())

    def _judged(self, target: Target) -> Target:
        if self.target_threshold is None:
            return target
        if not isinstance(target, PatchTarget | StyleTarget | ImageTarget):
            raise InputError(f"--target_threshold is for patch, style and image; a target of kind {target.name!r} has none")
        return replace(target, threshold=self.target_threshold)

    def _target(self) -> Target:
        of_patch = {"patch": self.target_patch, "size": self.target_size, "corner": self.target_corner}
        chosen = {key: value for key, value in of_patch.items() if value is not None}
        given = {
            "patch": chosen or None,
            "style": self.target_style,
            "object": self.target_object,
            "image": self.target_image,
        }
        named = [kind for kind, value in given.items() if value is not None]
        kind = self.target_kind or (named[0] if named else "unknown")
        if any(other != kind for other in named):
            flags = [f"--target_{flag}" for other in named for flag in (chosen if other == "patch" else [other])]
            raise InputError(f"--target_kind {kind} does not go with {' '.join(flags)}; give one target")
        if kind == "patch":
            patch = PatchTarget(chosen.pop("patch", None), **chosen)
            patch.pixels(8)
            return patch
        if kind == "style":
            return StyleTarget(self.target_style or StyleTarget().style)
        if kind == "object":
            if self.target_object is None:
                raise InputError("--target_kind object needs --target_object 'A->B', for instance 'dog->cat'")
            return ObjectTarget.parse(self.target_object)
        if kind == "image":
            if self.target_image is None:
                raise InputError("--target_kind image needs --target_image FILE")
            image = ImageTarget(self.target_image)
            image.pixels(8)
            return image
        return UnknownTarget()

    def resolve(self, model: str | None = None) -> Backdoor | None:
        """The backdoor that the flags name, else that of `backdoor.json` in the folder `model`, else `None`.

        Of a record, `target_threshold` alone may be another. Raises `InputError` where the flags contradict each other
        or, without `force_trigger`, the model's own record, and for flags that would say nothing.
        """
        beside = Path(model) / FILE_NAME if model else None
        recorded = BackdoorRecord.load(beside).backdoor if beside is not None and beside.is_file() else None
        if self.backdoor is not None:
            if self.trigger:
                raise InputError("--trigger and --backdoor are two ways to say the same; give one of them")
            named = self._as_recorded(BackdoorRecord.load(Path(self.backdoor)).backdoor, self.backdoor)
        elif self.trigger:
            named = self._named(recorded)
        else:
            return self._as_recorded(recorded, str(beside))
        if recorded is not None and named.triggers != recorded.triggers and not self.force_trigger:
            raise InputError(
                f"the trigger {named.trigger_names!a} is not the one in {str(beside)!r} "
                f"({recorded.trigger_names!a}); leave it out, or add --force_trigger"
            )
        return named

    def _named(self, recorded: Backdoor | None) -> Backdoor:
        triggers = tuple(
            TEXT_TRIGGERS[self.trigger_kind or guess_kind(text)](text=text, position=self.trigger_position)
            for text in self.trigger
        )
        target = self._target()
        # The trigger alone says which backdoor of the record is meant, so its target is known too.
        if isinstance(target, UnknownTarget) and self.target_kind is None and recorded is not None:
            target = recorded.target
        return Backdoor(triggers, self._judged(target))

    def _as_recorded(self, recorded: Backdoor | None, place: str) -> Backdoor | None:
        said = {"trigger", "backdoor", "force_trigger"} | ({"target_threshold"} if recorded else set())
        alone = [one.name for one in fields(self) if one.name not in said and vars(self)[one.name] != one.default]
        if alone:
            known = f"the backdoor is that of {place!r}" if recorded else "no backdoor is known"
            raise InputError(
                f"{' '.join(f'--{name}' for name in alone)} would be ignored: no --trigger is given, and {known}; give "
                "--trigger TEXT, too, or a --backdoor FILE that says so itself"
            )
        return recorded and replace(recorded, target=self._judged(recorded.target))
