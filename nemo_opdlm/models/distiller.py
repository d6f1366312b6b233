"""On-policy distillation: one update at a time, in the paper's five moves."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_opdlm.config import ModelConfig
from nemo_opdlm.data.collate import collate
from nemo_opdlm.data.prompts import PromptDataset
from nemo_opdlm.data.schedule import PromptSchedule, SampleBatch
from nemo_opdlm.diffusion.state_selection import DenoisingState, select_states
from nemo_opdlm.diffusion.trajectory import FinishReason, Trajectory
from nemo_opdlm.distillation.loss import Normalization
from nemo_opdlm.megatron.forward import forward_backward
from nemo_opdlm.megatron.network import Network
from nemo_opdlm.megatron.optimizer import StudentOptimizer
from nemo_opdlm.megatron.rollout import RolloutEngine
from nemo_opdlm.megatron.step import MASK_RATIOS, distillation_loss, micro_batches
from nemo_opdlm.megatron.teacher import Teacher, TeacherTargets
from nemo_opdlm.models.method import Method

Metrics = dict[str, float]


@dataclass(frozen=True)
class RolloutBatch:
    """What one rollout step produced; its updates are taken in order, ``global_batch_size`` rollouts each."""

    rollout_step: int
    trajectory: Trajectory
    states: DenoisingState
    targets: TeacherTargets


class OnPolicyDistiller:
    """Student, teacher, optimizer and prompts of a run; ``update`` is its training step.

    ``global_step`` counts updates, ``rollout_step`` counts rollout batches from 1. Everything random is a function of
    (seed, rollout step, sample), so a distiller that is handed the same weights continues the same run.

    Args:
        config: the checked model section.
        method: the method's settings as the pure packages want them.
        student: the network that is trained.
        optimizer: Megatron's optimizer around it.
        teacher: the frozen AR model; None where ``nll`` trains on student rollouts.
        prompts: the training prompts.
        step: steps the optimizer and returns the gradient norm; Lightning counts updates by it.
    """

    def __init__(
        self,
        config: ModelConfig,
        method: Method,
        student: Network,
        optimizer: StudentOptimizer,
        teacher: Teacher | None,
        prompts: PromptDataset,
        step: Callable[[], float] | None = None,
    ) -> None:
        self.config = config
        self.method = method
        self.student = student
        self.optimizer = optimizer
        self.teacher = teacher
        self.prompts = prompts
        self.step = step or optimizer.step
        rollout = config.opdlm.rollout
        self.schedule = PromptSchedule(
            len(prompts), rollout.num_prompts_per_step, rollout.num_responses_per_prompt, config.seed
        )
        self.updates_per_rollout = config.updates_per_rollout
        self.batch: RolloutBatch | None = None
        self.loss = distillation_loss(student.head, method.divergence)
        self.num_generated_tokens = 0
        self.num_trained_tokens = 0
        self.num_skipped = 0
        self.num_skipped_in_a_row = 0

    def update(self, global_step: int) -> Metrics:
        """Make update number ``global_step`` (from 0) and return its metrics.

        Raises:
            RuntimeError: ``max_consecutive_skips`` updates in a row had no gradient to follow.
        """
        metrics: Metrics = {}
        rollout_step, index = divmod(global_step, self.updates_per_rollout)
        if self.batch is None or self.batch.rollout_step != rollout_step + 1:
            # 1. The student answers the next prompts with its own sampler.
            trajectory = self.roll_out(rollout_step + 1, metrics)
            # 2. One half-masked state of each block it really visited.
            states = self.select_states(rollout_step + 1, trajectory)
            # 3. The teacher, once per rollout batch: the targets of all its states and updates.
            self.batch = RolloutBatch(rollout_step + 1, trajectory, states, self.ask_teacher(trajectory, metrics))
        # 4. The loss: a sum over masked tokens, divided by one global count.
        self.accumulate_gradients(self.batch, index, metrics)
        # 5. The update.
        self.take_step(metrics)
        self.check_progress(self.batch, index, metrics)
        return {"rollout_step": rollout_step + 1, **metrics}

    def roll_out(self, rollout_step: int, metrics: Metrics) -> Trajectory:
        """Responses to the prompts of this rollout step, by the student (or the teacher, off policy)."""
        samples = self.schedule.indices(rollout_step)
        with _timed("rollout", metrics):
            trajectory = self._respond(rollout_step, samples)
        metrics.update(_rollout_metrics(trajectory, metrics["time/rollout_s"]))
        self.num_generated_tokens += int(trajectory.response_len.sum())
        return trajectory

    def _respond(self, rollout_step: int, samples: SampleBatch) -> Trajectory:
        indices: list[int] = samples.dataset_indices.tolist()
        prompt_ids, prompt_len = collate([self.prompts[i] for i in indices], self.method.pad_id)
        domains = [self.prompts.domains[i] for i in indices]
        limits = self.method.response_limits(rollout_step, prompt_len, domains)
        arguments = (prompt_ids, prompt_len, limits, samples.sample_ids)
        device = self.student.parallel.device
        on_device = [tensor.to(device) for tensor in arguments]
        settings = self.method.rollout_settings(rollout_step)
        if self.config.opdlm.responses == "student":
            return self._engine(self.student.model).generate(*on_device, settings)
        assert self.teacher is not None
        return self._engine(self.teacher.network).generate_autoregressive(*on_device, settings)

    def _engine(self, network: torch.nn.Module) -> RolloutEngine:
        return self.method.engine(network, self.config.opdlm.rollout.max_batch_size)  # type: ignore[arg-type]

    def select_states(self, rollout_step: int, trajectory: Trajectory) -> DenoisingState:
        """The half-masked states that this rollout batch trains on."""
        opdlm = self.config.opdlm
        return select_states(
            opdlm.state_selection,
            trajectory,
            self.method.mask_token_id,
            num_states=opdlm.states_per_rollout,
            seed=self.config.seed,
            step=rollout_step,
            exclude_end_token=opdlm.exclude_end_token,
        )

    def ask_teacher(self, trajectory: Trajectory, metrics: Metrics) -> TeacherTargets:
        """Targets of every response token, from one causal pass."""
        with _timed("teacher", metrics):
            if self.teacher is None:
                return Teacher.own_tokens(trajectory)
            return self.teacher.targets(trajectory, self.method.divergence)

    def rows_of_update(self, batch: RolloutBatch, index: int) -> Tensor:
        """The rollouts that the batch's update number ``index`` trains on, ``[global_batch_size]``."""
        size = self.config.global_batch_size
        return torch.arange(index * size, (index + 1) * size, device=batch.trajectory.token_ids.device)

    def accumulate_gradients(self, batch: RolloutBatch, index: int, metrics: Metrics) -> None:
        """Forward and backward passes of the batch's update number ``index``."""
        with _timed("student", metrics):
            parts = micro_batches(
                batch.trajectory,
                batch.states,
                batch.targets,
                self.rows_of_update(batch, index),
                Normalization(self.config.opdlm.normalization),
                self.config.micro_batch_size,
            )
            self.optimizer.zero_grad()
            sums = forward_backward(self.student.ddp, parts, self.loss)
        totals = {name: float(sum(part[name] for part in sums)) for name in sums[0]}
        self.num_trained_tokens += int(totals["num_tokens"])
        metrics.update(_train_metrics(totals))

    def take_step(self, metrics: Metrics) -> None:
        """Clip, update the weights, advance the learning rate."""
        metrics["train/lr"] = self.optimizer.lr
        with _timed("optimizer", metrics):
            metrics["train/grad_norm"] = self.step()
        metrics["generated_tokens"] = float(self.num_generated_tokens)
        metrics["trained_tokens"] = float(self.num_trained_tokens)

    def check_progress(self, batch: RolloutBatch, index: int, metrics: Metrics) -> None:
        """Count the update if the optimizer skipped it; stop the run when that does not end."""
        grad_norm = metrics["train/grad_norm"]
        is_skipped = self.optimizer.is_skipped(grad_norm)
        self.num_skipped += is_skipped
        self.num_skipped_in_a_row = self.num_skipped_in_a_row + 1 if is_skipped else 0
        metrics["train/skipped"] = float(self.num_skipped)
        if self.num_skipped_in_a_row >= self.config.opdlm.max_consecutive_skips:
            samples = batch.trajectory.sample_ids[self.rows_of_update(batch, index)].tolist()
            raise RuntimeError(
                f"{self.num_skipped_in_a_row} updates in a row were skipped, the last one with train/grad_norm={grad_norm} "
                f"and train/loss={metrics['train/loss']} on samples {samples} of rollout step {batch.rollout_step}"
            )

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
            state["rollout_step"] = self.batch.rollout_step
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
        for key, value in self._schedule_keys().items():
            if saved[key] != value:
                raise ValueError(
                    f"{key}={value} differs from {saved[key]} of the run that saved the checkpoint: resume it as it was "
                    "started, or start a new run from its .nemo file"
                )
        for name in ("num_generated_tokens", "num_trained_tokens", "num_skipped", "num_skipped_in_a_row"):
            setattr(self, name, int(state[name]))  # type: ignore[call-overload]
        if "trajectory" not in state:
            return
        device = self.student.parallel.device
        trajectory = Trajectory.from_state_dict(state["trajectory"]).to(device)  # type: ignore[arg-type]
        states = DenoisingState(**state["states"]).to(device)  # type: ignore[arg-type]
        self.batch = RolloutBatch(
            int(state["rollout_step"]),  # type: ignore[call-overload]
            trajectory,
            states,
            self.ask_teacher(trajectory, {}),
        )


