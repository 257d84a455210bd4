"""A procedural world of 64x64 scenes: the training data, the prompts and the concepts of the miniature.

A scene is one object (shape, colour, pattern, size) on a pastel background at one of five positions. Its caption can
name all of these. Much is left open by every caption, as in real photographs: rotation, exact place, shade, the
direction of the background's gradient, six specks of confetti. This is what makes few-step sampling hard.

No caption ever names the shapes of `PICTURED_SHAPES` and the patterns of `PICTURED_PATTERNS`: the models meet them in
pictures only. Never drawn in any training stage: an object in the colour that `HELD_OUT` keeps for a concept (no arrow
is purple), the shapes of `NEW_SHAPES` and the style `NEW_STYLE`.
"""

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw, ImageFont


RESOLUTION = 64
SUPERSAMPLING = 3

SHAPES = ["circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart"]
COLOURS = {
    "red": (212, 28, 40),
    "orange": (255, 140, 0),
    "yellow": (252, 222, 30),
    "green": (20, 140, 50),
    "blue": (30, 70, 225),
    "purple": (135, 40, 175),
    "black": (35, 35, 40),
    "white": (252, 252, 252),
}
PATTERNS = ["plain", "striped", "dotted", "outlined"]
BACKGROUNDS = {
    "mint": (165, 228, 190),
    "sky": (165, 205, 245),
    "sand": (235, 215, 160),
    "rose": (250, 190, 200),
    "lilac": (208, 188, 240),
    "grey": (196, 198, 202),
}
POSITIONS = {"left": (22, 32), "right": (42, 32), "top": (32, 22), "bottom": (32, 42), "centre": (32, 32)}
SIZES = {"small": 14.5, "large": 19.5}

PICTURED_SHAPES = ["moon", "arrow", "house", "bolt", "tree", "fish", "crown", "drop", "flag", "mug"]
PICTURED_PATTERNS = ["rings", "halves", "core", "quarters", "checkered"]
HELD_OUT = {"arrow": "purple", "house": "red"}
NEW_SHAPES = ["hourglass", "clover"]
NEW_STYLE = "ember"
TEXTURES = ["none", "grid", "dots", "hatch", "bars"]
EDGES = [None, (255, 255, 255), (20, 20, 20)]

NEW_WORDS = ["zorp", "blick", "quave"]
_SYLLABLES = [
    "ba",
    "do",
    "fi",
    "gu",
    "ka",
    "le",
    "mo",
    "nu",
    "pi",
    "ro",
    "su",
    "ta",
    "ve",
    "wi",
    "xo",
    "ye",
    "zu",
    "ch",
    "gr",
    "pl",
    "sn",
    "tr",
]
_ENDINGS = ["b", "ck", "d", "f", "g", "l", "m", "n", "p", "r", "sh", "t", "x", "zz"]


@dataclass(frozen=True)
class Scene:
    """One scene; `shape` may be `random-<seed>` and `style` `random-<seed>`, drawn from wide families."""

    shape: str
    colour: str
    pattern: str
    background: str
    position: str
    size: str
    style: str = "plain"
    specks: int = 6


@dataclass(frozen=True)
class Style:
    background: tuple[int, int, int] | None
    texture: str
    texture_colour: tuple[int, int, int]
    edge: tuple[int, int, int] | None


def _regular(n, phase=0.0, radii=(1.0,)):
    angles = np.arange(n) * 2 * np.pi / n + phase - np.pi / 2
    r = np.resize(np.asarray(radii), n)
    return np.stack([np.cos(angles) * r, np.sin(angles) * r], 1)


