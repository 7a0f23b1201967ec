"""Audits: a grid of learners with controls, and what it says."""

from privet.audit.flags import Facts, Flag
from privet.audit.leakage import LeakageAudit, audit_leakage
from privet.audit.leakage_plan import Clients, LeakagePlan
from privet.audit.licence import LicenceAudit, audit_licence
from privet.audit.licence_plan import LicencePlan, Seat
from privet.audit.run import Audit, run_audit
from privet.audit.store import Cell, Plan, RunStore, plan
from privet.audit.verdict import Grade, Verdict

__all__ = [
    "Audit",
    "Cell",
    "Clients",
    "Facts",
    "Flag",
    "Grade",
    "LeakageAudit",
    "LeakagePlan",
    "LicenceAudit",
    "LicencePlan",
    "Plan",
    "RunStore",
    "Seat",
    "Verdict",
    "audit_leakage",
    "audit_licence",
    "plan",
    "run_audit",
]
