"""What a model is to whoever trains, evaluates or shows it. No maths: models of different papers share functions.

A new model brings a file here, a line in the registry and a recipe; nothing above ``models/`` knows its paper.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from avfast.packing import PackedTokens
from avfast.tensors import to_device

if TYPE_CHECKING:
    from avfast.data.frontend import Frontend
    from avfast.random import DrawKey

D = TypeVar("D", bound="Draws")


@dataclass
class Output:
    """Result of a forward pass.

    Args:
        loss: scalar, weighted sum of ``losses``. In a distributed run the mean over processes is the global loss.
        losses: unweighted scalars by name: ``contrastive``, ``reconstruction_audio``, ``reconstruction_visual``, ...
        metrics: further scalars without gradient, such as ``contrastive_accuracy``, the share of best matches that are
            the own pair.
        reconstruction: predicted patches by modality, all ``(B, N, P)`` or the masked ones ``(B, M, P)``, of a model in
            evaluation mode; empty without that objective, and in training.
    """

    loss: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, Tensor] = field(default_factory=dict)
    reconstruction: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Features:
    """Token features ``(B, N, D)``, PackedTokens where instances keep unequal numbers, None for an absent modality."""

    audio: Tensor | PackedTokens | None
    visual: Tensor | PackedTokens | None
    fused: Tensor | PackedTokens | None


@dataclass(frozen=True, eq=False)
class Draws:
    """The random choices of one forward pass, and how its tokens are packed: all it would otherwise ask the host.

    Each model declares a record of its own with the fields that its forward pass reads: tensors, dataclasses of them,
    and values of the host. Of these, a compiled or captured pass may read all but those declared ``compare=False``,
    which differ from step to step, and what depends on the other fields alone, such as attention plans.

    Args:
        only: which of the model's ``passes`` this is.
    """

    only: str

    def tensors(self) -> list[Tensor]:
        """The tensors of all fields, always in the same order."""
        return list(_tensors(self))

    @property
    def signature(self) -> tuple:
        """What a compiled or captured pass depends on beside the values of the tensors."""
        return _signature(self)

    def to(self: D, device: torch.device | str) -> D:
        """The same on a device, in one copy for each dtype. The copy's tensors are new ones, on the same device too."""
        device, given = torch.device(device), self.tensors()
        moved: dict[int, Tensor] = {}
        for dtype in dict.fromkeys(x.dtype for x in given):
            some = [i for i, x in enumerate(given) if x.dtype is dtype]
            flat = to_device(torch.cat([given[i].flatten() for i in some]), device)
            for i, part in zip(some, flat.split([given[i].numel() for i in some]), strict=True):
                moved[i] = part.view(given[i].shape)
        return _rebuilt(self, iter([moved[i] for i in range(len(given))]))


def _tensors(record: Any) -> Iterator[Tensor]:
    for value in (getattr(record, f.name) for f in fields(record)):
        if isinstance(value, Tensor):
            yield value
        elif is_dataclass(value):
            yield from _tensors(value)


def _rebuilt(record: Any, tensors: Iterator[Tensor]) -> Any:
    changes: dict[str, Any] = {}
    for name, value in [(f.name, getattr(record, f.name)) for f in fields(record)]:
        if isinstance(value, Tensor):
            changes[name] = next(tensors)
        elif is_dataclass(value):
            changes[name] = _rebuilt(value, tensors)
    return replace(record, **changes)


def _signature(record: Any) -> tuple:
    values = [getattr(record, f.name) for f in fields(record) if f.compare]
    return tuple(
        (x.shape, x.dtype) if isinstance(x, Tensor) else _signature(x) if is_dataclass(x) else x for x in values
    )


@dataclass(frozen=True)
class Reconstruction:
    """What a model saw of a batch and made of it, on the CPU.

    Args:
        audio: by title, what is shown of each clip ``(B, frames, mels)``: the input, then what of it was seen and what
            was made of it. What is not known is NaN. Empty for a model that does not listen.
        visual: likewise ``(B, 3, H, W)``; of a video the frame in its middle.
        masked: by modality, ``(B,)`` share of masked patches.
    """

    audio: Mapping[str, Tensor]
    visual: Mapping[str, Tensor]
    masked: Mapping[str, Tensor]

    def select(self, rows: Tensor) -> Reconstruction:
        """Some clips of the batch."""
        return Reconstruction(
            *({k: x[rows] for k, x in part.items()} for part in (self.audio, self.visual, self.masked))
        )