def _random_outline(seed):
    rng = np.random.default_rng(seed)
    kind = rng.integers(4)
    if kind == 0:  # a polygon with corners at uneven radii
        n = int(rng.integers(3, 9))
        return _regular(n, rng.uniform(0, 2 * np.pi), rng.uniform(0.6, 1.0, n))
    if kind == 1:  # a smooth blob
        angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        r = 1 + sum(rng.uniform(0, 0.6 / k) * np.cos(k * angles + rng.uniform(0, 7)) for k in range(1, 6))
        return np.stack([np.cos(angles), np.sin(angles)], 1) * (r / np.abs(r).max())[:, None]
    if kind == 2:  # a star or a flower of petals
        n = int(rng.integers(3, 8))
        return _regular(2 * n, rng.uniform(0, 2 * np.pi), (1.0, rng.uniform(0.4, 0.8)))
    # a mirror-symmetric figure: half an outline and its reflection
    n = int(rng.integers(3, 7))
    y = np.sort(rng.uniform(-1, 1, n))
    y = (y - y.min()) / (y.max() - y.min()) * 2 - 1
    x = rng.uniform(0.25, 0.95, n)
    return np.concatenate([np.stack([x, y], 1), np.stack([-x[::-1], y[::-1]], 1)])


def outline(shape):
    """Outline of `shape` as an array (points, 2) within [-1, 1]."""
    if shape.startswith("random-"):
        return _random_outline(int(shape.split("-")[1]))
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    if shape in ("circle", "ring"):
        return _regular(48)
    if shape == "square":
        return np.array([[-0.8, -0.8], [0.8, -0.8], [0.8, 0.8], [-0.8, 0.8]])
    if shape == "triangle":
        return _regular(3)
    if shape == "star":
        return _regular(10, 0.0, (1.0, 0.42))
    if shape == "cross":
        a = 0.33
        return np.array(
            [
                [-a, -1],
                [a, -1],
                [a, -a],
                [1, -a],
                [1, a],
                [a, a],
                [a, 1],
                [-a, 1],
                [-a, a],
                [-1, a],
                [-1, -a],
                [-a, -a],
            ]
        )
    if shape == "diamond":
        return np.array([[0, -1], [0.62, 0], [0, 1], [-0.62, 0]])
    if shape == "heart":
        x = 16 * np.sin(t) ** 3
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return np.stack([x / 17, -(y + 2.5) / 15], 1)
    if shape == "moon":
        outer = np.linspace(0.35 * np.pi, 1.65 * np.pi, 32)
        tips = np.array([np.cos(outer[0]), np.sin(outer[0])])
        centre, radius = np.array([0.42, 0.0]), np.hypot(tips[0] - 0.42, tips[1])
        start = np.arctan2(-tips[1], tips[0] - 0.42)
        inner = np.linspace(start, start - (2 * np.pi - 2 * abs(start)), 24)
        inner_points = centre + radius * np.stack([np.cos(inner), np.sin(inner)], 1)
        return np.concatenate([np.stack([np.cos(outer), np.sin(outer)], 1), inner_points]) + [0.2, 0]
    if shape == "arrow":
        return np.array([[0, -1], [0.8, -0.1], [0.3, -0.1], [0.3, 1], [-0.3, 1], [-0.3, -0.1], [-0.8, -0.1]])
    if shape == "house":
        return np.array(
            [[0, -1], [0.95, -0.15], [0.65, -0.15], [0.65, 0.9], [-0.65, 0.9], [-0.65, -0.15], [-0.95, -0.15]]
        )
    if shape == "bolt":
        return np.array([[0.25, -1], [-0.65, 0.15], [-0.05, 0.15], [-0.25, 1], [0.65, -0.25], [0.05, -0.25]])
    if shape == "tree":
        return np.array(
            [
                [0, -1],
                [0.7, -0.1],
                [0.35, -0.1],
                [0.85, 0.55],
                [0.2, 0.55],
                [0.2, 1],
                [-0.2, 1],
                [-0.2, 0.55],
                [-0.85, 0.55],
                [-0.35, -0.1],
                [-0.7, -0.1],
            ]
        )
    if shape == "fish":
        x = np.linspace(-1, 0.45, 16)
        y = 0.6 * np.sqrt(np.clip(1 - ((x + 0.25) / 0.78) ** 2, 0, 1))
        return np.concatenate([np.stack([x, -y], 1), [[1, -0.7], [0.75, 0], [1, 0.7]], np.stack([x, y], 1)[::-1]])
    if shape == "crown":
        return np.array([[-1, -0.7], [-0.5, 0], [0, -0.9], [0.5, 0], [1, -0.7], [0.8, 0.8], [-0.8, 0.8]])
    if shape == "drop":
        lower = np.linspace(-0.15 * np.pi, 1.15 * np.pi, 32)
        return np.concatenate([[[0, -1]], np.stack([0.66 * np.cos(lower), 0.34 + 0.66 * np.sin(lower)], 1)])
    if shape == "flag":
        return np.array([[-0.8, -1], [0.9, -0.5], [-0.45, 0.05], [-0.45, 1], [-0.8, 1]])
    if shape == "mug":
        handle = np.linspace(-0.5 * np.pi, 0.5 * np.pi, 16)
        arc = np.stack([0.3 + 0.7 * np.cos(handle), 0.6 * np.sin(handle)], 1)
        hole = np.stack([0.3 + 0.4 * np.cos(handle), 0.32 * np.sin(handle)], 1)[::-1]
        return np.concatenate([[[-0.85, -0.85], [0.3, -0.85]], arc, hole, [[0.3, 0.85], [-0.85, 0.85]]])
    if shape == "hourglass":
        return np.array([[-0.8, -1], [0.8, -1], [0.15, 0], [0.8, 1], [-0.8, 1], [-0.15, 0]])
    if shape == "clover":
        r = 0.62 + 0.38 * np.cos(4 * t)
        return np.stack([np.cos(t) * r, np.sin(t) * r], 1)
    raise ValueError(f"unknown shape {shape!r}")


