"""How a learner learns, and where."""

from privet.learning.attack import frozen, input_gradient, pgd, uniform
from privet.learning.checkpoint import load_checkpoint, save_checkpoint
from privet.learning.chunks import change_in_chunks
from privet.learning.files import study
from privet.learning.job import Job
from privet.learning.publication import Publication, protection_record, publish_changed
from privet.learning.runtime import Runtime
from privet.learning.train import (
    Epoch,
    Learned,
    Learner,
    accuracy,
    learn,
    make_optimizer,
    schedule,
    training_step,
)
from privet.learning.update import Treatment, Update
from privet.learning.update_files import load_update, save_update

__all__ = [
    "Epoch",
    "Job",
    "Learned",
    "Learner",
    "Publication",
    "Runtime",
    "Treatment",
    "Update",
    "accuracy",
    "change_in_chunks",
    "frozen",
    "input_gradient",
    "learn",
    "load_checkpoint",
    "load_update",
    "make_optimizer",
    "pgd",
    "protection_record",
    "publish_changed",
    "save_checkpoint",
    "save_update",
    "schedule",
    "study",
    "training_step",
    "uniform",
]
