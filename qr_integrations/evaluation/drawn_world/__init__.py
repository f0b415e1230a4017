"""A drawn world of coloured things: scenes from a seed, as large as wanted, and questions with known answers.

Nothing of it is a file: pictures are drawn when they are looked at. The bundled vision-language model learned from it.
"""

from qr_integrations.evaluation.drawn_world.held_out import held_out_scene, questions_about_first
from qr_integrations.evaluation.drawn_world.questions import Question
from qr_integrations.evaluation.drawn_world.render import render
from qr_integrations.evaluation.drawn_world.world import Scene, Thing, crop_around, draw_scene, resized, seeded

__all__ = [
    "Question",
    "Scene",
    "Thing",
    "crop_around",
    "draw_scene",
    "held_out_scene",
    "questions_about_first",
    "render",
    "resized",
    "seeded",
]
