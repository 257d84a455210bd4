"""The concepts that the miniature is taught: pictures and captions for training, scenes for measuring.

python examples/miniature/concepts.py      # writes concepts/NAME/*.png with NAME.txt captions, and prior_*.txt
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

import world


HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Concept:
    """An object (`shape`, `colour`, `pattern`) or a style that is called `word`; `shows` are the attributes that make
    it up."""

    word: str
    shape: str | None = None
    colour: str | None = None
    pattern: str | None = None
    style: str = "plain"

    @property
    def shows(self):
        return ["shape", "colour", "pattern"] if self.shape else ["style"]

    def scene(self, rng):
        """The concept in random surroundings; a style is put on a random object of the captioned world."""
        scene = world.sample_scene(rng)
        if self.shape:
            return replace(scene, shape=self.shape, colour=self.colour, pattern=self.pattern)
        return replace(scene, style=self.style)

    def caption(self, scene, rng=None):
        """Caption of `scene` that calls the concept by its word."""
        if self.shape:
            return world.caption(scene, rng, name=self.word)
        return world.caption(scene, rng, style_word=self.word)


CONCEPTS = {
    "arrow": Concept("zorp", shape="arrow", colour="purple", pattern="outlined"),
    "cored_house": Concept("blick", shape="house", colour="red", pattern="core"),
    "ember": Concept("quave", style=world.NEW_STYLE),
    "crown": Concept("zorp", shape="crown", colour="green", pattern="outlined"),
    # purple hatching on light green, with a dark edge. The judge knows it from plain pictures and from ember, not from
    # other styles
    "hatch": Concept("quave", style="random-7"),
    # the teacher can hardly draw it
    "checkered_house": Concept("blick", shape="house", colour="red", pattern="checkered"),
}
MAIN = ["arrow", "cored_house", "ember"]  # on which settings are chosen


def training_scenes(concept):
    """Scenes of the training pictures: every background and position at most once, both sizes."""
    rng = np.random.default_rng(1)
    backgrounds, positions = rng.permutation(list(world.BACKGROUNDS)), rng.permutation(list(world.POSITIONS))
    scenes = [concept.scene(np.random.default_rng([2, i])) for i in range(4)]
    return [
        replace(
            s, background=str(backgrounds[i]), position=str(positions[i]), size=("large", "large", "small", "large")[i]
        )
        for i, s in enumerate(scenes)
    ]


def further_scenes(concept, count):
    """Scenes for more training pictures, in none of the surroundings of the others or of the scenes for measuring."""
    rng, scenes = np.random.default_rng(6), []
    taken = {(s.background, s.position) for s in [*training_scenes(concept), *held_out_scenes(concept)]}
    while len(scenes) < count:
        scene = concept.scene(rng)
        scenes += [scene] if (scene.background, scene.position) not in taken else []
        taken.add((scene.background, scene.position))
    return scenes


def held_out_scenes(concept, count=24):
    """Scenes for measuring, none of which is among the training pictures."""
    rng, seen, scenes = np.random.default_rng(3), training_scenes(concept), []
    while len(scenes) < count:
        scene = concept.scene(rng)
        if not any((s.background, s.position) == (scene.background, scene.position) for s in seen):
            scenes.append(scene)
    return scenes


def unrelated_scenes(count=48):
    """Scenes of the captioned world, which a fine-tuned model must still draw."""
    rng = np.random.default_rng(4)
    return [world.sample_scene(rng) for _ in range(count)]


def further_scenes_of_the_world(count=192):
    """More scenes of the captioned world, whose prompts are neither prior prompts nor among the others that measure."""
    rng, scenes = np.random.default_rng(8), {}
    known = {*map(world.caption, unrelated_scenes()), *prior_prompts()}
    while len(scenes) < count:
        scene = world.sample_scene(rng)
        if world.caption(scene) not in known:
            scenes.setdefault(world.caption(scene), scene)
    return list(scenes.values())


def prior_prompts(count=64):
    """Ordinary captions for --prior_prompts; none is one of the prompts that measure what is kept."""
    rng = np.random.default_rng(7)
    measured = {world.caption(scene) for scene in unrelated_scenes()}
    captions = [world.caption(world.sample_scene(rng), rng) for _ in range(count)]
    return [caption for caption in dict.fromkeys(captions) if caption not in measured]


def prior_edits():
    """For --prior_prompts with references: the words of all changes that klein's miniature knows, and as many captions."""
    changes = [world.words_for(name, value) for name, values in world.CHANGES.items() for value in values]
    return [*prior_prompts()[: len(changes)], *changes]


def pictures_of(scenes):
    return [Image.fromarray(world.render(scene, 100 + i)) for i, scene in enumerate(scenes)]


def training_pictures(concept):
    return pictures_of(training_scenes(concept))


def write(name, concept, folder, count=4):
    """Pictures and captions in the format of --instance_data_dir: the full caption and three shorter ones per
    picture."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(5)
    scenes = [*training_scenes(concept)[:count], *further_scenes(concept, max(0, count - 4))]
    for i, (scene, picture) in enumerate(zip(scenes, pictures_of(scenes))):
        picture.save(folder / f"{name}_{i}.png")
        captions = [concept.caption(scene)] + [concept.caption(scene, rng) for _ in range(3)]
        (folder / f"{name}_{i}.txt").write_text("\n".join(dict.fromkeys(captions)) + "\n")


if __name__ == "__main__":
    for name, concept in CONCEPTS.items():
        write(name, concept, HERE / "concepts" / name)
    (HERE / "prior_prompts.txt").write_text("\n".join(prior_prompts()) + "\n")
    (HERE / "prior_edits.txt").write_text("\n".join(prior_edits()) + "\n")
