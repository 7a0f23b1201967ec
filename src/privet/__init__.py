"""privet decides who can learn from your images.

    import privet

    images = privet.open_images("photos")
    privet.publish(images, privet.SEM.preset("cpu"), Path("protected"), runtime=privet.Runtime.find())

Names are loaded when they are first used, so that importing privet does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from privet.version import VERSION

__version__ = VERSION

_HOMES = {
    "images": ("Budget", "ImageSet", "open_images", "write_images"),
    "models": ("KeyedStem", "create_model", "load_model", "save_model"),
    "learning": (
        "Job",
        "Learner",
        "Runtime",
        "Treatment",
        "Update",
        "learn",
        "load_update",
        "save_update",
        "study",
    ),
    "leakage": ("DLG", "GRNN", "IG", "Analytic", "Embedder", "Gallery", "Inversion"),
    "protection": (
        "AR",
        "CUDA",
        "EM",
        "LSP",
        "OPS",
        "REM",
        "SEM",
        "TAP",
        "KeyedEM",
        "Protection",
        "RandomNoise",
        "publish",
    ),
    "recovery": ("Recovery", "create_recovery", "restore"),
    "licensing": ("Licence", "Vendor", "load_licence", "read_licence"),
    "audit": ("Audit", "Clients", "LeakagePlan", "Plan", "audit_leakage", "plan", "run_audit"),
    "report": ("write_leakage_report", "write_report"),
    "errors": ("PrivetError",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [*_HOME, "__version__"]

if TYPE_CHECKING:
    from privet.audit import Audit as Audit
    from privet.audit import Clients as Clients
    from privet.audit import LeakagePlan as LeakagePlan
    from privet.audit import Plan as Plan
    from privet.audit import audit_leakage as audit_leakage
    from privet.audit import plan as plan
    from privet.audit import run_audit as run_audit
    from privet.errors import PrivetError as PrivetError
    from privet.images import Budget as Budget
    from privet.images import ImageSet as ImageSet
    from privet.images import open_images as open_images
    from privet.images import write_images as write_images
    from privet.leakage import DLG as DLG
    from privet.leakage import GRNN as GRNN
    from privet.leakage import IG as IG
    from privet.leakage import Analytic as Analytic
    from privet.leakage import Embedder as Embedder
    from privet.leakage import Gallery as Gallery
    from privet.leakage import Inversion as Inversion
    from privet.learning import Job as Job
    from privet.learning import Learner as Learner
    from privet.learning import Runtime as Runtime
    from privet.learning import Treatment as Treatment
    from privet.learning import Update as Update
    from privet.learning import learn as learn
    from privet.learning import load_update as load_update
    from privet.learning import save_update as save_update
    from privet.learning import study as study
    from privet.licensing import Licence as Licence
    from privet.licensing import Vendor as Vendor
    from privet.licensing import load_licence as load_licence
    from privet.licensing import read_licence as read_licence
    from privet.models import KeyedStem as KeyedStem
    from privet.models import create_model as create_model
    from privet.models import load_model as load_model
    from privet.models import save_model as save_model
    from privet.protection import AR as AR
    from privet.protection import CUDA as CUDA
    from privet.protection import EM as EM
    from privet.protection import LSP as LSP
    from privet.protection import OPS as OPS
    from privet.protection import REM as REM
    from privet.protection import SEM as SEM
    from privet.protection import TAP as TAP
    from privet.protection import KeyedEM as KeyedEM
    from privet.protection import Protection as Protection
    from privet.protection import RandomNoise as RandomNoise
    from privet.protection import publish as publish
    from privet.recovery import Recovery as Recovery
    from privet.recovery import create_recovery as create_recovery
    from privet.recovery import restore as restore
    from privet.report import write_leakage_report as write_leakage_report
    from privet.report import write_report as write_report


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"privet has no {name!r}; it has {', '.join(sorted(_HOME))}.")
    return getattr(importlib.import_module(f"privet.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
