"""Source `synthetic`: labelled motion, rendered by numpy; several pictures are needed to tell the class.

A scene is a function of a phase in [-1, 1]: a smooth colour field over the whole picture and one or two
large sprites with smooth texture. Classes come in pairs over the same scenes: one plays the phase forwards,
its partner backwards, so each picture is as likely in one as in the other. `bounce` and `pass` are no
reverses of each other: they show the same pictures, with the two sprites exchanged once they have met.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

CLASSES = (
    "move right",
    "move left",
    "move down",
    "move up",
    "turn clockwise",
    "turn counter-clockwise",
    "grow",
    "shrink",
    "bounce off each other",
    "pass through each other",
    "emerge from behind",
    "vanish behind",
)
_BOUNCE, _PASS = 8, 9
_REACH = 1.25  # no shape extends further than this many radii
SHAPES = ("disc", "square", "triangle", "cross", "ellipse")


@dataclass(frozen=True)
class Clip:
    """What is needed to render one clip; `index` counts in its split, from 0."""

    seed: int
    split: str
    index: int
    width: int = 96
    height: int = 96
    frames: int = 40
    fps: int = 25
    plain: bool = False  # all scenes before the same grey, in place of a colour field

    @property
    def label(self) -> int:
        return self.index % len(CLASSES)

    @property
    def source(self) -> str:
        name = CLASSES[self.label].replace(" ", "_")
        return f"synthetic/{self.split}/seed-{self.seed}/{self.index:07d}-{name}"


def partner(label: int) -> int:
    """The class that a clip of class `label` shows when it is played backwards."""
    return label if label in (_BOUNCE, _PASS) else label ^ 1


def render(clip: Clip) -> NDArray[np.uint8]:
    """The clip's pictures [frames, height, width, 3], RGB."""
    # The draw must not know which one of a pair is rendered, nor how many clips there are.
    draw = np.random.default_rng([clip.seed, zlib.crc32(clip.split.encode()), clip.index])
    scene = draw_scene(draw)
    if clip.plain:
        scene |= {"field": np.full(3, 0.5), "waves": []}
    return render_scene(scene, clip.label, clip.width, clip.height, clip.frames)


def draw_scene(draw: np.random.Generator) -> dict[str, Any]:
    """Parameters of one scene, in units of the picture's shorter side; the same whatever the class."""
    return {
        "field": draw.uniform(0.25, 0.75, 3),
        "waves": [
            (draw.uniform(-0.9, 0.9, 2), draw.uniform(0, 2 * np.pi), draw.uniform(-0.16, 0.16, 3))
            for _ in range(4)
        ],
        "sprites": [_draw_sprite(draw) for _ in range(2)],
        "occluder": draw.uniform(0.1, 0.9, 3),
        "span": draw.uniform(0.24, 0.3),  # half the way that moves
        "lane": draw.uniform(-0.2, 0.2),  # across the direction of motion
        "shift": draw.uniform(-0.06, 0.06),  # along it
        "angle": draw.uniform(0, 2 * np.pi),
        "turn": draw.uniform(0.8, 1.4) * np.pi,  # radians in the whole clip
        "growth": draw.uniform(2.0, 2.6),
        "exchanged": bool(draw.integers(2)),  # which sprite starts where
        "vertical": bool(draw.integers(2)),  # axis of the two-sprite classes and of the occluder
    }


def _draw_sprite(draw: np.random.Generator) -> dict[str, Any]:
    colour = draw.uniform(0.05, 0.95, 3)
    return {
        "shape": SHAPES[int(draw.integers(len(SHAPES)))],
        "radius": draw.uniform(0.17, 0.23),
        "angle": draw.uniform(0, 2 * np.pi),
        "colours": (colour, np.clip(colour + draw.uniform(-0.5, 0.5, 3), 0, 1)),
        "wave": draw.uniform(3, 7, 2) * draw.choice([-1, 1], 2),
    }


