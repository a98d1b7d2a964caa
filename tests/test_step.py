"""A step's pass asks the host for nothing, so it compiles whole and a CUDA graph replays it."""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from helpers import assert_close
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from avfast import distributed
from avfast.data import frontend
from avfast.data.clips import Batch
from avfast.models import Draws, create_model
from avfast.models.fusion_draws import shared_tokens
from avfast.models.patched import shared_plan
from avfast.ops import AttentionPlan
from avfast.random import DrawKey
from avfast.train.graph import STAY, GraphedPass, capture
from avfast.train.trainer import Trainer

_triangles, _htk_triangles = (vars(sys.modules["avfast.data.log_mel"])[x] for x in ("_triangles", "_htk_triangles"))
NAMES = ("avsiam_tiny", "avsep_tiny", "cav_mae_tiny", "deepavfusion_tiny")
BATCH = 12


def inputs(model, batch=BATCH, seed=0):
    generator = torch.Generator().manual_seed(seed)
    audio = torch.randn(batch, *model.audio_size, generator=generator)
    visual = torch.randn(batch, 3, model.img_size, model.img_size, generator=generator)
    return audio, visual


def named(data):
    return dict(zip(("audio", "visual"), data, strict=True))


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


class Copies(TorchDispatchMode):
    """What makes the host wait for a CUDA device: copies that block or leave from pageable memory, and reads."""

    def __init__(self, pinned: set[int]) -> None:
        super().__init__()
        self.pinned, self.crossings, self.waits = pinned, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, out)) if isinstance(x, torch.Tensor)]
        kinds = {x.device.type for x in tensors}
        if func is torch.ops.aten._local_scalar_dense.default and "cuda" in kinds:
            self.waits.append(str(func))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default) and kinds == {"cpu", "cuda"}:
            self.crossings += 1
            if not (kwargs or {}).get("non_blocking") or id(args[0]) not in self.pinned:
                self.waits.append(f"{func} of {tuple(args[0].shape)} {args[0].dtype}")
        return out


@pytest.fixture
def fake_plans(monkeypatch):
    """Plans are made without reading lengths, which fake tensors do not have."""

    def of(lengths, lengths_k=None, device=None):
        q = torch.empty(len(lengths) + 1, dtype=torch.int32, device=device)
        work = [torch.empty(9, 4, dtype=torch.int32, device=device) for _ in range(3 if lengths_k is None else 6)]
        return AttentionPlan(q, None if lengths_k is None else q, work)

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(AttentionPlan, "from_lengths", of)
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


