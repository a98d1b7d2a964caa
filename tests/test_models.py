"""Every tiny preset keeps the whole contract of avfast/models/contract.py."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from helpers import assert_close
from torch.nn.parallel import DistributedDataParallel

from avfast import create_model, list_models
from avfast.data import Batch
from avfast.models import Draws, Figures
from avfast.random import DrawKey

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "decoder_embed_dim": 16, "decoder_num_heads": 2}
SMALL_SEQUENCE = {
    "num_clips": 4, "clip_frames": 2, "img_size": 16, "audio_size": (16, 16), "embed_dim": 32, "depth": 1,
    "num_heads": 2, "rank": 8, "init_std": 0.01, "mep_dim": 16, "num_negatives": 5, "pool_size": 3,
    "visual_args": {"width": 8, "depths": (1, 1, 1, 1), "alpha": 2}, "audio_args": {"width": 4, "depths": (1, 1)},
}  # fmt: skip
NAMES, BATCH = list_models("*_tiny"), 4


ACROSS = {"avbert_tiny": {"cross_rank": True, "pool_size": None, "masks": "video", "cpp": False}}


def small(name, **settings):
    torch.manual_seed(0)
    return create_model(name, **(SMALL_SEQUENCE if name.startswith("avbert") else SMALL) | settings)


@pytest.fixture(params=NAMES)
def model(request):
    return small(request.param)


def inputs(model, batch=BATCH, seed=0):
    generator = torch.Generator().manual_seed(seed)
    frontend = model.frontend
    wave = torch.rand(batch, frontend.num_samples, generator=generator) - 0.5
    shape = (batch, frontend.spec.num_frames, 3, *[frontend.image_size] * 2)
    frames, all_of_them = torch.randint(256, shape, generator=generator, dtype=torch.uint8), torch.arange(batch)
    return frontend(
        Batch(
            wave, torch.full((batch,), wave.shape[1]), frames, all_of_them >= 0, all_of_them >= 0, None, all_of_them,
            tuple(range(batch)), 0, [], all_of_them < 0,
        )
    )  # fmt: skip


def drawn(model, only=None, **given):
    return model.draw(BATCH, key=DrawKey(3, 1, range(BATCH), BATCH), only=only, **given)


def step(model, data, draws, call=None):
    """The losses and the gradients by name."""
    model.zero_grad()
    output = (model if call is None else call)(**data, draws=draws)
    output.loss.backward()
    losses = torch.stack([output.loss, *output.losses.values()]).detach()
    return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got, want, tol):
    assert_close("losses", got[0], want[0], tol)
    assert got[1].keys() == want[1].keys()
    scale = max(x.abs().max().item() for x in want[1].values())
    for name, grad in want[1].items():
        assert_close(name, got[1][name], grad, 10 * tol, scale)


def test_draws_name_every_choice_and_move_in_one_piece(model):
    for only in model.passes:
        draws, again = drawn(model, only), drawn(model, only)
        assert isinstance(draws, Draws) and draws.only == only and draws.signature == again.signature
        moved = draws.to("cpu")
        for a, b, c in zip(draws.tensors(), again.tensors(), moved.tensors(), strict=True):
            assert torch.equal(a, b) and torch.equal(a, c) and a.data_ptr() != c.data_ptr()
        other = model.draw(BATCH, key=DrawKey(3, 2, range(BATCH), BATCH), only=only)
        assert other.signature == draws.signature, "every step has the same shapes"
        assert not all(torch.equal(a, b) for a, b in zip(draws.tensors(), other.tensors(), strict=True))
        assert drawn(model, only, has_audio=[i > 0 for i in range(BATCH)]).signature != draws.signature


def test_a_step_trains_every_parameter_but_those_declared_unused(model):
    data, trained = inputs(model), set()
    for only in model.passes:
        losses, grads = step(model, data, drawn(model, only))
        assert torch.isfinite(losses).all()
        trained |= grads.keys()
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained <= wanted and (trained == wanted or model.has_unused_parameters)
    grouped = [p for group in model.parameter_groups().values() for p in group]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))
    assert {id(p) for block in model.blocks() for p in block.parameters()} < {*map(id, grouped)}


def test_a_missing_modality_reaches_nothing(model):
    data = inputs(model)
    for name in data:
        absent = {f"has_{name}": [False] * BATCH}
        whole = step(model, data, drawn(model, **absent))
        if len(data) == 1:
            assert not whole[0].any() and not any(grad.any() for grad in whole[1].values())
            continue
        assert_same(step(model, data | {name: None}, drawn(model, **absent)), whole, 1e-6)
        with pytest.raises(ValueError, match=f"the draws .*{name}, which is not given"):
            model(**data | {name: None}, draws=drawn(model))


def test_each_modality_is_encoded_alone_and_both_together(model):
    data = inputs(model)
    for name, x in data.items():
        found = model.eval().encode(**{name: x})
        assert getattr(found, name).shape[0] == BATCH and getattr(found, name).ndim == 3
        assert [getattr(found, other) for other in data if other != name] == [None] * (len(data) - 1)
    together = vars(model.encode(**data))
    assert all(together[name].shape[0] == BATCH for name in (*data, *(["fused"] if len(data) > 1 else [])))


def test_recomputation_and_compilation_change_nothing(model):
    model.double()
    data, draws = {name: x.double() for name, x in inputs(model).items()}, drawn(model).to("cpu")
    want = step(model, data, draws)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_same(step(model, data, draws, compiled), want, 1e-12)
    other = model.draw(BATCH, key=DrawKey(3, 2, range(BATCH), BATCH)).to("cpu")
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_same(step(model, data, other, compiled), step(model, data, other), 1e-12)
    torch._dynamo.reset()
    model.set_grad_checkpointing(True)
    assert_same(step(model, data, draws), want, 1e-12)


def test_weights_saved_give_the_same_model(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    data, draws = inputs(model), drawn(model)
    want = model(**data, draws=draws).loss
    for parameter in model.parameters():
        parameter.data.zero_()
    model.load_state_dict(torch.load(tmp_path / "weights.pt"))
    assert torch.equal(model(**data, draws=draws).loss, want)


def test_half_precision_is_near(model):
    data, draws = inputs(model), drawn(model)
    want = step(model, data, draws)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**data, draws=draws)
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert_close("loss", output.loss, want[0][0], 0.02)


def test_figures_show_what_was_kept(model):
    data, draws = inputs(model), drawn(model, model.passes[-1])
    figures = model.figures(data, draws, model.eval()(**data, draws=draws))
    assert isinstance(figures, Figures)
    if figures.reconstruction is None:
        assert not model(**data, draws=draws).reconstruction
        return
    assert figures.reconstruction.masked.keys() == data.keys()
    for name, x in data.items():
        given, masked, guess = getattr(figures.reconstruction, name).values()
        frame = x[:, :, x.shape[2] // 2] if x.ndim == 5 else x
        assert given.shape == masked.shape == guess.shape == frame.shape and torch.equal(given, frame)
        seen = masked == given  # what is masked is NaN, or noised
        if x.ndim != 5:  # one frame of a video may show more or less of the patches than the whole
            assert_close("share", 1 - seen.float().flatten(1).mean(1), figures.reconstruction.masked[name], 1e-6)
        assert 0 < seen.float().mean() < 1
        assert_close(name, guess[seen], given[seen], 1e-6)


SHARES = (range(3), range(3, 5))  # of a batch of five clips; those of the first process have no frames


def shared_step(name, only, rows, wrap=lambda model: model, **settings):
    """A step on some rows of the batch, the model the same everywhere."""
    model = small(name, **settings).double()
    data = {kind: x[rows.start : rows.stop].double() for kind, x in inputs(model, 5).items()}
    has = [i in SHARES[1] for i in rows]
    draws = model.draw(len(rows), key=DrawKey(0, 0, rows, 5), only=only, has_visual=has)
    call = wrap(model)
    step(model, data, draws, call)
    found = step(model, data, draws, call)  # DDP sees in the second pass what it missed in the first
    return *found, {k: x.clone() for k, x in model.named_buffers() if k.endswith(("running_mean", "running_var"))}


def process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    found = {}

    def wrap(model):
        return DistributedDataParallel(model, find_unused_parameters=model.has_unused_parameters)

    for name in NAMES:
        for only in small(name).passes:
            found[name, only] = shared_step(name, only, SHARES[rank], wrap)
        if name in ACROSS:
            found[name, "across"] = shared_step(name, "joint", SHARES[rank], wrap, **ACROSS[name])
    torch.save(found, f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What each of two processes found of all models."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(process, (str(folder),), nprocs=2)
    return [torch.load(folder / str(rank)) for rank in range(2)]


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_equal_one_where_one_of_them_lacks_a_modality(name, processes):
    for only in (*small(name).passes, *(["across"] if name in ACROSS else [])):
        (losses, grads, statistics), (others, same, _) = (found[name, only] for found in processes)
        assert all(torch.equal(grads[k], same[k]) for k in grads) and grads.keys() == same.keys()
        settings = ACROSS[name] if only == "across" else {}
        whole = shared_step(name, "joint" if settings else only, range(5), **settings)
        assert_same(((losses + others) / 2, grads), whole, 1e-12)
        for buffer, x in whole[2].items():
            assert_close(buffer, statistics[buffer], x, 1e-12)
