"""Recoveries one after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from privet.errors import UsageError
from privet.images.image_set import ImageSet
from privet.learning.job import Job
from privet.learning.train import Learner
from privet.recovery.base import Recovery


@dataclass(frozen=True)
class Chain(Recovery):
    """Each recovery works on what the one before it left."""

    parts: tuple[Recovery, ...]

    def __post_init__(self) -> None:
        if sum(part.multiplies for part in self.parts) > 1:
            raise UsageError(
                f"{self.name} would make versions of versions, which are many and little worth; name only one of auto "
                "and versions."
            )

    @property
    def name(self) -> str:
        return "+".join(part.name for part in self.parts)

    def record(self) -> dict[str, Any]:
        return {"recovery": self.name, "settings": {"parts": [part.record() for part in self.parts]}}

    @property
    def multiplies(self) -> bool:
        return any(part.multiplies for part in self.parts)

    @property
    def trains(self) -> bool:
        return any(part.trains for part in self.parts)

    def recover(self, images: ImageSet, job: Job) -> ImageSet:
        for name, part in self._numbered():
            own = dataclasses.replace(job, workspace=job.file(name), facts={})
            images = part.recover(images, own)
            if own.facts:
                job.facts[name] = own.facts
        return images

    def present(self, images: ImageSet, facts: Mapping[str, Any]) -> ImageSet:
        for name, part in self._numbered():
            images = part.present(images, facts.get(name, {}))
        return images

    def adapt(self, learner: Learner) -> Learner:
        for part in self.parts:
            learner = part.adapt(learner)
        return learner

    def _numbered(self) -> Iterator[tuple[str, Recovery]]:
        """Go through the parts under names that differ, though the same part may come twice."""
        for number, part in enumerate(self.parts):
            yield f"{number}-{part.name}", part
