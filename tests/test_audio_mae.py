from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import assert_close
from released import Released
from small_models import assert_stored, figures_of, named_weights, signals, small_released

from avfast import AudioMAE
from avfast.models.branch import Branch
from avfast.nn.patches import patchify
from avfast.random import DrawKey
from avfast.released import mae_st

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-8}
SMALL = {
    "audio_size": (128, 64), "embed_dim": 32, "depth": 2, "num_heads": 2, "decoder_embed_dim": 16, "decoder_depth": 2,
    "decoder_num_heads": 2,
}  # fmt: skip
DECODERS = {"local": "pretrain_local (decoder_mode=1)", "global": "pretrain_global (decoder_mode=0)"}


class ReleasedAudioMAE(Released):
    """The released code; its position tables and temperatures do not follow the rule of the other weights."""

    def state(self, layout: str, unread: str = "none") -> dict[str, torch.Tensor]:
        state = super().state(layout, unread)
        for key, value in state.items():
            if key.endswith("pos_embed"):
                state[key] = torch.cat([torch.zeros(1, 1, value.shape[2]), transposed_table(value.shape[2])], 1)
            if key.endswith("tau"):
                state[key] = torch.from_numpy((1 + 0.1 * self.normal(key, value.shape)).astype(np.float32))
        return state


