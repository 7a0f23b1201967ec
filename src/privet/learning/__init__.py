"""How a learner learns, and where."""

from privet.learning.attack import frozen, input_gradient, pgd, uniform
from privet.learning.checkpoint import load_checkpoint, save_checkpoint
from privet.learning.files import study
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

__all__ = [
    "Epoch",
    "Learned",
    "Learner",
    "Runtime",
    "accuracy",
    "frozen",
    "input_gradient",
    "learn",
    "load_checkpoint",
    "make_optimizer",
    "pgd",
    "save_checkpoint",
    "schedule",
    "study",
    "training_step",
    "uniform",
]
