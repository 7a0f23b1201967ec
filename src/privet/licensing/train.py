"""The licensee's trainer: the release's own recipe on unlocked files, behind its stem, from its initial weights."""

from __future__ import annotations

import datetime
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import safetensors.torch

from privet.files import write_bytes
from privet.learning import Learned, Runtime, study
from privet.licensing.licence import Licence
from privet.licensing.verify import verify
from privet.progress import Progress, silent


def train(
    folder: Path,
    test: str | Path,
    licence: Licence,
    out: Path,
    *,
    runtime: Runtime,
    public: bytes | None = None,
    seed: int = 0,
    today: datetime.date | None = None,
    progress: Progress = silent,
) -> Learned:
    """Check a release and a licence, then train as the recipe says.

    The stem is applied to the stored images, of the release and of the test set, before any augmentation, and the
    network that is written works behind the same stem only. A lock is taken off the release's images alone.

    Args:
        folder: the release.
        test: clean images of the same classes.
        licence: for this release.
        out: as for `study`.
        runtime: where.
        public: as for `verify`.
        seed: the same seed gives the same network.
        today: as for `verify`.
        progress: told about files and images.

    Raises:
        PrivetError: as `verify` and `study`.
    """
    verify(folder, public=public, licence=licence, today=today, progress=progress)
    with ExitStack() as stack:
        weights = None
        if licence.weights:  # for the time of the training, where nobody else reads
            private = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="privet-")))
            weights = private / "initial.safetensors"
            write_bytes(weights, safetensors.torch.save(licence.weights), private=True)
        return study(
            folder,
            test,
            replace(licence.learner(), weights=weights),
            out,
            runtime=runtime,
            seed=seed,
            transform=licence.unlock,
            present=licence.present,
            progress=progress,
        )
