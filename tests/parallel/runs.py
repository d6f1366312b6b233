"""Training without Lightning, as one rank of any layout does it: what the ranks of the parallel tests run."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from nemo_opdlm import cli
from nemo_opdlm.config import Config, parse
from nemo_opdlm.data.prompts import PromptDataset, load_prompts
from nemo_opdlm.data.schedule import SampleBatch
from nemo_opdlm.data.tokenizer import load_tokenizer
from nemo_opdlm.diffusion.masks import AttentionRule
from nemo_opdlm.diffusion.trajectory import Trajectory
from nemo_opdlm.megatron import parallel
from nemo_opdlm.megatron.checkpoint import load_sharded, save_sharded
from nemo_opdlm.megatron.optimizer import StudentOptimizer, wrap
from nemo_opdlm.megatron.student import StagedGPT, build_model
from nemo_opdlm.megatron.teacher import Teacher
from nemo_opdlm.models.archive_format import open_nemo
from nemo_opdlm.models.conversion import PREFIX, archive_architecture, read_weights
from nemo_opdlm.models.distiller import OnPolicyDistiller
from nemo_opdlm.models.method import Method, SpecialTokens
from nemo_opdlm.models.settings import model_options, optimizer_settings

PROMPTS = Path(__file__).parents[2] / "examples" / "prompts" / "passages_train.jsonl"
MAX_STEPS = 20
#: 16 short passages per rollout step, two updates of 8.
SETTINGS = (
    f"trainer.max_steps={MAX_STEPS}",
    "trainer.precision=32",
    "model.micro_batch_size=2",
    "model.global_batch_size=8",
    "model.optim.lr=1e-3",
    "model.optim.sched.warmup_steps=2",
    "model.data.train_ds.max_prompt_length=14",
    "model.data.train_ds.truncate_prompt_to=14",
    "model.data.train_ds.chat_template=false",
    "model.opdlm.rollout.num_prompts_per_step=16",
    "model.opdlm.rollout.max_batch_size=16",
    "model.opdlm.rollout.max_new_tokens=18",
    "model.opdlm.rollout.threshold=0.3",
)


@dataclass(frozen=True)
class Layout:
    """A layout by the names of its keys; what is left of the world is data-parallel."""

    tensor: int = 1
    pipeline: int = 1
    virtual: int | None = None
    context: int = 1
    sequence: bool = False

    @property
    def overrides(self) -> tuple[str, ...]:
        return (
            f"model.tensor_model_parallel_size={self.tensor}",
            f"model.pipeline_model_parallel_size={self.pipeline}",
            f"model.virtual_pipeline_model_parallel_size={'null' if self.virtual is None else self.virtual}",
            f"model.context_parallel_size={self.context}",
            f"model.sequence_parallel={str(self.sequence).lower()}",
        )


#: Name -> number of ranks, layout.
LAYOUTS = {
    "1": (1, Layout()),
    "TP2": (2, Layout(tensor=2)),
    "TP2+SP": (2, Layout(tensor=2, sequence=True)),
    "PP2": (2, Layout(pipeline=2)),
    "VPP2": (2, Layout(pipeline=2, virtual=2)),
    "CP2": (2, Layout(context=2)),
    "DP2": (2, Layout()),
    "TP2xPP2": (4, Layout(tensor=2, pipeline=2)),
    "TP2+SPxCP2": (4, Layout(tensor=2, sequence=True, context=2)),
    "PP2xDP2": (4, Layout(pipeline=2)),
    "CP2xDP2": (4, Layout(context=2)),
    "TP2+SPxPP2": (4, Layout(tensor=2, sequence=True, pipeline=2)),
    "VPP2xCP2": (4, Layout(pipeline=2, virtual=2, context=2)),
}


class Recorder(OnPolicyDistiller):
    """Keeps its rollouts, or replays recorded ones; writes the gradients of its updates as checkpoints."""

    rollouts: list[Trajectory]
    replayed: Sequence[Trajectory] = ()
    resumed: tuple[int, ...] = ()
    gradients: Path | None = None

    def _respond(self, rollout_step: int, samples: SampleBatch) -> Trajectory:
        if self.replayed:
            assert rollout_step not in self.resumed, "the checkpoint holds this rollout batch"
            return self.replayed[rollout_step - 1]
        trajectory = super()._respond(rollout_step, samples)
        self.rollouts.append(trajectory)
        return trajectory

    def take_step(self, metrics: dict[str, float]) -> None:
        if self.gradients is not None:
            with gradients_in_place_of_weights(self.student.model):
                save_sharded(
                    self.gradients / str(len(list(self.gradients.glob("*")))),
                    self.student.model.sharded_weights(PREFIX),
                )
        super().take_step(metrics)

    def weights_and_optimizer(self, is_loading: bool = False) -> dict[str, Any]:
        weights = self.student.model.sharded_weights(PREFIX)
        optimizer = self.optimizer.sharded_state_dict(weights, is_loading)
        return {"model": weights, "optimizer": optimizer}

    def save(self, folder: Path, global_step: int) -> dict[str, Any]:
        save_sharded(folder, self.weights_and_optimizer())
        return {
            "step": global_step,
            "distiller": self.state_dict(),
            "scheduler": self.optimizer.scheduler.state_dict(),
        }

    def resume(self, folder: Path, plain: Mapping[str, Any]) -> int:
        state = load_sharded(
            folder, self.weights_and_optimizer(is_loading=True), vocab_size=self.student.model.arch.vocab_size
        )
        self.student.model.load_weights(state["model"], PREFIX)
        self.optimizer.load_state_dict(state["optimizer"])
        self.optimizer.scheduler.load_state_dict(plain["scheduler"])
        self.load_state_dict(plain["distiller"])
        assert self.batch is not None
        self.resumed = (self.batch.rollout_step,)
        return int(plain["step"])


@contextmanager
def gradients_in_place_of_weights(model: StagedGPT) -> Iterator[None]:
    """So that Megatron's own sharding says which part of the network's gradient each rank holds."""
    kept = {name: parameter.data for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.data = parameter.main_grad.to(parameter.dtype)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.data = kept[name]


def configure(archive: str, layout: Layout, *overrides: str) -> Config:
    given = (f"model.restore_from_path={archive}", f"model.data.train_ds.file_path={PROMPTS}")
    last_wins = {item.partition("=")[0]: item for item in (*given, *SETTINGS, *layout.overrides, *overrides)}
    return parse(cli.compose("gpt_opdlm", list(last_wins.values())), Config)


def build(archive: str, layout: Layout, *overrides: str) -> Recorder:
    """A distiller of this rank, in place of whatever layout the process had."""
    config = configure(archive, layout, *overrides)
    parallel.destroy()
    context = parallel.initialize(layout.tensor, layout.pipeline, layout.virtual, layout.context)
    with open_nemo(archive) as opened:
        arch = archive_architecture(opened, opened.config)
        tokenizer = load_tokenizer(opened.tokenizer, trust_remote_code=False)  # type: ignore[arg-type]
        mask_token_id = int(opened.config["opdlm"]["mask_token_id"])
        tokens = SpecialTokens.read(tokenizer, arch.vocab_size, mask_token_id, None, opened.config["origin"])
        options = model_options(config.model, config.trainer.precision)
        student = build_model(arch, context, AttentionRule.BLOCK_DIFFUSION, options)
        read_weights(student, opened)
    with open_nemo(str(config.model.teacher_path)) as opened:
        arch_of_teacher, pack_to_tokens = archive_architecture(opened, opened.config), config.model.opdlm.pack_to_tokens
        teacher = Teacher(arch_of_teacher, context, options, micro_batch_size=4, pack_to_tokens=pack_to_tokens)
        read_weights(teacher.network, opened)
    settings = optimizer_settings(config.model, MAX_STEPS, config.trainer.gradient_clip_val)
    network = wrap(student, settings)
    method = Method.of(config.model, tokens, arch.max_position_embeddings, MAX_STEPS)
    optimizer = StudentOptimizer(network, settings)
    recorder = Recorder(config.model, method, network, optimizer, teacher, _prompts(config, tokenizer, tokens))
    recorder.rollouts = []
    return recorder


def _prompts(config: Config, tokenizer: Any, tokens: SpecialTokens) -> PromptDataset:
    names = {field.name for field in fields(config.model.data.train_ds)} - {"file_path"}
    settings = {name: getattr(config.model.data.train_ds, name) for name in names}
    settings["response_end_ids"] = None if config.model.opdlm.generates else tokens.end_token_ids
    file_path, mask_token_id = str(config.model.data.train_ds.file_path), tokens.mask_token_id
    return load_prompts(file_path, tokenizer=tokenizer, mask_token_id=mask_token_id, **settings)


@dataclass(frozen=True)
class Outcome:
    """What a rank saw: metrics of each update, and its rollouts as plain state."""

    metrics: list[dict[str, float]]
    rollouts: list[dict[str, Any]]
    plain: dict[str, Any] | None = None


def train(
    archive: str,
    layout: Layout,
    num_updates: int,
    overrides: tuple[str, ...] = (),
    gradients: str | None = None,
    replayed: Sequence[dict[str, Any]] = (),
    save_to: str | None = None,
    save_after: int | None = None,
    resume_from: tuple[str, Mapping[str, Any]] | None = None,
) -> Outcome:
    """Make updates from the archive, or from a checkpoint, up to update number ``num_updates``; save after one of them."""
    run = build(archive, layout, *overrides)
    run.replayed = [Trajectory.from_state_dict(state) for state in replayed]
    run.gradients = None if gradients is None else Path(gradients)
    first = 0 if resume_from is None else run.resume(Path(resume_from[0]), resume_from[1])
    metrics, plain = [], None
    for step in range(first, num_updates):
        metrics.append(run.update(step))
        if save_to is not None and step + 1 == (save_after or num_updates):
            plain = run.save(Path(save_to), step + 1)
    return Outcome(metrics, [trajectory.state_dict() for trajectory in run.rollouts], plain)


def train_by_name(archive: str, layout: Layout, num_updates: int, options: dict[str, Any]) -> Outcome:
    """`train` with options by name."""
    return train(archive, layout, num_updates, **options)


def read_gradients(archive: str, folder: Path) -> dict[str, Tensor]:
    """Gradients that any layout has written, whole and by name; one process calls this."""
    parallel.destroy()
    context = parallel.initialize()
    with open_nemo(archive) as opened:
        arch = archive_architecture(opened, opened.config)
    network = build_model(arch, context, AttentionRule.CAUSAL, model_options(configure(archive, Layout()).model, "32"))
    state = load_sharded(folder, network.sharded_weights(PREFIX), vocab_size=arch.vocab_size)
    return {name: value for name, value in state["chunk0"].items() if isinstance(value, Tensor)}
