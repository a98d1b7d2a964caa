"""The residual convolutional networks of clips, SlowFast, VideoResNet and AudioResNet, and what they are made of."""

import pytest
import torch
from helpers import assert_close
from torch import nn

from avfast import flops
from avfast.nn import AudioResNet, SlowFast, VideoResNet
from avfast.nn.bottleneck import Bottleneck, ConvNorm

TINY = [
    pytest.param(SlowFast, {"width": 8, "beta": 1 / 4, "alpha": 2}, (3, 4, 16, 16), id="slowfast"),
    pytest.param(VideoResNet, {"width": 4}, (3, 4, 16, 16), id="video"),
    pytest.param(AudioResNet, {"width": 4}, (16, 8), id="audio"),
    pytest.param(AudioResNet, {"width": 4, "variant": "released"}, (16, 8), id="audio-released"),
]


def tiny(cls, settings, **more):
    torch.manual_seed(0)
    return cls(depths=(1, 2, 1, 1), **settings, **more)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def shapes(stages, x):
    return [tuple((x := part(x)).shape) for part in stages]


def test_published_sizes():
    with torch.device("meta"):
        assert parameters(VideoResNet()) == 31_672_128
        assert parameters(AudioResNet(variant="released")) == 5_839_840
        # SlowFast 4x16, R50, has 34.48 M parameters with its classifier of 400 classes.
        assert parameters(SlowFast()) + 400 * 2304 + 400 == 34_480_216


def test_shapes_of_the_stages_at_full_size():
    with torch.device("meta"):
        video, audio, slowfast, paper = VideoResNet(), AudioResNet(variant="released"), SlowFast(), AudioResNet()
        clip = torch.empty(2, 3, 32, 112, 112)
        spectrogram = torch.empty(2, 128, 80)
    assert shapes([video.stem, *video.stages], clip) == [
        (2, 64, 16, 28, 28),
        (2, 256, 16, 28, 28),
        (2, 512, 16, 14, 14),
        (2, 1024, 16, 7, 7),
        (2, 2048, 16, 4, 4),
    ]
    assert shapes([audio.stem, *audio.stages], spectrogram.transpose(1, 2)[:, None]) == [
        (2, 32, 80, 128),
        (2, 128, 40, 64),
        (2, 256, 20, 32),
        (2, 512, 10, 16),
        (2, 1024, 5, 8),
    ]
    assert shapes([paper.stem, *paper.stages], torch.empty(2, 1, 128, 220, device="meta")) == [
        (2, 32, 128, 220),
        (2, 128, 128, 220),
        (2, 256, 64, 110),
        (2, 512, 32, 55),
        (2, 1024, 16, 28),
    ]
    seen = {}
    for name, part in slowfast.named_modules():
        if name.count(".") < 3:
            part.register_forward_hook(lambda module, args, output, name=name: seen.update({name: tuple(output.shape)}))
    assert slowfast(clip).shape == (2, slowfast.out_features) == (2, 2304)
    sides = (28, 28, 14, 7, 4)
    slow = [seen[f"slow.{part}"] for part in ("stem", "stages.0", "stages.1", "stages.2", "stages.3")]
    assert slow == [(2, c, 4, s, s) for c, s in zip((64, 256, 512, 1024, 2048), sides, strict=True)]
    fast = [seen[f"fast.{part}"] for part in ("stem", "stages.0", "stages.1", "stages.2", "stages.3")]
    assert fast == [(2, c, 32, s, s) for c, s in zip((8, 32, 64, 128, 256), sides, strict=True)]
    assert [seen[f"lateral.{i}"][1:3] for i in range(4)] == [(16, 4), (64, 4), (128, 4), (256, 4)]


def test_flops():
    with torch.device("meta"):
        assert flops.count(VideoResNet(), torch.empty(1, 3, 32, 112, 112)) / 1e9 == pytest.approx(47.75, abs=0.005)
        assert flops.count(AudioResNet(variant="released"), torch.empty(1, 128, 80)) / 1e9 == pytest.approx(
            1.75, abs=0.005
        )
        # 36.1 billion multiply-adds in the paper of SlowFast, for frames of 256 pixels.
        assert flops.count(SlowFast(), torch.empty(1, 3, 32, 256, 256)) / 2e9 == pytest.approx(36.1, abs=0.05)


