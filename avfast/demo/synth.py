"""Scenes as audio: additive synthesis, one timbre per instrument, and two noises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from .scene import Scene, Source

VIBRATO_HZ = (2.5, 9.0)
NOISE_SLOPE_DB = (-4.0, 4.0)  # per octave: brown to violet
AMBIENT_DB = -58.0
VIBRATO_SEMITONES = 0.6
STACCATO = 0.3  # sounding part of the time between two onsets; 1 when sustained
TOP_HZ = 7600.0  # partials above are left out at any sample rate
Array = np.ndarray


class Waves(NamedTuple):
    """What is heard in a scene: float32 in -1 to 1; ``mixture`` is the sum of all the others."""

    sources: np.ndarray  # (sources, samples): one row per source of the scene, zeros for a silent one
    ambient: np.ndarray  # (samples,): its colour is that of the frames' background
    noise: np.ndarray  # (samples,): unrelated to the frames
    mixture: np.ndarray  # (samples,)


@dataclass(frozen=True)
class Timbre:
    """How an instrument sounds. Times in seconds; a decay of 0 holds until the note ends."""

    ratios: tuple[float, ...]  # partials over the fundamental
    amplitude: Callable[[Array, Array], Array]  # of (ratio, hertz) of the partials
    attack: float
    decay: float = 0.0
    damping: float = 0.0  # how much faster high partials decay: rate grows with ratio ** damping
    breath: float = 0.0  # noise above 2 kHz, relative to the partials
    click: float = 0.0  # noise of 12 ms at the onset, likewise
    flutter_hz: float = 0.0  # amplitude modulation,
    flutter: float = 0.0  # its depth, 0 to 1


def _formants(ratio: Array, hertz: Array) -> Array:
    peaks = ((750, 1.0), (1250, 0.5), (3300, 0.8))
    return sum(gain * np.exp(-(((hertz - centre) / 220.0) ** 2)) for centre, gain in peaks) + 0.3 / ratio**2


def _harmonics(last: int, step: int = 1) -> tuple[float, ...]:
    return tuple(float(n) for n in range(1, last + 1, step))


TIMBRES = (  # in the order of INSTRUMENTS
    # bell: inharmonic, high partials die first
    Timbre((0.5, 1.0, 1.183, 1.506, 2.0, 2.66, 3.01, 4.17, 5.43, 6.8, 8.21), lambda r, f: r**-0.2, 0.002, 0.9, 0.8),
    # flute: nearly a sine, with breath
    Timbre((1.0, 2.0), lambda r, f: r**-3.5, 0.05, breath=0.12),
    # clarinet: odd harmonics, soft
    Timbre(_harmonics(9, 2), lambda r, f: r**-0.5 * np.exp(-((f / 2600) ** 4)), 0.02),
    # strings: all harmonics, a slow bow that shakes
    Timbre(_harmonics(40), lambda r, f: r**-0.7, 0.08, breath=0.03, flutter_hz=12.0, flutter=0.5),
    # marimba: two far partials, a knock
    Timbre((1.0, 3.93, 9.6), lambda r, f: r**-0.6, 0.002, 0.35, 0.5, click=1.2),
    # choir: harmonics under three formants, the highest that of singers
    Timbre(_harmonics(24), _formants, 0.06, breath=0.02),
    # organ: octaves only, equally strong
    Timbre((0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0), lambda r, f: np.ones_like(r), 0.005),
    # buzzer: weak fundamental, bright, chopped
    Timbre(_harmonics(40), lambda r, f: r**0.3, 0.004, flutter_hz=22.0, flutter=1.0),
)


def waves(scene: Scene) -> Waves:
    """See Scene.waves."""
    sources = np.stack([_source(scene, k) for k in range(len(scene.sources))])
    power = np.mean(sources.sum(0) ** 2)
    rng = np.random.default_rng([scene.seed, 2])
    ambient = _ambient(scene, rng)
    noise = _noise(scene, rng) * np.sqrt(power * 10 ** (-scene.snr_db / 10))
    mixture = sources.sum(0) + ambient + noise
    gain = min(1.0, 0.98 / np.abs(mixture).max())
    return Waves(*((gain * part).astype(np.float32) for part in (sources, ambient, noise, mixture)))


def _source(scene: Scene, index: int) -> Array:
    """One source alone, (samples,) float64."""
    source = scene.sources[index]
    if not source.sounding:
        return np.zeros(scene.num_samples)
    timbre = TIMBRES[source.instrument]
    rng = np.random.default_rng([scene.seed, 1, index])
    time = np.arange(scene.num_samples) / scene.sample_rate
    gate, since = _notes(scene, source, timbre.attack, time)
    rate = VIBRATO_HZ[0] + source.vibrato * (VIBRATO_HZ[1] - VIBRATO_HZ[0])
    vibrato = np.sin(2 * np.pi * (rate * time + rng.random()))
    hertz = source.hertz * 2 ** ((source.semitones(time, scene.seconds) + VIBRATO_SEMITONES * vibrato) / 12)
    phase = 2 * np.pi * np.cumsum(hertz) / scene.sample_rate
    ratios = np.array(timbre.ratios)
    ratios = ratios[ratios * source.hertz < min(TOP_HZ, 0.46 * scene.sample_rate)]
    amplitudes = timbre.amplitude(ratios, ratios * source.hertz)
    tone = np.zeros_like(time)
    for ratio, amplitude, start in zip(ratios, amplitudes, rng.uniform(0, 2 * np.pi, len(ratios)), strict=True):
        partial = amplitude * np.cos(ratio * phase + start)
        if timbre.decay:
            partial *= np.exp(since * (-(max(ratio, 1.0) ** timbre.damping) / timbre.decay))
        tone += partial
    scale = np.sqrt(np.sum(amplitudes**2) / 2)
    if timbre.breath:
        tone += timbre.breath * scale * _shaped(rng, scene, lambda f: f > 2000)
    if timbre.click:
        tone += timbre.click * scale * np.exp(-since / 0.012) * _shaped(rng, scene, lambda f: f > 1000)
    if timbre.flutter:
        tone *= 1 - timbre.flutter * (0.5 + 0.5 * np.sin(2 * np.pi * timbre.flutter_hz * time))
    tone *= gate * (1 + 0.25 * vibrato)
    tone *= np.minimum(1, (scene.seconds - time) / 0.01)
    level = np.sqrt(np.mean(tone[gate > 0.1] ** 2))
    return tone * (10 ** (source.decibels / 20) / level)


def _notes(scene: Scene, source: Source, attack: float, time: Array) -> tuple[Array, Array]:
    """Envelope without decay, and the time since the last onset: two arrays (samples,)."""
    gate = np.zeros_like(time)
    since = np.full_like(time, scene.seconds)
    ends = (*source.onsets[1:], scene.seconds)
    for onset, end in zip(source.onsets, ends, strict=True):
        first, last = round(onset * scene.sample_rate), round(end * scene.sample_rate)
        local = time[first:last] - onset
        since[first:last] = local
        release = (end - onset) * (1.0 if source.articulation else STACCATO)
        gate[first:last] = np.clip(local / attack, 0, 1) * np.clip((release - local) / 0.02, 0, 1)
    return gate, since


def _shaped(rng: np.random.Generator, scene: Scene, response: Callable[[Array], Array]) -> Array:
    """Noise of RMS 1 whose spectrum follows ``response(hertz)``, (samples,)."""
    spectrum = np.fft.rfft(rng.standard_normal(scene.num_samples))
    spectrum *= response(np.fft.rfftfreq(scene.num_samples, 1 / scene.sample_rate))
    noise = np.fft.irfft(spectrum, scene.num_samples)
    return noise / np.sqrt(np.mean(noise**2))


def _ambient(scene: Scene, rng: np.random.Generator) -> Array:
    slope = NOISE_SLOPE_DB[0] + scene.background * (NOISE_SLOPE_DB[1] - NOISE_SLOPE_DB[0])

    def response(hertz: Array) -> Array:
        return (np.maximum(hertz, 80) / 1000) ** (slope / 6.02) * (hertz < 8000)

    return _shaped(rng, scene, response) * 10 ** (AMBIENT_DB / 20)


def _noise(scene: Scene, rng: np.random.Generator) -> Array:
    """One octave wide, slowly swelling, RMS 1."""

    def response(hertz: Array) -> Array:
        return np.exp(-0.5 * (np.log2(np.maximum(hertz, 1) / scene.noise_hz) / 0.5) ** 2)

    time = np.arange(scene.num_samples) / scene.sample_rate
    swell = 1 + 0.6 * np.sin(2 * np.pi * (rng.uniform(0.2, 1.0) * time + rng.random()))
    noise = _shaped(rng, scene, response) * swell
    return noise / np.sqrt(np.mean(noise**2))
