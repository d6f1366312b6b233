"""How fast a run is, how well it uses its devices, and what it has cost so far."""

import resource
import sys
import time
from dataclasses import dataclass

import torch

from nemo_opdlm.config import Architecture, ModelConfig
from nemo_opdlm.diffusion.work import causal_work, rollout_work, training_work
from nemo_opdlm.models.distiller import Metrics, RolloutBatch
from nemo_opdlm.models.flops import forward_flops

_KIB, _GIB = 2**10, 2**30


@dataclass(frozen=True)
class BatchCost:
    """What a rollout batch asks for, over all ranks.

    Attributes:
        rollout_flops: of the rollout and of the teacher's pass.
        update_flops: of each update of the batch's epoch.
        row_tokens: tokens of the rows ``[prompt | clean | state x c]`` that each of them trains on.
    """

    rollout_flops: float
    update_flops: list[float]
    row_tokens: list[float]


class Throughput:
    """Figures of each optimizer step, beside those that the update itself gives.

    `throughput/mfu` is the step's FLOPs / (`time/step_s` x devices x peak FLOP/s of a device). The FLOPs are those of
    `forward_flops` for every token that the method processes:

    - the student's two-stream rows, forward once and backward twice, with the head on the masked tokens;
    - in the first step of a rollout batch, the rollout: `denoising forwards x block_size` tokens, and each block but a row's
      last once more as it is committed, with the head on the tokens that are still masked; none where a data set has the
      responses;
    - in the same step, the teacher's causal pass over prompt and response; its head on the masked tokens of each update, or
      on all response tokens at once for top-k targets.

    Padding, recomputed activations and the held-out set do not count. `throughput/tflops_per_device` is the same without
    the peak, and there where none is known.

    Args:
        config: the model section.
        student: its architecture.
        teacher: its architecture; None where there is none.
        num_devices: ranks of the run.
        peak_tflops: of one device (`peak_flops`); None = unknown.
    """

    def __init__(
        self,
        config: ModelConfig,
        student: Architecture,
        teacher: Architecture | None,
        num_devices: int,
        peak_tflops: float | None,
    ) -> None:
        self.config = config
        self.student = student
        self.teacher = teacher
        self.num_devices = num_devices
        self.peak_tflops = peak_tflops
        self._batch: RolloutBatch | None = None
        self._cost = BatchCost(0.0, [], [])
        self._hours_before = 0.0
        self._start = time.monotonic()

    @property
    def device_hours(self) -> float:
        """Wall-clock hours since the run was set up, times devices; a resumed run goes on from its checkpoint's number."""
        return self._hours_before + self.num_devices * (time.monotonic() - self._start) / 3600

    @device_hours.setter
    def device_hours(self, hours: float) -> None:
        self._hours_before, self._start = hours, time.monotonic()

    def metrics(self, batch: RolloutBatch, index: int, update: Metrics, seconds: float) -> Metrics:
        """Figures of an update.

        Args:
            batch: whose rollouts it trained on.
            index: its number in the batch's epoch.
            update: its own metrics.
            seconds: it took.
        """
        if batch is not self._batch:
            self._batch, self._cost = batch, self.cost(batch)
        flops = self._cost.update_flops[index]
        if "time/rollout_s" in update:
            flops += self._cost.rollout_flops
        tflops = flops / seconds / self.num_devices / 1e12
        found = {
            "time/step_s": seconds,
            "train/tokens_per_s": self._cost.row_tokens[index] / update["time/student_s"],
            "throughput/tflops_per_device": tflops,
            **peak_memory(batch.trajectory.token_ids.device),
            "device_hours": self.device_hours,
        }
        if self.peak_tflops is not None:
            found["throughput/mfu"] = tflops / self.peak_tflops
        return found

    def cost(self, batch: RolloutBatch) -> BatchCost:
        """Count a batch; the device is read once for all of its updates."""
        trajectory, opdlm = batch.trajectory, self.config.opdlm
        is_on_policy, has_causal_copy = opdlm.responses == "student", opdlm.ar_loss_weight > 0
        responses = trajectory.response_len
        has_top_k = opdlm.divergence_top_k > 0
        rolled = rollout_work(trajectory) if is_on_policy else causal_work(trajectory.prompt_len + responses, responses)
        taught = causal_work(trajectory.prompt_len + responses, responses * has_top_k)
        trained = training_work(trajectory, batch.states, has_causal_copy).stack()
        by_update = trained.unflatten(1, (-1, self.config.global_batch_size)).sum(-1).T
        work = torch.cat([rolled.stack().sum(1)[None], taught.stack().sum(1)[None], by_update]).tolist()
        writer = {"student": self.student, "teacher": self.teacher}.get(opdlm.responses)
        rollout_flops = 0.0 if writer is None else forward_flops(writer, work[0])
        update_flops = [3 * forward_flops(self.student, update) for update in work[2:]]
        if self.teacher is not None and opdlm.divergence != "nll":
            rollout_flops += forward_flops(self.teacher, work[1])
            if not has_top_k:
                heads = [forward_flops(self.teacher, (0, 0, num_logits)) for _, _, num_logits in work[2:]]
                update_flops = [flops + head for flops, head in zip(update_flops, heads, strict=True)]
        return BatchCost(rollout_flops, update_flops, [num_tokens for num_tokens, _, _ in work[2:]])


def peak_memory(device: torch.device) -> Metrics:
    """The most memory of this process so far: what torch allocated and reserved on a GPU; resident memory on a CPU."""
    if device.type == "cuda":
        return {
            "memory/peak_gib": torch.cuda.max_memory_allocated(device) / _GIB,
            "memory/peak_reserved_gib": torch.cuda.max_memory_reserved(device) / _GIB,
        }
    unit = 1 if sys.platform == "darwin" else _KIB
    return {"memory/peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GIB}
