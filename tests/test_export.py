"""Exported programs of encode give the eager numbers, for other batches than the traced one, in PyTorch's operators."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from helpers import assert_close
from test_models import inputs, small

from avfast import backend, list_models
from avfast.export import __main__ as command
from avfast.export import export, save
from avfast.ops.low_rank_linear import low_rank_linear
from avfast.ops.skew_exp import skew_exp

NAMES = list_models("*_tiny")
ALONE = [(name, modality) for name in NAMES for modality in ("audio", "visual")]
FUSIONS = [("deepavfusion_tiny", {"fusion_arch": arch}) for arch in ("factorized", "token")]
SHARINGS = [("avbert_tiny", {"sharing": "none"}), ("avbert_tiny", {"fusion": "early"})]


def given(model, batch, modality):
    return {name: x for name, x in inputs(model, batch).items() if modality in (name, "both")}


def eager(model, data):
    with torch.no_grad():
        return {name: x for name, x in vars(model.encode(**data)).items() if x is not None}


def operators(program):
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


def check(found, want, tol):
    assert found.keys() == want.keys()
    for name, x in want.items():
        assert found[name].shape == x.shape
        assert_close(name, found[name], x, tol)


def exported_equals_eager(name, modality="both", **settings):
    model = small(name, **settings).eval()
    if modality not in ("both", *inputs(model)):
        return
    program = export(model, modality=modality)
    assert not any("avfast" in op for op in operators(program))
    for batch in (5, 1):
        data = given(model, batch, modality)
        check(program.module()(**data), eager(model, data), 1e-5)


def test_a_program_gives_the_eager_features_of_any_batch_without_our_operators():
    exported_equals_eager("cav_mae_tiny", depth=1, decoder_depth=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_model_is_exported(name):
    exported_equals_eager(name)


@pytest.mark.slow
@pytest.mark.parametrize("name, modality", ALONE)
def test_every_model_is_exported_for_one_modality(name, modality):
    exported_equals_eager(name, modality)


@pytest.mark.slow
@pytest.mark.parametrize("name, settings", [*FUSIONS, *SHARINGS])
def test_other_architectures_are_exported(name, settings):
    exported_equals_eager(name, **settings)


def test_factors_of_low_rank_are_written_out():
    class Projection(torch.nn.Module):
        def forward(self, x, skew, v, u, bias):
            return torch.stack(low_rank_linear(x, v, skew_exp(skew) @ u, bias))

    rest = [torch.randn(shape) for shape in ((2, 4, 4), (8, 6), (2, 4, 5), (2, 5))]
    shapes = ({0: torch.export.Dim("batch")}, *(None for _ in rest))
    program = torch.export.export(Projection(), (torch.randn(3, 6), *rest), dynamic_shapes=shapes)
    assert not any("avfast" in op for op in operators(program))
    x = torch.randn(7, 6)
    assert_close("projection", program.module()(x, *rest), Projection()(x, *rest), 1e-5)


def test_exporting_leaves_the_model_and_the_backend_as_they_are():
    model = small("audio_mae_tiny", depth=1, decoder_depth=0).train()
    before, state = backend.get_backend(), {name: x.clone() for name, x in model.state_dict().items()}
    x = torch.randn(1, *model.settings["audio_size"])
    program = export(model, {"audio": x})
    assert model.training and backend.get_backend() == before
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    check(program.module()(audio=x), eager(model, {"audio": x}), 1e-5)
    with pytest.raises(ValueError, match="modality: expected audio or both, got 'visual'"):
        export(model, modality="visual")
    with pytest.raises(ValueError, match=r"features.pt: expected a name that ends in .pt2 or .onnx"):
        save(program, "features.pt")


@pytest.mark.slow
def test_with_kernels_a_program_keeps_our_operators(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model = small("cav_mae_tiny", depth=1, decoder_depth=0).eval()
    data = inputs(model)

    class Encode(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, audio, visual):
            return self.model.encode(audio, visual).fused

    batch, before = torch.export.Dim("batch"), backend.get_backend()
    try:
        backend.set_backend("triton")
        with torch.no_grad():
            program = torch.export.export(
                Encode(), (), data, dynamic_shapes={"audio": {0: batch}, "visual": {0: batch}}
            )
    finally:
        backend.set_backend(before)
    assert {"avfast.packed_attention_qkv.default", "avfast.add_layer_norm.default"} <= operators(program)
    other = inputs(model, 5)
    with torch.no_grad():  # the operators run their eager bodies here
        assert_close("fused", program.module()(**other), eager(model, other)["fused"], 1e-5)


@pytest.mark.slow
def test_a_file_is_read_without_avfast(tmp_path):
    model = small("audio_mae_tiny").eval()
    data = given(model, 5, "audio")
    save(export(model), tmp_path / "features.pt2")
    torch.save((data, eager(model, data)), tmp_path / "want.pt")
    code = (
        "import sys, torch\n"
        "program = torch.export.load('features.pt2').module()\n"
        "data, want = torch.load('want.pt')\n"
        "torch.testing.assert_close(program(**data), want, rtol=1e-5, atol=1e-5)\n"
        "assert not any(name.partition('.')[0] == 'avfast' for name in sys.modules)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)


def onnx_equals_eager(name, path, modality="both", **settings):
    pytest.importorskip("onnxscript", reason='needs pip install "avfast[export]"')
    runtime = pytest.importorskip("onnxruntime", reason='needs pip install "avfast[export]"')
    model = small(name, **settings).eval()
    save(export(model, modality=modality), path)
    session = runtime.InferenceSession(path)
    assert all(x.shape[0] == "batch" for x in (*session.get_inputs(), *session.get_outputs()))
    for batch in (5, 1):
        data = given(model, batch, modality)
        want = {f"{kind}_features": x for kind, x in eager(model, data).items()}
        values = session.run(None, {kind: x.numpy() for kind, x in data.items()})
        names = [x.name for x in session.get_outputs()]
        check(dict(zip(names, map(torch.from_numpy, values), strict=True)), want, 1e-4)


def test_onnx_gives_the_eager_features(tmp_path):
    onnx_equals_eager("avsiam_tiny", tmp_path / "features.onnx", depth=1, fusion_depth=1, decoder_depth=0)


@pytest.mark.slow
@pytest.mark.parametrize("modality", ["both", "audio", "visual"])
@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("avbert")])
def test_onnx_of_every_model_but_avbert(name, modality, tmp_path):
    if modality in ("both", *inputs(small(name))):
        onnx_equals_eager(name, tmp_path / "features.onnx", modality)


@pytest.mark.slow
def test_what_onnx_cannot_hold_is_named(tmp_path):
    pytest.importorskip("onnxscript", reason='needs pip install "avfast[export]"')
    program = export(small("avbert_tiny"), modality="audio")
    with pytest.raises(ValueError, match="features.onnx: not every operator .*linalg_matrix_exp"):
        save(program, tmp_path / "features.onnx")


def test_the_command_writes_a_program(tmp_path, capsys):
    small("audio_mae_tiny", depth=1, decoder_depth=0).save_pretrained(tmp_path / "model")
    out = tmp_path / "features.pt2"
    assert command.main([str(tmp_path / "model"), "--out", str(out)]) == 0
    assert "features.pt2: takes audio (B, 192, 64)" in capsys.readouterr().out and out.exists()
    assert command.main([str(tmp_path / "model"), "--out", str(out), "--modality", "visual"]) == 2
    assert "modality: expected audio or both" in capsys.readouterr().err


def test_the_command_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert command.main([str(tmp_path), "--out", "features.onnx"]) == 2
    assert 'pip install "avfast[export]"' in capsys.readouterr().err
