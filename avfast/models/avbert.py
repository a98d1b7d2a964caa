"""AVBERT: clips of a long video through CNNs, each modality through a transformer, and both through a third.

Lee et al., Parameter Efficient Multimodal Transformers for Video Representation Learning, ICLR 2021.

A video is T clips. CNNs turn each clip into x_v and x_a, transformers of one modality these into y_v and y_a, with a
summary (BOS) in front, and a multimodal one [y_v; y_a] into z. Some clips are masked, the same in both modalities. Each
transformer's output there is to tell which clip was masked from similar ones (masked embedding prediction, MEP).
Classifiers tell pairs of outputs of one video from those of two (correct pair prediction, CPP); a multimodal pair of
two videos is what the transformer makes of both. One masked pass serves all.

The released code has no pre-training. What paper and code differ in or leave open:

====================  ===================  =====================  ======================================================
keyword, topic        paper                released code          here
====================  ===================  =====================  ======================================================
cnn                   SlowFast, ResNet-50  other, see nn/         "paper"
adapter               not told             Linear and LayerNorm   as released; x is its output, and a target of MEP
mask_ratio            not told             none                   0.15 as BERT, at least one clip
masks                 not told             none                   "pool": at the same places in all videos of a pool;
                                                                  else masks would tell a pair of two videos
mask vector           not told             none                   learned, one per modality, in place of x; always
target_gradient       "end to end"         none                   True: the CNNs learn from the targets of MEP too
num_negatives         not told             none                   64 without replacement; "current_..." take all
negatives             contradicts itself   none                   see :func:`.avbert_losses.sampling_weights`
multimodal negatives  not told             none                   those of the modality's own term
pool_size             "mini-batch"         none                   of a process; fixed, N processes equal one
cross_rank            not told             none                   False: negatives of the process
MEP heads             not told             none                   one per transformer; no temperature
mep_hidden            not told             none                   D
cpp_depth             not told             none                   2 layers, one classifier each of y and of z
cpp_positions         two                  none                   2, distinct, the same of both modalities
deranged z            not told             none                   inputs are re-paired: each output has seen both sides
dropout               not told             0.1                    0; of attention, its output, MLPs and embeddings
eps                   not told             1e-12                  1e-12
initial values        "normal"             N(0, 0.01)             embeddings N(0, 0.02), Linear N(0, 0.01), biases 0
frozen (B.6)          half-way             none                   what layers share with a frozen transformer goes on
====================  ===================  =====================  ======================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avfast.hub import HubMixin
from avfast.models.avbert_draws import AVBERTDraws, Masks, Sampling
from avfast.models.avbert_embed import Adapter, TimeEmbedding, fixed, outputs_at, take
from avfast.models.avbert_losses import Drawn, Negatives, PairClassifier, PredictionHead, Terms, draw_negatives, means
from avfast.models.contract import Features, Figures, Output
from avfast.nn import AudioResNet, SharedLowRankTransformer, SlowFast, VideoResNet
from avfast.nn.bottleneck import Bottleneck, Norm
from avfast.nn.shared_transformer import Sharing
from avfast.packing import take_rows
from avfast.random import DrawKey
from avfast.released import avbert
from avfast.tensors import float32_weights, untraced

if TYPE_CHECKING:
    from avfast.data.frontend_clips import ClipsFrontend

NAMES = ("visual", "audio")  # in the order of the multimodal sequence
Modality = Literal["visual", "audio"]
Fusion = Literal["early", "mid", "late"]


class AVBERT(nn.Module, HubMixin):
    """AVBERT (see the head of this file).

    Its parts work alone: ``visual_cnn`` and ``audio_cnn`` on clips, :meth:`encode` on one modality or both.

    Args:
        num_clips: of a video, T. :meth:`encode` takes fewer too.
        clip_frames: frames of a clip, t.
        img_size: height and width of a frame in pixels.
        audio_size: spectrogram of a clip (frames, mel bins).
        embed_dim: D.
        depth: layers of each transformer, L; of those of early and late fusion 2 L.
        num_heads: heads.
        mlp_ratio: hidden width of the MLPs over D.
        cnn: ``"paper"``: SlowFast and a ResNet-50 of half the width; ``"released"``: the released code's.
        cnn_norm: ``"batch"``; ``"sync"``, with which N processes equal one; or ``"group"``, with which no result
            depends on the rest of the batch (but what tells clips apart is small beside what they share, and learning
            is slow).
        visual_args: overrides for :class:`~avfast.nn.SlowFast` or :class:`~avfast.nn.VideoResNet`, such as ``width``.
        audio_args: for :class:`~avfast.nn.AudioResNet`.
        sharing: of weights between layers and transformers, see :class:`~avfast.nn.SharedLowRankTransformer`.
        rank: of the factors that ``"part"`` has.
        fusion: ``"mid"``: transformers of one modality, then one of both; ``"early"``: one of both; ``"late"``: one of
            each modality, and none of both.
        modality_embedding: the multimodal transformer's input tells modalities apart (B.5).
        dropout: see the head.
        eps: of all LayerNorms.
        init_std: of linear weights at first; a narrow model wants more.
        time_std: of time embeddings at first, beside clip embeddings of 1.
        mask_ratio: share of masked clips.
        masks: videos of a pool are masked at the same places (``"pool"``), or each at its own (``"video"``).
        target_gradient: MEP trains the CNNs through its targets too.
        multimodal_mep: MEP of the multimodal transformer (B.3).
        negatives: ``"similar"``, ``"dissimilar"``, ``"current_sequence"`` (the video's other clips) or
            ``"current_minibatch"`` (all other clips), of the same modality.
        num_negatives: so many that the first two draw, K.
        pool_size: so many consecutive videos of the global batch are a pool, within which negatives are drawn and
            videos re-paired; default a process's batch. If it divides that, N processes equal one.
        cross_rank: negatives come from all processes; the pool of negatives is then the global batch by default.
        mep_hidden: width within the heads of MEP, default D.
        mep_dim: width in which outputs and clips are compared, P.
        cpp: correct pair prediction.
        cpp_weight: its weight, alpha.
        cpp_positions: clips whose outputs are classified beside BOS (B.4).
        cpp_depth: linear layers of a classifier.
        frozen: ``"audio"`` or ``"visual"``: in the first half of the training only this CNN and transformer learn, by
            their MEP; in the second half all others do (B.6). A draw without a key is of the first.
        frontend: overrides for :class:`~avfast.data.ClipsFrontend`.

    Raises:
        ValueError: on settings that contradict each other.
    """

    passes = ("joint",)
    sources: tuple[str, ...] = ()
    contrasts = False  # clips of one modality train it

    @float32_weights
    def __init__(
        self,
        *,
        num_clips: int = 30,
        clip_frames: int = 32,
        img_size: int = 112,
        audio_size: tuple[int, int] = (220, 128),
        embed_dim: int = 768,
        depth: int = 6,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        cnn: Literal["paper", "released"] = "paper",
        cnn_norm: Norm = "batch",
        visual_args: dict | None = None,
        audio_args: dict | None = None,
        sharing: Sharing = "part",
        rank: int = 128,
        fusion: Fusion = "mid",
        modality_embedding: bool = True,
        dropout: float = 0.0,
        eps: float = 1e-12,
        init_std: float = 0.01,
        time_std: float = 0.02,
        mask_ratio: float = 0.15,
        masks: Masks = "pool",
        target_gradient: bool = True,
        multimodal_mep: bool = True,
        negatives: Negatives = "similar",
        num_negatives: int = 64,
        pool_size: int | None = None,
        cross_rank: bool = False,
        mep_hidden: int | None = None,
        mep_dim: int = 256,
        cpp: bool = True,
        cpp_weight: float = 1.0,
        cpp_positions: int = 2,
        cpp_depth: int = 2,
        frozen: Modality | None = None,
        frontend: dict | None = None,
    ) -> None:
        super().__init__()
        if cnn not in ("paper", "released"):
            raise ValueError(f"cnn must be paper or released, got {cnn!r}")
        if fusion not in ("early", "mid", "late"):
            raise ValueError(f"fusion must be early, mid or late, got {fusion!r}")
        if frozen not in (None, *NAMES) or (frozen and fusion == "early"):
            raise ValueError(f"frozen must be visual, audio or None, and None with early fusion, got {frozen!r}")
        if fusion == "early" and not (cpp or multimodal_mep):
            raise ValueError("early fusion without multimodal_mep and without cpp has no loss")
        self.sampling = Sampling(
            num_clips, mask_ratio, masks, negatives, num_negatives, pool_size, cross_rank,
            cpp_positions if cpp else None,
        )  # fmt: skip
        self.fusion, self.frozen, self.target_gradient, self.cpp_weight = fusion, frozen, target_gradient, cpp_weight
        self.clip_shapes = {"visual": (3, clip_frames, img_size, img_size), "audio": tuple(audio_size)}
        self.frontend_args = {
            "num_clips": num_clips, "frames_per_clip": clip_frames, "image_size": img_size,
            "num_frames": audio_size[0], "num_mel_bins": audio_size[1], **(frontend or {}),
        }  # fmt: skip
        video = SlowFast if cnn == "paper" else VideoResNet
        self.visual_cnn = video(**{"norm": cnn_norm, **(visual_args or {})})
        self.audio_cnn = AudioResNet(**{"norm": cnn_norm, "variant": cnn, **(audio_args or {})})
        self.adapters = nn.ModuleDict({name: Adapter(self.cnn(name).out_features, embed_dim, eps) for name in NAMES})
        parts = {"early": ("fused",), "mid": (*NAMES, "fused"), "late": NAMES}[fusion]
        self.times = nn.ModuleDict()
        for part in parts:
            kinds = 2 if part == "fused" and modality_embedding else 0
            self.times[part] = TimeEmbedding(num_clips + 1, embed_dim, kinds, eps, dropout)
        self.transformer = SharedLowRankTransformer(
            embed_dim, [depth if fusion == "mid" else 2 * depth] * len(parts), num_heads, mlp_ratio, sharing=sharing,
            rank=rank, dropout=dropout, eps=eps, init_std=init_std,
        )  # fmt: skip
        self.index = {part: i for i, part in enumerate(parts)}
        self.mep_heads, self.cpp_heads = nn.ModuleDict(), nn.ModuleDict()
        for part in parts:
            if part != "fused" or multimodal_mep:
                self.mep_heads[part] = PredictionHead(embed_dim, mep_hidden or embed_dim, mep_dim)
        if cpp and fusion != "early":
            self.cpp_heads["unimodal"] = PairClassifier(embed_dim, cpp_depth)
        if cpp and fusion != "late":
            self.cpp_heads["multimodal"] = PairClassifier(embed_dim, cpp_depth)
        self._initialise(init_std, time_std)

    @torch.no_grad()
    def _initialise(self, init_std: float, time_std: float) -> None:
        for part in (self.adapters, self.mep_heads, self.cpp_heads):
            for linear in part.modules():
                if isinstance(linear, nn.Linear):
                    linear.weight.normal_(std=init_std)
                    if linear.bias is not None:
                        linear.bias.zero_()
        for module in (*self.adapters.values(), *self.times.values()):
            for name, vectors in module.named_parameters(recurse=False):
                vectors.normal_(std=time_std if name == "positions" else 0.02)

    @cached_property
    def frontend(self) -> ClipsFrontend:
        """What turns waveforms and frames into this model's inputs."""
        from avfast.data import ClipsFrontend

        return ClipsFrontend(**self.frontend_args)

    def cnn(self, name: str) -> SlowFast | VideoResNet | AudioResNet:
        """``visual_cnn`` or ``audio_cnn``."""
        return self.visual_cnn if name == "visual" else self.audio_cnn

    def adapter(self, name: str) -> Adapter:
        """A modality's."""
        return cast(Adapter, self.adapters[name])

    def visible(self, progress: float) -> float:
        """Share of clips that are not masked."""
        return 1 - self.sampling.num_masked / self.sampling.num_clips

    def draw(self, batch_size: int, generator: torch.Generator | None = None, **given: Any) -> AVBERTDraws:
        """Every random choice of a pass; for what can be given see :meth:`.avbert_draws.Sampling.draw`.

        Args:
            batch_size: videos on this process.
            generator: seeds a stand-alone draw; default torch's global generator.
            given: ``key``, ``has_audio``, ``has_visual`` ... A video that lacks a modality counts in the MEP of the
                other alone.

        Raises:
            ValueError: in training with CPP, on a batch of one.
        """
        draws = self.sampling.draw(batch_size, generator, training=self.training, **given)
        if self.frozen is None:
            return draws
        key: DrawKey | None = given.get("key")
        return replace(draws, half="second" if key is not None and key.progress >= 0.5 else "first")

    @untraced
    def placed(self, draws: AVBERTDraws | None, inputs: dict[str, Tensor | None], x: Tensor) -> AVBERTDraws:
        """Draws on the inputs' device; None are drawn, without what is not given."""
        if draws is None:
            has = [None if inputs[name] is not None else [False] * len(x) for name in NAMES]
            draws = self.draw(len(x), has_visual=has[0], has_audio=has[1])
        return draws.to(x.device)

    # The model.

    def checked(self, inputs: dict[str, Tensor | None], any_size: bool = False) -> Tensor:
        """One of the inputs; raises ValueError unless all have the right shape, or of ``any_size`` the right axes."""
        given = {name: x for name, x in inputs.items() if x is not None}
        if not given:
            raise ValueError("give audio, visual or both")
        sizes = {name: tuple(x.shape[:2]) for name, x in given.items()}
        if len(sizes) == 2 and sizes["audio"] != sizes["visual"]:
            raise ValueError(f"audio and visual must pair up, got (B, T) = {sizes['audio']} and {sizes['visual']}")
        most = self.sampling.num_clips
        for name, x in given.items():
            shape, features = self.clip_shapes[name], self.cnn(name).out_features
            if not x.is_floating_point():
                raise ValueError(f"{name} must be floating point, got {x.dtype}; model.frontend makes it so")
            other = any_size and x.ndim == 2 + len(shape) and (name == "audio" or x.shape[2] == 3)
            if x.shape[2:] not in (shape, (features,)) and not other:
                raise ValueError(f"{name} must be (B, T, {', '.join(map(str, shape))}), got {tuple(x.shape)}")
            if not (1 if any_size else most) <= x.shape[1] <= most:
                raise ValueError(f"{name} must be of {most} clips, got {x.shape[1]}")
        return next(iter(given.values()))

    def clips(self, name: str, given: Tensor) -> Tensor:
        """Embeddings x ``(n, T, D)`` of clips, or of the CNN's outputs ``(n, T, C)``."""
        if given.ndim > 3:
            given = self.cnn(name)(given.flatten(0, 1)).unflatten(0, given.shape[:2])
        return self.adapter(name)(given)

    def contextual(self, part: str, factors: Any, *sequences: Tensor) -> Tensor:
        """Outputs of a transformer for sequences ``(n, L, D)`` with BOS, one after another."""
        return self.transformer(self.times[part](*sequences), self.index[part], factors)

    def forward(
        self, audio: Tensor | None = None, visual: Tensor | None = None, draws: AVBERTDraws | None = None
    ) -> Output:
        """One pre-training pass.

        Args:
            audio: ``(B, T, frames, mels)`` log-mel of the clips.
            visual: ``(B, T, 3, t, H, W)`` normalised clips.
            draws: from :meth:`draw`; default drawn here, without what is not given.

        Returns:
            Losses ``mep_visual``, ``mep_audio``, ``mep_multimodal``, ``cpp_unimodal`` and ``cpp_multimodal``, as far as
            the settings have them; the metric ``mep_accuracy``, the share of masked clips that are told from all their
            negatives, mean over the transformers, and ``cpp_accuracy`` of the classifiers.
        """
        inputs = {"visual": visual, "audio": audio}
        first = self.checked(inputs)
        if draws is None or draws.masked.device != first.device:
            draws = self.placed(draws, inputs, first)
        if draws.masked.shape[0] != first.shape[0]:
            raise ValueError(f"draws are of {draws.masked.shape[0]} videos, the batch has {first.shape[0]}")
        for name, rows in draws.rows().items():
            if inputs[name] is None and (rows is None or rows.shape[0]):
                raise ValueError(f"the draws mask {name}, which is not given; draw with has_{name}=[False] * B")
        factors, terms = self.transformer.factors(), {}
        sequences, drawn, masked = {}, {}, {}
        for i, name in enumerate(NAMES):
            if draws.half == "first" and name != self.frozen:
                continue
            rows, learns = draws.rows()[name], draws.half != "second" or name != self.frozen
            masked[name] = take(draws.masked, rows)
            given = inputs[name]
            given = first.new_zeros(0, self.sampling.num_clips, *self.clip_shapes[name]) if given is None else given
            with nullcontext() if learns else fixed(self.cnn(name)):
                x = self.clips(name, take(given, rows))
                sequences[name] = self.adapter(name).sequence(x, masked[name])
                if name in self.index:
                    sequences[name] = self.contextual(name, factors, sequences[name])
            drawn[name] = draw_negatives(
                x if self.target_gradient else x.detach(), take(draws.places, rows), masked[name],
                None if draws.noise is None else take(draws.noise[:, i], rows),
                self.sampling.negatives, self.sampling.num_negatives, self.sampling.cross_rank,
            )  # fmt: skip
            if name in self.mep_heads and learns:
                terms[f"mep_{name}"] = self.mep_heads[name](outputs_at(sequences[name], masked[name] + 1), *drawn[name])
        if draws.half != "first":
            terms |= self.pairs(sequences, masked, drawn, draws, factors)
        return self.output(terms)

    def pairs(
        self,
        sequences: dict[str, Tensor],
        masked: dict[str, Tensor],
        drawn: dict[str, Drawn],
        draws: AVBERTDraws,
        factors: Any,
    ) -> dict[str, Terms]:
        """The terms that look at both modalities, of the videos that have both."""
        terms: dict[str, Terms] = {}
        rows = [None if draws.pairs is None else draws.pairs[i] for i in range(2)]
        both = [take(sequences[name], some) for name, some in zip(NAMES, rows, strict=True)]
        deranged = None
        if draws.partner is not None and draws.positions is not None:
            at = F.pad(draws.positions + 1, (1, 0))  # BOS, then the positions
            matched = [take(x, draws.matched) for x in both]
            deranged = [matched[0], take_rows(both[1], draws.partner)]
            if "unimodal" in self.cpp_heads:
                shown = ([outputs_at(x, at) for x in pair] for pair in (matched, deranged))
                terms["cpp_unimodal"] = self.cpp_heads["unimodal"](*shown)
        if "fused" not in self.mep_heads and "multimodal" not in self.cpp_heads:
            return terms
        whole = both if deranged is None else [torch.cat(some) for some in zip(both, deranged, strict=True)]
        halves = self.contextual("fused", factors, *whole).chunk(2, 1)
        count = both[0].shape[0]
        if "fused" in self.mep_heads:
            parts = []
            for name, z, some in zip(NAMES, halves, rows, strict=True):
                own, chosen = take(drawn[name].own, some), take(drawn[name].chosen, some)
                outputs = outputs_at(z[:count], take(masked[name], some) + 1)
                parts.append(self.mep_heads["fused"](outputs, drawn[name].clips, own, chosen))
            terms["mep_multimodal"] = parts[0] + parts[1]
        if deranged is not None and "multimodal" in self.cpp_heads:
            matched, deranged = [take(z[:count], draws.matched) for z in halves], [z[count:] for z in halves]
            shown = ([outputs_at(z, at) for z in pair] for pair in (matched, deranged))
            terms["cpp_multimodal"] = self.cpp_heads["multimodal"](*shown)
        return terms

    def output(self, terms: dict[str, Terms]) -> Output:
        """Losses and accuracies of all processes."""
        found = means(terms)
        losses = {name: loss for name, (loss, _) in found.items()}
        weighted = [loss * (self.cpp_weight if name.startswith("cpp") else 1.0) for name, loss in losses.items()]
        metrics = {}
        for kind in ("mep", "cpp"):
            if rates := [rate for name, (_, rate) in found.items() if name.startswith(kind)]:
                metrics[f"{kind}_accuracy"] = torch.stack(rates).mean()
        return Output(torch.stack(weighted).sum(), losses, metrics)

    def encode(self, audio: Tensor | None = None, visual: Tensor | None = None) -> Features:
        """Outputs of the transformers, without masking.

        Args:
            audio: ``(B, T', frames, mels)`` or the audio CNN's outputs ``(B, T', C)``, T' at most T; or None. Clips may
                be of other sizes than in training.
            visual: ``(B, T', 3, t, H, W)`` or the visual CNN's outputs; or None.

        Returns:
            ``audio`` y_a and ``visual`` y_v ``(B, 1 + T', D)``, BOS first, and with both ``fused`` z
            ``(B, 2 + 2 T', D)``, [visual; audio]. With early fusion x with BOS in place of y; with late no z.
        """
        inputs = {"visual": visual, "audio": audio}
        self.checked(inputs, any_size=True)
        factors, found = self.transformer.factors(), {}
        for name, given in inputs.items():
            if given is not None:
                found[name] = self.adapter(name).sequence(self.clips(name, given))
                if name in self.index:
                    found[name] = self.contextual(name, factors, found[name])
        fused = None
        if len(found) == 2 and "fused" in self.index:
            fused = self.contextual("fused", factors, *(found[name] for name in NAMES))
        return Features(found.get("audio"), found.get("visual"), fused)

    def figures(self, inputs: dict[str, Tensor], draws: AVBERTDraws, output: Output) -> Figures:
        """None: it makes no pictures."""
        return Figures()

    # Training machinery.

    @property
    def has_unused_parameters(self) -> bool:
        """Whether a forward pass leaves some parameters without gradient: frozen ones, or a transformer of no loss."""
        idle = self.fusion == "mid" and "fused" not in self.mep_heads and not self.cpp_heads
        return idle or self.frozen is not None

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """``"orthogonal"``: what rotations are made of, to be trained at a tenth of the rate; and the ``"rest"``."""
        orthogonal = self.transformer.orthogonal_parameters()
        names = {id(p) for p in orthogonal}
        return {"orthogonal": orthogonal, "rest": [p for p in self.parameters() if id(p) not in names]}

    def blocks(self) -> list[nn.Module]:
        """The units of sharding: bottleneck blocks, and layers of transformers that share nothing."""
        blocks: list[nn.Module] = [m for m in self.modules() if isinstance(m, Bottleneck)]
        if self.transformer.sharing == "none":
            blocks += [*self.transformer.attention, *self.transformer.mlp]
        return blocks

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations of stages and layers in the backward pass instead of keeping them."""
        self.visual_cnn.grad_checkpointing = self.audio_cnn.grad_checkpointing = enable
        self.transformer.grad_checkpointing = enable

    def load_pretrained(self) -> None:
        """Nothing to start from: it is trained from scratch."""

    @classmethod
    def from_released(cls, checkpoint: str | Path | Mapping[str, Tensor], **settings: Any) -> AVBERT:
        """Load a released checkpoint, pre-trained or fine-tuned; classifiers are left out.

        Mask vectors, MEP's heads and CPP's, which it has none of, start anew. Arguments and errors are those of
        :meth:`avfast.AVSiam.from_released`; its 21 clips may become fewer.
        """
        return avbert.build(cls, checkpoint, settings)
