"""UEraser: training on the hardest of strong distortions."""

from __future__ import annotations

from dataclasses import dataclass, replace

from privet.learning.train import Learner
from privet.recovery.base import Recovery


@dataclass(frozen=True)
class UEraser(Recovery):
    """UEraser (Qin et al., arXiv 2303.15127): a way of training that shortcuts do not survive.

    Every view is distorted (`privet.images.distort`: brightness, contrast and colours by fractal
    maps, one operation of TrivialAugment, JPEG). In the first `share` of the epochs the learner
    learns, of several distortions of each image, the one that it finds hardest; afterwards any.

    Deviations: the authors compress with JPEG against those protections that they know to need it
    (TAP, AR). A recovery is not told which protection it faces, so here half of all distortions end
    with JPEG, whatever the protection. The hardest is found by the frozen network, and learned alone;
    they train on all at once, and let only the highest loss count. An operation of TrivialAugment is
    drawn for each image, not for a batch.

    Attributes:
        draws: distortions of each image; 1 is the authors' UEraser-Lite.
        share: of the epochs; theirs is 50 of 200, and in UEraser-Max all of them.
    """

    draws: int = 5
    share: float = 0.25

    @property
    def name(self) -> str:
        return "ueraser-lite" if self.draws == 1 else "ueraser-max" if self.share == 1 else "ueraser"

    @property
    def trains(self) -> bool:
        return True

    def adapt(self, learner: Learner) -> Learner:
        return replace(learner, distort=True, draws=self.draws, hard_share=self.share)
