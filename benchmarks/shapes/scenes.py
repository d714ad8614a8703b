"""A drawn world: scenes of coloured shapes, instructions that change them, and the exact result of each.

A scene is data (a background with a slight gradient, one to four shapes, sometimes the red box of JoyAI's
move instruction, a tone), and `draw` makes the picture of it. An edit is two scenes whose shapes are listed
in pairs (before, after), so that the target, the region that changes and every frame between the two are
drawn by the same few lines. Everything is a function of (split, index): the worlds of training and of testing
never meet, and any sample can be drawn again.

Coordinates: x to the right and y down, both in [-1, 1] over the picture; sizes in the same unit.
Pictures: (H, W, 3) float32 in [0, 1]. Masks: (H, W) bool.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SIZE = 96  # pixels

COLOURS = {
    "red": (0.86, 0.13, 0.13),
    "green": (0.13, 0.62, 0.23),
    "blue": (0.15, 0.31, 0.88),
    "yellow": (0.97, 0.83, 0.14),
    "orange": (0.97, 0.50, 0.11),
    "purple": (0.54, 0.20, 0.68),
    "pink": (0.98, 0.50, 0.72),
    "black": (0.09, 0.09, 0.10),
}
BACKGROUNDS = {
    "gray": (0.56, 0.55, 0.57),
    "white": (0.95, 0.95, 0.95),
    "beige": (0.92, 0.85, 0.72),
    "light blue": (0.70, 0.83, 0.96),
    "mint": (0.73, 0.91, 0.82),
    "lavender": (0.82, 0.77, 0.92),
    "brown": (0.52, 0.39, 0.32),
    "navy": (0.12, 0.16, 0.34),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
PLACES = {
    "in the top left corner": (-0.5, -0.5),
    "in the top right corner": (0.5, -0.5),
    "in the bottom left corner": (-0.5, 0.5),
    "in the bottom right corner": (0.5, 0.5),
    "in the center": (0.0, 0.0),
}
RADII = (0.24, 0.36)
ADDED_RADIUS = 0.30  # an instruction to add says no size
BOX_COLOUR = (0.96, 0.04, 0.04)
BOX_MARGIN, BOX_LINE = 0.08, 0.045
CONTRAST = 0.42  # least distance in RGB of a shape from what is behind it

# {it} is the shape that is meant, with its article.
PHRASES = {
    "recolour": (
        "Change the color of {it} to {colour}.",
        "Make {it} {colour}.",
        "Paint {it} {colour}.",
        "Turn {it} {colour}.",
    ),
    "remove": ("Remove {it}.", "Delete {it}.", "Erase {it} from the picture.", "Take {it} away."),
    "add": ("Add {new} {place}.", "Put {new} {place}.", "Draw {new} {place}."),
    "move": ("Move {it} into the red box and finally remove the red box.",),
    "background": (
        "Change the background to {background}.",
        "Make the background {background}.",
        "Replace the background with {background}.",
    ),
    "grey": ("Make the image black and white.", "Convert the photo to grayscale.", "Turn it into grayscale."),
    "negative": ("Invert the colors.", "Make a negative of the image.", "Turn the picture into a negative."),
    "replace": ("Replace {it} with {new}.", "Change {it} to {new}.", "Turn {it} into {new}."),
}
KINDS = tuple(PHRASES)
LOCAL = ("recolour", "remove", "add", "move", "replace")  # those that change one shape

SPLITS = {"train": 0, "held-out": 1}


class Thing(NamedTuple):
    """A shape in a scene."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    rgb: tuple[float, float, float]
    alpha: float = 1.0

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


class Box(NamedTuple):
    """The outline that says where a shape shall go; `half` is half its side."""

    x: float
    y: float
    half: float
    alpha: float = 1.0


class Backdrop(NamedTuple):
    """One colour that grows lighter along `angle`, by `slope` from the middle to an edge."""

    name: str
    rgb: tuple[float, float, float]
    angle: float
    slope: float


class Scene(NamedTuple):
    backdrop: Backdrop
    things: tuple[Thing, ...]
    box: Box | None = None
    tone: str = ""  # "", "grey" or "negative"
    amount: float = 1.0  # of the tone


