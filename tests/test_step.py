"""A step's pass asks the host for nothing, so it compiles whole and a CUDA graph replays it."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import assert_close
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from avfast.masking import DrawKey
from avfast.models import Draws, create_model
from avfast.models.draws import shared_plan
from avfast.models.fusion_layout import shared_tokens
from avfast.ops import AttentionPlan
from avfast.train.graph import GraphedPass

NAMES = ("avsiam_tiny", "avsep_tiny", "cav_mae_tiny", "deepavfusion_tiny")
BATCH = 12


def inputs(model, batch=BATCH, seed=0):
    generator = torch.Generator().manual_seed(seed)
    audio = torch.randn(batch, *model.audio_size, generator=generator)
    visual = torch.randn(batch, 3, model.img_size, model.img_size, generator=generator)
    return audio, visual


class HostTensors(TorchDispatchMode):
    """Operators that read or make a tensor on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        self.found += [str(func)] if any(x.device.type == "cpu" for x in tensors) else []
        return out


@pytest.fixture
def fake_plans(monkeypatch):
    """Plans are made without reading lengths, which fake tensors do not have."""

    def of(lengths, lengths_k=None, device=None):
        q = torch.empty(len(lengths) + 1, dtype=torch.int32, device=device)
        return AttentionPlan(
            q, None if lengths_k is None else q, torch.empty(4, 9, 4, dtype=torch.int32, device=device)
        )

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(AttentionPlan, "of", of)
    yield
    shared_plan.cache_clear()
    shared_tokens.cache_clear()


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_forward_pass_touches_no_host_tensor(name, missing, fake_plans):
    present = [i != 3 for i in range(BATCH)] if missing else None
    draws = create_model(name).draw(BATCH, has_audio=present)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        model = create_model(name)
        audio = torch.empty(BATCH, *model.audio_size)
        visual = torch.empty(BATCH, 3, model.img_size, model.img_size)
        moved = draws.to("cuda")
        with HostTensors() as host:
            model(audio, visual, moved)
        assert not host.found
        with HostTensors() as host:
            model(audio, visual, draws)
        assert host.found, "the control, draws that are still on the CPU, must be seen"