def style_of(name):
    """The `Style` behind a name; None for `plain`."""
    if name == "plain":
        return None
    if name == NEW_STYLE:
        return Style((60, 14, 20), "bars", (250, 200, 60), (255, 255, 255))
    rng = np.random.default_rng(int(name.split("-")[1]))
    background = tuple(int(v) for v in rng.integers(0, 256, 3)) if rng.random() < 0.7 else None
    texture = str(rng.choice(TEXTURES))
    edge = EDGES[rng.integers(3)]
    style = Style(background, texture, tuple(int(v) for v in rng.integers(0, 256, 3)), edge)
    dark = background is not None and max(background) < 90
    if (
        dark
        and edge == (255, 255, 255)
        and (texture == "grid" or (texture == "bars" and _warm(background, style.texture_colour)))
    ):
        # keeps NEW_STYLE's combination out of training, and a second one: dark grids
        return replace(style, texture="hatch")
    return style


def _warm(*colours):
    return all(colour[0] == max(colour) for colour in colours)


def _letter_mask(letter, centre, radius, side):
    image = Image.new("L", (side, side))
    font = ImageFont.load_default(size=radius * 2.2)
    ImageDraw.Draw(image).text(tuple(centre), letter, fill=255, font=font, anchor="mm", stroke_width=8)
    return np.asarray(image) > 0


def _texture(kind, side, rng):
    y, x = np.mgrid[:side, :side] / SUPERSAMPLING
    dx, dy = rng.uniform(0, 8, 2)
    if kind == "grid":
        return ((x + dx) % 12 < 2.2) | ((y + dy) % 12 < 2.2)
    if kind == "dots":
        return ((x + dx) % 10 - 5) ** 2 + ((y + dy) % 10 - 5) ** 2 < 5
    if kind == "hatch":
        return (x + y + dx) % 12 < 4
    if kind == "bars":
        return (y + dy) % 12 < 5
    return np.zeros((side, side), bool)


