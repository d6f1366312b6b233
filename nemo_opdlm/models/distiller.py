"""On-policy distillation: one update at a time, in the paper's five moves."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemo_opdlm.config import ModelConfig
from nemo_opdlm.data.collate import collate
from nemo_opdlm.data.prompts import PromptDataset
from nemo_opdlm.data.schedule import PromptSchedule, SampleBatch
from nemo_opdlm.diffusion.requests import Requests
from nemo_opdlm.diffusion.settings import RolloutProgress
from nemo_opdlm.diffusion.state_selection import DenoisingState, select_states
from nemo_opdlm.diffusion.trajectory import Trajectory, given_texts
from nemo_opdlm.distillation.loss import Normalization
from nemo_opdlm.megatron.exchange import respond_together
from nemo_opdlm.megatron.forward import RowSplit, forward_backward
from nemo_opdlm.megatron.network import Network
from nemo_opdlm.megatron.optimizer import StudentOptimizer
from nemo_opdlm.megatron.step import MASK_RATIOS, distillation_loss, divergence_sums, micro_batches, total
from nemo_opdlm.megatron.student import StagedGPT
from nemo_opdlm.megatron.teacher import Teacher, TeacherTargets
from nemo_opdlm.models.health import check_rollout, rollout_health, too_many_skips
from nemo_opdlm.models.method import Method
from nemo_opdlm.models.phases import Phases

Metrics = dict[str, float]


@dataclass(frozen=True)
class Share:
    """What one data-parallel rank trains on: its rollouts in the order of the updates, their states and targets."""

    trajectory: Trajectory
    states: DenoisingState
    targets: TeacherTargets


@dataclass(frozen=True)
class RolloutBatch:
    """What one rollout step produced; its updates are taken in order, ``global_batch_size`` rollouts each.

    Attributes:
        rollout_step: which one.
        epoch: the pass over its rollouts that the states are for, from 0.
        trajectory, states: all of it, on every rank: what a checkpoint of any layout holds.
        share: this rank's part.
    """

    rollout_step: int
    epoch: int
    trajectory: Trajectory
    states: DenoisingState
    share: Share


class OnPolicyDistiller:
    """Student, teacher, optimizer and prompts of a run; ``update`` is its training step.

    ``global_step`` counts updates, ``rollout_step`` counts rollout batches from 1. Everything random is a function of
    (seed, rollout step, sample), so a distiller that is handed the same weights continues the same run.

    Args:
        config: the checked model section.
        method: the method's settings as the pure packages want them.
        student: the network that is trained.
        optimizer: Megatron's optimizer around it.
        teacher: the frozen AR model; None where ``nll`` trains on responses that are not the teacher's.
        prompts: the training prompts.
        step: steps the optimizer at this loss and returns the gradient norm; Lightning counts updates by it.
        on_progress: told how far each batch of a rollout is, before each of its forwards.
        on_phase: told which part of an update begins.
        gives_up: asked now and then whether to leave a rollout; `update` then raises `RolloutGivenUp` on every rank.
    """

    def __init__(
        self,
        config: ModelConfig,
        method: Method,
        student: Network,
        optimizer: StudentOptimizer,
        teacher: Teacher | None,
        prompts: PromptDataset,
        step: Callable[[float], float] | None = None,
        on_progress: Callable[[RolloutProgress], None] | None = None,
        on_phase: Callable[[str], None] | None = None,
        gives_up: Callable[[], bool] | None = None,
    ) -> None:
        self.config = config
        self.method = method
        self.student = student
        self.optimizer = optimizer
        self.teacher = teacher
        self.prompts = prompts
        self.step = step or optimizer.step
        self.on_progress = on_progress
        self.phases = Phases(student.parallel.device, on_phase)
        self.gives_up = gives_up
        rollout = config.opdlm.rollout
        self.schedule = PromptSchedule(
            len(prompts), rollout.num_prompts_per_step, rollout.num_responses_per_prompt, config.seed
        )
        self.updates_per_rollout = config.updates_per_rollout
        self.batch: RolloutBatch | None = None
        self.loss = distillation_loss(student.head, method.divergence)
        self.split = training_split(config, student.model)
        self.num_generated_tokens = 0
        self.num_trained_tokens = 0
        self.num_skipped = 0
        self.num_skipped_in_a_row = 0

    def update(self, global_step: int) -> Metrics:
        """Make update number ``global_step`` (from 0) and return its metrics.

        Raises:
            UnhealthyRun: ``max_consecutive_skips`` updates in a row had no gradient to follow, or most responses are garbage.
        """
        metrics: Metrics = {}
        rollout_step, index = divmod(global_step, self.updates_per_rollout)
        epoch, index = divmod(index, self.config.updates_per_epoch)
        if self.batch is None or self.batch.rollout_step != rollout_step + 1:
            # Its targets are not to wait beside the next ones.
            self.batch = None
            # 1. The student answers the next prompts with its own sampler.
            trajectory = self.roll_out(rollout_step + 1, metrics)
            # 2. One half-masked state of each block it really visited.
            states = self.select_states(rollout_step + 1, trajectory, epoch)
            # 3. The teacher, once per rollout batch: the targets of all its states and updates.
            share = self.share_out(trajectory, states, metrics)
            self.batch = RolloutBatch(rollout_step + 1, epoch, trajectory, states, share)
        elif self.batch.epoch != epoch:
            self.batch = self.next_epoch(self.batch, epoch)
        # 4. The loss: a sum over masked tokens, divided by one global count.
        self.accumulate_gradients(self.batch, index, metrics)
        # 5. The update.
        self.take_step(metrics)
        self.check_progress(self.batch, index, metrics)
        return {"rollout_step": rollout_step + 1, **metrics}

    def roll_out(self, rollout_step: int, metrics: Metrics) -> Trajectory:
        """Responses to the prompts of this rollout step, by the student (or the teacher, or from the data set, off policy)."""
        samples = self.schedule.indices(rollout_step)
        self.student.finish_param_sync()
        with self.phases.timed("rollout", metrics):
            trajectory = self._respond(rollout_step, samples)
        metrics.update(_response_metrics(trajectory))
        if self.config.opdlm.generates:
            metrics.update(_rollout_metrics(trajectory, metrics["time/rollout_s"]))
            self.num_generated_tokens += int(trajectory.response_len.sum())
            check_rollout(trajectory, rollout_step, self.row_ids(rollout_step), self.config.opdlm.rollout)
        return trajectory

    def row_ids(self, rollout_step: int) -> list[str]:
        """Names of a rollout step's prompts in their file, in the order of its rollouts."""
        return [self.prompts.row_ids[i] for i in self.schedule.indices(rollout_step).dataset_indices.tolist()]

    def _respond(self, rollout_step: int, samples: SampleBatch) -> Trajectory:
        indices: list[int] = samples.dataset_indices.tolist()
        prompt_ids, prompt_len = collate([self.prompts[i] for i in indices], self.method.pad_id)
        domains = [self.prompts.domains[i] for i in indices]
        limits = self.method.response_limits(rollout_step, prompt_len, domains)
        if not self.config.opdlm.generates:
            return self._look_up(samples, limits)
        parallel = self.student.parallel
        requests = Requests(prompt_ids, prompt_len, limits, samples.sample_ids).to(parallel.device)
        settings = self.method.rollout_settings(rollout_step)
        generate = self._generator()

        def respond(rows: Tensor) -> Trajectory:
            return generate(requests.index(rows), settings, self.on_progress)

        return respond_together(respond, limits, parallel)

    def _look_up(self, samples: SampleBatch, limits: Tensor) -> Trajectory:
        """The data set's responses, cut at their limits as rollouts are; every rank has them all."""
        indices, responses = samples.dataset_indices.tolist(), self.prompts.responses
        assert responses is not None
        return given_texts(
            [self.prompts[i] for i in indices],
            [responses[i][:limit] for i, limit in zip(indices, limits.tolist(), strict=True)],
            samples.sample_ids,
            self.method.mask_token_id,
            self.config.opdlm.block_size,
            self.method.tokens.end_token_ids,
        ).to(self.student.parallel.device)

    def _generator(self) -> Callable[..., Trajectory]:
        max_batch_size = self.config.opdlm.rollout.max_batch_size
        if self.config.opdlm.responses == "student":
            return self.method.engine(self.student.model, max_batch_size, gives_up=self.gives_up).generate
        assert self.teacher is not None
        return self.method.engine(self.teacher.network, max_batch_size, gives_up=self.gives_up).generate_autoregressive

    def select_states(self, rollout_step: int, trajectory: Trajectory, epoch: int) -> DenoisingState:
        """The half-masked states that a pass over this rollout batch trains on."""
        opdlm = self.config.opdlm
        return select_states(
            opdlm.state_selection,
            trajectory,
            self.method.mask_token_id,
            num_states=opdlm.states_per_rollout,
            seed=self.config.seed,
            step=rollout_step,
            epoch=epoch,
            exclude_end_token=opdlm.exclude_end_token,
        )

    def share_out(self, trajectory: Trajectory, states: DenoisingState, metrics: Metrics) -> Share:
        """This data-parallel rank's rollouts, and the targets of all their response tokens from one causal pass."""
        rows = self._rows_of_rank(trajectory)
        trajectory, states = trajectory.index(rows), states.index(rows)
        with self.phases.timed("teacher", metrics):
            return Share(trajectory, states, self._targets(trajectory))

    def next_epoch(self, batch: RolloutBatch, epoch: int) -> RolloutBatch:
        """The same rollouts and targets with other states."""
        states = self.select_states(batch.rollout_step, batch.trajectory, epoch)
        share = replace(batch.share, states=states.index(self._rows_of_rank(batch.trajectory)))
        return replace(batch, epoch=epoch, states=states, share=share)

    def _rows_of_rank(self, trajectory: Trajectory) -> Tensor:
        parallel = self.student.parallel
        return rows_of_rank(trajectory, self.config.global_batch_size, parallel.dp_rank, parallel.dp_size)

    def _targets(self, trajectory: Trajectory) -> TeacherTargets:
        if self.teacher is None:
            return Teacher.own_tokens(trajectory)
        return self.teacher.targets(trajectory, self.method.divergence)

    def accumulate_gradients(self, batch: RolloutBatch, index: int, metrics: Metrics) -> None:
        """Forward and backward passes of update number ``index`` of the batch's epoch."""
        with self.phases.timed("student", metrics):
            size = self.config.global_batch_size // self.student.parallel.dp_size
            parts = micro_batches(
                batch.share.trajectory,
                batch.share.states,
                batch.share.targets,
                torch.arange(index * size, (index + 1) * size, device=self.student.parallel.device),
                Normalization(self.config.opdlm.normalization),
                self.config.micro_batch_size,
                self.split,
                self._forbidden_where_comparable(batch.epoch, index),
                self.config.opdlm.pack_to_tokens,
                self.config.opdlm.ar_loss_weight,
            )
            self.optimizer.zero_grad()
            totals = total(forward_backward(self.student, parts, self.loss), self.student.parallel)
        self.num_trained_tokens += int(totals["num_tokens"])
        metrics.update(_train_metrics(totals))

    def _forbidden_where_comparable(self, epoch: int, index: int) -> Tensor | None:
        """Tokens without probability in rollouts; None unless an update sees what the rollout saw, with the same weights."""
        opdlm = self.config.opdlm
        if epoch > 0 or index > 0 or opdlm.responses != "student" or opdlm.state_selection == "random_mask":
            return None
        return self.method.tokens.forbidden.to(self.student.parallel.device)

    def take_step(self, metrics: Metrics) -> None:
        """Clip, update the weights, advance the learning rate."""
        metrics["train/lr"] = self.optimizer.lr
        with self.phases.timed("optimizer", metrics):
            metrics["train/grad_norm"] = self.step(metrics["train/loss"])
        metrics["generated_tokens"] = float(self.num_generated_tokens)
        metrics["trained_tokens"] = float(self.num_trained_tokens)

    def check_progress(self, batch: RolloutBatch, index: int, metrics: Metrics) -> None:
        """Count the update if the optimizer skipped it; stop the run when that does not end."""
        grad_norm, loss = metrics["train/grad_norm"], metrics["train/loss"]
        is_skipped = self.optimizer.is_skipped(grad_norm, loss)
        self.num_skipped += is_skipped
        self.num_skipped_in_a_row = self.num_skipped_in_a_row + 1 if is_skipped else 0
        metrics["train/skipped"] = float(self.num_skipped)
        if self.num_skipped_in_a_row >= self.config.opdlm.max_consecutive_skips:
            raise too_many_skips(
                self.num_skipped_in_a_row, grad_norm, loss, self._offenders(batch, index), batch.rollout_step
            )

    def _offenders(self, batch: RolloutBatch, index: int) -> list[str]:
        """Prompts of an update whose loss is not finite when they are alone; all of its prompts where there are none."""
        parallel, size = self.student.parallel, self.config.global_batch_size
        in_update = torch.zeros(len(batch.trajectory), dtype=torch.bool)
        in_update[index * size : (index + 1) * size] = True
        share, per_rank = batch.share, size // parallel.dp_size
        losses = torch.zeros(len(batch.trajectory), dtype=torch.float64, device=parallel.device)
        rows = self._rows_of_rank(batch.trajectory)
        for row in range(index * per_rank, (index + 1) * per_rank):
            number = torch.tensor([row], device=parallel.device)
            arguments = (share.trajectory, share.states, share.targets, number, self.method.divergence, 1)
            for part in divergence_sums(self.student.model, *arguments):
                losses[rows[row]] = part["divergence_sum"]
        is_finite = parallel.from_last_stage(parallel.sum_over_data(losses)).isfinite().cpu()
        guilty = in_update & ~is_finite
        row_ids = self.row_ids(batch.rollout_step)
        return [row_ids[row] for row in torch.nonzero(guilty if guilty.any() else in_update)[:, 0].tolist()]

    def state_dict(self) -> dict[str, object]:
        """The unfinished rollout batch and the token counts; targets are computed again from the teacher."""
        state: dict[str, object] = {
            "schedule": self._schedule_keys(),
            "num_generated_tokens": self.num_generated_tokens,
            "num_trained_tokens": self.num_trained_tokens,
            "num_skipped": self.num_skipped,
            "num_skipped_in_a_row": self.num_skipped_in_a_row,
        }
        if self.batch is not None:
            state["rollout_step"], state["epoch"] = self.batch.rollout_step, self.batch.epoch
            state["trajectory"] = self.batch.trajectory.state_dict()
            state["states"] = dict(vars(self.batch.states))
        return state

    def _schedule_keys(self) -> dict[str, int]:
        """What decides which samples an update trains on; a resumed run must not change it."""
        rollout = self.config.opdlm.rollout
        return {
            "model.opdlm.rollout.num_prompts_per_step": rollout.num_prompts_per_step,
            "model.opdlm.rollout.num_responses_per_prompt": rollout.num_responses_per_prompt,
            "model.global_batch_size": self.config.global_batch_size,
            "model.opdlm.epochs_per_rollout": self.config.opdlm.epochs_per_rollout,
            "model.opdlm.block_size": self.config.opdlm.block_size,
            "model.seed": self.config.seed,
            "number of training prompts": len(self.prompts),
        }

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Continue where ``state_dict`` was taken, also between two updates of one rollout batch.

        Raises:
            ValueError: an update would train on other samples than in the run that saved the state.
        """
        saved: dict[str, int] = state["schedule"]  # type: ignore[assignment]
        # Checkpoints from before there were several epochs had one.
        for key, value in self._schedule_keys().items():
            if saved.get(key, 1) != value:
                raise ValueError(
                    f"{key}={value} differs from {saved.get(key, 1)} of the run that saved the checkpoint: resume it as it was "
                    "started, or start a new run from its .nemo file"
                )
        for name in ("num_generated_tokens", "num_trained_tokens", "num_skipped", "num_skipped_in_a_row"):
            setattr(self, name, int(state[name]))  # type: ignore[call-overload]
        if "trajectory" not in state:
            return
        device = self.student.parallel.device
        trajectory = Trajectory.from_state_dict(state["trajectory"]).to(device)  # type: ignore[arg-type]
        states = DenoisingState(**state["states"]).to(device)  # type: ignore[arg-type]
        rollout_step, epoch = int(state["rollout_step"]), int(state.get("epoch", 0))  # type: ignore[call-overload]
        self.batch = RolloutBatch(rollout_step, epoch, trajectory, states, self.share_out(trajectory, states, {}))


def training_split(config: ModelConfig, student: StagedGPT) -> RowSplit:
    """How training rows are cut over context-parallel ranks, and what they are filled up to."""
    split, pack_to_tokens = RowSplit.over_context(student), config.opdlm.pack_to_tokens
    if not student.config.tp_comm_overlap:
        return split
    assert pack_to_tokens is not None
    return split.filled_up_to(pack_to_tokens)


def rows_of_rank(trajectory: Trajectory, global_batch_size: int, dp_rank: int, dp_size: int) -> Tensor:
    """The rollouts that a data-parallel rank trains on, update after update: ``global_batch_size / dp_size`` of each.

    Within an update they are dealt by length, so that all ranks have rows of about the same lengths.
    """
    lengths = trajectory.prompt_len + trajectory.response_len
    updates = torch.arange(len(trajectory), device=lengths.device).split(global_batch_size)
    return torch.cat([rows[lengths[rows].argsort(stable=True)][dp_rank::dp_size] for rows in updates])


def _response_metrics(trajectory: Trajectory) -> Metrics:
    return {
        "rollout/response_len": float(trajectory.response_len.sum()) / len(trajectory),
        **rollout_health(trajectory),
    }


def _rollout_metrics(trajectory: Trajectory, seconds: float) -> Metrics:
    num_tokens = float(trajectory.response_len.sum())
    return {
        "rollout/tokens_per_forward": num_tokens / float(trajectory.num_forwards.sum()),
        "rollout/tokens_per_s": num_tokens / seconds,
    }


def _train_metrics(totals: dict[str, float]) -> Metrics:
    num_tokens = max(totals["num_tokens"], 1.0)
    metrics = {
        "train/loss": totals["loss_sum"] / max(totals["count"], 1.0),
        "train/kl": totals["divergence_sum"] / num_tokens,
        "train/agreement": totals["agreements"] / num_tokens,
    }
    if totals["num_ar_tokens"]:
        metrics["train/ar_kl"] = totals["ar_divergence_sum"] / totals["num_ar_tokens"]
    if totals["num_revealed"]:
        metrics["rollout/logprob_gap"] = totals["logprob_gap_sum"] / totals["num_revealed"]
        metrics["rollout/logprob_gap_max"] = totals["logprob_gap_max"]
    for upper in MASK_RATIOS:
        if totals[f"num_tokens_{upper}"]:
            key = f"train/kl_at_mask_ratio_{upper}"
            metrics[key] = totals[f"divergence_sum_{upper}"] / totals[f"num_tokens_{upper}"]
    return metrics
