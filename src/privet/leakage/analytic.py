"""A fully connected first layer gives its input away: no search is needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from privet.errors import UsageError
from privet.leakage.base import Inversion
from privet.leakage.problem import Problem, Solved
from privet.learning.job import Job
from privet.learning.update import short
from privet.models.blocks import Scaled


@dataclass(frozen=True, kw_only=True)
class Analytic(Inversion):
    """The closed form for one image (Phong et al., IEEE TIFS 2018, section 3).

    Of a linear layer u = W h + b, one image's gradient has dW = du h^T and db = du, so h is dW^T db over
    the squared length of db: the least-squares mean of what each row says.

    The layer must be the first one, work on all pixels, and have a bias that was sent; the record
    must be of one image and one step.
    """

    name: ClassVar[str] = "analytic"

    def _solve(self, problem: Problem, report: Callable[[int], None], job: Job) -> Solved:
        update = problem.update
        if update.images > 1 or update.local_steps > 1:
            raise UsageError(
                f"analytic is for one image and one step, got {update.images} and {update.local_steps}."
            )
        if problem.known is None:
            raise UsageError('analytic does not look for labels; use labels="infer".')
        module = problem.client.module
        first = next((part for part in module.named_modules() if list(part[1].parameters(False))), None)
        values = {name: (low + problem.evidence.high[name]) / 2 for name, low in problem.evidence.low.items()}
        prefix = short(first[0] + ".") if first is not None and first[0] else ""
        weight, bias = values.get(f"{prefix}weight"), values.get(f"{prefix}bias")
        shape = (len(problem.starts), 1, update.channels, *update.size)
        pixels = shape[2] * shape[3] * shape[4]
        if first is None or not isinstance(first[1], nn.Linear) or weight is None or bias is None:
            raise UsageError("analytic needs a linear first layer whose matrix and bias were sent.")
        if weight.shape[2] != pixels:
            raise UsageError(f"analytic needs a first layer on all {pixels} values, got {weight.shape[2]}.")
        h = torch.einsum("mo,moi->mi", bias, weight) / bias.square().sum(1, keepdim=True)
        x = h.view(shape)
        if isinstance(module, Scaled):
            x = x * module.std + module.mean
        x = x.mean(2, keepdim=True) if problem.colours < update.channels else x
        y = F.one_hot(problem.known, update.classes).to(x)
        count = len(problem.starts)
        return Solved(x=x, y=y, steps=[1] * count, ends=["closed form"] * count, history=[])
