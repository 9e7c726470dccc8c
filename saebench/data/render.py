"""Draw one image of `shapes`: a textured, coloured outline on a background, then light and noise.

Coordinates run from -1 to 1 over the image, x to the right and y down. An outline is a signed
function f(u, v) of coordinates turned and scaled with the object (negative inside, about 1 in
radius); its coverage of a pixel is clip(1/2 - f * radius in pixels, 0, 1). Colours are mixed as
float64 in 0..1 and rounded to 8 bits once, at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from saebench.data.hashing import mix, normal

SIZE = 32
HUES = {
    "red": 0.0,
    "orange": 0.078,
    "yellow": 0.153,
    "green": 0.333,
    "cyan": 0.5,
    "blue": 0.625,
    "purple": 0.764,
    "pink": 0.903,
}
BACKGROUNDS = ("even", "gradient", "clutter", "waves")
INKS = ("dark", "light")

_CENTRES = (np.arange(SIZE) + 0.5) / SIZE * 2 - 1
_X, _Y = np.meshgrid(_CENTRES, _CENTRES)
_RGB_OFFSETS = np.array([0.0, 2 / 3, 1 / 3])

Field = np.ndarray  # [32 32] float64


@dataclass(frozen=True)
class Scene:
    """Everything that decides the pixels. Angles and hues in turns, the rest in 0..1 or -1..1."""

    outline: str
    texture: str
    x: float
    y: float
    radius: float  # of the object; 1 is half the image
    rotation: float
    hue: float
    saturation: float
    value: float
    ink: str  # the tone of the texture's second colour
    phase: tuple[float, float]  # of the texture, along u and v
    background: str
    back_hue: float
    back_saturation: float
    back_value: float
    back_angle: float
    clutter: np.ndarray  # [pieces 6] uniform: x, y, size, angle, hue, value
    brightness: float
    noise: float  # standard deviation
    noise_key: np.uint64


def render(scene: Scene) -> np.ndarray:
    """[32 32 3] uint8."""
    turn = 2 * np.pi * scene.rotation
    dx, dy = (_X - scene.x) / scene.radius, (_Y - scene.y) / scene.radius
    u = np.cos(turn) * dx + np.sin(turn) * dy
    v = np.cos(turn) * dy - np.sin(turn) * dx
    cover = _covers(OUTLINES[scene.outline](u, v), scene.radius)
    inked = TEXTURES[scene.texture](u, v, *scene.phase)

    base = hsv(scene.hue, scene.saturation, scene.value)
    ink = 0.22 * base if scene.ink == "dark" else 0.25 * base + 0.75
    pixels = _background(scene)
    pixels += cover[..., None] * (base + inked[..., None] * (ink - base) - pixels)

    pixels *= scene.brightness
    draws = mix(scene.noise_key, np.arange(pixels.size)).reshape(pixels.shape)
    pixels += scene.noise * normal(draws)
    return np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8)


def hsv(hue: float, saturation: float, value: float) -> np.ndarray:
    """[3] RGB in 0..1; hue in turns."""
    wheel = np.abs(((hue + _RGB_OFFSETS) % 1.0) * 6 - 3) - 1
    return value * (1 - saturation + saturation * np.clip(wheel, 0, 1))


def _covers(signed: Field, radius: float) -> Field:
    return np.clip(0.5 - signed * (radius * SIZE / 2), 0, 1)


def _half_planes(u: Field, v: Field, sides: int, apothem: float) -> Field:
    """A regular polygon with a corner on the positive u axis."""
    angles = 2 * np.pi * (np.arange(sides) + 0.5) / sides
    return np.max([np.cos(a) * u + np.sin(a) * v for a in angles], axis=0) - apothem


def _box(u: Field, v: Field, half_u: float, half_v: float) -> Field:
    return np.maximum(np.abs(u) - half_u, np.abs(v) - half_v)


def _star(u: Field, v: Field, points: int, inner: float) -> Field:
    """Points at radius 1.1, notches at radius `inner`: one edge, folded around the centre."""
    half = np.pi / points
    angle = np.arctan2(v, u)
    folded = np.abs((angle + half) % (2 * half) - half)
    length = np.hypot(u, v)
    edge = np.array([inner * np.cos(half) - 1.1, inner * np.sin(half)])
    normal_u, normal_v = edge[1] / np.hypot(*edge), -edge[0] / np.hypot(*edge)
    return normal_u * (length * np.cos(folded) - 1.1) + normal_v * length * np.sin(folded)


def _arrowhead(u: Field, v: Field) -> Field:
    return np.maximum(_half_planes(u, v, 3, 0.55), -_half_planes(u + 0.72, v, 3, 0.42))


def _tee(u: Field, v: Field) -> Field:
    return np.minimum(_box(u + 0.6, v, 0.32, 0.95), _box(u - 0.2, v, 0.8, 0.3))


OUTLINES: dict[str, Callable[[Field, Field], Field]] = {
    "disc": lambda u, v: np.hypot(u, v) - 0.95,
    "oval": lambda u, v: 0.58 * (np.hypot(u, v / 0.58) - 1.1),
    "triangle": lambda u, v: _half_planes(u, v, 3, 0.55),
    "arrowhead": _arrowhead,
    "square": lambda u, v: _box(u, v, 0.82, 0.82),
    "bar": lambda u, v: _box(u, v, 1.1, 0.5),
    "star": lambda u, v: _star(u, v, 5, 0.5),
    "sparkle": lambda u, v: _star(u, v, 4, 0.42),
    "cross": lambda u, v: np.minimum(_box(u, v, 1.0, 0.34), _box(u, v, 0.34, 1.0)),
    "tee": _tee,
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.72) - 0.28,
    "crescent": lambda u, v: np.maximum(np.hypot(u, v) - 1, 0.85 - np.hypot(u - 0.55, v)),
}


def _wave(position: Field, phase: float) -> Field:
    return np.cos(2 * np.pi * (position / 0.62 + phase))


TEXTURES: dict[str, Callable[[Field, Field, float, float], Field]] = {
    "plain": lambda u, v, p, q: np.zeros_like(u),
    "striped": lambda u, v, p, q: np.clip(0.5 + 1.6 * _wave(v, p), 0, 1),
    "spotted": lambda u, v, p, q: np.clip(1.8 * (_wave(u, p) + _wave(v, q) - 0.7), 0, 1),
    "checked": lambda u, v, p, q: np.clip(0.5 + 2.5 * _wave(u / 1.5, p) * _wave(v / 1.5, q), 0, 1),
}


def _background(scene: Scene) -> np.ndarray:
    """[32 32 3] float64."""
    base = hsv(scene.back_hue, scene.back_saturation, scene.back_value)
    turn = 2 * np.pi * scene.back_angle
    along = np.cos(turn) * _X + np.sin(turn) * _Y
    if scene.background == "gradient":
        return base * (1 + 0.45 * along[..., None])
    if scene.background == "waves":
        cycles = 1.5 + 2 * scene.back_angle
        return base * (1 + 0.3 * np.cos(2 * np.pi * cycles * along[..., None]))
    pixels = np.broadcast_to(base, (SIZE, SIZE, 3)).copy()
    if scene.background == "clutter":
        for x, y, size, angle, hue, value in scene.clutter:
            turn = 2 * np.pi * angle
            dx, dy = _X - (2 * x - 1), _Y - (2 * y - 1)
            u, v = np.cos(turn) * dx + np.sin(turn) * dy, np.cos(turn) * dy - np.sin(turn) * dx
            cover = _covers(_box(u, v, 0.08 + 0.35 * size, 0.07), 1.0)[..., None]
            pixels += cover * (hsv(hue, 0.5, 0.2 + 0.7 * value) - pixels)
    return pixels
