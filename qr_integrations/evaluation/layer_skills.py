"""Which layer of a vision tower knows what of a drawn scene: probes with colours, shapes, letters, counts and sides."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from qr_integrations.backend import Backend
from qr_integrations.backend.tower_states import VisionTower, open_tower
from qr_integrations.encoding.layer_probes import LayerProbes, Probe, picture_features, probe_layers
from qr_integrations.errors import InputError
from qr_integrations.evaluation.drawn_world import Scene, draw_scene, render, seeded
from qr_integrations.evaluation.drawn_world.world import LETTERS, Difficulty

AT_THE_THING = ("color", "shape", "letter")
"""Skills that are read from the patch in the middle of the largest thing; the others from the mean over patches."""
SKILLS = (*AT_THE_THING, "count", "side")

_SEED, _DIFFICULTY, _LARGEST = "layer skills", Difficulty(most=5, largest=0.25), 0.4
_SIDE = 336  # pixels of a drawn picture
_MIDDLE = 0.08  # a thing that is this near to the middle is on no side


@dataclass(frozen=True, slots=True)
class SkillScene:
    """A square scene and what is to be told of it.

    Attributes:
        scene: its first thing is large.
        labels: the answer for each skill that the scene allows.
    """

    scene: Scene
    labels: dict[str, str]

    @property
    def place(self) -> tuple[float, float]:
        """Where the middle of the largest thing is, as shares of width and height."""
        x, y = self.scene.things[0].centre
        return x / self.scene.width, y / self.scene.height

    def picture(self) -> Image.Image:
        """The scene, drawn."""
        return render(self.scene, scale=_SIDE / self.scene.long_side)


def skill_scenes(count: int) -> list[SkillScene]:
    """Square scenes from a seed of their own, so that no processor crops or pads them. Every other has a letter.

    Raises:
        InputError: no scenes.
    """
    if count < 1:
        raise InputError(f"{count} scenes are none to measure on: pass at least 1")
    found: list[SkillScene] = []
    number = 0
    while len(found) < count:
        scene = draw_scene(seeded(_SEED, number), _DIFFICULTY, first=[_LARGEST])
        number += 1
        lettered = scene.things[0].mark in LETTERS
        if scene.width == scene.height and (lettered or len(found) % 2 == 0):
            found.append(SkillScene(scene, _labels(scene)))
    return found


def _labels(scene: Scene) -> dict[str, str]:
    thing = scene.things[0]
    labels = {"color": thing.colour, "shape": thing.kind, "count": str(len(scene.things))}
    if thing.mark in LETTERS:
        labels["letter"] = str(thing.mark)
    share = thing.centre[0] / scene.width
    if abs(share - 0.5) > _MIDDLE:
        labels["side"] = "left" if share < 0.5 else "right"
    return labels


def probe_skills(
    tower: VisionTower | Backend | str | Path,
    scenes: int = 400,
    *,
    probe: Probe = "ridge",
    placed: bool = True,
    batch_size: int = 8,
    seed: int = 0,
) -> dict[str, LayerProbes]:
    """How well each layer tells the skills of the drawn world.

    Args:
        tower: what `open_tower` opens.
        scenes: how many are drawn.
        probe, seed: see `probe_layers`.
        placed: read color, shape and letter where the thing is. False reads everything from the mean over patches, for
            towers that read tiles, or patches in an order of their own.
        batch_size: pictures of one pass at most.

    Raises:
        InputError: too few scenes, or an unknown setting.
        UnsupportedModelError: with `placed`, a tower whose patches have no known places.
    """
    drawn = skill_scenes(scenes)
    places = [one.place for one in drawn] if placed else None
    features = picture_features(open_tower(tower), (one.picture() for one in drawn), places, batch_size=batch_size)
    found = {}
    for skill in SKILLS:
        known = [number for number, one in enumerate(drawn) if skill in one.labels]
        states = features.at if features.at is not None and skill in AT_THE_THING else features.mean
        labels = [drawn[number].labels[skill] for number in known]
        found[skill] = probe_layers(states[:, known], labels, probe=probe, seed=seed)
    return found
