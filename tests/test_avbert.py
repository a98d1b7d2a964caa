"""AVBERT: what its passes read, and the settings that the paper compares."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close

from avfast import AVBERT
from avfast.models import avbert_losses as losses
from avfast.models.__main__ import SCHEMES, count_parameters
from avfast.random import DrawKey

SMALL = {
    "num_clips": 6, "clip_frames": 2, "img_size": 16, "audio_size": (16, 8), "embed_dim": 32, "depth": 1,
    "num_heads": 2, "rank": 8, "mep_dim": 16, "num_negatives": 5, "mask_ratio": 0.34, "cnn_norm": "group",
    "visual_args": {"width": 8, "depths": (1, 1, 1, 1), "alpha": 2}, "audio_args": {"width": 4, "depths": (1, 1)},
}  # fmt: skip
RELEASED = {"cnn": "released", "visual_args": {"width": 8, "depths": (1, 1, 1, 1)}}
ALL = ["mep_visual", "mep_audio", "cpp_unimodal", "mep_multimodal", "cpp_multimodal"]
B, T = 4, 6


def built(**settings):
    torch.manual_seed(0)
    return AVBERT(**SMALL | settings).double()


def videos(batch=B):
    return {"visual": torch.randn(batch, T, 3, 2, 16, 16).double(), "audio": torch.randn(batch, T, 16, 8).double()}


def drawn(model, batch=B, progress=0.0, **given):
    return model.draw(batch, key=DrawKey(3, 1, range(batch), batch, progress), **given)


def gradients(model, inputs, draws, *names):
    """By parameter, the gradient of some of the losses; of the loss without names."""
    model.zero_grad()
    output = model(**inputs, draws=draws)
    (torch.stack([output.losses[name] for name in names]).sum() if names else output.loss).backward()
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def test_losses_equal_their_definitions():
    """Every term told video by video: transformers and heads alone are the model's."""
    model, inputs = built().eval(), videos()
    draws = drawn(model)
    with torch.no_grad():
        found = model(**inputs, draws=draws)
        x = {n: model.adapters[n](model.cnn(n)(v.flatten(0, 1)).view(B, T, -1)) for n, v in inputs.items()}
        y, terms = {}, {name: [] for name in ALL}
        for name, clips in x.items():
            tokens = clips.clone()
            for i in range(B):
                tokens[i, draws.masked[i]] = model.adapters[name].mask
            tokens = torch.cat([model.adapters[name].bos.expand(B, 1, -1), tokens], 1)
            y[name] = model.transformer(model.times[name].norm(tokens + model.times[name].positions), model.index[name])

        def multimodal(i, j):
            """z of the frames of video i and the audio of video j."""
            time = model.times["fused"]
            parts = [
                y["visual"][i] + time.positions + time.modality[0],
                y["audio"][j] + time.positions + time.modality[1],
            ]
            return model.transformer(time.norm(torch.cat(parts))[None], 2)[0].split(T + 1)

        def pair(head, visual, audio, at):
            logits = model.cpp_heads[head].layers(torch.cat([visual, audio], -1))[[0, *(at + 1).tolist()], 0]
            return logits[0], logits[1:]

        negatives = {}
        for side, (name, clips) in enumerate(x.items()):
            allowed = losses.candidates(draws.places, draws.places, draws.masked, T, "similar")
            weight = losses.sampling_weights(clips.take_along_dim(draws.masked[..., None], 1), clips.flatten(0, 1),
                                             allowed, "similar")  # fmt: skip
            negatives[name] = losses.choose(weight, draws.noise[:, side], 5)
            assert (negatives[name].sum(-1) == 5).all()
        for i in range(B):
            j, at = draws.partner[i].item(), draws.positions[i]
            z, mixed = multimodal(i, i), multimodal(i, j)
            for side, (name, clips) in enumerate(x.items()):
                for m, t in enumerate(draws.masked[i].tolist()):
                    others = clips.flatten(0, 1)[negatives[name][i, m]]
                    for term, part, output in ((f"mep_{name}", name, y[name][i]), ("mep_multimodal", "fused", z[side])):
                        head = model.mep_heads[part]
                        guess = head.fc2(torch.nn.functional.gelu(head.fc1(output[t + 1])))
                        scores = head.target(torch.cat([clips[i, t][None], others])) @ guess
                        terms[term].append(-scores.log_softmax(0)[0])
            both = (("cpp_unimodal", (y["visual"][i], y["audio"][i]), (y["visual"][i], y["audio"][j])),
                    ("cpp_multimodal", z, mixed))  # fmt: skip
            for term, matched, deranged in both:
                for truth, sides in ((1.0, matched), (-1.0, deranged)):
                    bos, rest = pair(term[4:], *sides, at)
                    sure = torch.nn.functional.logsigmoid
                    terms[term].append(-sure(truth * bos) - sure(truth * rest).mean())
    assert list(found.losses) == ALL
    for name, loss in found.losses.items():
        assert_close(name, loss, torch.stack(terms[name]).mean(), 1e-10)
    assert_close("loss", found.loss, torch.stack([*found.losses.values()]).sum(), 1e-12)


