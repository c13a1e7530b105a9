"""The choices for a run of the demo or the search, read once from the environment, and their consequences.

    IMAGES         a folder of pictures, instead of drawn scenes
    CAPTIONS       a CSV table with the columns image and caption, for the pictures of IMAGES
    QUERIES        texts separated by semicolons, or a file with one on each line
    CHECKPOINT     a model, instead of the one that is shipped
    KAFKA_BROKERS  a running Kafka, instead of one started here; REDIS_URL and DATABASE_URL likewise

An empty variable counts as not set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from demo_pictures import Pictures, pictures_with_captions, pictures_with_queries, queries_of
from demo_report import Caveat
from demo_scenes import drawn_scenes
from edje.checkpoint import read_config
from edje.config import EdjeConfig
from server_process import ServiceError

#: Trained on drawn scenes by the recipe `scenes`.
SHIPPED = Path(__file__).resolve().parents[1] / "models" / "scenes"
FIRST_STAGE = "first_stage"  # folder of the first stage in a checkpoint

UNTRAINED = Caveat(
    "UNTRAINED weights: this shows that it works, not how well it ranks",
    "They are random numbers in the right shape (checkpoint: trained is false), so the order below shows that every "
    "part works together. It says nothing about how good the model is.",
)
PHOTOGRAPHS = Caveat(
    "Trained on drawn scenes: its ranking of photographs means nothing. Bring your own checkpoint: CHECKPOINT=DIR",
    "The shipped model has seen coloured shapes on paper and nothing else, and knows some sixty words. The order below "
    "shows that every part works together, with these pictures too. It says nothing about how well a model for "
    "photographs would rank them.",
)


@dataclass(frozen=True, slots=True)
class Choices:
    """The choices of one run."""

    images: Path | None = None
    captions: Path | None = None
    queries: str | None = None
    own_checkpoint: Path | None = None
    has_own_kafka: bool = False
    has_own_redis: bool = False

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Choices:
        """Return the choices of this environment. Raises `ServiceError` for choices that exclude each other."""

        def path(name: str) -> Path | None:
            value = environment.get(name)
            return Path(value).expanduser() if value else None

        choices = cls(
            images=path("IMAGES"),
            captions=path("CAPTIONS"),
            queries=environment.get("QUERIES") or None,
            own_checkpoint=path("CHECKPOINT"),
            has_own_kafka=bool(environment.get("KAFKA_BROKERS")),
            has_own_redis=bool(environment.get("REDIS_URL")),
        )
        if choices.images is None and (choices.captions or choices.queries):
            raise ServiceError("CAPTIONS and QUERIES need your own pictures: set IMAGES to their folder")
        if choices.captions and choices.queries:
            raise ServiceError("set CAPTIONS or QUERIES, not both")
        return choices

    @property
    def checkpoint(self) -> Path:
        return (self.own_checkpoint or SHIPPED).resolve()

    def config(self) -> EdjeConfig:
        """Return the model's configuration. Raises `CheckpointError`."""
        return read_config(self.checkpoint)

    def pictures(self, new_folder: Path) -> Pictures:
        """Return the pictures of IMAGES with their queries, or scenes drawn into the new folder.

        Raises `ServiceError`.
        """
        if self.images is None:
            return drawn_scenes(new_folder)
        if self.captions is not None:
            return pictures_with_captions(self.images, self.captions)
        if self.queries is not None:
            return pictures_with_queries(self.images, queries_of(self.queries))
        raise ServiceError(
            "IMAGES needs queries: set CAPTIONS to a CSV table with the columns image and "
            'caption (then the right picture of each caption is known), or QUERIES to texts such as "a dog;a beach" or '
            "a file of them"
        )

    def pictures_to_search(self, new_folder: Path, num_scenes: int) -> Pictures:
        """Return the pictures of IMAGES, or scenes drawn into the new folder; no query is needed.

        Raises `ServiceError`.
        """
        if self.images is None:
            return drawn_scenes(new_folder, num_scenes)
        if self.captions is not None or self.queries is not None:
            return self.pictures(new_folder)
        return pictures_with_queries(self.images, ())

    def check_search(self) -> None:
        """Raise `ServiceError` or `CheckpointError` unless the checkpoint has a first stage, which finds candidates."""
        self.config()
        if not (self.checkpoint / FIRST_STAGE).is_dir():
            raise ServiceError(
                f"{self.checkpoint} has no first stage (the folder {FIRST_STAGE}), so nothing would find candidates "
                "for a query: training writes one if the recipe has a first stage"
            )

    def searches_vectors(self) -> bool:
        """Whether a first stage of the checkpoint, trained for such pictures, finds the candidates."""
        return self.caveat() is not PHOTOGRAPHS and (self.checkpoint / FIRST_STAGE).is_dir()

    def is_checked(self) -> bool:
        """Whether the figures are checked against those of the shipped model."""
        return self.images is None and self.own_checkpoint is None

    def caveat(self) -> Caveat | None:
        """Return the reason why the ranking is meaningless, else None. Raises `CheckpointError`."""
        if not self.config().trained:
            return UNTRAINED
        return PHOTOGRAPHS if self.images is not None and self.own_checkpoint is None else None