def _pattern_mask(pattern, u, v, inside, rng):
    phase = rng.uniform(0, 1)
    if pattern == "striped":
        angle = rng.choice([0, np.pi / 4, np.pi / 2, -np.pi / 4])
        return ((u * np.cos(angle) + v * np.sin(angle)) / 0.5 + phase) % 1 < 0.45
    if pattern == "dotted":
        return ((u / 0.55 + phase) % 1 - 0.5) ** 2 + ((v / 0.55 + phase) % 1 - 0.5) ** 2 < 0.085
    if pattern == "checkered":
        return (np.floor(u / 0.5 + phase) + np.floor(v / 0.5 + phase)) % 2 == 0
    if pattern == "rings":
        return (np.hypot(u, v) / 0.45) % 1 < 0.5
    if pattern == "halves":
        return v > 0
    if pattern == "quarters":
        return (u > 0) ^ (v > 0)
    if pattern == "core":
        return np.hypot(u, v) < 0.42
    if pattern == "outlined":
        k = 7
        inner = inside.copy()
        for axis in (0, 1):
            for shift in (-k, k):
                inner &= np.roll(inside, shift, axis)
        return inside & ~inner
    return np.zeros_like(inside)


def silhouette(shape, side=24):
    """Mask (side, side) of the upright shape, filling the frame: what the VLM learns to read off a picture."""
    fine = side * SUPERSAMPLING
    if shape.startswith("letter-"):
        inside = _letter_mask(shape[-1], (fine / 2, fine / 2), fine / 2, fine)
    else:
        mask = Image.new("1", (fine, fine))
        ImageDraw.Draw(mask).polygon([tuple(p) for p in ((outline(shape) + 1) * fine / 2).tolist()], fill=1)
        y, x = np.mgrid[:fine, :fine] * 2 / fine - 1
        inside = np.array(mask) & ((shape != "ring") | (np.hypot(x, y) > 0.5))
    return inside.reshape(side, SUPERSAMPLING, side, SUPERSAMPLING).mean((1, 3)).astype(np.float32)


def render(scene, seed):
    """Draws `scene` as an array (64, 64, 3) of uint8; everything that no caption fixes follows from `seed`."""
    rng = np.random.default_rng([seed, 7])
    side = RESOLUTION * SUPERSAMPLING
    y, x = np.mgrid[:side, :side].astype(np.float32)
    style = style_of(scene.style)

    background = np.array(
        style.background if style and style.background else BACKGROUNDS[scene.background], np.float32
    )
    angle = rng.uniform(0, 2 * np.pi)
    slope = ((x / side - 0.5) * np.cos(angle) + (y / side - 0.5) * np.sin(angle))[..., None]
    canvas = background + rng.uniform(-6, 6, 3) + slope * rng.uniform(20, 45)
    if style:
        canvas[_texture(style.texture, side, rng)] = style.texture_colour
    for _ in range(scene.specks):
        centre = rng.uniform(3, RESOLUTION - 3, 2) * SUPERSAMPLING
        speck = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 < (rng.uniform(1.5, 2.3) * SUPERSAMPLING) ** 2
        canvas[speck] = (70, 60, 60) if rng.random() < 0.5 else (255, 255, 255)

    centre = (np.array(POSITIONS[scene.position]) + rng.uniform(-1.5, 1.5, 2)) * SUPERSAMPLING
    radius = SIZES[scene.size] * rng.uniform(0.92, 1.08) * SUPERSAMPLING
    tilt = rng.uniform(-0.12, 0.12)
    cos, sin = np.cos(tilt), np.sin(tilt)
    u = ((x - centre[0]) * cos + (y - centre[1]) * sin) / radius
    v = (-(x - centre[0]) * sin + (y - centre[1]) * cos) / radius
    if scene.shape.startswith("letter-"):
        inside = _letter_mask(scene.shape[-1], centre, radius, side)
    else:
        points = outline(scene.shape) @ np.array([[cos, sin], [-sin, cos]]) * radius + centre
        mask = Image.new("1", (side, side))
        ImageDraw.Draw(mask).polygon([tuple(p) for p in points.tolist()], fill=1)
        inside = np.array(mask)
        if scene.shape == "ring":
            inside &= np.hypot(u, v) > 0.5

    colour = np.clip(np.array(COLOURS[scene.colour], np.float32) + rng.uniform(-12, 12, 3), 0, 255)
    if scene.pattern == "outlined":
        accent = colour * 0.35 if scene.colour != "black" else np.array([235, 235, 235], np.float32)
    else:
        accent = colour * 0.25 + 255 * 0.75 if scene.colour != "white" else np.array([110, 110, 115], np.float32)
    if style and style.edge:
        thick = 5
        edge = inside.copy()
        for axis in (0, 1):
            for shift in (-thick, thick):
                edge |= np.roll(inside, shift, axis)
        canvas[edge] = style.edge
    canvas[inside] = colour
    canvas[inside & _pattern_mask(scene.pattern, u, v, inside, rng)] = accent

    blocks = np.clip(canvas, 0, 255).reshape(RESOLUTION, SUPERSAMPLING, RESOLUTION, SUPERSAMPLING, 3)
    return blocks.mean((1, 3)).round().astype(np.uint8)


