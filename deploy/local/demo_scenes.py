"""The demo's drawn scenes, which no training contains, in groups made of the same words.

Every fifth picture has a query: a caption that is true of it and of no other picture in its group.
"""

from __future__ import annotations

from pathlib import Path

from demo_pictures import Pictures
from edje.data.scenes.dataset import holdout, write_scenes
from workers.publish.image_files import image_files

#: Fifty groups of a scene and its three confusers.
NUM_PICTURES = 200
#: The model's figures use the scenes of seed 0; the demo draws others.
SEED = 1
#: Not a multiple of four, so that the 40 queries are for scenes and confusers alike.
QUERY_EVERY = 5
NUM_CANDIDATES = 20
#: Picture size: twice the shipped model's input size, for people who look at the report.
SIZE = 128
EXTENSION = ".png"


def drawn_scenes(folder: Path, num_pictures: int = NUM_PICTURES, size: int = SIZE) -> Pictures:
    """Draw the scenes into a new folder; pictures and questions are the same each time."""
    write_scenes(folder, "test", num_pictures, SEED, size)
    images = holdout(num_pictures, SEED).images
    ids = [f"{image.image_id}{EXTENSION}" for image in images]
    captions = {image_id: image.captions[0] for image_id, image in zip(ids, images, strict=True)}
    asked = ids[::QUERY_EVERY]
    group = images[0].group
    return Pictures(
        folder=folder,
        files=image_files([folder], keep_extension=True),
        captions=captions,
        described={image_id: image.captions[1] for image_id, image in zip(ids, images, strict=True)},
        queries={captions[image_id]: image_id for image_id in asked},
        image_query=ids[0],
        texts={
            image_id: captions[image_id] for image_id, image in zip(ids, images, strict=True) if image.group == group
        },
        num_candidates=NUM_CANDIDATES,
        origin=(
            f"{num_pictures} scenes drawn here, in groups of four that are made of the same words; training has no "
            "such scene, nor another arrangement of its words"
        ),
        right_text=ids[0],
    )
