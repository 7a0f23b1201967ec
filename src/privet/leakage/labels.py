"""Labels from an update alone: the last layer's gradient says how often each class occurred.

With z the logits, p their softmax and h the features before the last layer, the mean cross-entropy of
B images has db_c = (1/B) sum_i (p_ic - [y_i = c]) and dW_c = (1/B) sum_i (p_ic - [y_i = c]) h_i. Of a clipped
update both are smaller by an unknown factor, which the classes that do not occur give away: there db_c = mean p_c.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from privet.errors import UsageError
from privet.leakage.client import Client
from privet.leakage.objective import scaled_down
from privet.learning.update import Update
from privet.seeds import generator

DUMMIES = 64  # random images from which the classes' expected probabilities are estimated
SURE = 2.0  # standard deviations of noise that are not taken for more


@dataclass(frozen=True, kw_only=True, eq=False)
class Head:
    """What was sent for the network's last layer.

    Attributes:
        weight: (classes, features), or None if it was not sent.
        bias: (classes,), or None.
    """

    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def of(cls, update: Update) -> Head:
        """Find the last layer: the last matrix with a row for each class.

        Raises:
            UsageError: there is none.
        """
        names = [
            name.removesuffix("weight")
            for name, tensor in update.weights.items()
            if name.endswith("weight") and tensor.ndim == 2 and tensor.shape[0] == update.classes
        ]
        values, _ = update.as_gradient()
        prefix = names[-1] if names else ""
        weight, bias = values.get(f"{prefix}weight"), values.get(f"{prefix}bias")
        if not names or (weight is None and bias is None):
            raise UsageError(
                "Nothing was sent of a last layer with a row for each class, so the labels cannot be inferred; "
                'use labels="joint".'
            )
        return cls(weight=weight, bias=bias)


def by_sign(head: Head) -> int:
    """Return the label of a single image: the only class whose bias would rise (iDLG).

    Zhao et al., arXiv 2001.02610. Without the bias the row sums take its place, which needs features
    of one sign; the paper's rule.
    """
    if head.bias is not None:
        return int(head.bias.argmin())
    assert head.weight is not None
    return int(head.weight.sum(1).argmin())


def by_smallest(head: Head, images: int) -> Tensor:
    """Return the classes with the smallest entries: labels that are all different (Yin et al.).

    See through gradients, arXiv 2104.07586, section 3.2; features must not be negative.
    """
    if head.weight is None:
        raise UsageError("The last layer's matrix was not sent, so Yin's rule cannot be applied.")
    if images > len(head.weight):
        raise UsageError(f"{images} images cannot have different labels of {len(head.weight)}.")
    return head.weight.min(1).values.argsort()[:images].sort().values


def by_counts(
    head: Head, images: int, probabilities: Tensor, *, clipped: bool = False, noise: float = 0.0
) -> Tensor:
    """Return labels by how many of each there must be: n_c = B (mean p_c - db_c).

    Args:
        head: with a bias.
        images: B.
        probabilities: the network's expected mean p, (classes,), as on random images.
        clipped: whether what was sent was scaled down by an unknown factor.
        noise: standard deviation of the noise on each value.
    """
    if head.bias is None:
        raise UsageError("The last layer's bias was not sent, so labels cannot be counted by it.")
    slopes = head.bias.to(probabilities)
    if clipped:
        slopes = unclipped(slopes, probabilities, images, slopes.new_full((1,), noise))
    return labels_of(images * (probabilities - slopes), images)


def by_rows(
    head: Head,
    images: int,
    probabilities: Tensor,
    features: float,
    *,
    clipped: bool = False,
    noise: float = 0.0,
) -> Tensor:
    """Return labels by counts from the matrix alone: n_c = B (mean p_c - rowsum(dW_c) / O) (Geng et al.).

    arXiv 2110.09074, section 4.1; O is the mean sum of the features. The rest is as for `by_counts`.
    """
    if head.weight is None:
        raise UsageError("The last layer's matrix was not sent, so Geng's rule cannot be applied.")
    slopes = head.weight.sum(1).to(probabilities) / features
    if clipped:
        spread = noise * head.weight.shape[1] ** 0.5 / abs(features)
        slopes = unclipped(slopes, probabilities, images, slopes.new_full((1,), spread))
    return labels_of(images * (probabilities - slopes), images)


def unclipped(slopes: Tensor, probabilities: Tensor, images: int, noise: Tensor) -> Tensor:
    """Return db as it was before it was clipped, (..., classes).

    A class that does not occur has db_c = s mean p_c, with s the factor; one that does has less. So the largest
    db_c / mean p_c, less what noise may have added, is a first guess of s. Counts that make use of it say which classes
    do not occur, and the sum of db over those, divided by that of mean p, is s: no single probability is well known.
    Where every class occurs this is less than s.

    Args:
        slopes: db as it was sent, (..., classes).
        probabilities: the network's expected mean p, (..., classes).
        images: B.
        noise: standard deviation of the noise on `slopes`, (..., 1).
    """
    guess = ((slopes - SURE * noise) / probabilities).amax(-1, keepdim=True)
    guess = torch.where(guess > 0, guess, 1.0).clamp_max(1.0)
    absent = (slopes > 0) & (images * (probabilities - slopes / guess) < 0.5)
    sent, whole = (torch.where(absent, one, 0.0).sum(-1, keepdim=True) for one in (slopes, probabilities))
    return slopes / torch.where(sent > 0, sent / whole, guess).clamp_max(1.0)


def labels_of(counts: Tensor, images: int) -> Tensor:
    """Return `images` labels, sorted, whose numbers are nearest to these counts, (classes,)."""
    counts = counts.double().clamp_min(0)
    whole = counts.floor().long()
    while int(whole.sum()) > images:
        whole[(whole - counts).masked_fill(whole == 0, -torch.inf).argmax()] -= 1
    while int(whole.sum()) < images:
        whole[(counts - whole).argmax()] += 1
    return torch.arange(len(counts)).repeat_interleave(whole)


@torch.no_grad()
def count_again(
    labels: Tensor, bias: Tensor, client: Client, x: Tensor, *, clipped: Tensor, noise: Tensor
) -> Tensor:
    """Return the labels by counts from images that are nearer to the truth than random ones.

    Args:
        labels: as they were counted before, (members, images).
        bias: what was sent for the last layer's, (members, classes).
        client: of these members.
        x: what they have found so far, (members, images, channels, height, width).
        clipped: whose updates were scaled down by an unknown factor, (members,).
        noise: standard deviation of the noise on each value, (members,).

    Returns:
        (members, images); an image keeps its label if there is still one to keep.
    """
    probabilities = client.logits(x).softmax(2).mean(1)
    whole = unclipped(bias, probabilities, x.shape[1], noise[:, None])
    slopes = torch.where(clipped[:, None], whole, bias)
    again = labels.clone()
    for member, counts in enumerate(x.shape[1] * (probabilities - slopes)):
        left = Counter(labels_of(counts.cpu(), x.shape[1]).tolist())
        lost = []
        for image, label in enumerate(labels[member].tolist()):
            if left[label]:
                left[label] -= 1
            else:
                lost.append(image)
        again[member, lost] = torch.tensor(sorted(left.elements()), dtype=again.dtype, device=again.device)
    return again


@torch.no_grad()
def infer_labels(update: Update, network: nn.Module, *, aware: bool = True) -> Tensor:
    """Return the labels that an update gives away, (images,), in the order of their numbers.

    One image: by sign. More: by counts, with what the network makes of random images; by rows if the
    bias was not sent.

    Args:
        update: the record.
        network: the client's.
        aware: whether to make use of it that the update was clipped.

    Raises:
        UsageError: nothing was sent of the last layer.
    """
    head = Head.of(update)
    if update.images == 1:
        return torch.tensor([by_sign(head)])
    client = Client.of([update], network, device=torch.device("cpu"), dtype=torch.float32)
    random = generator(0, "images to infer labels with")
    x = torch.rand(1, DUMMIES, update.channels, *update.size, generator=random)
    probabilities = client.logits(x)[0].softmax(1).mean(0)
    values, treatment = update.as_gradient()
    clipped = aware and scaled_down(values, treatment)
    noise = treatment.noise_scale * (2**0.5 if treatment.noise == "laplace" else 1.0)
    if head.bias is not None:
        return by_counts(head, update.images, probabilities, clipped=clipped, noise=noise)
    return by_rows(head, update.images, probabilities, _features(client, x), clipped=clipped, noise=noise)


def _features(client: Client, x: Tensor) -> float:
    """Return the mean sum of the features before the last linear layer."""
    sums: list[float] = []
    layers = [part for part in client.module.modules() if isinstance(part, nn.Linear)]
    hook = layers[-1].register_forward_pre_hook(lambda _, inputs: sums.append(float(inputs[0].sum(1).mean())))
    parameters = {name: value[0] for name, value in {**client.parameters, **client.buffers}.items()}
    torch.func.functional_call(client.module, parameters, (x[0],))
    hook.remove()
    return sums[0]