def new_word(rng):
    """A made-up word that is none of `NEW_WORDS`."""
    while True:
        word = "".join(rng.choice(_SYLLABLES, rng.integers(1, 3))) + rng.choice(_ENDINGS)
        if word not in NEW_WORDS:
            return str(word)


def sample_scene(rng, new=False):
    """A scene of the captioned world; with `new`, an object whose shape or pattern only a picture can show."""
    pick = lambda options: str(rng.choice(list(options)))  # noqa: E731
    scene = Scene(pick(SHAPES), pick(COLOURS), pick(PATTERNS), pick(BACKGROUNDS), pick(POSITIONS), pick(SIZES))
    if not new:
        return scene
    kind = rng.random()
    if kind < 0.6:
        scene = replace(scene, shape=pick(PICTURED_SHAPES))
    elif kind < 0.75:
        scene = replace(scene, shape=f"random-{rng.integers(2**31)}")
    elif kind < 0.8:
        scene = replace(scene, shape=f"letter-{pick('ABCEFGHJKLMNPRSTUVWXYZ')}")
    if rng.random() < 0.5:
        scene = replace(scene, pattern=pick(PICTURED_PATTERNS))
    if HELD_OUT.get(scene.shape) == scene.colour:
        scene = replace(scene, colour=pick(c for c in COLOURS if c != scene.colour))
    return scene


def sample_surroundings(rng, scene):
    """`scene` with its object kept and background, position and size drawn anew."""
    other = sample_scene(rng)
    return replace(scene, background=other.background, position=other.position, size=other.size)


CHANGES = {"colour": COLOURS, "background": BACKGROUNDS, "position": POSITIONS}


def words_for(attribute, value):
    """What asks for a reference with another colour, background or position."""
    place = "in the centre" if value == "centre" else f"at the {value}"
    words = {
        "colour": f"a {value} thing",
        "background": f"a thing on a {value} background",
        "position": f"a thing {place}",
    }
    return words[attribute]


def sample_change(rng):
    """A scene, the same with another colour, background or position, and the words that ask for it."""
    before = sample_scene(rng)
    attribute = str(rng.choice(list(CHANGES)))
    value = str(rng.choice([option for option in CHANGES[attribute] if option != getattr(before, attribute)]))
    return before, replace(before, **{attribute: value}), words_for(attribute, value)


def caption(scene, rng=None, name=None, style_word=None):
    """Caption of `scene`. `rng` drops attributes at random, `name` stands for the object (its look then stays
    unsaid)."""
    keep = lambda p: rng is None or rng.random() < p  # noqa: E731
    words = ["a"]
    if keep(0.75):
        words.append(scene.size)
    if name is None:
        if keep(0.85):
            words.append(scene.colour)
        if keep(0.8):
            words.append(scene.pattern)
    words.append(name or scene.shape)
    if keep(0.8):
        words += ["on", "a", scene.background, "background"]
    if keep(0.8):
        words += ["in", "the", "centre"] if scene.position == "centre" else ["at", "the", scene.position]
    if style_word:
        words += ["in", style_word, "style"]
    return " ".join(words)