def test_a_masked_clip_reaches_no_output():
    """What is masked in both modalities changes targets alone: nothing leaks through z or through the classifiers."""
    model, inputs, seen = built().eval(), videos(), []
    model.transformer.register_forward_hook(lambda module, given, output: seen.append(output))
    draws = drawn(model)
    clip = (torch.arange(B), draws.masked[:, 0])
    other = {name: x.index_put(clip, torch.randn_like(x[clip])) for name, x in inputs.items()}
    first, second = model(**inputs, draws=draws), model(**other, draws=draws)
    assert len(seen) == 6 and all(torch.equal(a, b) for a, b in zip(seen[:3], seen[3:], strict=True))
    for name, loss in first.losses.items():
        assert torch.equal(loss, second.losses[name]) == name.startswith("cpp")
    shown = inputs["visual"].index_put((torch.arange(B), (draws.masked[:, 0] + 1) % T), torch.zeros(()).double())
    model(
        **inputs | {"visual": shown},
        draws=drawn(model, masked=draws.masked[:, :1].expand(-1, 2) * 0 + torch.tensor([0, 3])),
    )
    assert not torch.equal(seen[6], seen[0])


def test_the_videos_of_a_pair_are_masked_alike():
    """Otherwise the masks of its two halves would tell a pair of two videos from that of one."""
    for masks in ("pool", "video"):
        draws = drawn(built(masks=masks, pool_size=2), 40)
        assert torch.equal(draws.masked, draws.masked[draws.partner]) == (masks == "pool")


def test_gradients_reach_both_cnns_through_every_term():
    model, inputs = built(), videos()
    draws = drawn(model)
    for name in ALL:
        found = gradients(model, inputs, draws, name)
        for modality in ("visual", "audio"):
            reached = any(n.startswith(f"{modality}_cnn") for n in found)
            assert reached == (name not in {"mep_visual", "mep_audio"} - {f"mep_{modality}"}), (name, modality)
    whole = gradients(model, inputs, draws)
    model.target_gradient = False
    assert gradients(model, inputs, draws) == whole, "through what is not masked"
    assert not model.has_unused_parameters


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, ALL),
        (RELEASED, ALL),
        ({"multimodal_mep": False}, [n for n in ALL if n != "mep_multimodal"]),
        ({"cpp": False}, [n for n in ALL if "cpp" not in n]),
        ({"cpp": False, "multimodal_mep": False}, ["mep_visual", "mep_audio"]),
        ({"cpp_positions": 0}, ALL),
        ({"modality_embedding": False}, ALL),
        ({"fusion": "early"}, ["mep_multimodal", "cpp_multimodal"]),
        ({"fusion": "late"}, ["mep_visual", "mep_audio", "cpp_unimodal"]),
        ({"fusion": "late", "cpp": False}, ["mep_visual", "mep_audio"]),
        ({"negatives": "current_sequence"}, ALL),
        ({"negatives": "current_minibatch", "sharing": "none"}, ALL),
        ({"negatives": "dissimilar", "sharing": "part_att", "mep_hidden": 7, "cpp_depth": 1}, ALL),
    ],
)
def test_settings_of_the_paper_s_comparisons(settings, names):
    model, inputs = built(**settings), videos(2)
    draws = drawn(model, 2)
    assert sorted(model(**inputs, draws=draws).losses) == sorted(names)
    model.zero_grad()
    model(**inputs, draws=draws).loss.backward()
    missing = {name for name, p in model.named_parameters() if p.grad is None}
    assert (
        bool(missing)
        == model.has_unused_parameters
        == (names == ["mep_visual", "mep_audio"] and "fusion" not in settings)
    )
    found, early, late = model.encode(**inputs), settings.get("fusion") == "early", settings.get("fusion") == "late"
    assert found.audio.shape == found.visual.shape == (2, 1 + T, 32)
    assert found.fused is None if late else found.fused.shape == (2, 2 + 2 * T, 32)
    assert model.transformer.depths == {(True, False): (2,), (False, True): (2, 2)}.get((early, late), (1, 1, 1))
    assert (draws.positions is None) == (settings.get("cpp") is False)


