"""The demo's pictures: freely licensed photographs that come with scikit-image, or a folder of one's own.

A picture's name is its caption, in words with dashes between them: the file names are all the first stage knows.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image

from server_process import ServiceError, package_folder
from workers.publish.image_files import ImageFile, image_files, printable

#: Of a folder of one's own; enough to see it work, few enough to wait for.
MAX_PICTURES = 500

Region = tuple[int, int, int, int]  # left, top, right, bottom, in pixels


@dataclass(frozen=True, slots=True)
class Photograph:
    """A photograph in scikit-image's package, and the licence that its documentation there states."""

    file: str
    caption: str
    licence: str


@dataclass(frozen=True, slots=True)
class Detail:
    """A region of one of the photographs, kept as an image file of its own."""

    file: str
    region: Region
    caption: str


# Left out are pictures without a stated licence (moon, page, the motorcycle pair) and drawings.
PHOTOGRAPHS = (
    Photograph("astronaut.png", "smiling woman astronaut in orange space suit", "public domain (NASA)"),
    Photograph("brick.png", "brick wall", "CC0"),
    Photograph("camera.png", "man with camera on tripod in park", "CC0 (Lav Varshney)"),
    Photograph("cell.png", "single round cell under microscope", "CC0"),
    Photograph("chelsea.png", "face of ginger cat", "CC0 (Stefan van der Walt)"),
    Photograph("clock_motion.png", "wall clock blurred by motion", "public domain (Stefan van der Walt)"),
    Photograph("coffee.png", "red cup of coffee on wooden table", "CC0 (Rachel Michetti)"),
    Photograph("coins.png", "old greek coins in rows", "no known restrictions"),
    Photograph("grass.png", "grass and leaves on ground", "CC0"),
    Photograph("gravel.png", "gravel stones on ground", "CC0"),
    Photograph("hubble_deep_field.jpg", "galaxies in deep space", "public domain (NASA)"),
    Photograph("ihc.png", "stained tissue under microscope", "no known restrictions"),
    Photograph("microaneurysms.png", "small blood vessels of eye", "CC0 (Andreas Maier)"),
    Photograph("retina.jpg", "retina of human eye", "CC0"),
    Photograph("rocket.jpg", "rocket on launch pad at night", "public domain (SpaceX)"),
    Photograph("text.png", "handwriting on paper", "public domain"),
)
DETAILS = (
    Detail("astronaut.png", (330, 0, 470, 220), "model of space shuttle with orange tank"),
    Detail("astronaut.png", (290, 330, 512, 512), "black helmet of astronaut"),
    Detail("astronaut.png", (0, 0, 120, 330), "flag with stars and stripes"),
    Detail("camera.png", (310, 130, 512, 260), "city buildings behind park"),
    Detail("camera.png", (240, 200, 370, 512), "tripod on grass"),
    Detail("chelsea.png", (120, 60, 250, 170), "green eye of cat"),
    Detail("chelsea.png", (150, 180, 330, 300), "nose and whiskers of cat"),
    Detail("coffee.png", (310, 180, 440, 360), "spoon on red saucer"),
    Detail("coffee.png", (420, 0, 600, 160), "wooden table"),
    Detail("coins.png", (300, 100, 384, 245), "two old coins"),
    Detail("hubble_deep_field.jpg", (640, 480, 820, 640), "bright star in deep space"),
    Detail("retina.jpg", (60, 480, 420, 840), "blood vessels of retina"),
    Detail("rocket.jpg", (330, 90, 640, 427), "steel towers and lights at night"),
)
QUERIES = (
    "a cup of coffee on a table",
    "an astronaut in a space suit",
    "the eye of a cat",
    "a rocket at night",
)
#: The picture that texts are ranked for.
IMAGE_QUERY = "man-with-camera-on-tripod-in-park.png"


@dataclass(frozen=True, slots=True)
class Pictures:
    """Image files, and what to ask about them."""

    folder: Path
    files: Sequence[ImageFile]
    queries: Sequence[str]
    image_query: str
    origin: str  # in a sentence, for people
    credits: Sequence[str]

    def captions(self) -> dict[str, str]:
        """The caption of every picture, by image id."""
        return {file.image_id: caption_of(file.image_id) for file in self.files}


def shipped_pictures(folder: Path) -> Pictures:
    """Write the photographs of scikit-image, and the regions cut out of them, into a new folder."""
    source = package_folder("skimage", "the demo's photographs") / "data"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for photograph in PHOTOGRAPHS:
        name = photograph.caption.replace(" ", "-") + Path(photograph.file).suffix
        shutil.copyfile(source / photograph.file, folder / name)
    for detail in DETAILS:
        with Image.open(source / detail.file) as image:
            image.crop(detail.region).save(folder / f"{detail.caption.replace(' ', '-')}.png")
    return Pictures(
        folder=folder,
        files=image_files([folder], keep_extension=True),
        queries=QUERIES,
        image_query=IMAGE_QUERY,
        origin=(
            f"{len(PHOTOGRAPHS)} freely licensed photographs from the package scikit-image, and {len(DETAILS)} regions "
            "cut out of them and saved as image files of their own"
        ),
        credits=[f"{photograph.caption}: {photograph.licence}" for photograph in PHOTOGRAPHS],
    )


def pictures_in(folder: Path) -> Pictures:
    """The first images of somebody's own folder; the names of some of them are the queries."""
    files = image_files([folder], keep_extension=True)[:MAX_PICTURES]
    if len(files) < 2:
        raise ServiceError(f"IMAGES={folder} holds {len(files)} image files; the demo needs at least 2")
    asked = dict.fromkeys(files[len(files) * quarter // 4].image_id for quarter in range(4))
    return Pictures(
        folder=folder,
        files=files,
        queries=[caption_of(image_id) for image_id in asked],
        image_query=files[0].image_id,
        origin=f"{len(files)} image files of {printable(folder)}; their names are their captions and the queries",
        credits=(),
    )


def caption_of(image_id: str) -> str:
    """The words of a file name."""
    return (
        " ".join(re.findall(r"\w+", PurePosixPath(image_id).with_suffix("").as_posix().replace("_", " "))) or image_id
    )
