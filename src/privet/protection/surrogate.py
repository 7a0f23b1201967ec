"""Keeping a run's surrogate, to protect further images of the same classes without training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from privet.errors import InputError
from privet.images.image_set import ImageSet
from privet.images.open import align
from privet.learning.job import Job
from privet.models import SavedModel, describe_model, load_model, save_model
from privet.models.projection import PREFIX

if TYPE_CHECKING:
    from privet.protection.base import Protection

FILE = "surrogate.safetensors"


def save_surrogate(
    model: nn.Module, architecture: str, images: ImageSet, method: Protection, job: Job
) -> None:
    """Give every process the first one's surrogate; write it into the workspace, if there is one."""
    job.runtime.agree(model)
    path = job.file(FILE)
    if path is not None and job.runtime.rank == 0:
        about = SavedModel(
            architecture=architecture,
            class_names=images.class_names,
            size=images.size,
            notes={"method": method.name, "settings": method.settings(), "seed": job.seed},
        )
        save_model(path, model, about)


def as_known(images: ImageSet, surrogate: Path) -> ImageSet:
    """Return the images with labels as a surrogate counts its classes; they may lack some of these.

    Raises:
        InputError: it cannot be read, or was not trained on a class that the images have.
    """
    about = describe_model(surrogate)
    if unknown := sorted(set(images.class_names) - set(about.class_names)):
        raise InputError(
            f"{surrogate} was trained on the classes {list(about.class_names)}, but these images have {unknown}, too. "
            "A surrogate protects images of its own classes only."
        )
    return align(images, about.class_names)


def load_surrogate(job: Job, *, contrastive: bool = False) -> nn.Module | None:
    """Return the surrogate that the job names, frozen, or None if it names none.

    Args:
        job: names it.
        contrastive: whether it must have learned without labels, or else with them.

    Raises:
        InputError: it cannot be read, or is of the other kind.
    """
    if job.surrogate is None:
        return None
    model, about = load_model(job.surrogate)
    if about.architecture.startswith(PREFIX) is not contrastive:
        kinds = ("with labels (em, sem, rem, tap)", "without labels (ucl, tue)")
        raise InputError(
            f"{job.surrogate} learned {kinds[not contrastive]}; this method needs one that learned "
            f"{kinds[contrastive]}."
        )
    return job.runtime.place(model).eval().requires_grad_(False)