@dataclass(frozen=True)
class AttentionMaps:
    """Where tokens that read a whole modality look, on the CPU; None and empty for a modality that is not shown.

    Args:
        audio: ``(B, frames, mels)``.
        visual: ``(B, 3, H, W)``.
        p: by layer, weights ``(B, mel patches, time patches)`` over the audio's patches.
        r: by layer, ``(B, rows, columns)`` over the frame's.
        legend: what the weights are.
    """

    audio: Tensor | None
    visual: Tensor | None
    p: Mapping[int, Tensor]
    r: Mapping[int, Tensor]
    legend: str

    def select(self, rows: Tensor) -> AttentionMaps:
        """Some clips of the batch."""
        audio, visual = (None if x is None else x[rows] for x in (self.audio, self.visual))
        p, r = ({layer: x[rows] for layer, x in part.items()} for part in (self.p, self.r))
        return AttentionMaps(audio, visual, p, r, self.legend)


@dataclass(frozen=True)
class Figures:
    """What can be shown of a batch; None for what a model does not have."""

    reconstruction: Reconstruction | None = None
    attention: AttentionMaps | None = None


class Model(Protocol):
    """A model as training, evaluation, figures and tasks see it: an :class:`~torch.nn.Module` with these members.

    Its inputs are named tensors, which its front end makes of a batch: ``audio`` ``(B, frames, mels)``, ``visual``
    ``(B, 3, H, W)``, ``(B, 3, T, H, W)`` ..., and what else it wants. It need not take both modalities.
    """

    training: bool

    @property
    def passes(self) -> tuple[str, ...]:
        """The forward passes of a step, with an optimiser each; usually ``("joint",)``."""

    @property
    def sources(self) -> tuple[str, ...]:
        """What :meth:`load_pretrained` takes."""

    @property
    def frontend(self) -> Frontend:
        """What turns waveforms and frames into the model's inputs."""

    @property
    def contrasts(self) -> bool:
        """Whether a loss tells pairs of audio and visual apart.

        Clips of one modality do not train it then, and retrieval can be measured.
        """

    @property
    def has_unused_parameters(self) -> bool:
        """Whether a forward pass leaves some parameters without gradient (DDP must then look for them)."""

    def visible(self, progress: float) -> float:
        """The share of tokens that the encoders see on average, 1 - mask ratio, in (0, 1].

        A function of the progress of training alone (:func:`avfast.random.progress`); constant without a curriculum.
        """

    def draw(
        self,
        batch_size: int,
        *,
        key: DrawKey | None = None,
        only: str | None = None,
        has_audio: Sequence[bool] | None = None,
        has_visual: Sequence[bool] | None = None,
    ) -> Draws:
        """Every random choice of a pass, on the CPU; same key, same result, whatever the split over processes.

        What else a model can be given here is not drawn. ``has_audio`` and ``has_visual`` say per instance what a clip
        has. The input of one that lacks it holds zeros or silence, which no loss may count.
        """

    def __call__(self, *inputs: Any, **named: Any) -> Output:
        """One pass over the inputs, with ``draws``."""

    def encode(self, *inputs: Any, **named: Any) -> Features:
        """Token features of ``audio``, of ``visual`` or of both, after the final norms, without masking."""

    def parameter_groups(self) -> Mapping[str, Sequence[nn.Parameter]]:
        """The parameters by what training treats alike.

        ``--unimodal_ramp`` holds ``"unimodal"`` ones back; ``--orthogonal_lr`` slows ``"orthogonal"`` ones, the
        logarithms of rotations.
        """

    def blocks(self) -> Sequence[nn.Module]:
        """The transformer blocks, the units of sharding."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute block activations in the backward pass instead of keeping them."""

    def load_pretrained(self, *sources: Any, **named: Any) -> None:
        """Start from weights of elsewhere: ``image``, ``audio`` ... (a checkpoint or a state dict), see ``sources``."""

    def figures(self, inputs: dict[str, Tensor], draws: Any, output: Output) -> Figures:
        """What can be shown of the output of a pass in evaluation mode; ``draws`` are the pass's."""

    # Of every module.

    def train(self, mode: bool = True) -> Any: ...

    def eval(self) -> Any: ...

    def to(self, device: torch.device) -> Any: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any: ...
