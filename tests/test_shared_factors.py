"""What AVBERT's transformers compute once: whether it is ever stale, and whether it works in wrapped models."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from helpers import assert_close
from shared_transformers import LOW_RANK, Parent, add_in_place, inputs, run, transformer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel


def load(module, assign=False):
    module.load_state_dict(transformer(module.sharing, init_std=0.2).state_dict(), assign=assign)


def optimise(module, **settings):
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, amsgrad=True, **settings)
    sum(out.square().sum() for out in run(module, inputs(module))).backward()
    optimizer.step()


def replace_u(module):
    module.attention[0].proj.u = nn.Parameter(module.attention[0].proj.u.detach() + 1)


def set_data(module):
    """Twice, so that the first memory may be used again."""
    for _ in range(2):
        module.skew.data = module.skew.data + 0.3


def edit_data_before_evaluation(module):
    module.train()
    module.skew.data += 0.3
    module.eval()


EDITS = {
    "in place": add_in_place,
    "loaded": load,
    "loaded by assignment": lambda module: load(module, assign=True),
    "optimised": optimise,
    "optimised tensor by tensor": lambda module: optimise(module, foreach=False),
    "optimised in one kernel, which counts no versions": lambda module: optimise(module, fused=True),
    "a bias": lambda module: nn.init.normal_(module.attention[0].qkv.bias),
    "another parameter": replace_u,
    "other data": set_data,
    "data before evaluation": edit_data_before_evaluation,
    "dtype": lambda module: module.double(),
}


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("edit", EDITS)
def test_kept_factors_are_never_stale(edit, context):
    module = transformer("part").eval()
    x = inputs(module)[0]
    with context():
        before, kept = module(x, 0), module.factors()
        assert module.factors() is kept
    EDITS[edit](module)
    x = x.to(module.skew.dtype)
    fresh = transformer("part").to(module.skew.dtype)
    fresh.load_state_dict(module.state_dict())
    with context():
        after = module(x, 0)
        assert module.factors() is not kept
    assert torch.equal(after, fresh(x, 0))
    assert edit == "dtype" or not torch.equal(after, before)


def test_nothing_is_kept_where_a_change_would_not_be_seen():
    module = transformer("part").eval()
    with torch.no_grad():
        kept = module.factors()
        with torch.autocast("cpu", torch.bfloat16):
            half = module.factors()
        assert half[0]["qkv"][0].dtype == half[0]["qkv"][1].dtype == torch.bfloat16
        assert module.factors()[0]["qkv"][1].dtype == torch.float32
        assert module.factors() is not kept  # of the last dtype alone
        module.train()
        assert module.factors() is not module.factors()
    with torch.inference_mode():
        inference = transformer("part").eval()
        first = inference(inputs(inference)[0], 0)
        inference.skew[0, 0, 1] += 0.5
        assert not torch.equal(inference(inputs(inference)[0], 0), first)


@pytest.mark.parametrize("sharing", LOW_RANK)
def test_gradients_after_evaluation_without(sharing):
    """In evaluation mode too."""
    module = transformer(sharing).eval()
    given = inputs(module)
    with torch.no_grad():
        want = run(module, given)
    outs = run(module, given)
    assert all(torch.equal(a, b) for a, b in zip(outs, want, strict=True))
    sum(out.square().sum() for out in outs).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())


def test_two_forwards_then_two_backwards():
    module = transformer("part")
    (first, *_), (second, *_) = inputs(module), [x.roll(1, 0).cos() for x in inputs(module)]
    names = dict(module.named_parameters())

    def gradients(out):
        return torch.autograd.grad(out.square().sum(), names.values(), materialize_grads=True)

    apart = [gradients(module(x, 0)) for x in (first, second)]
    outs = [module(x, 0) for x in (first, second)]
    for out, want in zip(outs, apart, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(gradients(out), want, strict=True))


def test_a_state_dict_holds_parameters_alone():
    module = transformer("part").eval()
    with torch.no_grad():
        run(module, inputs(module))
    assert set(module.state_dict()) == {name for name, _ in module.named_parameters()}
    copied, loaded = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
    assert module._kept is not None and copied._kept is None and loaded._kept is None


# Wrapped, in one process and in two.


def steps(wrap, sharing, rows):
    """Three steps and an evaluation after each: losses, and parameters."""
    model = Parent(sharing)
    wrapped = wrap(model)
    given = [x[rows] for x in inputs(model.inner, batch=4)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(3):
        loss = wrapped.train()(*given)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            losses += [loss.item(), wrapped.eval()(*given).item(), wrapped(*given).item()]
            optimizer.step()  # in evaluation mode; of sharded parameters no version shows it
            losses.append(wrapped(*given).item())
        optimizer.zero_grad()
    whole = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in model.named_parameters()}
    return torch.tensor(losses), {name: p.detach() for name, p in whole.items()}


def group(folder, rank, size):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    mesh = init_device_mesh("cpu", (size,))
    return {
        "ddp": DistributedDataParallel,
        "fsdp2": lambda model: fully_shard(model, mesh=mesh, reshard_after_forward=True),
    }


@pytest.fixture
def wraps(tmp_path):
    yield group(tmp_path, 0, 1)
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("sharing", LOW_RANK)
def test_a_wrapped_model_trains_and_evaluates_as_a_bare_one(sharing, kind, wraps):
    losses, parameters = steps(wraps[kind], sharing, slice(None))
    want, exact = steps(lambda model: model, sharing, slice(None))
    assert_close("losses", losses, want, 1e-6)
    for name, value in exact.items():
        assert_close(name, parameters[name], value, 1e-6, 1.0)


def process(rank, folder):
    torch.set_num_threads(1)
    rows = slice(2 * rank, 2 * rank + 2)
    wraps = group(folder, rank, 2)
    torch.save(
        {k: steps(wraps[k[0]], k[1], rows) for k in [(w, s) for w in wraps for s in LOW_RANK]}, f"{folder}/{rank}"
    )
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one_replicated_and_sharded(tmp_path):
    torch.multiprocessing.spawn(process, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / str(rank)) for rank in range(2))
    for (kind, sharing), (losses, parameters) in first.items():
        others, same = second[kind, sharing]
        want, exact = steps(lambda model: model, sharing, slice(None))
        assert_close(f"{kind} {sharing} losses", (losses + others) / 2, want, 1e-5)
        for name, value in parameters.items():
            assert torch.equal(value, same[name]), name
            assert_close(f"{kind} {sharing} {name}", value, exact[name], 1e-4, 1.0)


# On a GPU.


@pytest.mark.gpu
def test_a_training_step_in_a_cuda_graph_without_a_host_wait():
    model = Parent("part").cuda()
    given = [x.cuda() for x in inputs(model.inner)]
    parameters = list(model.parameters())

    def step():
        return torch.autograd.grad(model(*given), parameters)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    add_in_place(model.inner)
    given[0].mul_(0.5)
    graph.replay()
    for name, a, b in zip(dict(model.named_parameters()), got, step(), strict=True):
        assert_close(name, a, b, 1e-5, 1.0)


@pytest.mark.gpu
def test_a_captured_evaluation_computes_its_own_factors():
    module = transformer("part").cuda().eval()
    x = inputs(module)[0].cuda()
    with torch.no_grad():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            module(x, 0)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = module(x, 0)
        add_in_place(module)
        graph.replay()
        assert_close("replayed", out, module(x, 0), 1e-6)
