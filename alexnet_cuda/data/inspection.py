"""What a data set holds: its images as training gets them, and the sizes, modes and damage of its files."""

from collections import Counter
from dataclasses import dataclass, field

from ..recipe import Recipe
from . import load_images, source
from .imageset import ImageSet


@dataclass
class Inspection:
    """Of pictures in files: the smallest, median and largest size (width, height) by area, all sizes, how many files
    have each of Pillow's modes, and a sentence for each damaged file."""

    images: ImageSet
    all_sizes: list[tuple[int, int]] = field(default_factory=list)
    modes: dict[str, int] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        ordered = sorted(self.all_sizes, key=lambda size: (size[0] * size[1], size))
        if not ordered:
            size = self.images.size
            return {"every": (size, size)} if size else {}
        return {"smallest": ordered[0], "median": ordered[len(ordered) // 2], "largest": ordered[-1]}


def inspect(recipe: Recipe) -> Inspection:
    """Reads the data set of a recipe as training would, without its damaged files. Raises DataError as training does,
    for anything else."""
    module = source(recipe)
    if not hasattr(module, "survey"):
        return Inspection(load_images(recipe))
    found = module.survey(recipe.replace({"skip_corrupt": True}))
    whole = [fact for fact in found.facts.values() if not fact.error]
    modes = dict(Counter(fact.mode for fact in whole).most_common())
    sizes = [(fact.width, fact.height) for fact in whole]
    return Inspection(module.image_set(found, recipe), sizes, modes, found.damaged)
