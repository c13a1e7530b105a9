"""Names a dataset as frozen data that a recipe can contain, and opens it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from edje.data.caption_table import caption_table
from edje.data.concatenated import concatenate
from edje.data.dataset import Dataset, Split
from edje.data.flickr8k import flickr8k
from edje.data.judged_lists import judged_lists
from edje.data.karpathy import karpathy
from edje.data.scenes.dataset import scenes
from edje.data.scenes.world import SWAPS, Swap

Share = Annotated[float, Field(ge=0, lt=1)]


LeaveOut = Annotated[
    Path | None,
    Field(
        description="A text file with images to leave out, such as the test images of another dataset: on each line an "
        "image id, or a SHA-256 as `sha256sum` prints it.",
    ),
]


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class KarpathySpec(_Spec):
    """Flickr30k or COCO, in Karpathy's JSON."""

    kind: Literal["karpathy"] = Field(description="The layout of the data.")
    json_path: Path = Field(description="The file `dataset_*.json`.")
    image_root: Path = Field(description="The folder that image names in the file are relative to.")
    restval: bool = Field(True, description="Whether COCO's split `restval` is used for training.")
    leave_out: LeaveOut = None


class TableSpec(_Spec):
    """A CSV table with the columns `image` and `caption`, and optionally `split`, `teacher_score` and `label`."""

    kind: Literal["table"] = Field(description="The layout of the data.")
    csv_path: Path = Field(description="The CSV file.")
    image_root: Path | None = Field(
        None, description="The folder that image names in the file are relative to. None: the folder of the CSV file."
    )
    whole: bool = Field(False, description="Whether every row is used for every split.")
    leave_out: LeaveOut = None
    dev_share: Share = Field(
        0.1, description="Share of the images in the split dev, for a table without a column split."
    )
    test_share: Share = Field(
        0.1, description="Share of the images in the split test, for a table without a column split."
    )

    @model_validator(mode="after")
    def _leaves_training_data(self) -> TableSpec:
        if self.dev_share + self.test_share >= 1:
            raise ValueError("dev_share and test_share leave no image for training: their sum must be below 1")
        return self


class ListsSpec(_Spec):
    """Judged or clicked candidate lists, one JSON object per line, with labels and optionally a teacher's scores."""

    kind: Literal["lists"] = Field(description="The layout of the data.")
    lists_path: Path = Field(description="The file of JSON lines.")
    image_root: Path | None = Field(
        None, description="The folder that image names in the file are relative to. None: the folder of the file."
    )
    leave_out: LeaveOut = None
    dev_share: Share = Field(0.1, description="Share of the queries in the split dev.")
    test_share: Share = Field(0.1, description="Share of the queries in the split test.")


class Flickr8kSpec(_Spec):
    """Flickr8k's published files."""

    kind: Literal["flickr8k"] = Field(description="The layout of the data.")
    folder: Path = Field(description="The folder with the subfolders `text` and `images`.")


class ScenesSpec(_Spec):
    """Drawn scenes. A group is one scene and its confusers."""

    kind: Literal["scenes"] = Field(description="The layout of the data.")
    seed: int = Field(0, ge=0, description="Seed of the scenes and captions.")
    train_groups: int = Field(5_000, gt=0, description="Number of groups in the split train.")
    dev_groups: int = Field(125, gt=0, description="Number of groups in the split dev.")
    test_groups: int = Field(250, gt=0, description="Number of groups in the split test.")
    confusers: int = Field(3, ge=0, le=5, description="Number of confusers in a group.")
    swaps: tuple[Swap, ...] = Field(
        SWAPS, min_length=1, description="What two objects of a scene exchange to make a confuser."
    )

    def num_groups(self, split: Split) -> int:
        """The number of groups of a split."""
        return {"train": self.train_groups, "dev": self.dev_groups, "test": self.test_groups}[split]


OneSpec = Annotated[KarpathySpec | TableSpec | ListsSpec | Flickr8kSpec | ScenesSpec, Field(discriminator="kind")]


class SeveralSpec(_Spec):
    """Several datasets as one."""

    kind: Literal["several"] = Field(description="The layout of the data.")
    parts: dict[str, OneSpec] = Field(
        min_length=1,
        description="The datasets: tables like `[data]`, by names that become prefixes of their image ids.",
    )
    train_only: tuple[str, ...] = Field((), description="Names of the datasets that are used for training alone.")

    @model_validator(mode="after")
    def _train_only_names_parts(self) -> SeveralSpec:
        if unknown := set(self.train_only) - set(self.parts):
            raise ValueError(f"train_only names {min(unknown)!r}, but the parts are {', '.join(self.parts)}")
        return self

    def parts_of(self, split: Split) -> dict[str, OneSpec]:
        """The datasets used for this split."""
        return {name: part for name, part in self.parts.items() if split == "train" or name not in self.train_only}


DataSpec = Annotated[
    KarpathySpec | TableSpec | ListsSpec | Flickr8kSpec | ScenesSpec | SeveralSpec, Field(discriminator="kind")
]


def open_dataset(spec: DataSpec, split: Split, *, strict: bool = False) -> Dataset:
    """The dataset that a specification names. `strict` refuses data with problems. Raises `DataError`."""
    match spec:
        case KarpathySpec():
            return karpathy(
                spec.json_path,
                spec.image_root,
                split,
                restval=spec.restval,
                leave_out=spec.leave_out,
                strict=strict,
            )
        case TableSpec():
            return caption_table(
                spec.csv_path,
                spec.csv_path.parent if spec.image_root is None else spec.image_root,
                None if spec.whole else split,
                dev_share=spec.dev_share,
                test_share=spec.test_share,
                leave_out=spec.leave_out,
                strict=strict,
            )
        case ListsSpec():
            return judged_lists(
                spec.lists_path,
                spec.lists_path.parent if spec.image_root is None else spec.image_root,
                split,
                dev_share=spec.dev_share,
                test_share=spec.test_share,
                leave_out=spec.leave_out,
                strict=strict,
            )
        case Flickr8kSpec():
            return flickr8k(spec.folder, split, strict=strict)
        case ScenesSpec():
            return scenes(split, spec.seed, spec.num_groups(split), spec.confusers, spec.swaps)
        case SeveralSpec():
            parts = spec.parts_of(split)
            return concatenate({name: open_dataset(part, split, strict=strict) for name, part in parts.items()}, split)
