"""Saves of two ranks in the background; a module of its own, for each rank imports it."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from nemo_opdlm.lightning.async_checkpoint_io import AsyncCheckpointIO
from nemo_opdlm.lightning.checkpoint_io import SHARDED_STATE
from nemo_opdlm.megatron.checkpoint import load_sharded
from nemo_opdlm.megatron.cpu import run_megatron_on_cpu
from nemo_opdlm.megatron.sharded_write import ShardedWrite


def save_on_two_ranks(folder: Path) -> None:
    """Rank 1 is slow at its first save and fails at its second."""
    rank = dist.get_rank()
    run_megatron_on_cpu()
    saves, tensor, finished = AsyncCheckpointIO(), torch.full((2, 3), float(rank)), []

    def begin(step: int) -> None:
        options = {"finalize_fn": lambda: finished.append(step)}
        saves.save_checkpoint({"global_step": step, SHARDED_STATE: _sharded(tensor, rank)}, folder / "last", options)

    def slow(writing: ShardedWrite) -> None:
        time.sleep(rank * 0.5)
        write(writing)

    write = ShardedWrite.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardedWrite, "write", slow)
        begin(1)
    tensor.fill_(7)
    saves.poll()
    assert not finished and not (folder / "last").exists()
    saves.wait()
    assert finished == [1] and torch.equal(_load(folder / "last"), torch.tensor([[0.0] * 3] * 2 + [[1.0] * 3] * 2))

    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr("torch.distributed.checkpoint.filesystem._write_item", _no_space_left)
        begin(2)
        with pytest.raises(OSError, match=f"cannot write the checkpoint in {folder}: no space left on rank 1"):
            saves.wait()
    dist.barrier()
    assert finished == [1] and saves.load_checkpoint(folder / "last")["global_step"] == 1
    assert [path.name for path in folder.iterdir()] == ["last"]


def _sharded(tensor: torch.Tensor, rank: int) -> dict[str, Any]:
    return {"model": {"model.rows": ShardedTensor.from_rank_offsets("model.rows", tensor, (0, rank, 2))}}


def _load(folder: Path) -> torch.Tensor:
    whole = ShardedTensor.from_rank_offsets("model.rows", torch.empty(4, 3))
    return load_sharded(folder, {"model": {"model.rows": whole}})["model"]["model.rows"]  # type: ignore[no-any-return]


def _no_space_left(*_: Any) -> None:
    raise OSError("no space left on rank 1")
