"""The studies of `benchmarks/quality.py`: the encoders of each dataset and how they are trained. Runs nothing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Study:
    """The encoders, depths and numbers of tokens that are compared on a dataset."""

    recipe: str
    k: int
    kinds: dict[str, tuple[str, ...]]  # changes to the recipe, by encoder
    depths: tuple[int, ...]  # values of k, including `k`
    tokens_kind: str  # the encoder that is trained with other numbers of tokens and evaluated in every storage type
    tokens: tuple[int, ...]
    cascade_of: str | None = None  # the encoder whose late interaction is the cheap stage of a cascade
    cascade_budgets: tuple[int, ...] = ()
    base: str | None = None  # the checkpoint whose tower and first stage all encoders share
    shared: tuple[str, ...] = ()  # phases of the recipe that trained them


STUDIES = {
    "scenes": Study(
        recipe="scenes.toml",
        k=20,
        base="deploy/models/scenes",
        shared=("see",),
        kinds={
            "minimal": (),
            # No layer reads text and image together, so there is no state to ground words in.
            "maxsim": (
                'joint.kind="maxsim"',
                "joint.num_layers=0",
                "phase.1.losses={late_interaction=1.0}",
                "phase.2.losses={itm=1.0,late_interaction=0.25}",
            ),
            "late": ('joint.kind="late"',),
            # It has no late interaction: matching replaces it in every phase, against more negatives than the images
            # of one group.
            "full": (
                'joint.kind="full"',
                "adapter.places=true",  # the positions of patches, which the other encoders add at fusion
                "joint.num_layers=5",
                "joint.text_layers=0",
                "joint.visual_layers=0",
                "joint.match_dim=0",
                "phase.1.losses={itm=1.0,grounding=0.5}",
                'phase.1.negatives={source="batch",per_sample=1,top_k=64}',
                "phase.1.learning_rate=2e-3",
                "phase.2.losses={itm=1.0,grounding=0.25}",
                'phase.2.negatives={source="batch",per_sample=3,top_k=16}',
                "phase.2.learning_rate=1e-3",
            ),
        },
        depths=(5, 10, 20, 50),
        cascade_of="minimal",
        cascade_budgets=(0, 3, 5, 10),
        tokens_kind="minimal",
        tokens=(8, 16),  # an image has nine patches
    ),
    "flickr8k": Study(
        recipe="flickr8k.toml",
        k=20,
        kinds={
            "minimal": (),
            "maxsim": ('joint.kind="maxsim"', "joint.num_layers=0"),
            "late": ('joint.kind="late"',),
            # It has no late interaction, so it is trained by matching alone.
            "full": (
                'joint.kind="full"',
                "joint.text_layers=0",
                "joint.visual_layers=0",
                "joint.match_dim=0",
                "joint.bert_layers=[4,5]",
                "phase.0.losses={itm=1.0}",
                "phase.0.train={adapter=2.0,meeting=1.0}",
            ),
        },
        depths=(5, 10, 20),
        tokens_kind="minimal",
        tokens=(8, 16, 32),
    ),
}