def transposed_table(dim: int) -> torch.Tensor:
    """AudioMAE's ``(1, 512, dim)`` positions, laid out for 8 x 64 patches while tokens run 64 x 8."""
    row = torch.arange(512)
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = [place.double()[:, None] * frequency for place in (row % 64, row // 64)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], 1).float()[None]


def all_patches(released: Released, losses: str, branch: Branch, tokens, image, draws, tol: float) -> torch.Tensor:
    """Checks the losses of the masked patches of all predictions, and gives these."""
    predicted = branch.decode(tokens, image, draws, whole=True)
    masked = predicted.gather(1, draws.masked[..., None].expand(-1, -1, predicted.shape[2]))
    for name, target in (("", image), ("_scaled", 2 * image + 1), ("_tiny", 0.001 * image)):
        for branch.norm_pix, word in ((False, "off"), (True, "on")):
            loss = branch.reconstruction_loss(masked, target, draws.masked)
            released.check(f"{losses}_loss{name}_norm_pix_{word}", loss, tol)
    return predicted


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float64"])
@pytest.mark.parametrize("decoder", DECODERS)
@torch.no_grad()
def test_pre_training_equals_the_released_one(decoder, dtype):
    released, tol = ReleasedAudioMAE("audio_mae", dtype), TOLERANCE[dtype]
    state = released.state(DECODERS[decoder])
    released.check("pos_embed", state["pos_embed"], 1e-6)
    model = AudioMAE.from_released(state).to(dtype).eval()
    assert len(model.audio.decoder.blocks) == {"local": 16, "global": 8}[decoder]
    draws = model.draw(2, audio_keep=released.ids("keep")).to("cpu").audio
    image = released.input("spec")
    tokens = model.audio.encode(image, draws.plan("encoder"), draws.kept)
    released.check("latent", tokens, tol)
    predicted = all_patches(released, decoder, model.audio, tokens, image, draws, tol)
    released.check(f"{decoder}_pred", predicted, tol)
    output = model(image[:, 0], model.draw(2, audio_keep=released.ids("keep")))
    released.check(f"{decoder}_loss_norm_pix_on", output.loss, tol)
    if decoder == "local":
        for block in model.audio.decoder.blocks:
            block.attn.shift = (0, 0)
        predicted = model.audio.decode(tokens, image, draws, whole=True)
        released.check("local_noshift_pred", predicted, tol)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float64"])
@torch.no_grad()
def test_fine_tuned_logits_equal_the_released_ones(dtype):
    released = ReleasedAudioMAE("audio_mae", dtype)
    model = AudioMAE.from_released(released.state("finetune")).to(dtype).eval()
    released.check("ft_logits", model.classify(released.input("spec")[:, 0]), TOLERANCE[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float64"])
@pytest.mark.parametrize("layout", ["dec8_t8", "dec4_t16"])
@torch.no_grad()
def test_a_branch_of_videos_equals_the_released_mae_st(layout, dtype):
    released, tol = Released("mae_st", dtype), TOLERANCE[dtype]
    settings, weights = mae_st.convert(released.state(layout))
    branch = Branch(**settings)
    branch.load_state_dict(weights)
    branch.to(dtype).eval()
    draws = branch.draw(DrawKey(0, 0, range(2), 2), "visual", 1, 313, released.ids("keep")).planned(torch.device("cpu"))
    video = released.input("video")
    tokens = branch.encode(video, draws.plan("encoder"), draws.kept)
    released.check("latent", tokens[:, 1:], tol)
    released.check(f"{layout}_pred", all_patches(released, layout, branch, tokens, video, draws, tol), tol)
    target = patchify(branch.target(video), branch.target_patch)
    released.check(f"{layout}_target", target, tol)


# A small configuration against what the code gave that was checked at full size.

CASES = {
    "local": {}, "global": {"decoder": "global"}, "diffused": {"mask_content": "diffused", "norm_pix": False},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_small_model_gives_the_stored_figures(case):
    model = named_weights(AudioMAE(**SMALL, **CASES[case]))
    assert_stored(case, figures_of(model, signals(2, 128, 64)), "diff" in case)


# What the model promises.


def test_patches_kept_and_masked_are_all_and_follow_the_curriculum():
    model = AudioMAE(**SMALL | {"audio_size": (1024, 128)}, mask_ratio=(0.9, 0.8))
    for progress, kept in ((0.0, 51), (0.5, 76), (1.0, 102)):
        key = DrawKey(0, 5, range(3), 3, progress)
        draws = model.draw(3, key=key).audio
        assert draws.kept.shape == (1, 3, kept)
        both = torch.cat([draws.kept[0], draws.masked], 1).sort(1).values
        assert torch.equal(both, torch.arange(512).expand(3, -1))
        assert model.visible(progress) == pytest.approx(0.1 + 0.1 * progress)
    wide = AudioMAE(**SMALL | {"audio_size": (192, 64)}, mask_ratio=(0.9, 0.5)).masking
    assert [wide.kept(48, epoch / 48) for epoch in (38, 43)] == [20, 22], "not one less by the last bits of 7/12"
    other = AudioMAE(**SMALL | {"audio_size": (1024, 128)}, mask_ratio=(0.9, 0.8), rounding="nearest")
    assert other.draw(3, key=DrawKey(0, 5, range(3), 3, 0.5)).audio.kept.shape[2] == 77


def test_draws_do_not_depend_on_how_a_batch_is_split():
    model = AudioMAE(**SMALL, mask_content="diffused")
    whole, some = (model.draw(len(rows), key=DrawKey(3, 4, rows, 6)) for rows in (range(6), range(2, 5)))
    for x, y in zip(whole.tensors(), some.tensors(), strict=True):
        if x.ndim:
            axis = x.ndim - 2 if x.ndim > 1 else 0
            assert torch.equal(x.narrow(axis, 2, 3), y)
        else:
            assert torch.equal(x, y), "one seed for the noise of all processes"
    assert whole.noise.sample_ids.tolist() == list(range(6))


def test_what_is_given_is_not_drawn():
    model = AudioMAE(**SMALL, mask_content="diffused").double()
    audio, keep, times = signals(2, 128, 64), torch.tensor([[3, 1], [0, 31]]), torch.tensor([1, 1000])
    draws = model.draw(2, audio_keep=keep, audio_timesteps=times, noise_seed=7)
    assert draws.audio.kept.tolist() == [[[1, 3], [0, 31]]] and draws.audio.masked.shape == (2, 30)
    assert torch.equal(draws.audio.timesteps, times) and draws.noise.seed == 7
    again = model.draw(2, audio_keep=keep, audio_timesteps=times, noise_seed=7)
    assert model(audio, draws).loss == model(audio, again).loss
    assert model(audio, draws).loss != model(audio, model.draw(2, audio_keep=keep, audio_timesteps=times)).loss
    for wrong in (
        torch.tensor([[1, 1], [0, 2]]),
        torch.tensor([[0, 32], [0, 1]]),
        torch.zeros(2, 32, dtype=torch.bool),
        torch.zeros(2, 0, dtype=torch.int64),
    ):
        with pytest.raises(ValueError, match="audio_keep must hold"):
            model.draw(2, audio_keep=wrong)
    with pytest.raises(ValueError, match="tell of 0 instances, the batch has 2"):
        model.draw(2, has_audio=[])


def test_a_clip_without_audio_counts_in_nothing():
    model, audio = AudioMAE(**SMALL).double(), signals(3, 128, 64)
    key = DrawKey(0, 0, range(3), 3)
    loss = model(audio, model.draw(3, key=key, has_audio=[True, True, False])).loss
    alone = model(audio[:2], model.draw(2, key=DrawKey(0, 0, range(2), 2))).loss
    assert_close("loss", loss, alone, 1e-12)


def test_the_noised_input_is_shown_in_its_place():
    model = AudioMAE(**SMALL, mask_content="diffused").double().eval()
    audio, draws = signals(2, 128, 64), model.draw(2, audio_timesteps=torch.ones(2, dtype=torch.int64))
    shown = model.figures({"audio": audio}, draws, model(audio, draws)).reconstruction.audio
    assert list(shown) == ["input", "noised input", "reconstruction"]
    assert 0 < (shown["noised input"] - shown["input"]).abs().max() < 0.15  # 0.025 deviations of noise at t = 1
    plain = AudioMAE(**SMALL).eval()
    draws = plain.draw(2)
    assert plain.figures({"audio": audio.float()}, draws, plain.train()(audio.float(), draws)).reconstruction is None


def test_positions_of_shorter_audio_are_the_first_of_longer(tmp_path):
    long, short = (AudioMAE(**SMALL | {"audio_size": (frames, 128)}) for frames in (256, 128))
    for a, b in ((long.audio.pos_embed, short.audio.pos_embed), (long.audio.decoder.pos_embed,) * 2):
        assert torch.equal(a[:, : b.shape[1]], b) and not a.requires_grad
    state = small_released()
    full, half = AudioMAE.from_released(state), AudioMAE.from_released(state, audio_size=(128, 128), num_heads=2)
    assert full.frontend.num_frames == 256 and torch.equal(half.audio.pos_embed, full.audio.pos_embed[:, :65])
    torch.save({"model": state, "epoch": 32}, tmp_path / "audiomae.pth")
    other = AudioMAE(**SMALL | {"audio_size": (128, 128)})
    other.load_pretrained(audio=tmp_path / "audiomae.pth")
    assert torch.equal(other.audio.pos_embed, half.audio.pos_embed)
    assert torch.equal(other.audio.blocks[1].mlp.fc1.weight, half.audio.blocks[1].mlp.fc1.weight)


def test_settings_come_from_the_checkpoint_and_what_does_not_fit_is_listed():
    state = small_released()
    model = AudioMAE.from_released({f"module.{k}": v for k, v in state.items()})
    assert model.audio.decoder.attention == "local" and len(model.audio.decoder.blocks) == 2
    assert torch.equal(model.audio.decoder.pos_embed, state["decoder_pos_embed"][:, 1:])
    assert AudioMAE.from_released(state, decoder_depth=0).audio.decoder is None
    assert AudioMAE.from_released(state, num_classes=7).classify(torch.zeros(1, 256, 128)).shape == (1, 7)
    with pytest.raises(ValueError, match="1 unknown keys in the checkpoint: blocks.0.ls1"):
        AudioMAE.from_released({**state, "blocks.0.ls1": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"1 missing keys: audio.blocks.1.attn.qkv.bias"):
        AudioMAE.from_released({k: v for k, v in state.items() if k != "blocks.1.attn.qkv.bias"})
    fewer = AudioMAE.from_released(state, audio_size=(256, 64), decoder_depth=0)
    table = state["pos_embed"][0, 1:].view(16, 8, 32)
    assert torch.equal(fewer.audio.pos_embed[0, 0], state["pos_embed"][0, 0])
    want = torch.nn.functional.interpolate(table[None], (4, 32), mode="bicubic", antialias=True)  # channels: time
    assert_close("mel bins", fewer.audio.pos_embed[0, 1:].view(16, 4, 32), want[0], 1e-6)
    with pytest.raises(ValueError, match=r"audio must be .* built or loaded with audio_size=\(256, 128\) takes it"):
        fewer.encode(torch.zeros(1, 256, 128))
    with pytest.raises(ValueError, match="no AudioMAE checkpoint"):
        AudioMAE.from_released({"encoder.weight": torch.zeros(1)})
    fine_tuned = {k: v for k, v in state.items() if not k.startswith(("decoder", "mask", "norm."))}
    fine_tuned |= {"head.weight": torch.zeros(5, 32), "head.bias": torch.zeros(5)}
    fine_tuned |= {"fc_norm.weight": torch.ones(32), "fc_norm.bias": torch.zeros(32)}
    assert AudioMAE.from_released(fine_tuned).classify(torch.zeros(1, 256, 128)).shape == (1, 5)
    again = AudioMAE.from_released(fine_tuned, num_classes=3)
    assert again.classify(torch.zeros(1, 256, 128)).shape == (1, 3)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"decoder": "swin"}, "decoder must be local or global"),
        ({"mask_content": "noise"}, "mask_content must be one of token, diffused"),
        ({"mask_ratio": 1.0}, "a masking ratio lies in"),
        ({"mask_ratio": 0.99}, "keeps none of 32 patches"),
        ({"mask_ratio": (0.8, 0.0)}, "masks none of 32 patches"),
        ({"mask_ratio": (0.9, 0.8, 0.7)}, "the first and the last"),
        ({"audio_size": (96, 64)}, r"multiples of 4 patches along both axes, got \(6, 4\)"),
        ({"rounding": "up"}, "rounding must be one of floor, nearest"),
        ({"timesteps": "step"}, "timesteps must be one of clip, batch"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, reason):
    with pytest.raises(ValueError, match=reason):
        AudioMAE(**SMALL | settings)
