"""A user's own file: three models of kinds that the library does not have yet, and a recipe for each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avfast.data import KaldiFrontend
from avfast.data.spec import clips, video
from avfast.distributed import all_sum, world_size
from avfast.models.contract import Draws, Features, Figures, Output, Reconstruction
from avfast.models.registry import PRESETS
from avfast.nn import patchify, unpatchify
from avfast.ops import info_nce, masked_patch_mse
from avfast.random import DrawKey
from avfast.train import Config

SIZE, MELS, FRAMES = 16, 32, 32
TUBE = (2, 8, 8)


class Own(nn.Module):
    """What the three have in common: nothing to load, no blocks to shard."""

    passes, sources, contrasts, has_unused_parameters = ("joint",), (), False, False

    def visible(self, progress):
        return 1.0

    def parameter_groups(self):
        return {"all": list(self.parameters())}

    def blocks(self):
        return []

    def set_grad_checkpointing(self, enable=True):
        raise ValueError("this model is too small to recompute anything")

    def load_pretrained(self):
        pass

    def figures(self, inputs, draws, output):
        return Figures()


def the_key(batch_size, key):
    return DrawKey.fresh(batch_size) if key is None else key


def shuffled(key, stream, count):
    """(B, count) int64, a permutation of each sample."""
    return torch.from_numpy(key.uniform(stream, count).argsort(1))


def presence(batch_size, *given):
    """Which samples have all of it: (B,) bool, and their rows."""
    has = torch.ones(batch_size, dtype=torch.bool)
    for some in given:
        has &= has if some is None else torch.tensor(some)
    return has, has.nonzero()[:, 0]


# Audio alone: a masked autoencoder of 8 x 8 patches.


class Ears(KaldiFrontend):
    frames = None


@dataclass(frozen=True, eq=False)
class Masked(Draws):
    mask: Tensor  # (B, N)
    there: Tensor  # (B,) which samples have audio


class Listener(Own):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.frontend = Ears(num_frames=FRAMES, num_mel_bins=MELS, image_size=SIZE)
        self.embed, self.token = nn.Linear(64, width), nn.Parameter(torch.zeros(width))
        self.positions = nn.Parameter(torch.randn(FRAMES * MELS // 64, width) / 10)
        self.block = nn.TransformerEncoderLayer(width, 2, width, 0.0, batch_first=True)
        self.head = nn.Linear(width, 64)

    def draw(self, batch_size, *, key=None, only=None, has_audio=None, has_visual=None):
        mask = shuffled(the_key(batch_size, key), "mask", len(self.positions)) >= 4
        return Masked("joint", mask, presence(batch_size, has_audio)[0])

    def tokens(self, patches, mask=None):
        x = self.embed(patches)
        if mask is not None:
            x = torch.where(mask[..., None], self.token, x)
        return self.block(x + self.positions)

    def forward(self, audio, draws=None):
        draws = self.draw(len(audio)) if draws is None else draws
        patches = cut(audio)
        guess = self.head(self.tokens(patches, draws.mask))
        ids = torch.where(draws.mask & draws.there[:, None], torch.arange(len(self.positions), device=audio.device), -1)
        loss = masked_patch_mse(guess, audio, ids, patch=8)
        return Output(loss, {"reconstruction_audio": loss}, reconstruction={"audio": guess})

    def encode(self, audio):
        return Features(self.tokens(cut(audio)), None, None)

    def figures(self, inputs, draws, output):
        patches, mask = cut(inputs["audio"]), draws.mask[..., None]
        rows = (patches, patches.masked_fill(mask, torch.nan), patches.where(~mask, output.reconstruction["audio"]))
        shown = dict(zip(("input", "masked", "reconstruction"), (pasted(x).cpu() for x in rows), strict=True))
        return Figures(Reconstruction(shown, {}, {"audio": draws.mask.float().mean(1).cpu()}))


def cut(audio):
    """(B, frames, mels) as (B, N, 64)."""
    return F.unfold(audio[:, None], 8, stride=8).mT


def pasted(patches):
    return F.fold(patches.mT, (FRAMES, MELS), 8, stride=8)[:, 0]


# Video alone, two masked views of it: each reconstructs what it does not see, and finds the other among all.


class Eyes(KaldiFrontend):
    frames = video(4, 1.0)

    def __call__(self, batch, *, train=False, key=None):
        return {"visual": self.visual(batch.frames)}


@dataclass(frozen=True, eq=False)
class TwoViews(Draws):
    keep: Tensor  # (B, 2, K)
    there: Tensor  # (B,) which samples have a video
    rows: Tensor  # their rows


class Watcher(Own):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.frontend = Eyes(num_frames=120, num_mel_bins=MELS, image_size=SIZE)
        self.embed, self.token = nn.Linear(3 * 2 * 64, width), nn.Parameter(torch.zeros(width))
        self.positions = nn.Parameter(torch.randn(8, width) / 10)
        self.encoder = nn.TransformerEncoderLayer(width, 2, width, 0.0, batch_first=True)
        self.decoder = nn.TransformerEncoderLayer(width, 2, width, 0.0, batch_first=True)
        self.head = nn.Linear(width, 3 * 2 * 64)

    def draw(self, batch_size, *, key=None, only=None, has_audio=None, has_visual=None):
        key = the_key(batch_size, key)
        keep = torch.stack([shuffled(key, f"view {i}", 8)[:, :3] for i in range(2)], 1)
        return TwoViews("joint", keep, *presence(batch_size, has_visual))

    def forward(self, visual, draws=None):
        draws = self.draw(len(visual)) if draws is None else draws
        tubes = patchify(visual, TUBE)
        terms, means, guesses = [], [], []
        for keep in draws.keep.unbind(1):
            at = keep[..., None]
            seen = self.encoder((self.embed(tubes) + self.positions).take_along_dim(at, 1))
            means.append(seen.mean(1)[draws.rows])
            whole = self.token.expand(*tubes.shape[:2], -1).scatter(1, at.expand_as(seen), seen)
            guesses.append(self.head(self.decoder(whole + self.positions)))
            masked = torch.ones(tubes.shape[:2], dtype=torch.bool, device=keep.device).scatter(1, keep, False)
            ids = torch.where(masked & draws.there[:, None], torch.arange(8, device=keep.device), -1)
            terms.append(masked_patch_mse(guesses[-1], visual, ids, patch=TUBE))
        found = info_nce(*means)
        losses = {"intra_modal_visual": found.loss, "reconstruction_visual": terms[0] + terms[1]}
        loss = 0.1 * found.loss + losses["reconstruction_visual"]
        return Output(loss, losses, {"intra_modal_accuracy": found.accuracy}, {"visual": guesses[0]})

    def encode(self, visual):
        return Features(None, self.encoder(self.embed(patchify(visual, TUBE)) + self.positions), None)

    def figures(self, inputs, draws, output):
        masked = torch.ones(len(draws.keep), 8, dtype=torch.bool).scatter(1, draws.keep[:, 0].cpu(), False)
        tubes, guess, at = (
            patchify(inputs["visual"], TUBE).cpu(),
            output.reconstruction["visual"].cpu(),
            masked[..., None],
        )
        rows = (tubes, tubes.masked_fill(at, torch.nan), tubes.where(~at, guess))
        middles = [unpatchify(x, (2, 2, 2), TUBE)[:, :, 2] for x in rows]
        shown = dict(zip(("input", "masked", "reconstruction"), middles, strict=True))
        return Figures(Reconstruction({}, shown, {"visual": masked.float().mean(1)}))


# A sequence of clips with their audio, two small CNNs: pairs of clips are told apart, and matched within a sequence.


class Sequences(KaldiFrontend):
    frames = clips(3, 2)

    @property
    def seconds(self):
        return 3 * self.num_samples / self.sample_rate

    def __call__(self, batch, *, train=False, key=None):
        wave = F.pad(batch.waveform, (0, 3 * self.num_samples))[:, : 3 * self.num_samples]
        audio = self.audio(wave.unflatten(1, (3, -1)).flatten(0, 1)).unflatten(0, (-1, 3))
        return {"audio": audio, "visual": self.visual(batch.frames)}


@dataclass(frozen=True, eq=False)
class Derangement(Draws):
    shift: Tensor  # (B, 3) each clip's partner in its sequence; some samples keep their own
    there: Tensor  # (B,) which samples have both
    rows: Tensor  # their rows


class Matcher(Own):
    contrasts = True

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.frontend = Sequences(num_frames=FRAMES, num_mel_bins=MELS, image_size=SIZE)
        self.ears = nn.Sequential(nn.Conv2d(1, width, 4, 4), nn.GELU(), nn.Conv2d(width, width, 4, 4))
        self.eyes = nn.Sequential(
            nn.Conv3d(3, width, (1, 4, 4), (1, 4, 4)), nn.GELU(), nn.Conv3d(width, width, (2, 2, 2))
        )
        self.match = nn.Bilinear(width, width, 1)

    def draw(self, batch_size, *, key=None, only=None, has_audio=None, has_visual=None):
        key = the_key(batch_size, key)
        moved = torch.from_numpy(key.uniform("moved", 1) < 0.5)
        return Derangement("joint", (torch.arange(3) + moved) % 3, *presence(batch_size, has_audio, has_visual))

    def heard(self, audio):
        return self.ears(audio.flatten(0, 1)[:, None]).mean((2, 3)).unflatten(0, (-1, 3))

    def watched(self, visual):
        return self.eyes(visual.flatten(0, 1)).mean((2, 3, 4)).unflatten(0, (-1, 3))

    def forward(self, audio, visual, draws=None):
        draws = self.draw(len(audio)) if draws is None else draws
        a, v = self.heard(audio), self.watched(visual)
        found = info_nce(a[draws.rows].flatten(0, 1), v[draws.rows].flatten(0, 1))
        logits = self.match(a.take_along_dim(draws.shift[..., None], 1), v)[..., 0]
        truth = (draws.shift == torch.arange(3, device=a.device)).to(logits.dtype)
        error = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
        pairs = 3 * all_sum(draws.there.sum()).clamp(min=1)  # of all processes
        matching = (error * draws.there[:, None]).sum() * world_size() / pairs
        losses = {"contrastive": found.loss, "matching": matching}
        return Output(found.loss + matching, losses, {"contrastive_accuracy": found.accuracy})

    def encode(self, audio=None, visual=None):
        a, v = None if audio is None else self.heard(audio), None if visual is None else self.watched(visual)
        return Features(a, v, None if a is None or v is None else a * v)


PRESETS |= {"own_listener": (Listener, {}), "own_watcher": (Watcher, {}), "own_matcher": (Matcher, {})}
SHORT = {"steps": 2, "batch_size": 4, "workers": 0, "lr": 1e-2, "log_every": 1, "figures": 2}


def listener() -> Config:
    """Audio alone."""
    return Config(model="own_listener", **SHORT)


def watcher() -> Config:
    """Two masked views of a video."""
    return Config(model="own_watcher", **SHORT)


def matcher() -> Config:
    """Sequences of clips."""
    return Config(model="own_matcher", **SHORT)
