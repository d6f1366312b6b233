"""What a study trains: cells, each a model, a variant of the method and a seed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Subject:
    """A real pretrained model.

    Attributes:
        name: source that is fetched (``convert.sources``).
        experiment: file in conf/experiment.
        mask_token: a special token that nothing uses: its row of the tied embedding becomes the mask's.
        num_updates: updates of a cell, over all its stages.
        evaluate_every: updates between two evaluations.
        seeds: of its cells.
        variants: names of ``VARIANTS``.
    """

    name: str
    experiment: str
    mask_token: str
    num_updates: int
    evaluate_every: int
    seeds: tuple[int, ...]
    variants: tuple[str, ...]


@dataclass(frozen=True)
class Stage:
    """A training run on the student of the stage before, the AR original as the teacher.

    Attributes:
        experiments: further files in conf/experiment.
        overrides: of Hydra.
    """

    experiments: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()


def _with(*overrides: str) -> tuple[Stage, ...]:
    return (Stage(overrides=overrides),)


def _blocks(*sizes: int) -> tuple[Stage, ...]:
    return tuple(Stage(overrides=(f"model.opdlm.block_size={size}",)) for size in sizes)


#: The method and what it is compared with; equal prompts and updates, in equal parts where there are several stages.
METHODS: Mapping[str, tuple[Stage, ...]] = {
    "opdlm": (Stage(),),
    "random_mask": (Stage(("random_mask",)),),
    "off_policy": (Stage(("off_policy",)),),
    "sft": (Stage(("sft_baseline",)),),
}
BLOCK_SIZES: Mapping[str, tuple[Stage, ...]] = {
    "block_8": _blocks(8),
    "block_16": _blocks(16),
    "block_4_8": _blocks(4, 8),
    "block_4_8_16": _blocks(4, 8, 16),
}
DIVERGENCES: Mapping[str, tuple[Stage, ...]] = {
    "reverse_kl": _with("model.opdlm.divergence=reverse_kl"),
    "jsd": _with("model.opdlm.divergence=jsd"),
    "top16_partial": _with("model.opdlm.divergence_top_k=16", "model.opdlm.tail=partial"),
    "top16_tail_bucket": _with("model.opdlm.divergence_top_k=16", "model.opdlm.tail=tail_bucket"),
}
VARIANTS: Mapping[str, tuple[Stage, ...]] = {**METHODS, **BLOCK_SIZES, **DIVERGENCES}

GLASSLLM = Subject("glassllm", "quickstart", "<bos>", 144, 24, (1, 2, 3), tuple(VARIANTS))
SMOLLM2 = Subject("smollm2", "quickstart_smollm2", "<reponame>", 48, 16, (1, 2), tuple(METHODS))
FULL = (GLASSLLM, SMOLLM2)
#: Every kind of cell once, a few updates long.
SMOKE = (
    replace(
        GLASSLLM, num_updates=24, evaluate_every=4, seeds=(1,), variants=(*METHODS, "block_4_8_16", "top16_tail_bucket")
    ),
    replace(SMOLLM2, num_updates=2, evaluate_every=2, seeds=(1,), variants=("opdlm",)),
)


@dataclass(frozen=True)
class Cell:
    """One of a study's results: a model trained by a variant with a seed."""

    subject: Subject
    variant: str
    seed: int

    @property
    def name(self) -> str:
        """Of its folder and its result."""
        return f"{self.subject.name}-{self.variant}-{self.seed}"

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Of its variant."""
        return VARIANTS[self.variant]

    def overrides(self, stage: Stage) -> list[str]:
        """The training run of a stage but for its paths, as arguments of ``examples/train_opdlm.py``."""
        num_updates = self.subject.num_updates // len(self.stages)
        return [
            f"experiment=[{','.join((self.subject.experiment, *stage.experiments))}]",
            f"trainer.max_steps={num_updates}",
            f"trainer.val_check_interval={self.subject.evaluate_every}",
            f"model.optim.sched.warmup_steps={num_updates // 12}",
            f"model.optim.sched.max_steps={num_updates}",
            f"model.seed={self.seed}",
            *stage.overrides,
        ]


def cells(subjects: Sequence[Subject]) -> Iterator[Cell]:
    """All cells, a seed of every variant before the next seed: a study that is cut short has one of each."""
    for subject in subjects:
        for seed in subject.seeds:
            for variant in subject.variants:
                yield Cell(subject, variant, seed)
