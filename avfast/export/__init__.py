"""Models as programs for elsewhere: ``encode`` through ``torch.export`` and as ONNX, for batches of any size."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn

from avfast import backend

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from avfast.models import Model

Modality = Literal["audio", "visual", "both"]
SUFFIXES = (".pt2", ".onnx")
LARGEST_FILE = 2**31 - 2**24
"""Bytes of weights that an ONNX file can hold itself, with room for the graph."""


class _Encode(nn.Module):
    """``encode`` as a module's forward, whose result is a dictionary."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model

        def forward(**inputs: Tensor) -> dict[str, Tensor]:
            found = vars(cast("Model", model).encode(**inputs))
            return {name: x for name, x in found.items() if x is not None}

        # torch.export takes sizes by the names of parameters, and loses those of a collecting one.
        parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
        forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        self.forward = forward


def export(model: Model, inputs: Mapping[str, Tensor] | None = None, *, modality: Modality = "both") -> ExportedProgram:
    """``model.encode`` in evaluation mode as a program of PyTorch's own operators, for batches of any size.

    The model is traced with ``AVFAST_BACKEND=reference``, whose operators a program holds written out.
    ``torch.export.export`` of a module that calls ``encode`` gives the same on a CPU; on a GPU it keeps the operators
    of avfast, with their kernels, and its program runs where avfast is imported.

    Args:
        model: stays as it is; the program holds its weights.
        inputs: an example, as ``model.frontend`` gives it; all sizes but the batch's are the program's. Default blank.
        modality: without ``inputs``, ``"audio"`` and ``"visual"`` leave the other one out.

    Returns:
        A program whose ``module()`` takes the inputs by name, on the model's device, and gives ``(B, N, D)`` tensors by
        name: ``audio``, ``visual`` and ``fused``, as far as :class:`~avfast.models.Features` has them.

    Raises:
        ValueError: the model does not take what is asked for.
    """
    device = next(iter(model.parameters())).device
    given = _example(model, modality) if inputs is None else dict(inputs)
    # A batch of one would be taken for a constant.
    given = {name: torch.cat([x, x])[:2].to(device) for name, x in given.items()}
    batch = torch.export.Dim("batch", min=1)
    training, before = model.training, backend.get_backend()
    model.eval()
    backend.set_backend("reference")
    try:
        with torch.no_grad():
            encode = _Encode(cast(nn.Module, model), [*given])
            return torch.export.export(encode, (), given, dynamic_shapes={name: {0: batch} for name in given})
    finally:
        backend.set_backend(before)
        model.train(training)


def _example(model: Model, modality: Modality) -> dict[str, Tensor]:
    """The inputs of a silent, black clip."""
    from avfast.data.clips import collate
    from avfast.data.dataset import Sample

    frontend, spec = model.frontend, model.frontend.spec
    frames = torch.zeros(spec.num_frames, 3, spec.image_size, spec.image_size, dtype=torch.uint8)
    sample = Sample(0, 0, 0, torch.zeros(frontend.num_samples, dtype=torch.float32), frames, (), False)
    inputs = frontend(collate([sample], spec=spec))
    wanted = [name for name in inputs if modality in (name, "both")]
    if not wanted:
        raise ValueError(f"modality: expected {' or '.join(inputs)} or both, got {modality!r}")
    return {name: inputs[name] for name in wanted}


def save(program: ExportedProgram, path: str | os.PathLike[str]) -> None:
    """Write a program of :func:`export`, by the name of the file.

    Args:
        program: to be written.
        path: ``.pt2``, which ``torch.export.load`` reads; or ``.onnx``, with inputs of the same names, outputs
            ``audio_features`` ..., and ``batch`` as their first size. Weights beyond 2 GB lie beside it.

    Raises:
        ValueError: for another ending; ONNX lacks an operator of the model, such as AVBERT's matrix exponential.
        ImportError: ONNX without the extra.
    """
    path = checked(path)
    if path.suffix == ".pt2":
        torch.export.save(program, path)
        return
    need_onnx()
    inputs = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"]
    outputs = program.call_spec.out_spec.unflatten(program.graph_signature.user_outputs)
    size = sum(x.numel() * x.element_size() for x in program.state_dict.values())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what PyTorch does inside, and that the inputs share their first size
            torch.onnx.export(
                program, (), path, dynamo=True, verbose=False, external_data=size > LARGEST_FILE, input_names=inputs,
                output_names=[f"{name}_features" for name in outputs],
                dynamic_shapes={name: {0: "batch"} for name in inputs},
            )  # fmt: skip
    except torch.onnx.OnnxExporterError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = str(cause).partition("\n")[0]
        raise ValueError(f"{path}: not every operator of this model exists in ONNX; .pt2 takes it. {reason}") from error


def checked(path: str | os.PathLike[str]) -> Path:
    """The path; raises ValueError unless it ends as those of :func:`save` do."""
    if Path(path).suffix not in SUFFIXES:
        raise ValueError(f"{os.fspath(path)}: expected a name that ends in {' or '.join(SUFFIXES)}")
    return Path(path)


def need_onnx() -> None:
    """Raises ImportError, with what to install, where ONNX cannot be written."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f'ONNX needs {error.name}: pip install "avfast[export]"') from None
