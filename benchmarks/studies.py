"""What `benchmarks/quality.py` compares on each dataset, and with what training. Runs nothing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Study:
    """What is compared on a dataset."""

    recipe: str
    k: int
    kinds: dict[str, tuple[str, ...]]  # encoder: changes to the recipe
    depths: tuple[int, ...]  # values of k, and k itself
    tokens_kind: str  # the encoder that is trained with other numbers of tokens, and judged in every storage type
    tokens: tuple[int, ...]
    cascade_of: str | None = None  # the encoder whose late interaction picks for its layers
    cascade_budgets: tuple[int, ...] = ()
    base: str | None = None  # the checkpoint whose tower and first stage all encoders share
    shared: tuple[str, ...] = ()  # phases of the recipe that made those


STUDIES = {
    "scenes": Study(
        recipe="scenes.toml",
        k=20,
        base="deploy/models/scenes",
        shared=("see",),
        kinds={
            "minimal": (),
            # Its words never meet the image, so there is nothing in which to ground them.
            "maxsim": (
                'joint.kind="maxsim"',
                "joint.num_layers=0",
                "phase.1.losses={late_interaction=1.0}",
                "phase.2.losses={itm=1.0,late_interaction=0.25}",
            ),
            "late": ('joint.kind="late"',),
            # It has no late interaction: matching takes its place from the beginning, and has to tell apart what that
            # would, so its negatives are not the confusers alone.
            "full": (
                'joint.kind="full"',
                "adapter.places=true",  # where a patch lies, which the others are told when text and image meet
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
        tokens=(8, 16),  # a picture has nine patches
    ),
    "flickr8k": Study(
        recipe="flickr8k.toml",
        k=20,
        kinds={
            "minimal": (),
            "maxsim": ('joint.kind="maxsim"', "joint.num_layers=0"),
            "late": ('joint.kind="late"',),
            # It has no late interaction, so it learns from matching alone.
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
