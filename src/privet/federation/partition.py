"""Which client has which images."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from privet.errors import UsageError
from privet.seeds import derive

Index = NDArray[np.int64]

ATTEMPTS = 200
LARGEST_ALPHA = 1e6  # shares are alike to a thousandth; far beyond, their sum is no number any more


def iid(count: int, clients: int, *, seed: int = 0) -> list[Index]:
    """Deal images to clients at random, as evenly as it goes.

    Args:
        count: number of images.
        clients: number of clients.
        seed: of the deal.

    Returns:
        For each client the positions of its images, ascending.

    Raises:
        UsageError: there are fewer images than clients.
    """
    if not 1 <= clients <= count:
        raise UsageError(f"Expected from 1 client to one for each of {count} images, got {clients}.")
    order = np.random.default_rng(derive(seed, "iid")).permutation(count)
    return [np.sort(part) for part in np.array_split(order, clients)]


def dirichlet(
    labels: NDArray[np.int64], clients: int, *, alpha: float, least: int = 10, seed: int = 0
) -> list[Index]:
    """Split each class among the clients by shares drawn from a Dirichlet distribution (Hsu et al., arXiv 1909.06335).

    A small alpha gives each client few classes; a large one comes near to a random deal.

    Args:
        labels: of the images, (images,).
        clients: number of clients.
        alpha: of the distribution, above 0 and up to a million.
        least: images that every client must have; shares are drawn anew until it is so.
        seed: of the draw.

    Returns:
        For each client the positions of its images, ascending.

    Raises:
        UsageError: alpha is out of range, there are too few images, or no draw gave every client so many.
    """
    if not 0 < alpha <= LARGEST_ALPHA or clients < 1 or least * clients > len(labels):
        raise UsageError(
            f"Expected alpha above 0 and up to {LARGEST_ALPHA:g}, and at least {least} images for each client, got "
            f"{alpha} and {len(labels)} images for {clients} clients."
        )
    for attempt in range(ATTEMPTS):
        random = np.random.default_rng(derive(seed, "dirichlet", attempt))
        parts: list[list[Index]] = [[] for _ in range(clients)]
        for label in np.unique(labels):
            members = random.permutation(np.flatnonzero(labels == label))
            shares = random.dirichlet(np.full(clients, alpha))
            ends = np.floor(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
            for part, piece in zip(parts, np.split(members, ends), strict=True):
                part.append(piece)
        whole = [np.sort(np.concatenate(part)) for part in parts]
        if min(map(len, whole)) >= least:
            return whole
    raise UsageError(
        f"No Dirichlet split with alpha {alpha} gave each of {clients} clients {least} images; raise alpha or have "
        "fewer clients."
    )