def render_scene(
    scene: dict[str, Any], label: int, width: int, height: int, frames: int
) -> NDArray[np.uint8]:
    """The scene's pictures [frames, height, width, 3] as class `label` plays it."""
    last = max(1, frames - 1)
    phases = [(2 * number - last) / last for number in range(frames)]  # exactly odd about the middle
    if label % 2 and label != _PASS:
        phases = phases[::-1]
    side = min(width, height)
    x = (np.arange(width, dtype=np.float32) + np.float32(0.5 - width / 2)) / np.float32(side)
    y = (np.arange(height, dtype=np.float32) + np.float32(0.5 - height / 2)) / np.float32(side)
    field = _field(scene, x[None, :], y[:, None])
    pictures = np.empty((frames, height, width, 3), np.uint8)
    for number, phase in enumerate(phases):
        canvas = _Canvas(field.copy(), x, y, 1.0 / side)
        _ANIMATIONS[label // 2](canvas, scene, phase, label)
        pictures[number] = np.rint(canvas.picture * np.float32(255))
    return pictures


def _field(scene: dict[str, Any], x: Floats, y: Floats) -> Floats:
    """The colour field [height, width, 3]: at most half a wave across the picture."""
    field = np.broadcast_to(scene["field"].astype(np.float32), (y.shape[0], x.shape[1], 3)).copy()
    for (fx, fy), phase, colour in scene["waves"]:
        wave = np.cos(np.float32(np.pi) * (np.float32(fx) * x + np.float32(fy) * y) + np.float32(phase))
        field += wave[..., None] * colour.astype(np.float32)
    return np.clip(field, 0, 1)


@dataclass
class _Canvas:
    picture: Floats  # [height, width, 3], painted in place
    x: Floats  # [width], shorter sides from the centre
    y: Floats  # [height]
    pixel: float  # shorter sides a pixel

    def cover(self, rows: slice, columns: slice, distance: Floats, colour: Floats) -> None:
        """Paint `colour` where the signed distance is negative, with an edge one pixel soft."""
        alpha = np.clip(np.float32(0.5) - distance / np.float32(self.pixel), 0, 1)[..., None]
        part = self.picture[rows, columns]
        part += alpha * (colour - part)

    def sprite(
        self, sprite: dict[str, Any], x0: float, y0: float, angle: float = 0.0, scale: float = 1.0
    ) -> None:
        """Paint a sprite at (x0, y0), turned by `angle` radians and enlarged by `scale`."""
        size, turn = sprite["radius"] * scale, sprite["angle"] + angle
        reach = _REACH * size + self.pixel
        rows = slice(*np.searchsorted(self.y, [y0 - reach, y0 + reach]))
        columns = slice(*np.searchsorted(self.x, [x0 - reach, x0 + reach]))
        dx = (self.x[None, columns] - np.float32(x0)) / np.float32(size)
        dy = (self.y[rows, None] - np.float32(y0)) / np.float32(size)
        cos, sin = np.float32(np.cos(turn)), np.float32(np.sin(turn))
        along, across = cos * dx + sin * dy, cos * dy - sin * dx
        distance = _DISTANCES[sprite["shape"]](along, across) * np.float32(size)
        first, second = (colour.astype(np.float32) for colour in sprite["colours"])
        fx, fy = sprite["wave"] / 2
        mix = np.float32(0.5) + np.float32(0.5) * np.sin(np.float32(fx) * along + np.float32(fy) * across)
        self.cover(rows, columns, distance, first + mix[..., None] * (second - first))


def _square(x: Floats, y: Floats) -> Floats:
    return np.maximum(np.abs(x), np.abs(y)) - np.float32(0.8)


def _triangle(x: Floats, y: Floats) -> Floats:
    return np.maximum(np.abs(x) * np.float32(0.866) + y * np.float32(0.5), -y) - np.float32(0.6)


def _cross(x: Floats, y: Floats) -> Floats:
    far, near = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
    return np.maximum(far - np.float32(1.0), near - np.float32(0.42))


_DISTANCES: dict[str, Callable[[Floats, Floats], Floats]] = {
    "disc": lambda x, y: np.hypot(x, y) - np.float32(1),
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "ellipse": lambda x, y: (np.hypot(x, y / np.float32(0.6)) - np.float32(1)) * np.float32(0.7),
}


def _way(scene: dict[str, Any], phase: float) -> float:
    return float(scene["shift"] + scene["span"] * phase)


def _move_x(canvas: _Canvas, scene: dict[str, Any], phase: float, label: int) -> None:
    canvas.sprite(scene["sprites"][0], _way(scene, phase), scene["lane"])


def _move_y(canvas: _Canvas, scene: dict[str, Any], phase: float, label: int) -> None:
    canvas.sprite(scene["sprites"][0], scene["lane"], _way(scene, phase))


def _turn(canvas: _Canvas, scene: dict[str, Any], phase: float, label: int) -> None:
    sprite = dict(scene["sprites"][0])
    if sprite["shape"] == "disc":
        sprite["shape"] = "ellipse"  # a disc shows its turning by the texture only
    canvas.sprite(sprite, scene["shift"], scene["lane"] / 2, angle=scene["turn"] / 2 * phase, scale=1.3)


def _grow(canvas: _Canvas, scene: dict[str, Any], phase: float, label: int) -> None:
    scale = 0.95 * scene["growth"] ** (phase / 2)
    canvas.sprite(scene["sprites"][0], scene["shift"], scene["lane"] / 2, scale=scale)


def _meet(canvas: _Canvas, scene: dict[str, Any], phase: float, label: int) -> None:
    way = 1.15 * scene["span"] * phase
    if label == _BOUNCE:
        way = -abs(way)
    if scene["exchanged"]:
        way = -way
    for sprite, place in zip(scene["sprites"], (way, -way), strict=True):
        canvas.sprite(sprite, *_placed(scene, place))


def _emerge(canvas: _Canvas, scene: dict[str, Any], phase: float, label: int) -> None:
    sign = -1 if scene["exchanged"] else 1
    canvas.sprite(scene["sprites"][0], *_placed(scene, sign * (-0.07 + 0.29 * phase)))
    axis = canvas.y[:, None] if scene["vertical"] else canvas.x[None, :]
    edge = np.broadcast_to(np.float32(sign) * axis + np.float32(0.05), canvas.picture.shape[:2])
    canvas.cover(slice(None), slice(None), edge, scene["occluder"].astype(np.float32))


def _placed(scene: dict[str, Any], along: float) -> tuple[float, float]:
    """(x, y) of a place on the scene's lane, which runs across or down."""
    return (scene["lane"], along) if scene["vertical"] else (along, scene["lane"])


_ANIMATIONS: tuple[Callable[[_Canvas, dict[str, Any], float, int], None], ...] = (
    _move_x,
    _move_y,
    _turn,
    _grow,
    _meet,
    _emerge,
)
