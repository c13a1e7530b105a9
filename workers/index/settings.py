"""The settings of the index worker."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, PositiveFloat, PositiveInt, SecretStr
from pydantic import model_validator as check
from pydantic_settings import SettingsConfigDict

from workers.settings import WorkerSettings, at_most

DATABASE_URL = Field(
    SecretStr("postgresql://postgres@localhost:5432/postgres"),
    validation_alias="DATABASE_URL",
    description="Postgres with pgvector, for the index of images; may carry a password.",
)


class IndexSettings(WorkerSettings):
    """The index worker's settings."""

    model_config = SettingsConfigDict(env_prefix="INDEX_")

    database_url: SecretStr = DATABASE_URL
    http_port: int = Field(8082, ge=0, le=65535, description="Port of health and metrics; 0: a free one, logged.")
    group_id: str = Field(
        "edje-index",
        min_length=1,
        description="Consumer group; the model digest is appended, so that each model's index reads every event.",
    )
    checkpoint: Path = Field(
        Path("checkpoint"), description="Folder of the model checkpoint, whose first stage makes the vectors."
    )
    max_batch_images: PositiveInt = Field(256, le=10_000, description="Images of one write.")
    max_inflight_images: PositiveInt = Field(2_000, description="Images in work before reading pauses.")
    write_timeout_s: PositiveFloat = Field(30.0, description="Longest time of one statement; a slower one is retried.")

    @check(mode="after")
    def _bounds_agree(self) -> Self:
        at_most(self, "max_batch_images", "max_inflight_images")
        return self
