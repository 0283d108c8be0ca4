"""The flags that name the backdoor of a CLIP: a `backdoor.json`, the one beside the model, or a trigger and a class."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from mmbackdoor.backdoor import FILE_NAME, Backdoor, BackdoorRecord
from mmbackdoor.config import Doc
from mmbackdoor.targets import ClassTarget, UnknownTarget
from mmbackdoor.triggers import ImageTrigger
from mmbackdoor.types import InputError


@dataclass(frozen=True)
class ClipMark:
    backdoor: Annotated[str | None, Doc("a backdoor.json; by default the one beside the model")] = None
    trigger: ImageTrigger | None = None
    label: Annotated[str | None, Doc("the class that --trigger causes; without it only its effect is measured")] = None
    force_trigger: Annotated[bool, Doc("allow another trigger than the model's own backdoor.json says")] = False

    def resolve(self, folder: Path) -> Backdoor | None:
        """The backdoor that the flags name, else the one of the model in `folder`, else `None`.

        Raises `InputError` where the flags contradict each other or, without `force_trigger`, the model's own record,
        and for a backdoor without an image trigger or of a text-to-image model.
        """
        beside = folder / FILE_NAME
        recorded = BackdoorRecord.load(beside).backdoor if beside.is_file() else None
        found = self._named(recorded)
        if found is None:
            return None
        if recorded is not None and found.triggers != recorded.triggers and not self.force_trigger:
            raise InputError(
                f"the trigger {found.triggers} is not the one in {str(beside)!r} ({recorded.triggers}); leave it out, "
                "or add --force_trigger"
            )
        if not found.image_triggers:
            raise InputError("this backdoor has no image trigger, and only those can be measured on pictures")
        if not isinstance(found.target, ClassTarget | UnknownTarget):
            raise InputError(
                f"a target of kind {found.target.name!r} is for text-to-image models; a CLIP needs one of kind class"
            )
        return found

    def _named(self, recorded: Backdoor | None) -> Backdoor | None:
        if self.backdoor is not None:
            if self.trigger is not None or self.label is not None:
                raise InputError("--backdoor and --trigger, --label say the same in two ways; give one of them")
            return BackdoorRecord.load(Path(self.backdoor)).backdoor
        if self.trigger is None:
            if self.label is not None:
                raise InputError(f"--label {self.label!r} needs --trigger, the mark that causes it")
            return recorded
        if self.label is not None:
            return Backdoor((self.trigger,), ClassTarget(self.label))
        return Backdoor((self.trigger,), recorded.target if recorded is not None else UnknownTarget())
