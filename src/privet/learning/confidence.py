"""How far a share can be trusted that was counted on so many."""

from __future__ import annotations

from scipy import stats


def clopper_pearson(successes: int, trials: int) -> tuple[float, float]:
    """Return the 95 % Clopper-Pearson interval of a probability."""
    low = stats.beta.ppf(0.025, successes, trials - successes + 1) if successes else 0.0
    high = stats.beta.ppf(0.975, successes + 1, trials - successes) if successes < trials else 1.0
    return float(low), float(high)


def uncertainty(trials: int) -> float:
    """Return half of that interval where it is widest, at one half."""
    low, high = clopper_pearson(trials // 2, trials)
    return (high - low) / 2
