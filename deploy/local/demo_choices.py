"""What whoever runs the demo may choose, read once from the environment, and what follows from it.

    IMAGES         a folder of one's own pictures, instead of drawn scenes
    CHECKPOINT     a model of one's own, instead of the one that is shipped
    KAFKA_BROKERS  a Kafka that runs already, instead of one started here; REDIS_URL likewise

What is set to nothing counts as not set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from demo_pictures import Pictures, pictures_in
from demo_report import Caveat
from demo_scenes import drawn_scenes
from edje.checkpoint import read_config
from edje.config import EdjeConfig

#: Trained on drawn scenes by the recipe `scenes`.
SHIPPED = Path(__file__).resolve().parents[1] / "models" / "scenes"
FIRST_STAGE = "first_stage"  # the folder in a checkpoint

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

    images: Path | None
    own_checkpoint: Path | None
    has_own_kafka: bool
    has_own_redis: bool

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Choices:
        """The choices that this environment sets."""
        images, checkpoint = (environment.get(name) for name in ("IMAGES", "CHECKPOINT"))
        return cls(
            images=Path(images).expanduser() if images else None,
            own_checkpoint=Path(checkpoint).expanduser() if checkpoint else None,
            has_own_kafka=bool(environment.get("KAFKA_BROKERS")),
            has_own_redis=bool(environment.get("REDIS_URL")),
        )

    @property
    def checkpoint(self) -> Path:
        return (self.own_checkpoint or SHIPPED).resolve()

    def config(self) -> EdjeConfig:
        """The model's. Raises `CheckpointError`."""
        return read_config(self.checkpoint)

    def pictures(self, new_folder: Path) -> Pictures:
        """One's own, or scenes drawn into the folder."""
        return drawn_scenes(new_folder) if self.images is None else pictures_in(self.images)

    def searches_vectors(self) -> bool:
        """Whether the checkpoint's own first stage finds the candidates: where it has one that knows such pictures."""
        return self.caveat() is not PHOTOGRAPHS and (self.checkpoint / FIRST_STAGE).is_dir()

    def is_checked(self) -> bool:
        """Whether the figures must be what the shipped model's have to be."""
        return self.images is None and self.own_checkpoint is None

    def caveat(self) -> Caveat | None:
        """What keeps the ranking from meaning anything. Raises `CheckpointError`."""
        if not self.config().trained:
            return UNTRAINED
        return PHOTOGRAPHS if self.images is not None and self.own_checkpoint is None else None
