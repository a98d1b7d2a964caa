"""Scenes as pixels: shapes are implicit functions, so frames and masks render at any time, crop and size."""

from __future__ import annotations

import colorsys
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .scene import Scene, Source

HUES = ((-0.01, 0.12), (0.50, 0.66))  # of the two colours, slowest to fastest vibrato; in turns
FLASH_SECONDS = 0.12
Array = np.ndarray


def _disc(u: Array, v: Array) -> Array:
    return np.hypot(u, v) - 0.95


def _ring(u: Array, v: Array) -> Array:
    return np.abs(np.hypot(u, v) - 0.74) - 0.22


def _square(u: Array, v: Array) -> Array:
    return np.maximum(np.abs(u), np.abs(v)) - 0.82


def _triangle(u: Array, v: Array) -> Array:
    return np.maximum(0.866 * np.abs(u) - 0.5 * (v - 0.2), v - 0.2 - 0.25) - 0.4


def _cross(u: Array, v: Array) -> Array:
    u, v = np.abs(u), np.abs(v)
    return np.maximum(np.maximum(u, v) - 0.95, np.minimum(u, v) - 0.34)


def _flower(u: Array, v: Array) -> Array:
    return 0.7 * (np.hypot(u, v) - 0.69 - 0.28 * np.cos(5 * np.arctan2(u, -v)))


def _hourglass(u: Array, v: Array) -> Array:
    u, v = np.abs(u), np.abs(v)
    return np.maximum(v - 0.92, 0.8 * (u - 0.1 - 0.75 * v))


def _crescent(u: Array, v: Array) -> Array:
    return np.maximum(np.hypot(u, v) - 0.95, 0.68 - np.hypot(u - 0.5, v))


# Textures give 0 (ink) to 1 (the object's colour) at a point in 64ths of the frame's shorter side from the object's
# centre, so that their grain does not depend on the object's size.
def _plain(x: Array, y: Array) -> Array:
    return np.ones_like(x + y)


def _checks(x: Array, y: Array) -> Array:
    return (np.sin(0.8 * x) * np.sin(0.8 * y) > 0).astype(x.dtype)


def _rows(x: Array, y: Array) -> Array:
    return 0.5 + 0.5 * np.cos(1.2 * y)


def _diagonals(x: Array, y: Array) -> Array:
    return 0.5 + 0.5 * np.cos(0.9 * (x + y))


def _counter_diagonals(x: Array, y: Array) -> Array:
    return 0.5 + 0.5 * np.cos(0.9 * (x - y))


def _heart(x: Array, y: Array) -> Array:
    return (np.hypot(x, y) > 4).astype(x.dtype)


def _columns(x: Array, y: Array) -> Array:
    return 0.5 + 0.5 * np.cos(1.2 * x)


def _dots(x: Array, y: Array) -> Array:
    return np.clip(0.4 - np.cos(1.1 * x) * np.cos(1.1 * y), 0, 1)


BLACK, WHITE = 0.0, 0.9
LOOKS = (  # shape, texture, ink: one of each per instrument, in the order of INSTRUMENTS
    (_disc, _plain, BLACK),
    (_ring, _counter_diagonals, WHITE),
    (_square, _checks, BLACK),
    (_triangle, _rows, WHITE),
    (_cross, _diagonals, BLACK),
    (_flower, _heart, WHITE),
    (_hourglass, _columns, BLACK),
    (_crescent, _dots, WHITE),
)


def colour(source: Source) -> Array:
    """RGB of the object at full brightness, each 0 to 1."""
    low, high = HUES[source.colour]
    return np.array(colorsys.hsv_to_rgb((low + source.vibrato * (high - low)) % 1, 0.9, 1.0), dtype=np.float32)


def _local(scene: Scene, source: Source, time: float, x: Array, y: Array) -> tuple[Array, Array]:
    """Frame pixels x (W,) and y (H,) in units of the object's circle: (1, W) and (H, 1)."""
    radius = source.radius * min(scene.width, scene.height)
    u = (x - source.x * scene.width) / radius
    v = (y - source.height(time, scene.seconds) * scene.height) / radius
    return u[None, :], v[:, None]


