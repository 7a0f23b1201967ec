"""Several versions of each image, each recovered in another way."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from privet.errors import UsageError
from privet.images.image_set import ImageSet
from privet.learning.job import Job
from privet.recovery.base import Recovery
from privet.recovery.chain import Chain


@dataclass(frozen=True)
class Versions(Recovery):
    """Each image as several recoveries leave it, all of them to learn from: ours.

    Recoveries differ in which shortcut they leave: JPEG that of the colours, grayscale that of single pixels, and
    so on. A network that sees every image in all versions gains nothing from what only some of them have. One
    version of each image will not do: then a shortcut is the only way to tell its images apart (docs/methods.md).
    `Learner.for_versions` takes as many steps on them as on the images alone.

    Attributes:
        parts: recoveries that change training images alone, or leave the test images usable as they are.
    """

    parts: tuple[Recovery, ...]

    name = "versions"
    multiplies = True

    def __post_init__(self) -> None:
        if len({part.name for part in self.parts}) < max(2, len(self.parts)) or any(
            part.trains or part.multiplies for part in self.parts
        ):
            raise UsageError(
                "versions needs at least two different recoveries that change images, got "
                f"{', '.join(part.name for part in self.parts) or 'none'}."
            )

    def record(self) -> dict[str, Any]:
        return {"recovery": self.name, "settings": {"parts": [part.record() for part in self.parts]}}

    def recover(self, images: ImageSet, job: Job) -> ImageSet:
        """Return all versions of the images, one version after the other.

        What two of them begin with, as purify-gently and purify-gently+grayscale do, is done once.
        """
        found: dict[tuple[Recovery, ...], ImageSet] = {(): images}
        for part in self.parts:
            steps = _steps(part)
            for number, step in enumerate(steps, start=1):
                if steps[:number] in found:
                    continue
                # Settings are not in a name, so two that are called the same may differ: the count tells them apart.
                name = f"{len(found) - 1}-" + "+".join(one.name for one in steps[:number])
                own = replace(job, workspace=job.file(name), facts={})
                found[steps[:number]] = step.recover(found[steps[: number - 1]], own)
                if own.facts:
                    job.facts[name] = own.facts
        index = torch.arange(len(images)).repeat(len(self.parts))
        return replace(
            images.subset(index),
            names=tuple(f"{name}-{part.name}" for part in self.parts for name in images.names),
            pixels=torch.cat([found[_steps(part)].pixels for part in self.parts]),
        )


def _steps(part: Recovery) -> tuple[Recovery, ...]:
    return part.parts if isinstance(part, Chain) else (part,)