@pytest.mark.parametrize("frames", [1, 4, 5])
def test_slow_pathway_reads_every_alpha_th_frame(frames):
    model = tiny(SlowFast, {"width": 8, "beta": 1 / 4, "alpha": 2}, norm="group", zero_init=False)
    for lateral in model.lateral:
        nn.init.zeros_(lateral.norm.weight)
    x = torch.randn(2, 3, frames, 16, 16)
    slow, fast = model(x).split([256, 64], 1)
    changed = x.clone()
    changed[:, :, 1::2] += 1
    slow_after, fast_after = model(changed).split([256, 64], 1)
    assert torch.equal(slow, slow_after)
    assert frames == 1 or not torch.allclose(fast, fast_after)
    assert torch.equal(fast_after, model.fast(changed))


def test_lateral_connections_carry_the_fast_pathway():
    model = tiny(SlowFast, {"width": 8, "beta": 1 / 4, "alpha": 2}, norm="group", zero_init=False)
    x = torch.randn(2, 3, 4, 16, 16)
    for i, lateral in enumerate(model.lateral):
        before = model(x)
        kept = lateral.conv.weight.detach().clone()
        lateral.conv.weight.data.copy_(torch.randn_like(kept))
        after = model(x)
        assert not torch.allclose(before[:, :256], after[:, :256]), i
        assert torch.equal(before[:, 256:], after[:, 256:]), i


@pytest.mark.parametrize(("cls", "settings", "shape"), TINY)
@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("train", [True, False])
def test_recomputation_changes_nothing(cls, settings, shape, norm, train):
    x = torch.randn(3, *shape)
    results = []
    for recompute in (False, True):
        model = tiny(cls, settings, norm=norm, zero_init=False).train(train)
        model.grad_checkpointing = recompute
        model(x).square().sum().backward()
        results.append((dict(model.named_buffers()), {k: p.grad for k, p in model.named_parameters()}))
    (buffers, gradients), (buffers_again, gradients_again) = results
    for key, value in buffers.items():
        assert torch.equal(value, buffers_again[key]), key
        if key.endswith("num_batches_tracked"):
            assert value == int(train)
    for key, value in gradients.items():
        assert torch.equal(value, gradients_again[key]), key
        assert value.abs().max() > 0, key


def test_recomputation_in_a_compiled_graph_changes_nothing():
    x, results = torch.randn(3, 8, 8), []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = AudioResNet(4, (1,), zero_init=False)
        model.grad_checkpointing = True
        (torch.compile(model, backend="aot_eager") if compiled else model)(x).square().sum().backward()
        results.append({**dict(model.named_buffers()), **{k: p.grad for k, p in model.named_parameters()}})
    for key, value in results[0].items():
        assert_close(key, results[1][key], value, 1e-6)


@pytest.mark.parametrize(("cls", "settings", "shape"), TINY)
def test_recomputation_keeps_less(cls, settings, shape):
    model, kept = tiny(cls, settings), []
    for recompute in (False, True):
        model.grad_checkpointing = recompute
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            model(torch.randn(2, *shape))
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize(("cls", "settings", "shape"), TINY)
def test_group_norm_leaves_clips_independent(cls, settings, shape):
    model = tiny(cls, settings, norm="group", zero_init=False).double()
    x = torch.randn(3, *shape).double()
    together = model(x)
    assert together.shape == (3, model.out_features)
    assert together.std(0).mean() > 0.1
    assert_close("alone", torch.cat([model(clip[None]) for clip in x]), together, 1e-12)


@pytest.mark.parametrize(("channels", "groups"), [(2, 1), (16, 1), (24, 1), (56, 1), (64, 4), (2048, 128)])
def test_groups_hold_sixteen_channels(channels, groups):
    assert ConvNorm(1, channels, (1, 1), norm="group").norm.num_groups == groups


