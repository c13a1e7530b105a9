"""Which dataset is meant, as frozen data that a recipe can hold, and the one door to all readers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from edje.data.caption_table import caption_table
from edje.data.concatenated import several
from edje.data.dataset import Dataset, Split
from edje.data.flickr8k import flickr8k
from edje.data.karpathy import karpathy
from edje.data.scenes.dataset import scenes
from edje.data.scenes.world import SWAPS, Swap

Count = Annotated[int, Field(gt=0)]


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class KarpathySpec(_Spec):
    """Flickr30k or COCO, in Karpathy's JSON."""

    kind: Literal["karpathy"]
    json_path: Path
    image_root: Path
    restval: bool = True


class TableSpec(_Spec):
    """A CSV of image and caption. With `whole`, all rows are meant whatever the split."""

    kind: Literal["table"]
    csv_path: Path
    image_root: Path
    whole: bool = False


class Flickr8kSpec(_Spec):
    """Flickr8k's official files."""

    kind: Literal["flickr8k"]
    folder: Path


class ScenesSpec(_Spec):
    """Drawn scenes; each group is a scene and its confusers."""

    kind: Literal["scenes"]
    seed: Annotated[int, Field(ge=0)] = 0
    train_groups: Count = 5_000
    dev_groups: Count = 125
    test_groups: Count = 250
    confusers: Annotated[int, Field(ge=0, le=5)] = 3
    swaps: Annotated[tuple[Swap, ...], Field(min_length=1)] = SWAPS

    def num_groups(self, split: Split) -> int:
        return {"train": self.train_groups, "dev": self.dev_groups, "test": self.test_groups}[split]


OneSpec = Annotated[KarpathySpec | TableSpec | Flickr8kSpec | ScenesSpec, Field(discriminator="kind")]


class SeveralSpec(_Spec):
    """Several datasets as one, by names that become part of their images' ids; `train_only` names some of them."""

    kind: Literal["several"]
    parts: Annotated[dict[str, OneSpec], Field(min_length=1)]
    train_only: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _known(self) -> SeveralSpec:
        if unknown := set(self.train_only) - set(self.parts):
            raise ValueError(f"train_only names {min(unknown)!r}, which is none of {', '.join(self.parts)}")
        return self

    def parts_of(self, split: Split) -> dict[str, OneSpec]:
        """Those that have something for this split."""
        return {name: part for name, part in self.parts.items() if split == "train" or name not in self.train_only}


DataSpec = Annotated[KarpathySpec | TableSpec | Flickr8kSpec | ScenesSpec | SeveralSpec, Field(discriminator="kind")]


def open_dataset(spec: DataSpec, split: Split, *, strict: bool = False) -> Dataset:
    """The dataset that is meant. `strict` refuses faulty data, as evaluation must. Raises `DataError`."""
    match spec:
        case KarpathySpec():
            return karpathy(spec.json_path, spec.image_root, split, restval=spec.restval, strict=strict)
        case TableSpec():
            return caption_table(spec.csv_path, spec.image_root, None if spec.whole else split, strict=strict)
        case Flickr8kSpec():
            return flickr8k(spec.folder, split, strict=strict)
        case ScenesSpec():
            return scenes(split, spec.seed, spec.num_groups(split), spec.confusers, spec.swaps)
        case SeveralSpec():
            wanted = spec.parts_of(split)
            return several({name: open_dataset(part, split, strict=strict) for name, part in wanted.items()}, split)