def filters_on_the_device(mels, fft, *_):
    return torch.zeros(fft // 2 + 1, mels, device="cuda")


def fake_batch(model, size=4):
    samples = model.frontend.num_samples
    return Batch(
        waveform=torch.zeros(size, samples),
        num_samples=torch.full((size,), samples),
        frames=torch.zeros(size, 1, 3, model.img_size, model.img_size, dtype=torch.uint8),
        has_audio=torch.tensor([True] * size),
        has_visual=torch.tensor([i != 1 for i in range(size)]),
        labels=None, index=torch.arange(size), positions=tuple(range(size)), step=5, total=size, failures=[],
        short=torch.zeros(size, dtype=torch.bool),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["avsiam_tiny", "deepavfusion_tiny"])
def test_the_inputs_of_a_step_reach_the_device_without_a_wait(name, fake_plans, monkeypatch):
    kept, pinned = [], set()

    def pin(x):  # the pageable original must not count, and the copy's id must not be given to another
        kept.append(x.clone())
        pinned.add(id(kept[-1]))
        return kept[-1]

    model = create_model(name, depth=1)
    batch = fake_batch(model)
    trainer = SimpleNamespace(model=model, config=SimpleNamespace(seed=3), device=torch.device("cuda"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        # tables that a first step left on the device; generators of a device need one
        for table in ("_triangles", "_htk_triangles"):
            monkeypatch.setattr(sys.modules["avfast.data.log_mel"], table, filters_on_the_device)
        monkeypatch.setattr(frontend, "_per_channel", lambda values, device: torch.ones(3, 1, 1, device=device))
        monkeypatch.setattr(torch, "Generator", lambda device: SimpleNamespace(manual_seed=lambda seed: None))
        monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
        monkeypatch.setattr(torch.Tensor, "is_pinned", lambda x: id(x) in pinned)
        with Copies(pinned) as seen:
            made, draws = Trainer.inputs(trainer, batch, "joint")
        assert {x.device.type for x in (*made.values(), *draws.tensors())} == {"cuda"}
        assert seen.crossings >= 4 and not seen.waits
        with Copies(pinned) as seen:
            batch.waveform.to("cuda")
        assert seen.waits, "the control, a copy that blocks, must be seen"


@pytest.mark.parametrize(
    "name", ["avsiam_tiny", pytest.param("cav_mae_tiny", marks=pytest.mark.slow), "deepavfusion_tiny"]
)
def test_a_compiled_model_draws_and_serves_all_batch_sizes_after_one_recompilation(name):
    """Two graphs, before and after the draws, each compiled once more with shapes that may change."""
    model = create_model(name, embed_dim=32, depth=1, num_heads=2, decoder_embed_dim=16, decoder_num_heads=2)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled, graphs = torch.compile(model, backend=counter), []
    for batch in (6, 12, 7, 2):
        assert torch.isfinite(compiled(*inputs(model, batch)).loss)
        graphs.append(counter.frame_count)
    torch._dynamo.reset()
    assert graphs[0] == 2 and graphs[1:] == [4, 4, 4]


@pytest.mark.parametrize("name", NAMES)
def test_a_last_block_of_masked_patches_alone_changes_no_loss_and_no_gradient(name):
    """In training; in evaluation all are predicted. With instances that lack a modality or are of other lengths."""
    batch = 5
    model, data = create_model(name).double(), [x.double() for x in inputs(create_model(name), batch)]
    model.set_grad_checkpointing(name != "cav_mae_tiny")
    key = DrawKey(3, 1, range(batch), batch)
    keep = [torch.randperm(5)[: 1 + i] for i in range(batch)], [torch.randperm(4)[:3]] * batch
    whole = [torch.arange(x.num_patches).repeat(batch, 1) for x in (model.patch_embed_a, model.patch_embed)]
    ragged, unmasked = (model.draw(batch, audio_keep=a, visual_keep=v) for a, v in (keep, whole))
    presences = (None, [i != 3 for i in range(batch)])
    draws = [model.draw(batch, key=key, has_audio=has, only=only) for only in model.passes for has in presences]
    for drawn in (*draws, ragged, unmasked):
        results = []
        for training in (True, False):
            model.train(training).zero_grad()
            out = model(*data, drawn)
            out.loss.backward()
            results.append((out, [None if p.grad is None else p.grad.clone() for p in model.parameters()]))
        (got, grads), (want, wanted) = results
        assert_close("loss", got.loss, want.loss, 1e-12)
        scale = max(x.abs().max().item() for x in wanted if x is not None)
        for (parameter, _), a, b in zip(model.named_parameters(), grads, wanted, strict=True):
            assert (a is None) == (b is None), parameter
            if a is not None:
                assert_close(parameter, a, b, 1e-9, scale)
        for patches in want.reconstruction.values():
            assert patches.shape[0] == batch
        assert bool(got.reconstruction) == (bool(want.reconstruction) and drawn is unmasked)


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


@pytest.mark.parametrize(
    "keep, words",
    [(torch.tensor([[0, 10_000]]), r"0 \.\. \d+, got 10000"), (torch.ones(1, 64, dtype=torch.bool), "bool mask")],
)
@pytest.mark.parametrize("name", ["avsiam_tiny", "deepavfusion_tiny"])
def test_kept_patches_that_the_model_does_not_have_are_refused(name, keep, words):
    model = create_model(name, depth=1, decoder_depth=1)
    with pytest.raises((TypeError, ValueError), match=words):
        model.draw(1, audio_keep=keep)
    with pytest.raises((TypeError, ValueError), match=words):
        model.encode(*inputs(model, 1), visual_keep=keep)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda a, v: (a.short(), v), "audio must be floating point, got torch.int16; model.frontend.audio"),
        (lambda a, v: (a, v.byte()), "visual must be floating point, got torch.uint8; model.frontend.visual"),
        (lambda a, v: (a, v.permute(0, 2, 3, 1)), r"channels come first: visual.permute\(0, 3, 1, 2\)"),
    ],
)
def test_inputs_of_another_kind_are_refused(change, words):
    model = create_model("avsiam_tiny", depth=1, decoder_depth=1)
    for call in (model, model.encode):
        with pytest.raises(ValueError, match=words):
            call(*change(*inputs(model, 1)))


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
            losses.append(passes(named(inputs(model, size, step + i)), draws, len(sizes))["loss"])
        optimizer.step()
    return torch.stack(losses)