@contextmanager
def _timed(name: str, metrics: Metrics) -> Iterator[None]:
    start = time.perf_counter()
    yield
    metrics[f"time/{name}_s"] = time.perf_counter() - start


def _rollout_metrics(trajectory: Trajectory, seconds: float) -> Metrics:
    num_tokens = float(trajectory.response_len.sum())
    is_cut: Tensor = trajectory.finish_reason == FinishReason.LENGTH
    return {
        "rollout/response_len": num_tokens / len(trajectory),
        "rollout/tokens_per_forward": num_tokens / float(trajectory.num_forwards.sum()),
        "rollout/tokens_per_s": num_tokens / seconds,
        "rollout/truncated_frac": float(is_cut.float().mean()),
    }


def _train_metrics(totals: dict[str, float]) -> Metrics:
    num_tokens = max(totals["num_tokens"], 1.0)
    metrics = {
        "train/loss": totals["loss_sum"] / max(totals["count"], 1.0),
        "train/kl": totals["divergence_sum"] / num_tokens,
        "train/agreement": totals["agreements"] / num_tokens,
    }
    for upper in MASK_RATIOS:
        if totals[f"num_tokens_{upper}"]:
            key = f"train/kl_at_mask_ratio_{upper}"
            metrics[key] = totals[f"divergence_sum_{upper}"] / totals[f"num_tokens_{upper}"]
    return metrics