@dataclasses.dataclass(frozen=True)
class Edit:
    """An instruction, with what it changes: shapes in pairs, None where there is nothing."""

    kind: str
    instruction: str
    pairs: tuple[tuple[Thing | None, Thing | None], ...]
    backdrops: tuple[Backdrop, Backdrop]
    box: Box | None = None
    tone: str = ""

    @property
    def source(self) -> Scene:
        return self.between(0.0)

    @property
    def target(self) -> Scene:
        return self.between(1.0)

    def between(self, progress: float) -> Scene:
        """The scene part of the way from the source (0) to the target (1)."""
        s = float(progress)
        things: list[Thing] = []
        for before, after in self.pairs:
            if before is not None and after is not None and before.shape == after.shape:
                things.append(_mix(before, after, s))
                continue
            if before is not None and s < 1:
                things.append(before._replace(alpha=1 - s))
            if after is not None and s > 0:
                things.append(after._replace(alpha=s))
        a, b = self.backdrops
        backdrop = Backdrop(b.name if s >= 1 else a.name, _lerp(a.rgb, b.rgb, s), a.angle, a.slope)
        box = self.box._replace(alpha=1 - s) if self.box and s < 1 else None
        return Scene(backdrop, tuple(things), box, self.tone if s > 0 else "", s)

    def changed(self, size: int = SIZE) -> np.ndarray:
        """Where source and target differ by a level of 8 bits or more."""
        return np.abs(draw(self.source, size) - draw(self.target, size)).max(-1) > 1 / 255

    def subjects(self) -> tuple[Thing, ...]:
        """The shapes of the target by which success is judged: the one that is new, or all of them."""
        after = tuple(b for a, b in self.pairs if b is not None)
        if self.kind not in LOCAL:
            return after
        return tuple(b for a, b in self.pairs if b is not None and a != b)


def make_edit(
    index: int,
    split: str = "train",
    kinds: Sequence[str] = KINDS,
    counts: Sequence[int] = (1, 2, 2, 3, 3, 4),
) -> Edit:
    """Edit number `index` of a split. `counts`: how many shapes a scene may have, each equally often."""
    rng = np.random.default_rng((SPLITS[split], index))
    kind = _pick(rng, kinds)
    while True:
        scene = random_scene(rng, _pick(rng, counts))
        edit = _MAKERS[kind](rng, scene)
        if edit is not None:
            return edit


def random_scene(rng: np.random.Generator, count: int) -> Scene:
    """`count` different shapes that do not touch, on a background that they stand out from."""
    backdrop = _random_backdrop(rng)
    colours = _visible_colours(backdrop)
    while True:
        things: list[Thing] = []
        for _ in range(40):
            if len(things) == count:
                return Scene(backdrop, tuple(things))
            thing = _random_thing(rng, colours)
            if all(thing.name != t.name and _apart(thing, t) for t in things):
                things.append(thing)


def _recolour(rng, scene):
    it = _pick(rng, scene.things)
    names = {t.name for t in scene.things}
    colours = [c for c in _visible_colours(scene.backdrop) if f"{c} {it.shape}" not in names]
    colour = _pick(rng, colours)
    after = it._replace(colour=colour, rgb=COLOURS[colour])
    return _local(rng, "recolour", scene, it, after, it=f"the {it.name}", colour=colour)


def _remove(rng, scene):
    it = _pick(rng, scene.things)
    return _local(rng, "remove", scene, it, None, it=f"the {it.name}")


def _add(rng, scene):
    colour, shape = _pick(rng, _visible_colours(scene.backdrop)), _pick(rng, SHAPES)
    place = _pick(rng, list(PLACES))
    new = Thing(shape, colour, *PLACES[place], ADDED_RADIUS, COLOURS[colour])
    others = scene.things[: max(len(scene.things) - 1, 1)]  # the new one counts
    scene = scene._replace(things=others)
    if any(t.name == new.name or not _apart(t, new) for t in others):
        return None
    return _local(rng, "add", scene, None, new, new=_with_article(new.name), place=place)


def _move(rng, scene):
    it = _pick(rng, scene.things)
    half = it.radius + BOX_MARGIN
    x, y = rng.uniform(-0.95 + half, 0.95 - half, 2)
    box = Box(float(x), float(y), half)
    frame = Thing("square", "red", box.x, box.y, half * 1.1, BOX_COLOUR)
    if not all(_apart(frame, t) for t in scene.things):
        return None
    if math.dist(scene.backdrop.rgb, BOX_COLOUR) < CONTRAST:
        return None
    edit = _local(rng, "move", scene, it, it._replace(x=box.x, y=box.y), it=f"the {it.name}")
    return dataclasses.replace(edit, box=box)


def _background(rng, scene):
    names = [
        name
        for name, rgb in BACKGROUNDS.items()
        if name != scene.backdrop.name and all(math.dist(rgb, t.rgb) > CONTRAST for t in scene.things)
    ]
    if not names:
        return None
    name = _pick(rng, names)
    after = scene.backdrop._replace(name=name, rgb=BACKGROUNDS[name])
    text = _pick(rng, PHRASES["background"]).format(background=name)
    return Edit("background", text, tuple((t, t) for t in scene.things), (scene.backdrop, after))


def _grey(rng, scene):
    return _toned(rng, scene, "grey")


def _negative(rng, scene):
    return _toned(rng, scene, "negative")


