"""Reports: one JSON file for programs, one page for people, strips to look at."""

from privet.report.federation import write_federation
from privet.report.leakage import write_leakage_report
from privet.report.licence import write_licence_report
from privet.report.report import render, summarise, write_report
from privet.report.strips import strips

__all__ = [
    "render",
    "strips",
    "summarise",
    "write_federation",
    "write_leakage_report",
    "write_licence_report",
    "write_report",
]
