"""AVBERT's objectives: masked embedding prediction with content-aware negatives, and correct pair prediction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avfast.distributed import all_sum, gather_rows, world_size
from avfast.ops._shared import at_least_float32, without_autocast

Negatives = Literal["similar", "dissimilar", "current_sequence", "current_minibatch"]


class Terms(NamedTuple):
    """Sums over what a process has of a loss; :func:`means` makes a loss of the global batch of them.

    ``loss`` and ``hits``, of which the latter has no gradient, are scalars; ``total`` says of how many.
    """

    loss: Tensor
    hits: Tensor
    total: int

    def __add__(self, other: Terms) -> Terms:  # type: ignore[override]
        return Terms(self.loss + other.loss, self.hits + other.hits, self.total + other.total)


def means(terms: Mapping[str, Terms]) -> dict[str, tuple[Tensor, Tensor]]:
    """Loss and accuracy of all processes by name, in one exchange; 0 of what none of them has.

    The mean over processes of the loss is the loss of the global batch.
    """
    sums = [x for term in terms.values() for x in (term.hits, torch.full_like(term.hits, term.total))]
    hits, totals = all_sum(torch.stack(sums)).view(-1, 2).unbind(1)
    totals = totals.clamp(min=1)
    rates = hits / totals
    return {
        name: (term.loss * world_size() / totals[i], rates[i]) for i, (name, term) in enumerate(terms.items())
    }  # fmt: skip


# Negatives.


def candidates(own: Tensor, places: Tensor, masked: Tensor, num_clips: int, negatives: Negatives) -> Tensor:
    """Which clips can be negatives of the masked clips: all others of the pool, or of the video.

    Args:
        own: ``(n, 2)`` int64 pool and place in it of the videos with the masked clips.
        places: ``(N, 2)`` of those whose clips can be negatives, their own among them.
        masked: ``(n, M)`` int64 clips.
        num_clips: of each video, T.
        negatives: the strategy.

    Returns:
        ``(n, M, N T)`` bool.
    """
    pool = own[:, None, 0] == places[:, 0]
    video = pool & (own[:, None, 1] == places[:, 1])
    itself = video[:, None, :, None] & (masked[:, :, None, None] == torch.arange(num_clips, device=masked.device))
    allowed = video if negatives == "current_sequence" else pool
    return (allowed[:, None, :, None] & ~itself).flatten(2)


def sampling_weights(positives: Tensor, clips: Tensor, candidates: Tensor, negatives: Negatives) -> Tensor:
    """How likely each clip is drawn as a negative of each positive, up to a factor per positive (section 2.1).

    Euclidean distances d to the candidates are scaled to [0, 1] by their least and largest, and those outside the 2.5
    and 97.5 percentiles (the ranks next to them outwards) are dropped. The weight is 1 - d for similar negatives, d for
    dissimilar ones. (The paper says that d is the sampling probability, and that this favours similar clips: it favours
    dissimilar ones, which it calls CANS-Dissimilar and finds worse.) Where all candidates are equally far, they are
    equally likely.

    Args:
        positives: ``(..., D)``.
        clips: ``(C, D)``.
        candidates: ``(..., C)`` bool: which clips can be negatives of a positive.
        negatives: ``"similar"`` or ``"dissimilar"``.

    Returns:
        ``(..., C)`` in at least float32, without gradient; 0 for what is no candidate or dropped.
    """
    dtype = at_least_float32(positives, clips)
    with torch.no_grad(), without_autocast(clips):
        distance = torch.cdist(positives.detach().to(dtype).flatten(0, -2), clips.detach().to(dtype))
        distance = distance.view(candidates.shape)
        ranked = distance.masked_fill(~candidates, torch.inf).sort(-1).values
        last = candidates.sum(-1, keepdim=True).clamp(min=1) - 1
        dropped = last // 40  # of each side: floor of 2.5 % of the last rank
        nearest, low, high, farthest = (ranked.gather(-1, i) for i in (last * 0, dropped, last - dropped, last))
        extent = farthest - nearest
        scaled = (distance - nearest) / extent
        weight = torch.where(extent > 0, 1 - scaled if negatives == "similar" else scaled, 1.0)
        kept = candidates & (low <= distance) & (distance <= high)
        return torch.where(kept, weight, 0.0)


def choose(weight: Tensor, noise: Tensor, count: int) -> Tensor:
    """Draws negatives without replacement, each time with probabilities proportional to the weights that are left.

    The ``count`` largest sums of log weight and Gumbel noise are such a draw (Kool et al., Stochastic Beams and Where
    to Find Them, 2019).

    Args:
        weight: ``(..., C)``, 0 or more.
        noise: ``(..., C)`` independent Gumbel noise.
        count: K; where fewer weights are above 0, all these are drawn.

    Returns:
        ``(..., C)`` bool, K or fewer of them true.
    """
    best = (weight.log() + noise).topk(min(count, weight.shape[-1]), dim=-1, sorted=False)
    return torch.zeros_like(weight, dtype=torch.bool).scatter(-1, best.indices, best.values > -torch.inf)


class Drawn(NamedTuple):
    """The masked clips of a modality among its N T clips, and those that they are told from.

    ``clips`` ``(N T, D)``; ``own`` ``(n, M)`` int64; ``chosen`` ``(n, M, N T)`` bool.
    """

    clips: Tensor
    own: Tensor
    chosen: Tensor


def draw_negatives(
    x: Tensor,
    places: Tensor,
    masked: Tensor,
    noise: Tensor | None,
    negatives: Negatives,
    count: int,
    cross_rank: bool = False,
) -> Drawn:
    """The negatives of the masked clips of a modality.

    Args:
        x: ``(n, T, D)`` the clips of this process's videos.
        places: ``(n, 2)`` int64 pool and place in it.
        masked: ``(n, M)`` int64 clips.
        noise: ``(n, M, W T)`` Gumbel noise with columns by place and clip, of ``"similar"`` and ``"dissimilar"``.
        negatives: the strategy. The last two of its values take all candidates.
        count: how many the first two draw.
        cross_rank: the clips of all processes are candidates, with gradient.
    """
    everyone, places_of_all, offset = x, places, 0
    if cross_rank:
        (everyone, offset), (places_of_all, _) = gather_rows(x), gather_rows(places)
    (n, num_clips, _), clips = x.shape, everyone.flatten(0, 1)
    allowed = candidates(places, places_of_all, masked, num_clips, negatives)
    own = (offset + torch.arange(n, device=x.device))[:, None] * num_clips + masked
    if noise is None:
        return Drawn(clips, own, allowed)
    columns = noise.unflatten(-1, (-1, num_clips)).index_select(2, places_of_all[:, 1]).flatten(2)
    weight = sampling_weights(x.take_along_dim(masked[..., None], 1), clips, allowed, negatives)
    return Drawn(clips, own, choose(weight, columns, count))


# Masked embedding prediction.


class PredictionHead(nn.Module):
    """The compatibility of outputs and clips, log I(x, o) = FFN(o) . W_I x (eq. 5).

    Args:
        dim: D.
        hidden: width within the FFN, two layers with GELU.
        out: P, in which both meet.
    """

    def __init__(self, dim: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, out)
        self.target = nn.Linear(dim, out, bias=False)

    def forward(self, outputs: Tensor, clips: Tensor, own: Tensor, chosen: Tensor) -> Terms:
        """InfoNCE of outputs at masked positions (eq. 4), summed.

        Args:
            outputs: ``(n, M, D)`` of a transformer.
            clips: ``(C, D)`` what they could have been.
            own: ``(n, M)`` int64: the clips that were masked.
            chosen: ``(n, M, C)`` bool: those that each is told from.
        """
        guess = self.fc2(F.gelu(self.fc1(outputs)))
        there = self.target(clips)
        dtype = at_least_float32(guess, there)
        with without_autocast(guess):
            logits = guess.to(dtype) @ there.to(dtype).mT
            logits = logits.masked_fill(~chosen.scatter(-1, own[..., None], True), -torch.inf)
            right = logits.gather(-1, own[..., None])[..., 0]
            loss = (logits.logsumexp(-1) - right).sum()
        with torch.no_grad():
            hits = (logits <= right[..., None]).all(-1).to(dtype).sum()
        return Terms(loss, hits, own.numel())


# Correct pair prediction.


class PairClassifier(nn.Module):
    """Tells from outputs of a visual and an audio sequence whether they are of one video.

    Args:
        dim: D; ``depth - 1`` layers of this width with GELU, and one to a logit.
        depth: linear layers.
    """

    def __init__(self, dim: int, depth: int) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"cpp_depth must be at least 1, got {depth}")
        widths, layers = [2 * dim, *[dim] * (depth - 1), 1], []
        for width, following in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Linear(width, following), nn.GELU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, matched: tuple[Tensor, Tensor], deranged: tuple[Tensor, Tensor]) -> Terms:
        """Binary cross entropy (eq. 7): that of BOS, and the mean over positions; summed over pairs of both kinds.

        Args:
            matched: visual and audio outputs ``(m, 1 + S, D)`` of pairs of one video, at BOS and at S positions.
            deranged: as many of two videos.
        """
        visual, audio = (torch.cat(sides) for sides in zip(matched, deranged, strict=True))
        logits = self.layers(torch.cat([visual, audio], -1))[..., 0]
        with without_autocast(logits):
            logits = logits.to(at_least_float32(logits))
            signs = torch.ones_like(logits)
            signs[matched[0].shape[0] :] = -1.0
            errors = F.softplus(-signs * logits)
            loss = errors[:, 0].sum()
            if errors.shape[1] > 1:
                loss = loss + errors[:, 1:].mean(1).sum()
        with torch.no_grad():
            hits = (signs * logits > 0).to(logits.dtype).mean(1).sum()
        return Terms(loss, hits, logits.shape[0])
