"""Writing a distributed checkpoint in three steps: plan with all ranks, write alone, finish with all ranks.

Only the middle step takes long, and it needs neither the other ranks nor the live tensors, if these were copied: then
it may run on another thread while training goes on. A save that waits takes the same steps one after the other, so
both kinds leave the same files.
"""

import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, extract_matching_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from nemo_opdlm.megatron.atomic_folder import on_every_rank
from nemo_opdlm.megatron.checksums import checksum, write_checksums
from nemo_opdlm.megatron.safe_metadata import COMMON, CONFIG


class ShardedWrite:
    """A distributed checkpoint on its way into an empty folder; every rank makes one, which plans the writing.

    Args:
        directory: the folder.
        sharded_state_dict: as Megatron's `sharded_state_dict()` gives it.
        copy: copy everything to host memory now, so that `write` may run while the tensors change.
        write_beside: writes further files into the folder, after the tensors and on the first rank only.

    Raises:
        OSError: the folder cannot be written to, or there is no memory for the copies.
    """

    def __init__(
        self,
        directory: Path,
        sharded_state_dict: ShardedStateDict,
        *,
        copy: bool = False,
        write_beside: Callable[[], None] | None = None,
    ) -> None:
        structure, _ = extract_matching_values(sharded_state_dict, lambda _: True)
        sharded, common = save_preprocess(structure)
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
        self._directory = directory
        self._common = dict_list_map_outplace(_copied, common) if copy else common
        self._write_beside = write_beside
        self._writing, self._cancelled = threading.Lock(), False
        self._results: list[WriteResult] = []
        self._checksums: dict[str, int] = {}
        self._error: BaseException | None = RuntimeError("its files were not written")
        self._writer = _CopiesWriter(directory) if copy else _Writer(directory)
        self._planner = _CopyingPlanner() if copy else _Planner()
        with _one_line_errors(directory):
            state = mcore_to_pyt_state_dict(by_key)
            (_, self._metadata, self._ranks), self._plan, *_ = save_state_dict_async_plan(
                state, self._writer, planner=self._planner
            )
            if isinstance(self._planner, _CopyingPlanner):
                planner = self._planner
                on_every_rank(lambda: planner.copy(self._plan))

    def write(self) -> None:
        """Write this rank's files; it talks to no other rank. What goes wrong is raised by `finish`, on every rank."""
        with self._writing:
            if self._cancelled:
                return
            try:
                self._results = self._writer.write_data(self._plan, self._planner).wait()
                names = {result.storage_data.relative_path for result in self._results}
                self._checksums = {name: checksum(self._directory / name) for name in names}
                if self._ranks.is_coordinator:
                    self._write_plain_files()
                self._error = None
            except BaseException as error:
                # Other ranks get it without its causes.
                self._error = OSError(one_line_cause(error))

    def cancel(self) -> None:
        """Stop a `write` on another thread at the next tensor; when this returns, it makes no more files in the folder.

        The folder never becomes a checkpoint.
        """
        self._cancelled = True
        if isinstance(self._planner, _CopyingPlanner):
            self._planner.drop()
        with self._writing:
            pass

    def finish(self) -> None:
        """Write the index once every rank has written; every rank calls this.

        Raises:
            OSError: one of them could not write; one line that names the folder of the checkpoint.
        """
        with _one_line_errors(self._directory):
            self._ranks.all_reduce("write", self._written, self._write_index)

    def _written(self) -> tuple[list[WriteResult], dict[str, int]]:
        if self._error is not None:
            raise self._error
        return self._results, self._checksums

    def _write_index(self, of_ranks: list[tuple[list[WriteResult], dict[str, int]]]) -> None:
        write_checksums(self._directory, {name: value for _, values in of_ranks for name, value in values.items()})
        self._writer.finish(self._metadata, [results for results, _ in of_ranks])

    def _write_plain_files(self) -> None:
        save_plain(self._directory / COMMON, self._common)
        config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        config |= {"common_backend": "torch", "common_backend_version": 1}
        (self._directory / CONFIG).write_text(json.dumps(config))
        if self._write_beside is not None:
            self._write_beside()


def save_plain(path: Path, value: Any) -> None:
    """`torch.save` of a small file by way of memory: torch itself takes a full disk for a bug ("unexpected pos").

    Raises:
        OSError: it cannot be written; one line that names the folder of the checkpoint.
    """
    content = io.BytesIO()
    torch.save(value, content)
    with _one_line_errors(path.parent):
        path.write_bytes(content.getbuffer())


def one_line_cause(error: BaseException) -> str:
    """What went wrong first, on whichever rank, without the pages that torch adds."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    # A write that fails within torch is the context, not the cause, of what torch then makes of it.
    while (
        first := error.__cause__ or (error.__context__ if isinstance(error.__context__, OSError) else None)
    ) is not None:
        error = first
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def _one_line_errors(directory: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, CheckpointException) as error:
        raise OSError(f"cannot write the checkpoint in {directory.parent}: {one_line_cause(error)}") from error


class _Writer(FileSystemWriter):
    """Torch's writer, as Megatron's planning calls it."""

    def storage_meta(self) -> StorageMeta:
        # The path of the checkpoint, which means nothing elsewhere, is left out of its index.
        return StorageMeta()

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Nothing: Megatron's own writer copies to the host here; ours writes from the tensors or copies apart."""


class _CopiesWriter(_Writer):
    """Writes tensors that lie in host memory already."""

    def __init__(self, directory: Path) -> None:
        # Copying ahead takes a CUDA stream, and on a new thread that is one of GPU 0: every rank would open a context there.
        super().__init__(directory, per_thread_copy_ahead=0)


class _Planner(MCoreSavePlanner):
    """Megatron's planner with the options of its own `save`."""

    def __init__(self) -> None:
        super().__init__(dedup_replicated_tensors=False, flatten_state_dict=False)


class _CopyingPlanner(_Planner):
    """Gives the writer copies made at one moment; each can be had once, so memory is freed as files grow."""

    def copy(self, plan: SavePlan) -> None:
        resolve = super().resolve_data
        self._copies = {item.index: _copied(resolve(item)) for item in plan.items}
        # What was gathered for this save alone is not kept until it is written.
        self.state_dict: dict[str, Any] = {}

    def drop(self) -> None:
        self._copies = {}

    def resolve_data(self, write_item: WriteItem) -> Any:
        return self._copies.pop(write_item.index)


def _copied(value: Any) -> Any:
    """A tensor's copy in host memory. Byte entries were made for this save and are nobody else's."""
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
