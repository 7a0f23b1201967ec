"""Protections, one a file, and their names."""

from privet.protection.base import Job, Protection
from privet.protection.em import EM
from privet.protection.publication import Publication, publish
from privet.protection.random_noise import RandomNoise
from privet.protection.rem import REM
from privet.protection.sem import SEM

__all__ = ["EM", "METHODS", "REM", "SEM", "Job", "Protection", "Publication", "RandomNoise", "publish"]

METHODS: dict[str, type[Protection]] = {method.name: method for method in (EM, SEM, REM, RandomNoise)}