def test_a_replayed_pass_trains_as_the_plain_one():
    results = []
    for graphed in (False, True):
        torch.manual_seed(0)
        model = create_model("avsiam_tiny", depth=1, decoder_depth=1, fusion_depth=1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def run(data, draws, parts, model=model):
            output = model(**data, draws=draws)
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


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_shapes_that_come_to_stay_replace_the_captured_ones(device):
    """A new epoch may have other batches and ratios; an odd batch or two are run as they are."""
    made, parameter = [], nn.Parameter(torch.ones(2, device=device))

    def capturing(run):
        made.append(passes.last[0]["x"][0][0])
        return emulated(run) if device == "cpu" else capture(run)

    def run(data, draws, parts):
        loss = (data["x"] @ parameter + draws.ids).sum() / parts
        loss.backward()
        return {"loss": loss.detach()}

    passes = GraphedPass(run, [parameter], capturing)
    captured = []
    for step, size in enumerate([3, 3, 3, 2, 2, 3, *[5] * (STAY + 2), *[2] * (STAY - 1), 5, *[2] * STAY, 3]):
        x, ones = torch.full((size, 2), float(step), device=device), torch.ones(1, device=device)
        parameter.grad = None
        loss = passes({"x": x}, Record("joint", ones), 1)["loss"]
        assert loss == size * (2 * step + 1) and parameter.grad.tolist() == [size * step] * 2
        captured.append(None if passes.captured is None else passes.inputs["x"].shape[0])
    assert captured == [None, *[3] * (5 + STAY - 1), *[5] * (3 + STAY - 1 + 1 + STAY - 1), 2, 2] and made == [3, 5, 2]


@dataclass(frozen=True, eq=False)
class Record(Draws):
    """Draws of a model to come."""

    ids: torch.Tensor


class Calls(TorchDispatchMode):
    """How often each operator runs."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket] += 1
        return func(*args, **(kwargs or {}))


def test_a_replay_zeroes_and_copies_all_gradients_at_once():
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(5)])
    data, draws = named((torch.ones(3, 2), torch.ones(3, 2))), Record("joint", torch.zeros(1))

    def run(data, draws, parts):
        model(data["audio"]).sum().backward()
        return {"loss": torch.zeros(())}

    passes = GraphedPass(run, model.parameters(), lambda run: (run(), lambda: None))
    for _ in range(3):
        passes(data, draws, 1)
    model.zero_grad(set_to_none=True)
    with Calls() as calls:
        passes(data, draws, 1)
    assert calls.counts[torch.ops.aten._foreach_zero_] == 1 and not calls.counts[torch.ops.aten.zero_]
    assert all((p.grad == 0).all() for p in model.parameters())
    others = [torch.full_like(p, 2) for p in model.parameters()]
    for parameter, grad in zip(model.parameters(), others, strict=True):
        parameter.grad = grad
    with Calls() as calls:
        passes(data, draws, 1)
    assert calls.counts[torch.ops.aten._foreach_copy_] == 2, "gradients and draws"
    assert calls.counts[torch.ops.aten.copy_] == 2, "the inputs"
    assert all((p.grad == 2).all() for p in model.parameters())


def test_a_capture_is_of_its_own_thread(monkeypatch):
    """Another thread, the loader's, allocates page-locked memory meanwhile."""
    made, stream = [], MagicMock()
    for name in ("Stream", "current_stream", "stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, stream)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **how: made.append(how) or nullcontext())
    capture(lambda: {})
    assert made == [{"capture_error_mode": "thread_local"}]


@pytest.mark.parametrize("name", ["avsiam_tiny", "deepavfusion_tiny"])
def test_recomputation_does_not_ask_for_the_random_state(name, monkeypatch):
    """A CUDA graph cannot capture that, and all draws are made outside."""
    model = create_model(name, depth=2)
    model.set_grad_checkpointing(True)
    draws = model.draw(2)
    monkeypatch.setattr(torch, "get_rng_state", None)
    model(*inputs(model, 2), draws).loss.backward()


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_a_cuda_graph_trains_as_the_plain_pass(name):
    results = []
    for graphed in (False, True):
        torch.manual_seed(0)
        model = create_model(name).cuda()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

        def run(data, draws, parts, model=model):
            with torch.autocast("cuda", torch.bfloat16):
                output = model(**data, draws=draws)
            (output.loss / parts).backward()
            return {"loss": output.loss.detach()}

        passes, losses = GraphedPass(run, model.parameters()) if graphed else run, []
        for step in range(6):
            optimizer.zero_grad(set_to_none=True)
            draws = model.draw(BATCH, torch.Generator().manual_seed(step)).to("cuda")
            losses.append(passes(named(x.cuda() for x in inputs(model, seed=step)), draws, 1)["loss"])
            optimizer.step()
        results.append(torch.stack(losses))
    assert_close("losses", results[1], results[0], 1e-3)


@pytest.mark.parametrize("backends, device", [("cpu:gloo,cuda:nccl", "cpu"), ("cuda:nccl", "meta")])
def test_sizes_of_other_processes_come_over_the_host(backends, device, monkeypatch):
    """Not over the device, which would have to finish first; where a group has no other way they do."""
    asked = []

    def all_reduce(counts):
        asked.append(counts.device.type)
        return torch.tensor([3, 2])

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_sum", all_reduce)
    monkeypatch.setattr(distributed._GatherRows, "apply", lambda rows, sizes: sizes)
    monkeypatch.setattr(distributed.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(distributed.dist, "get_backend_config", lambda: backends)
    assert distributed.gather_rows(torch.empty(2, 4, device="meta")) == ((3, 2), 3) and asked == [device]
