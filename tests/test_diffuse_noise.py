"""That the noise of diffuse_patches is normal and independent."""

from __future__ import annotations

import math

import pytest
import torch
from test_diffuse_patches import noise

from avfast import backend, build


def correlation(a, b):
    """In standard deviations of that of independent samples."""
    a, b = a.double().flatten(), b.double().flatten()
    return (a * b).sum().item() / math.sqrt(len(a))


def normality(z):
    """Deviations, in standard errors, of the first four moments; and of the counts of 64 equally likely intervals, by
    the Wilson-Hilferty form of chi squared."""
    z, n = z.double().flatten(), z.numel()
    moments = [(z.mean(), 1), (z.square().mean() - 1, 2), (z.pow(3).mean(), 15), (z.pow(4).mean() - 3, 96)]
    edges = torch.special.ndtri(torch.arange(1, 64, dtype=torch.float64) / 64)
    counts = torch.bincount(torch.bucketize(z, edges), minlength=64).double()
    freedom = 63
    chi = ((counts - n / 64).square() / (n / 64)).sum().item()
    uniform = ((chi / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / math.sqrt(2 / (9 * freedom))
    return [value.item() * math.sqrt(n / variance) for value, variance in moments] + [uniform]


def check_noise(samples):
    z = noise(samples=samples)
    assert max(map(abs, normality(z))) < 4.5, normality(z)
    for lane in z.unflatten(2, (4, -1)).unbind(2):  # each of the four normals of a block
        assert max(map(abs, normality(lane))) < 4.5
    words = z.unflatten(2, (4, -1))
    pairs = {
        "neighbours": (z[..., 1:], z[..., :-1]),
        "patches": (z[:, 1:], z[:, :-1]),
        "samples": (z[1:], z[:-1]),
        "seeds": (z, noise(samples=samples, seed=8)),
        "seeds, high word": (z, noise(samples=samples, seed=7 + 2**32)),
        "streams": (z, noise(samples=samples, stream=1)),
        **{f"words {i} and {j}": (words[:, :, i], words[:, :, j]) for i in range(4) for j in range(i)},
        "squares of a pair": (words[:, :, 0].square() - 1, (words[:, :, 1].square() - 1) / 2),
    }
    found = {name: correlation(*pair) for name, pair in pairs.items()}
    assert max(map(abs, found.values())) < 4.5, found


@pytest.fixture(params=["reference", "native"])
def implementation(request, monkeypatch):
    """Every test that takes it runs on each implementation on a CPU."""
    if request.param == "native" and not build.load("cpu"):
        pytest.skip("needs a C++ compiler")
    monkeypatch.setattr(backend, "_backend", request.param)


def test_the_noise_is_normal_and_independent(implementation):
    check_noise(16)


@pytest.mark.slow
def test_ten_million_normals(implementation):
    from scipy import stats

    check_noise(640)
    z = noise(samples=640).flatten()
    assert z.numel() > 1e7
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-4
    assert abs(z.max()) > 5 and z.abs().max() < 5.78


def test_a_wrong_noise_would_be_seen():
    """The thresholds above tell a standard deviation of 0.99 and a correlation of 0.01 from none."""
    z = torch.randn(16, 64, 256, generator=torch.Generator().manual_seed(1))
    assert max(map(abs, normality(z))) < 4.5 and abs(correlation(z[1:], z[:-1])) < 4.5
    assert max(map(abs, normality(0.99 * z))) > 4.5
    assert abs(correlation(z[1:], 0.01 * z[1:] + z[:-1])) > 4.5


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("name", ["triton", "native"])
def test_the_noise_of_a_gpu_is_normal_and_independent(monkeypatch, name):
    if name == "native" and not build.load("cuda"):
        pytest.skip("needs nvcc")
    monkeypatch.setattr(backend, "_backend", name)
    with torch.device("cuda"):
        z = noise(samples=640).cpu()
    assert max(map(abs, normality(z))) < 4.5
    assert abs(correlation(z[1:], z[:-1])) < 4.5