def test_blocks_start_as_their_shortcuts():
    block = Bottleneck(8, 2, [(1, 1), (3, 3), (1, 1)], [(1, 1)] * 3)
    x = torch.randn(2, 8, 5, 6)
    assert torch.equal(block(x), x.relu())
    block(x).sum().backward()
    assert block.layers[-1].norm.weight.grad.abs().min() > 0


def test_bottleneck_against_its_formula():
    block = Bottleneck(6, 2, [(3, 1), (1, 3), (1, 1)], [(2, 1), (1, 2), (1, 1)], zero_init=False).double().eval()
    for name, value in block.state_dict().items():
        if value.is_floating_point() and ".norm." in name:
            value.copy_(1 + 0.3 * torch.rand_like(value))
    x = torch.randn(2, 6, 7, 8, dtype=torch.float64)

    def normed(part, y):
        norm = part.norm
        y = (y - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + 1e-5).sqrt()
        return y * norm.weight[:, None, None] + norm.bias[:, None, None]

    a, b, c = block.layers
    padded = nn.functional.pad(x, (0, 0, 1, 1)).unfold(2, 3, 2)  # (N, C, rows, columns, kernel)
    y = normed(a, torch.einsum("ncrxk,ock->norx", padded, a.conv.weight[..., 0])).relu()
    y = nn.functional.pad(y, (1, 1)).unfold(3, 3, 2)
    y = normed(b, torch.einsum("ncrxk,ock->norx", y, b.conv.weight[:, :, 0])).relu()
    y = normed(c, torch.einsum("ncrx,oc->norx", y, c.conv.weight[:, :, 0, 0]))
    y = y + normed(
        block.shortcut, torch.einsum("ncrx,oc->norx", x[:, :, ::2, ::2], block.shortcut.conv.weight[..., 0, 0])
    )
    assert_close("bottleneck", block(x), y.relu(), 1e-13)


def test_convolutions_start_at_the_variance_of_their_outputs():
    weight = ConvNorm(64, 128, (1, 3, 3)).conv.weight
    assert weight.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)


@pytest.mark.parametrize(("cls", "settings", "shape"), TINY)
def test_synchronised_batch_norm(cls, settings, shape):
    model = tiny(cls, settings).eval()
    x = torch.randn(2, *shape)
    before = model(x)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert not any(type(m) in (nn.BatchNorm2d, nn.BatchNorm3d) for m in synchronised.modules())
    synchronised.grad_checkpointing = True
    after = synchronised(x)
    after.sum().backward()
    assert torch.equal(before, after)
    assert all(m.track_running_stats for m in synchronised.modules() if isinstance(m, nn.SyncBatchNorm))


def test_time_and_mel_bins_are_told_apart():
    model = tiny(AudioResNet, {"width": 4, "variant": "released"}, norm="group")
    seen = []
    model.stem.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    model(torch.randn(2, 24, 8))
    assert seen == [(2, 1, 8, 24)]
    assert [part.conv.kernel_size for part in model.stem] == [(9, 1), (1, 9)]


def test_errors_name_what_was_wrong():
    with pytest.raises(ValueError, match="norm must be one of batch, sync, group, not 'layer'"):
        VideoResNet(4, norm="layer")
    with pytest.raises(ValueError, match=r"beta \* width = 0.125 \* 4 channels"):
        SlowFast(4)
    with pytest.raises(ValueError, match="four stages, not of 3"):
        SlowFast(8, (1, 1, 1))
    with pytest.raises(ValueError, match="3 stages want 4 temporal_kernels, not 5"):
        VideoResNet(4, (1, 1, 1))
    with pytest.raises(ValueError, match="variant must be"):
        AudioResNet(4, variant="code")
    with pytest.raises(ValueError, match="4 stages want as many strides, not 2"):
        AudioResNet(4, strides=(1, 2))
    with pytest.raises(ValueError, match=r"expected clips \(N, 3, t, H, W\), got .* \(2, 1, 4, 16, 16\)"):
        SlowFast(8)(torch.zeros(2, 1, 4, 16, 16))
    with pytest.raises(ValueError, match=r"expected spectrograms .* \(2, 1, 16, 8\)"):
        AudioResNet(4)(torch.zeros(2, 1, 16, 8))
