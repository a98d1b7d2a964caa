"""Tables and weights do not depend on the mode or the default dtype that they were made under."""

from __future__ import annotations

import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from avfast.data.frontend import _per_channel
from avfast.models import create_model, list_models
from avfast.models.fusion_draws import shared_tokens
from avfast.models.patched import shared_plan
from avfast.random import DrawKey
from avfast.tensors import tensor_cache

_triangles, _htk_triangles = (vars(sys.modules["avfast.data.log_mel"])[x] for x in ("_triangles", "_htk_triangles"))


@pytest.mark.parametrize("name", list_models("*_tiny"))
def test_the_default_dtype_changes_neither_weights_nor_losses(name):
    """Nor what the front end makes of a clip."""
    found = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            for table in (_per_channel, _triangles, _htk_triangles, shared_plan, shared_tokens):
                table.cache_clear()
            torch.manual_seed(0)
            model = create_model(name, depth=1, **({} if name == "avbert_tiny" else {"decoder_depth": 1}))
            wave = torch.linspace(-1, 1, model.frontend.num_samples, dtype=torch.float32).expand(3, -1)
            key = DrawKey(0, 0, range(3), 3)
            inputs, front = {"audio": model.frontend.audio(wave, train=True, key=key)}, model.frontend
            if front.frames is not None:
                shape = 3, front.frames.count, 3, front.image_size, front.image_size
                inputs["visual"] = front.visual(torch.full(shape, 7, dtype=torch.uint8))
            loss = model(**inputs, draws=model.draw(3, key=key)).loss
            found.append((*inputs.values(), *model.parameters(), *model.buffers(), loss))
        finally:
            torch.set_default_dtype(torch.float32)
    for others in found[1:]:
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


@pytest.mark.parametrize("mode", [torch.inference_mode, FakeTensorMode])
def test_what_is_cached_serves_training_whatever_the_mode_it_was_made_in(mode):
    made = []

    @tensor_cache
    def table(size):
        made.append(size)
        return torch.ones(size)

    weight = torch.ones(3, requires_grad=True)
    with mode():
        table(3)
    (weight * table(3)).sum().backward()
    assert type(table(3)) is torch.Tensor and torch.equal(weight.grad, torch.ones(3))
    assert table(3) is table(3) and len(made) == (1 if mode is torch.inference_mode else 2)
    with FakeTensorMode():
        assert type(table(3)) is not torch.Tensor, "what is kept is not mixed into a traced model"