def mask(
    scene: Scene, time: float, size: tuple[int, int], crop: tuple[float, float, float, float] | None, source: int
) -> Array:
    """See Scene.mask. Raises ValueError for an empty crop, IndexError for a source that is not there."""
    left, top, right, bottom = crop if crop is not None else (0.0, 0.0, 1.0, 1.0)
    if not (left < right and top < bottom):
        raise ValueError(f"crop must be (left, top, right, bottom) with left < right and top < bottom, got {crop}")
    if not 0 <= source < len(scene.sources):
        raise IndexError(f"scene {scene.id} has {len(scene.sources)} sources, got source={source}")
    rows, columns = size
    x = (left + (np.arange(columns) + 0.5) / columns * (right - left)) * scene.width
    y = (top + (np.arange(rows) + 0.5) / rows * (bottom - top)) * scene.height
    visible = np.zeros((rows, columns), dtype=bool)
    order = _back_to_front(scene)
    if source in order:
        visible = _inside(scene, source, time, x, y)
        for other in order[order.index(source) + 1 :]:
            visible &= ~_inside(scene, other, time, x, y)
    return visible


def _back_to_front(scene: Scene) -> list[int]:
    indices = [k for k, source in enumerate(scene.sources) if source.on_screen]
    return sorted(indices, key=lambda k: scene.sources[k].sounding)


def _inside(scene: Scene, index: int, time: float, x: Array, y: Array) -> Array:
    source = scene.sources[index]
    u, v = _local(scene, source, time, x, y)
    return LOOKS[source.instrument][0](u, v) < 0


class Renderer:
    """Frames of one scene; keeps the background's texture between calls."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.texture = _texture(scene)

    def frame(self, time: float) -> Array:
        """The frame at ``time``: (height, width, 3) uint8."""
        scene = self.scene
        shift = (round(scene.drift[1] * time * scene.height), round(scene.drift[0] * time * scene.width))
        image = np.roll(self.texture, shift, axis=(0, 1))
        for index in _back_to_front(scene):
            self._paint(image, scene.sources[index], time)
        return (image * 255 + 0.5).astype(np.uint8)

    def _paint(self, image: Array, source: Source, time: float) -> None:
        scene = self.scene
        radius = source.radius * min(scene.width, scene.height)
        reach = radius + 1
        centre_x, centre_y = source.x * scene.width, source.height(time, scene.seconds) * scene.height
        x0, x1 = max(int(centre_x - reach), 0), min(int(centre_x + reach) + 2, scene.width)
        y0, y1 = max(int(centre_y - reach), 0), min(int(centre_y + reach) + 2, scene.height)
        if x0 >= x1 or y0 >= y1:
            return
        x = np.arange(x0, x1, dtype=np.float32) + np.float32(0.5)
        y = np.arange(y0, y1, dtype=np.float32) + np.float32(0.5)
        u, v = _local(scene, source, time, x, y)
        shape, texture, ink = LOOKS[source.instrument]
        cover = np.clip(0.5 - shape(u, v) * radius, 0, 1)[..., None]
        grain = texture(u * (64 * source.radius), v * (64 * source.radius))
        shade = source.brightness * (ink + (0.15 + 0.85 * grain)[..., None] * (colour(source) - ink))
        shade = shade + flash(source, time) * (1 - shade)
        patch = image[y0:y1, x0:x1]
        patch += cover * (shade - patch)


def flash(source: Source, time: float) -> float:
    """How much white is mixed in at ``time``: 0.6 at an onset, fading; both articulations flash alike."""
    since = [time - onset for onset in source.onsets if onset <= time]
    return 0.6 * float(np.exp(-min(since) / FLASH_SECONDS)) if since else 0.0


def _texture(scene: Scene) -> Array:
    """Periodic noise, coarse and about purple for brown ambient noise, fine and about green for violet: (H, W, 3)."""
    rng = np.random.default_rng([scene.seed, 0])
    down = np.fft.fftfreq(scene.height)[:, None]
    across = np.fft.rfftfreq(scene.width)[None, :]
    frequency = np.hypot(down, across)
    frequency[0, 0] = 1.0
    amplitude = np.clip(frequency, 2 / min(scene.height, scene.width), None) ** (-2.2 + 2.0 * scene.background)
    amplitude[0, 0] = 0
    grain = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((scene.height, scene.width))) * amplitude)
    grain = grain[: scene.height, : scene.width]
    grain = np.clip(grain / grain.std(), -2.5, 2.5)
    purple, green = np.array([0.34, 0.20, 0.38]), np.array([0.20, 0.36, 0.22])
    tint = purple + np.clip(scene.background + rng.normal(0, 0.15), 0, 1) * (green - purple)
    level = 1 + rng.uniform(-0.15, 0.15)
    return np.clip(tint * level * (1 + 0.15 * grain[..., None]), 0, 1).astype(np.float32)
