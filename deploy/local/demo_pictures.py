"""The demo's pictures, what is asked about them, and a folder of one's own as such.

Of one's own pictures only the file names are known: they are the captions and the queries, and nobody knows what is
right.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from demo_first_stage import FirstStage, Found
from demo_rankings import Option, Question
from server_process import ServiceError
from workers.publish.image_files import ImageFile, image_files, printable

#: Of a folder of one's own; enough to see it work, few enough to wait for.
MAX_PICTURES = 500
NUM_CANDIDATES = 10


@dataclass(frozen=True, slots=True)
class Pictures:
    """Image files, and what to ask about them."""

    folder: Path
    files: Sequence[ImageFile]
    captions: Mapping[str, str]  # of every image, by its id: what people are shown
    described: Mapping[str, str]  # likewise: what is known to a first stage that reads words and no pictures
    queries: Mapping[str, str | None]  # texts, each with the id of the right image if that is known
    image_query: str  # the image that texts are ranked for
    texts: Mapping[str, str]  # those, by the id of the image they were written for
    num_candidates: int
    origin: str  # in a sentence, for people
    right_text: str | None  # the name of the one that is true of the image, if that is known

    def questions(self, first_stage: FirstStage) -> list[Question]:
        """What is asked, with the candidates that the first stage finds; the image comes last."""
        paths = {file.image_id: file.path for file in self.files}

        def options(found: Found) -> list[Option]:
            return [Option(image_id, self.captions[image_id], score, paths[image_id]) for image_id, score in found]

        asked = [
            Question(text, options(first_stage.images(text, self.num_candidates)), right)
            for text, right in self.queries.items()
        ]
        found = first_stage.texts(self.image_query, self.texts, self.num_candidates)
        texts = [Option(name, self.texts[name], score) for name, score in found]
        asked.append(
            Question(self.captions[self.image_query], texts, self.right_text, self.image_query, paths[self.image_query])
        )
        return asked


def pictures_in(folder: Path) -> Pictures:
    """The first images of somebody's own folder; the names of some of them are the queries."""
    files = image_files([folder], keep_extension=True)[:MAX_PICTURES]
    if len(files) < 2:
        raise ServiceError(f"IMAGES={folder} holds {len(files)} image files; the demo needs at least 2")
    captions = {file.image_id: caption_of(file.image_id) for file in files}
    asked = dict.fromkeys(files[len(files) * quarter // 4].image_id for quarter in range(4))
    return Pictures(
        folder=folder,
        files=files,
        captions=captions,
        described=captions,
        queries={captions[image_id]: None for image_id in asked},
        image_query=files[0].image_id,
        texts=captions,
        num_candidates=NUM_CANDIDATES,
        origin=f"{len(files)} image files of {printable(folder)}; their names are their captions and the queries",
        right_text=None,
    )


def caption_of(image_id: str) -> str:
    """The words of a file name."""
    return (
        " ".join(re.findall(r"\w+", PurePosixPath(image_id).with_suffix("").as_posix().replace("_", " "))) or image_id
    )