@pytest.mark.parametrize("name", NAMES)
def test_multi_ratio_steps_compile_once_and_whole(name):
    torch.manual_seed(0)
    model = create_model(name)
    twin, data = copy.deepcopy(model), inputs(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for step in range(3):
        draws = model.draw(BATCH, torch.Generator().manual_seed(step)).to("cpu")
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            loss = compiled(*data, draws).loss
        loss.backward()
        want = twin(*data, draws).loss
        want.backward()
        assert_close("loss", loss, want, 1e-6)
    for (key, got), want in zip(model.named_parameters(), twin.parameters(), strict=True):
        if want.grad is not None:
            assert_close(key, got.grad, want.grad, 1e-6)
    torch._dynamo.reset()


def test_every_step_has_the_same_signature_and_other_tokens():
    model = create_model("avsiam_tiny")
    first, second = (model.draw(BATCH, torch.Generator().manual_seed(seed)).to("cpu").layout for seed in (0, 1))
    assert first.signature == second.signature and not torch.equal(first.index, second.index)
    assert first.plans["both"] is second.plans["both"]
    smaller = model.draw(BATCH - 1).layout
    silent = model.draw(BATCH, has_audio=[i > 0 for i in range(BATCH)]).layout
    assert len({first.signature, smaller.signature, silent.signature}) == 3


@pytest.mark.parametrize("name", NAMES)
def test_a_draw_makes_a_generator_per_stream_and_none_per_instance(name, monkeypatch):
    made, philox = [], np.random.Philox
    monkeypatch.setattr(np.random, "Philox", lambda **how: made.append(how) or philox(**how))
    monkeypatch.setattr(np.random, "Generator", None)
    model, counts = create_model(name), []
    for batch in (BATCH, 4 * BATCH):
        made.clear()
        model.draw(batch, has_audio=[i != 3 for i in range(batch)])
        counts.append(len(made))
    assert counts[0] == counts[1] <= 3


@pytest.mark.parametrize("name", NAMES)
def test_draws_do_not_depend_on_the_split_over_processes(name):
    model, total = create_model(name), 13
    whole = model.draw(total, key=DrawKey(7, 3, range(total), total))
    for positions in (range(5), [5, 6, 9, 12]):
        part = model.draw(len(positions), key=DrawKey(7, 3, positions, total))
        for kind in ("audio_keep", "visual_keep"):
            want = getattr(whole, kind).to_list()
            for position, ids in zip(positions, getattr(part, kind).to_list(), strict=True):
                assert torch.equal(ids, want[position])


def test_changed_draws_are_packed_anew():
    model = create_model("avsiam_tiny")
    data, draws = inputs(model), model.draw(BATCH).to("cpu")
    other = model.draw(BATCH)
    changed = Draws(other.audio_keep, draws.visual_keep, "joint")
    assert torch.equal(model(*data, replace(draws, audio_keep=other.audio_keep)).loss, model(*data, changed).loss)


def emulated(run):
    """What ``capture`` does, without a GPU: the replay computes on the captured inputs, into the same outputs."""
    run()
    outputs = run()

    def replay():
        for name, value in run().items():
            outputs[name].copy_(value)

    return outputs, replay


def train(passes, model, optimizer):
    """Losses of steps of two accumulated passes, of which some have other shapes."""
    losses = []
    for step, sizes in enumerate([(8, 8), (8, 8), (8, 5), (5, 8), (8, 8), (5, 5), (8, 8)]):
        optimizer.zero_grad(set_to_none=True)
        for i, size in enumerate(sizes):
            draws = model.draw(size, torch.Generator().manual_seed(10 * step + i)).to("cpu")
            losses.append(passes(*inputs(model, size, step + i), draws, len(sizes))["loss"])
        optimizer.step()
    return torch.stack(losses)


def test_a_replayed_pass_trains_as_the_plain_one():
    results = []
    for graphed in (False, True):
        torch.manual_seed(0)
        model = create_model("avsiam_tiny", depth=1, decoder_depth=1, fusion_depth=1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def run(audio, visual, draws, parts, model=model):
            output = model(audio, visual, draws)
            (output.loss / parts).backward()
            return {"loss": output.loss.detach()}

        passes = GraphedPass(run, model.parameters(), emulated) if graphed else run
        results.append((train(passes, model, optimizer), [p.detach() for p in model.parameters()]))
        if graphed:
            assert passes.captured is not None and passes.replay is not None
    (want, parameters), (got, ours) = results
    # not bit for bit: with several threads a matrix product depends on where its operands lie in memory
    assert_close("losses", got, want, 1e-5)
    assert_close("parameters", *(torch.cat([p.flatten() for p in side]) for side in (ours, parameters)), 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_a_cuda_graph_trains_as_the_plain_pass(name):
    results = []
    for graphed in (False, True):
        torch.manual_seed(0)
        model = create_model(name).cuda()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

        def run(audio, visual, draws, parts, model=model):
            with torch.autocast("cuda", torch.bfloat16):
                output = model(audio, visual, draws)
            (output.loss / parts).backward()
            return {"loss": output.loss.detach()}

        passes, losses = GraphedPass(run, model.parameters()) if graphed else run, []
        for step in range(6):
            optimizer.zero_grad(set_to_none=True)
            draws = model.draw(BATCH, torch.Generator().manual_seed(step)).to("cuda")
            losses.append(passes(*(x.cuda() for x in inputs(model, seed=step)), draws, 1)["loss"])
            optimizer.step()
        results.append(torch.stack(losses))
    assert_close("losses", results[1], results[0], 1e-3)
