"""The demo's pictures and the questions about them, for drawn scenes and for a folder of the user's pictures.

A caption table gives the right picture of each caption; for other texts the right picture is unknown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from demo_first_stage import FirstStage, Found
from demo_rankings import Option, Question
from edje.data.caption_table import caption_table
from edje.data.dataset import DataError
from server_process import ServiceError
from workers.publish.image_files import ImageFile, image_files, printable

#: Most captions of a table that are used as queries; as many as for drawn scenes.
NUM_QUERIES = 40
NUM_CANDIDATES = 20
#: Most texts ranked for one image.
NUM_TEXTS = 20


@dataclass(frozen=True, slots=True)
class Pictures:
    """Image files and the queries about them."""

    folder: Path
    files: Sequence[ImageFile]
    captions: Mapping[str, str]  # captions shown to people, by image id; for every image
    described: Mapping[str, str]  # texts for a first stage that reads no pictures, by image id
    queries: Mapping[str, str | None]  # query texts, each with the id of the right image if known
    texts: Mapping[str, str]  # texts ranked for `image_query`, by the id of the image that each describes
    num_candidates: int
    origin: str  # description of the pictures for people
    image_query: str | None = None  # the image for which texts are ranked; None: no such question
    right_text: str | None = None  # the id of the text that describes `image_query`, if known

    def questions(self, first_stage: FirstStage) -> list[Question]:
        """Return the questions with the first stage's candidates; the question about an image is last."""
        paths = {file.image_id: file.path for file in self.files}

        def options(found: Found) -> list[Option]:
            return [Option(image_id, self.captions[image_id], score, paths[image_id]) for image_id, score in found]

        asked = [
            Question(text, options(first_stage.images(text, self.num_candidates)), right)
            for text, right in self.queries.items()
        ]
        if self.image_query is None:
            return asked
        found = first_stage.texts(self.image_query, self.texts, self.num_candidates)
        texts = [Option(name, self.texts[name], score) for name, score in found]
        asked.append(
            Question(self.captions[self.image_query], texts, self.right_text, self.image_query, paths[self.image_query])
        )
        return asked


def image_folder(folder: Path) -> list[ImageFile]:
    """Return all image files of a folder. Raises `ServiceError` if there are fewer than two."""
    if not folder.is_dir():
        raise ServiceError(f"IMAGES={printable(folder)}: there is no such folder")
    files = image_files([folder], keep_extension=True)
    if len(files) < 2:
        raise ServiceError(f"IMAGES={printable(folder)} holds {len(files)} image files; at least 2 are needed")
    return files


def pictures_with_captions(folder: Path, table: Path) -> Pictures:
    """Return a folder's pictures with the captions of a table; some captions are the queries.

    Raises `ServiceError`.
    """
    files = image_folder(folder)
    try:
        dataset = caption_table(table, folder)
    except (DataError, OSError) as error:
        raise ServiceError(f"CAPTIONS={printable(table)}: {error}") from error
    captions_of = {image.image_id: image.captions for image in dataset.images if image.captions}
    captioned = [file.image_id for file in files if file.image_id in captions_of]
    if not captioned:
        raise ServiceError(
            f"CAPTIONS={printable(table)} names no picture of {printable(folder)}; the column image holds paths below "
            "that folder, such as beach/1.jpg"
        )
    step = max(1, len(captioned) // NUM_QUERIES)
    asked = captioned[::step][:NUM_QUERIES]
    image_query = asked[0]
    return Pictures(
        folder=folder,
        files=files,
        captions={file.image_id: captions_of.get(file.image_id, [caption_of(file.image_id)])[0] for file in files},
        described={file.image_id: _description(file.image_id, captions_of) for file in files},
        queries={captions_of[image_id][0]: image_id for image_id in asked},
        texts={image_id: captions_of[image_id][0] for image_id in captioned[:NUM_TEXTS]}
        | {image_query: captions_of[image_query][0]},
        num_candidates=min(NUM_CANDIDATES, len(files)),
        origin=f"{len(files)} image files of {printable(folder)}, {len(captioned)} of them with captions",
        image_query=image_query,
        right_text=image_query,
    )


def pictures_with_queries(folder: Path, queries: Sequence[str]) -> Pictures:
    """Return a folder's pictures with texts to search them by. Raises `ServiceError`."""
    files = image_folder(folder)
    captions = {file.image_id: caption_of(file.image_id) for file in files}
    return Pictures(
        folder=folder,
        files=files,
        captions=captions,
        described=captions,
        queries=dict.fromkeys(queries),
        texts={},
        num_candidates=min(NUM_CANDIDATES, len(files)),
        origin=f"{len(files)} image files of {printable(folder)}",
    )


def queries_of(given: str) -> list[str]:
    """Return the texts of QUERIES: separated by semicolons, or the lines of a file. Raises `ServiceError`."""
    path = Path(given).expanduser()
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else given.replace(";", "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ServiceError(f"QUERIES={printable(given)} cannot be read: {error}") from error
    queries = list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    if not queries:
        raise ServiceError(f"QUERIES={printable(given)} holds no text")
    return queries


def caption_of(image_id: str) -> str:
    """Return the words of a file name."""
    return (
        " ".join(re.findall(r"\w+", PurePosixPath(image_id).with_suffix("").as_posix().replace("_", " "))) or image_id
    )


def _description(image_id: str, captions_of: Mapping[str, Sequence[str]]) -> str:
    """Return a text about an image other than its first caption, which is the query."""
    captions = captions_of.get(image_id, ())
    return captions[1] if len(captions) > 1 else caption_of(image_id)
