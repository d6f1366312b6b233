"""The parallel groups of one process: created here, passed explicitly to whoever needs them."""

import gc
import os
import tempfile
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.distributed import distributed_c10d

from nemo_opdlm.megatron.cpu import run_megatron_on_cpu, wants_cpu


@dataclass(frozen=True)
class ParallelContext:
    """Where this process stands in the Megatron layout.

    Attributes:
        groups: Megatron's process groups (tp, pp, cp, dp, embd ...).
        tp_rank, tp_size, pp_rank, pp_size, dp_rank, dp_size, cp_rank, cp_size: coordinates on each axis.
        virtual_size: model chunks of each pipeline stage, above 1 under the interleaved schedule.
        wrap: the pipeline's ranks once more, for messages from its last rank to its first under that schedule.
        device: where this process keeps its tensors.
    """

    groups: ProcessGroupCollection
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    cp_rank: int
    cp_size: int
    virtual_size: int
    wrap: dist.ProcessGroup
    device: torch.device

    @property
    def is_first_stage(self) -> bool:
        """Whether this process embeds tokens."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this process owns the LM head."""
        return self.pp_rank == self.pp_size - 1

    @property
    def data_rank(self) -> int:
        """Place among the ranks that hold the same weights: data-parallel and context-parallel ones."""
        return dist.get_rank(self.groups.dp_cp)

    @property
    def data_size(self) -> int:
        """How many ranks hold the same weights and may answer different prompts."""
        return dist.get_world_size(self.groups.dp_cp)

    def stage_rank(self, pp_rank: int) -> int:
        """Global rank of a pipeline stage with this process's other coordinates."""
        return dist.get_global_rank(self.groups.pp, pp_rank % self.pp_size)

    def edge(self, into: int) -> dist.ProcessGroup:
        """The group that carries rollout messages into a pipeline stage.

        Between two ranks NCCL keeps one order for both directions, so with two stages the way back has a group of its own.
        """
        return self.wrap if into % self.pp_size == 0 else self.groups.pp

    def any_in_row(self, flag: bool) -> bool:
        """Whether a flag is set on one of the tensor- and pipeline-parallel ranks that run one sampler; they all call this."""
        if self.tp_size * self.pp_size == 1:
            return flag
        votes = torch.tensor([flag], dtype=torch.int32, device=self.device)
        dist.all_reduce(votes, dist.ReduceOp.MAX, group=self.groups.mp)
        return bool(votes)

    def sum_over_data(self, values: Tensor) -> Tensor:
        """The sum over data- and context-parallel ranks, on each of them."""
        if self.data_size > 1:
            dist.all_reduce(values, group=self.groups.dp_cp)
        return values

    def max_over_data(self, values: Tensor) -> Tensor:
        """The maximum over data- and context-parallel ranks, on each of them."""
        if self.data_size > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX, group=self.groups.dp_cp)
        return values

    def from_last_stage(self, values: Tensor) -> Tensor:
        """What the last pipeline stage holds, on every stage; the others pass a tensor of its shape and type."""
        if self.pp_size > 1:
            dist.broadcast(values, self.stage_rank(self.pp_size - 1), group=self.groups.pp)
        return values


#: The layout of this process, once it has one.
_current: ParallelContext | None = None


def _init_process_group(timeout_minutes: float) -> None:
    """Join the launcher's process group, or make a group of one over a file store: never a fixed port."""
    backend = "gloo" if wants_cpu() else "nccl"
    timeout = timedelta(minutes=timeout_minutes)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group(backend, timeout=timeout)
        return
    handle, path = tempfile.mkstemp(prefix="nemo_opdlm_store_")
    os.close(handle)
    dist.init_process_group(backend, store=dist.FileStore(path, 1), rank=0, world_size=1, timeout=timeout)


def initialize(
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    virtual_pipeline_model_parallel_size: int | None = None,
    context_parallel_size: int = 1,
    seed: int = 1234,
    timeout_minutes: float = 30,
    local_rank: int | None = None,
) -> ParallelContext:
    """Join the process group and build Megatron's groups; a second call with the same layout returns the same groups.

    Args:
        tensor_model_parallel_size, pipeline_model_parallel_size, virtual_pipeline_model_parallel_size,
        context_parallel_size: the layout; what is left of the world is data-parallel.
        seed: of Megatron's random states.
        timeout_minutes: after which a collective operation whose peers do not come fails.
        local_rank: number of this process's GPU; None = as torchrun says. Slurm does not say it the same way.

    Raises:
        ValueError: the world size is no multiple of TP x PP x CP, or Megatron already runs with another layout.
    """
    run_megatron_on_cpu()
    if not dist.is_initialized():
        _init_process_group(timeout_minutes)
    wanted = (tensor_model_parallel_size, pipeline_model_parallel_size, context_parallel_size)
    model_size = wanted[0] * wanted[1] * wanted[2]
    if dist.get_world_size() % model_size:
        raise ValueError(
            f"{dist.get_world_size()} processes cannot hold tensor_model_parallel_size={wanted[0]} x "
            f"pipeline_model_parallel_size={wanted[1]} x context_parallel_size={wanted[2]} = {model_size}: "
            f"start a multiple of {model_size}."
        )
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=wanted[0],
            pipeline_model_parallel_size=wanted[1],
            virtual_pipeline_model_parallel_size=virtual_pipeline_model_parallel_size,
            context_parallel_size=wanted[2],
            distributed_timeout_minutes=timeout_minutes,
        )
    if wants_cpu():
        # The tracker's fork is a no-op on CPU: dropout must be 0, which the schema enforces.
        tensor_parallel.random.initialize_rng_tracker(inference_rng_tracker=True)
    else:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) if local_rank is None else local_rank)
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
    global _current
    context = _current = _current or _context(timeout_minutes)
    found = (context.tp_size, context.pp_size, context.cp_size, context.virtual_size)
    if found != (*wanted, virtual_pipeline_model_parallel_size or 1):
        raise ValueError(
            f"Megatron already runs with (TP, PP, CP, VPP) = {found}; "
            f"{(*wanted, virtual_pipeline_model_parallel_size or 1)} needs a new process."
        )
    return context


def destroy() -> None:
    """Forget the layout, so that the same processes can take another one; every rank calls this."""
    global _current
    _current = None
    if not parallel_state.model_parallel_is_initialized():
        return
    parallel_state.destroy_model_parallel()
    # Megatron forgets its groups without closing them: some fifty threads and eighty file descriptors each time. They
    # end with the last reference to their group, and Megatron's hooks keep wrapped networks in cycles.
    gc.collect()
    for group in list(distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def _wrap_group(pipeline: dist.ProcessGroup, timeout: timedelta) -> dist.ProcessGroup:
    """A second group of this pipeline's ranks under the interleaved schedule; every rank makes those of all pipelines."""
    if (parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1) == 1:
        return pipeline
    mine = dist.get_process_group_ranks(pipeline)
    everywhere: list[list[int]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everywhere, mine)
    pipelines = sorted({tuple(ranks) for ranks in everywhere})
    groups: dict[tuple[int, ...], dist.ProcessGroup] = {
        ranks: dist.new_group(list(ranks), timeout=timeout) for ranks in pipelines
    }
    return groups[tuple(mine)]


def _context(timeout_minutes: float) -> ParallelContext:
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return ParallelContext(
        groups=groups,
        wrap=_wrap_group(groups.pp, timedelta(minutes=timeout_minutes)),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=parallel_state.get_context_parallel_world_size(),
        virtual_size=parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        device=torch.device("cpu") if wants_cpu() else torch.device("cuda", torch.cuda.current_device()),
    )