def _replace(rng, scene):
    it = _pick(rng, scene.things)
    names = {t.name for t in scene.things}
    shape = _pick(rng, [s for s in SHAPES if s != it.shape])
    colour = _pick(rng, _visible_colours(scene.backdrop))
    after = it._replace(shape=shape, colour=colour, rgb=COLOURS[colour])
    if after.name in names:
        return None
    return _local(rng, "replace", scene, it, after, it=f"the {it.name}", new=_with_article(after.name))


_MAKERS = {
    "recolour": _recolour,
    "remove": _remove,
    "add": _add,
    "move": _move,
    "background": _background,
    "grey": _grey,
    "negative": _negative,
    "replace": _replace,
}


def clip(edit: Edit, frames: int, size: int = SIZE, only: slice = slice(None)) -> np.ndarray:
    """The edit as it happens, (T, H, W, 3): the source first, the target last, slow at both ends. `only`:
    which of the frames."""
    times = np.linspace(0, 1, frames)[only]
    return np.stack([draw(edit.between(t * t * (3 - 2 * t)), size) for t in times])


def caption(scene: Scene) -> str:
    """What a picture shows: "a red circle and an orange star on a gray background"."""
    names = [_with_article(t.name) for t in scene.things]
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return f"{listed} on {_with_article(scene.backdrop.name)} background"


class CaptionPair(NamedTuple):
    """Two scenes that differ in one shape, their captions, and where either of the two shapes is."""

    source: Scene
    target: Scene
    source_caption: str
    target_caption: str
    region: np.ndarray


def make_caption_pair(
    index: int, split: str = "train", counts: Sequence[int] = (1, 2), size: int = SIZE
) -> CaptionPair:
    """Pair number `index` of a split: one shape of the scene becomes another, or changes its colour."""
    edit = make_edit(index, split, ("recolour", "replace"), counts)
    source, target = edit.source, edit.target
    shapes = [thing for pair in edit.pairs if pair[0] != pair[1] for thing in pair if thing is not None]
    region = np.any([coverage(thing, size) > 0.5 for thing in shapes], axis=0)
    return CaptionPair(source, target, caption(source), caption(target), region)


def draw(scene: Scene, size: int = SIZE) -> np.ndarray:
    """The picture of a scene, (size, size, 3)."""
    y, x = _grid(size)
    backdrop = scene.backdrop
    light = 1 + backdrop.slope * (math.cos(backdrop.angle) * x + math.sin(backdrop.angle) * y)
    picture = np.minimum(light[..., None] * np.asarray(backdrop.rgb, np.float32), 1).astype(np.float32)
    for thing in scene.things:
        _paint(picture, coverage(thing, size) * thing.alpha, thing.rgb)
    if scene.box is not None:
        box = scene.box
        outline = np.abs(np.maximum(np.abs(x - box.x), np.abs(y - box.y)) - box.half) - BOX_LINE / 2
        _paint(picture, _smooth_edge(outline, size) * box.alpha, BOX_COLOUR)
    if scene.tone:
        picture += scene.amount * (_TONES[scene.tone](picture) - picture)
    return picture


def to_levels(picture: np.ndarray) -> np.ndarray:
    """[0, 1] to 8 bits."""
    return (picture * 255).round().astype(np.uint8)


def coverage(thing: Thing, size: int = SIZE) -> np.ndarray:
    """How much of each pixel the shape covers, (size, size) in [0, 1]."""
    out = np.zeros((size, size), np.float32)
    reach = 1.25 * thing.radius + 4 / size
    rows, columns = (
        slice(max(int((c - reach + 1) * size / 2), 0), max(int((c + reach + 1) * size / 2) + 1, 0))
        for c in (thing.y, thing.x)
    )
    y, x = (axis[rows, columns] for axis in _grid(size))
    if y.size and thing.radius > 0:
        distance = _DISTANCES[thing.shape]((x - thing.x) / thing.radius, (y - thing.y) / thing.radius)
        out[rows, columns] = _smooth_edge(distance * thing.radius, size)
    return out


def _circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.sqrt(x * x + y * y) - 0.95