def test_weights_of_the_two_tasks():
    model, inputs = built(cpp_weight=0.25), videos(2)
    found = model(**inputs, draws=drawn(model, 2))
    total = sum(loss * (0.25 if "cpp" in name else 1) for name, loss in found.losses.items())
    assert_close("loss", found.loss, total, 1e-12)
    assert set(found.metrics) == {"mep_accuracy", "cpp_accuracy"}


def test_frozen_halves():
    model, inputs = built(frozen="audio", cnn_norm="batch"), videos()
    first, second = drawn(model, progress=0.4), drawn(model, progress=0.5)
    assert (first.half, second.half) == ("first", "second") and first.signature != second.signature
    assert list(model(**inputs, draws=first).losses) == ["mep_audio"] and model.has_unused_parameters
    reached = gradients(model, inputs, first)
    assert {n.split(".")[0] for n in reached} == {"audio_cnn", "adapters", "times", "transformer", "mep_heads"}
    assert not any("visual" in n or "fused" in n for n in reached)
    before = {name: x.clone() for name, x in model.named_buffers()}
    reached = gradients(model, inputs, second)
    assert (
        list(model(**inputs, draws=second).losses) == [n for n in ALL if n != "mep_audio"] and model.audio_cnn.training
    )
    assert not any("audio" in n for n in reached) and any("visual_cnn" in n for n in reached)
    for name, x in model.named_buffers():
        if name.endswith("running_mean"):
            assert torch.equal(x, before[name]) == name.startswith("audio_cnn"), name


def test_videos_that_lack_a_modality_count_in_the_mep_of_the_other_alone():
    model, inputs = built(negatives="current_minibatch"), videos()
    has = {"has_audio": [True, True, True, False], "has_visual": [False, True, True, True]}
    draws = drawn(model, **has)
    found = model(**inputs, draws=draws).losses
    silent = inputs | {"audio": torch.cat([inputs["audio"][:3], 5 + inputs["audio"][3:]])}
    assert all(torch.equal(loss, found[name]) for name, loss in model(**silent, draws=draws).losses.items())
    both = {name: x[1:3] for name, x in inputs.items()}
    some = drawn(built(negatives="current_minibatch"), 2, masked=draws.masked[1:3], positions=draws.positions)
    alone = model(**both, draws=some).losses
    for name in ("cpp_unimodal", "cpp_multimodal"):
        assert_close(name, alone[name], found[name], 1e-12)
    seen = {name: x[:3] if name == "audio" else x[1:] for name, x in inputs.items()}
    for name, x in seen.items():
        rows = draws.rows()[name]
        one = drawn(model, 3, masked=draws.masked[rows], **{f"has_{n}": [n == name] * 3 for n in inputs})
        assert_close(name, model(**{name: x}, draws=one).losses[f"mep_{name}"], found[f"mep_{name}"], 1e-12)


