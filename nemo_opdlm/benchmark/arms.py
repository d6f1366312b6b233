"""The arms of the rollout benchmark: ours, and what else one could do with the same weights."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_opdlm.benchmark.reference import ReferenceLoop
from nemo_opdlm.benchmark.timing import wait
from nemo_opdlm.benchmark.workload import Subject, Workload
from nemo_opdlm.diffusion.settings import RolloutSettings
from nemo_opdlm.diffusion.trajectory import Trajectory
from nemo_opdlm.megatron.cpu import without_redirect
from nemo_opdlm.megatron.denoiser import Forward, MegatronDenoiser
from nemo_opdlm.megatron.rollout import RolloutEngine


@dataclass(frozen=True)
class Outcome:
    """One run of an arm.

    Attributes:
        seconds: of the run.
        num_tokens: response tokens that were wanted.
        num_forwards: calls of the network.
        padding_share: of the token places that went through the network, those that belong to no unfinished row.
        model_share: of the seconds, those inside the network; None where it cannot be told.
        token_ids: the responses, one after the other; None where they are not those of the same random numbers.
    """

    seconds: float
    num_tokens: int
    num_forwards: int
    padding_share: float
    model_share: float | None = None
    token_ids: Tensor | None = None

    @property
    def seconds_per_token(self) -> float:
        """The figure that arms are compared by."""
        return self.seconds / self.num_tokens


def engine(subject: Subject, batch_size: int) -> RolloutEngine:
    """Ours over the subject's network."""
    return RolloutEngine(subject.generator.network, subject.sampling, subject.forbidden, batch_size)


def answer(subject: Subject, work: Workload, batch_size: int, settings: RolloutSettings) -> Trajectory:
    """Our rollout."""
    return engine(subject, batch_size).generate(work.requests.to(subject.device), settings)


def ours(subject: Subject, work: Workload, batch_size: int, settings: RolloutSettings) -> Outcome:
    """The rollout engine: fused commit, every row at its own pace, free slots refilled, masked rows to the head."""
    counts = _ForwardCounts()
    with counts:
        seconds, trajectory = _timed(lambda: answer(subject, work, batch_size, settings), subject)
    token_ids = trajectory.token_ids[trajectory.is_response]
    return Outcome(seconds, work.num_tokens, counts.num_forwards, counts.padding_share, token_ids=token_ids)


def reference(
    subject: Subject, work: Workload, batch_size: int, settings: RolloutSettings, *, uses_cache: bool = True
) -> Outcome:
    """The published loop over batches of so many rows, in the order of the prompts."""
    loop = ReferenceLoop(subject, settings, uses_cache)

    def run() -> Tensor:
        parts: list[Tensor] = []
        for first in range(0, len(work), batch_size):
            rows = slice(first, first + batch_size)
            part = Workload(work.prompt_ids[rows], work.prompt_len[rows], work.limits[rows])
            parts.append(loop.answer(part, first))
        return torch.cat(parts)

    seconds, token_ids = _timed(run, subject)
    counts = loop.counts
    padding = 1 - int(counts.num_useful) / counts.num_places
    return Outcome(seconds, work.num_tokens, counts.num_forwards, padding, counts.model_seconds / seconds, token_ids)


def autoregressive(subject: Subject, work: Workload, batch_size: int) -> Outcome:
    """`transformers.generate`, with its own sampling; a batch goes on to its longest response."""
    model, places, useful, forwards = subject.reference, 0, 0, 0

    def run() -> None:
        nonlocal places, useful, forwards
        for first in range(0, len(work), batch_size):
            rows = slice(first, first + batch_size)
            ids, mask = _padded_on_the_left(work.prompt_ids[rows], work.prompt_len[rows])
            limits = work.limits[rows]
            num_new = int(limits.max())
            model.generate(  # type: ignore[operator]
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                repetition_penalty=1.0,
                max_new_tokens=num_new,
                min_new_tokens=num_new,
                pad_token_id=0,
            )
            forwards += num_new
            places += ids.numel() + len(ids) * (num_new - 1)
            useful += int(mask.sum()) + int(limits.sum()) - len(ids)

    seconds, _ = _timed(run, subject)
    return Outcome(seconds, work.num_tokens, forwards, 1 - useful / places)


def _padded_on_the_left(ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    width = int(lengths.max())
    place = torch.arange(width) - (width - lengths[:, None])
    return ids.gather(1, place.clamp(min=0)), (place >= 0).long()


def _timed(run: Callable[[], Any], subject: Subject) -> tuple[float, Any]:
    device = subject.device
    wait(device)
    start = time.perf_counter()
    # Megatron's requests for CUDA are redirected by a hook around every operator, for which no other arm is to pay.
    with torch.no_grad(), without_redirect():
        result = run()
    wait(device)
    return time.perf_counter() - start, result


class _ForwardCounts:
    """Counts the forwards of our engine, and the places in them that hold no token."""

    def __init__(self) -> None:
        self.num_forwards = self._places = 0
        self._tokens: Tensor | int = 0  # stays on the device, which is not to be waited for

    def __enter__(self) -> None:
        pack = self._pack = MegatronDenoiser._pack

        def counting(denoiser: MegatronDenoiser, query: Any, *args: Any) -> Forward:
            forward = pack(denoiser, query, *args)
            self.num_forwards += 1
            self._places += forward.token_ids.numel()
            # On a GPU rows that are finished, and blocks that are cached already, are computed with the others.
            is_token = query.position_ids >= 0
            if not bool(query.valid.all()):
                is_token &= query.valid.to(is_token.device)
            self._tokens = self._tokens + is_token.sum()
            return forward

        MegatronDenoiser._pack = counting  # type: ignore[assignment,method-assign]

    def __exit__(self, *_: object) -> None:
        MegatronDenoiser._pack = self._pack  # type: ignore[method-assign]

    @property
    def padding_share(self) -> float:
        """Share of the places without a token."""
        return 1 - int(self._tokens) / self._places