def _polygon(points: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance from the outline of a polygon (P, 2), negative inside. x, y (h, w)."""
    start, edge = points[:, :, None, None], (np.roll(points, -1, 0) - points)[:, :, None, None]
    px, py = x - start[:, 0], y - start[:, 1]
    ex, ey = edge[:, 0], edge[:, 1]
    along = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0, 1)
    distance = np.sqrt(((px - along * ex) ** 2 + (py - along * ey) ** 2).min(0))
    end_y = start[:, 1] + ey
    crosses = ((y >= start[:, 1]) != (y >= end_y)) & ((ex * py > ey * px) == (ey > 0))
    return np.where(crosses.sum(0) % 2 == 1, -distance, distance)


def _ring(radii: Sequence[float], turn: float = -math.pi / 2) -> np.ndarray:
    """Points at equal angles from `turn` on, at the given distances from the middle."""
    angles = turn + np.arange(len(radii)) * 2 * math.pi / len(radii)
    return np.stack((np.cos(angles), np.sin(angles)), 1) * np.array(radii)[:, None]


def _heart_points(count: int = 36) -> np.ndarray:
    t = np.linspace(0, 2 * math.pi, count, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack((x, y - 2), 1) / 16.5


def _cross_points(arm: float = 0.34) -> np.ndarray:
    corner = [(-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm)]
    return np.array(corner + [(-x, -y) for x, y in corner]) * 0.98


_POLYGONS = {
    "square": np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.84,
    "triangle": np.array([(0, -0.95), (1.02, 0.8), (-1.02, 0.8)]),
    "star": _ring([1.08, 0.46] * 5) + np.array((0, 0.06)),
    "heart": _heart_points(),
    "cross": _cross_points(),
}
_DISTANCES = {
    "circle": _circle,
    **{k: functools.partial(_polygon, v.astype(np.float32)) for k, v in _POLYGONS.items()},
}


@functools.cache
def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """y and x of the middle of every pixel, each (size, size)."""
    axis = ((np.arange(size) + 0.5) * 2 / size - 1).astype(np.float32)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    return y, x


def _smooth_edge(distance: np.ndarray, size: int) -> np.ndarray:
    """Signed distance to coverage; an edge is one pixel wide."""
    return np.clip(0.5 - distance * (size / 2), 0, 1)


def _paint(picture: np.ndarray, cover: np.ndarray, rgb: Sequence[float]) -> None:
    picture += cover[..., None] * (np.asarray(rgb, np.float32) - picture)


def _to_grey(picture: np.ndarray) -> np.ndarray:
    return np.broadcast_to(
        (picture @ np.asarray((0.299, 0.587, 0.114), np.float32))[..., None], picture.shape
    )


def _to_negative(picture: np.ndarray) -> np.ndarray:
    return 1 - picture


def _to_sepia(picture: np.ndarray) -> np.ndarray:
    """From a dark to a light brown. No shipped model knows it: `new_instruction` teaches it."""
    dark, light = np.asarray(((0.25, 0.12, 0.02), (0.98, 0.80, 0.55)), np.float32)
    return dark + (light - dark) * _to_grey(picture)


_TONES = {"grey": _to_grey, "negative": _to_negative, "sepia": _to_sepia}


def _local(rng, kind, scene, before, after, **words) -> Edit:
    """An edit of one shape; the others stay."""
    pairs = [(before, after) if t is before else (t, t) for t in scene.things]
    if before is None:
        pairs.append((None, after))
    text = _pick(rng, PHRASES[kind]).format(**words)
    return Edit(kind, text, tuple(pairs), (scene.backdrop, scene.backdrop))


def _toned(rng, scene, tone) -> Edit:
    pairs = tuple((t, t) for t in scene.things)
    return Edit(tone, _pick(rng, PHRASES[tone]), pairs, (scene.backdrop, scene.backdrop), tone=tone)


def _random_backdrop(rng) -> Backdrop:
    name = _pick(rng, list(BACKGROUNDS))
    return Backdrop(
        name, BACKGROUNDS[name], float(rng.uniform(0, 2 * math.pi)), float(rng.uniform(0.02, 0.1))
    )


def _random_thing(rng, colours: Sequence[str]) -> Thing:
    shape, colour, radius = _pick(rng, SHAPES), _pick(rng, colours), float(rng.uniform(*RADII))
    x, y = rng.uniform(-0.96 + 1.05 * radius, 0.96 - 1.05 * radius, 2)
    return Thing(shape, colour, float(x), float(y), radius, COLOURS[colour])


def _visible_colours(backdrop: Backdrop) -> list[str]:
    return [name for name, rgb in COLOURS.items() if math.dist(rgb, backdrop.rgb) > CONTRAST]


def _apart(a: Thing, b: Thing) -> bool:
    """Whether the squares around two shapes leave a gap."""
    return max(abs(a.x - b.x), abs(a.y - b.y)) > 1.05 * (a.radius + b.radius)


def _pick(rng, items):
    return items[int(rng.integers(len(items)))]


def _with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _lerp(a: Sequence[float], b: Sequence[float], t: float) -> tuple[float, float, float]:
    r, g, b_ = (x + (y - x) * t for x, y in zip(a, b, strict=True))
    return r, g, b_


def _mix(a: Thing, b: Thing, t: float) -> Thing:
    if t >= 1:
        return b
    x, y, radius = (float(p + (q - p) * t) for p, q in zip(a[2:5], b[2:5], strict=True))
    return a._replace(x=x, y=y, radius=radius, rgb=_lerp(a.rgb, b.rgb, t))