def test_batch_norm_does_not_see_what_is_absent():
    model, inputs = built(cnn_norm="batch"), videos()
    draws = drawn(model, has_audio=[True, True, False, False])
    model(**inputs, draws=draws)
    found = {name: x.clone() for name, x in model.audio_cnn.named_buffers()}
    other = built(cnn_norm="batch")
    other.audio_cnn(inputs["audio"][:2].flatten(0, 1))
    for name, x in other.audio_cnn.named_buffers():
        assert_close(name, found[name], x, 1e-12)
    before = found["stem.0.norm.running_mean"]
    model(**inputs, draws=drawn(model, has_audio=[False] * B))
    after = dict(model.audio_cnn.named_buffers())["stem.0.norm.running_mean"]
    assert torch.isfinite(after).all() and before.shape == after.shape


def test_parts_work_alone_and_on_fewer_or_larger_clips():
    model, inputs = built().eval(), videos(2)
    whole = model.encode(**inputs)
    features = {name: model.cnn(name)(x.flatten(0, 1)).view(2, T, -1) for name, x in inputs.items()}
    for name in inputs:
        alone = vars(model.encode(**{name: inputs[name]}))
        assert torch.equal(alone[name], vars(whole)[name]) and [x for n, x in alone.items() if n != name] == [
            None,
            None,
        ]
    assert_close("fused", model.encode(**features).fused, whole.fused, 1e-12)
    short = model.encode(torch.randn(1, 3, 20, 8).double(), torch.randn(1, 3, 3, 4, 24, 24).double())
    assert short.fused.shape == (1, 8, 32)
    for wrong, reason in (
        ({}, "give audio, visual or both"),
        ({"audio": torch.randn(2, T, 16, 8), "visual": torch.randn(1, T, 3, 2, 16, 16)}, "must pair up"),
        ({"audio": torch.randn(2, T + 1, 16, 8)}, "audio must be of 6 clips, got 7"),
        ({"audio": torch.zeros(2, T, 16, 8, dtype=torch.int64)}, "audio must be floating point"),
        ({"visual": torch.randn(2, T, 2, 3, 16, 16)}, r"visual must be \(B, T, 3, 2, 16, 16\), got \(2, 6, 2"),
    ):
        with pytest.raises(ValueError, match=reason):
            model.encode(**wrong)
    with pytest.raises(ValueError, match="audio must be of 6 clips, got 5"):
        model(audio=torch.randn(2, T - 1, 16, 8))
    with pytest.raises(ValueError, match="draws are of 3 videos, the batch has 2"):
        model(**inputs, draws=drawn(model, 3))


def test_how_large_time_embeddings_start():
    """And nothing else does otherwise."""
    usual, large = (dict(built(**settings).named_parameters()) for settings in ({}, {"time_std": 0.2}))
    for name, p in usual.items():
        torch.testing.assert_close(large[name], p * 10 if name.endswith(".positions") else p, atol=1e-6, rtol=0)


def test_one_video_is_no_batch():
    model = built()
    with pytest.raises(ValueError, match="of which there must be 2 or more"):
        model.draw(1)
    assert torch.isfinite(model.eval()(**videos(1)).loss)
    assert torch.isfinite(built(cpp=False)(**videos(1)).loss)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"cnn": "resnet"}, "cnn must be paper or released"),
        ({"fusion": "middle"}, "fusion must be early, mid or late"),
        ({"frozen": "fused"}, "frozen must be visual, audio or None"),
        ({"frozen": "audio", "fusion": "early"}, "None with early fusion"),
        ({"fusion": "early", "cpp": False, "multimodal_mep": False}, "has no loss"),
        ({"cpp_depth": 0}, "cpp_depth must be at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, reason):
    with pytest.raises(ValueError, match=reason):
        AVBERT(**SMALL | settings)


def test_groups_blocks_and_presets():
    model = built()
    groups = model.parameter_groups()
    assert [p.shape for p in groups["orthogonal"]] == [(18, 8, 8)]
    assert built(sharing="none").parameter_groups()["orthogonal"] == []
    assert len(built(sharing="none").blocks()) == len(model.blocks()) + 6
    assert model.visible(0.3) == 1 - 2 / 6
    for scheme, parameters in (("both, low rank: part", 3_843_840), ("Multi-2: none", 7_397_760)):
        assert count_parameters("avbert_base", **SCHEMES[scheme][0])["transformer"] == parameters
