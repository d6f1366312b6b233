"""Checkpoints written while training goes on."""

from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from typing_extensions import override

from nemo_opdlm.lightning.checkpoint_io import SHARDED_STATE, MegatronCheckpointIO, checkpoint_folder
from nemo_opdlm.lightning.trainer_state import save_trainer_state, to_plain
from nemo_opdlm.megatron.atomic_folder import on_every_rank, replacing
from nemo_opdlm.megatron.background import ThreadedCallsQueue
from nemo_opdlm.megatron.sharded_write import ShardedWrite

#: Key of `storage_options` for a function to call when the checkpoint is there; NeMo's name.
FINALIZE = "finalize_fn"


class AsyncCheckpointIO(MegatronCheckpointIO):
    """Saves in the background where the caller gives a `finalize_fn` to call when the checkpoint is there.

    Whoever gives none relies on the checkpoint when `save_checkpoint` returns, and waits. Every rank calls every method,
    in the same order.
    """

    def __init__(self) -> None:
        self._queue = ThreadedCallsQueue()
        self._unfinished: list[_Save] = []

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Copy the state to host memory and write it on another thread; `poll` or `wait` puts the folder into place.

        Args:
            checkpoint: Lightning's checkpoint, with Megatron's sharded state dict under `SHARDED_STATE`.
            path: its name, with or without `.ckpt`.
            storage_options: a dict with a `finalize_fn`; without it the call returns when the checkpoint is there.

        Raises:
            OSError: the folder cannot be written to; or an earlier save, for which this one waited, found the disk full.
            TypeError: the checkpoint holds an object that is no plain value.
        """
        finalize = (storage_options or {}).get(FINALIZE)
        if finalize is None:
            self.wait()
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        folder, step = checkpoint_folder(path), checkpoint["global_step"]
        # The two checkpoints of one step (a best one, the last one) are written side by side. Those of an earlier step
        # come first: copies of two steps at most are never held, and what a later save replaces is there.
        if any(save.step != step or save.folder == folder for save in self._unfinished):
            self.wait()
        save = _Save.begin(checkpoint, folder)
        self._unfinished.append(save)
        self._queue.schedule(save.writing.write, save.finish, lambda: self._unfinished.remove(save), finalize)

    @override
    def load_checkpoint(self, path: str | Path, map_location: Any | None = None) -> dict[str, Any]:
        self.wait()
        return super().load_checkpoint(path, map_location)

    @override
    def teardown(self) -> None:
        self.wait()

    def poll(self) -> None:
        """Put the checkpoints into place whose files every rank has written.

        Raises:
            OSError: one could not be written; it and those after it are given up, older ones are untouched.
        """
        self._complete(blocking=False)

    def wait(self) -> None:
        """Wait until every checkpoint is in place.

        Raises:
            OSError: as for `poll`.
        """
        self._complete(blocking=True)

    def give_up(self) -> None:
        """Forget the checkpoints that are not in place yet, without talking to other ranks."""
        for save in self._unfinished:
            save.give_up()
        self._unfinished, self._queue = [], ThreadedCallsQueue()

    def _complete(self, blocking: bool) -> None:
        try:
            self._queue.maybe_finalize_async_calls(blocking)
        except BaseException:
            # Finishing a later save would remove what the one that failed was to replace.
            self.give_up()
            raise


class _GivenUp(Exception):
    """A save does not come to its end."""


@dataclass(frozen=True, eq=False)
class _Save:
    """A checkpoint that is not in its place yet.

    Attributes:
        folder: its place.
        step: optimizer steps done when it was begun.
        writing: its tensors on their way into a folder aside.
        place: on exit puts that folder into place, or removes it if an error comes along.
    """

    folder: Path
    step: int
    writing: ShardedWrite
    place: ExitStack

    @classmethod
    def begin(cls, checkpoint: dict[str, Any], folder: Path) -> "_Save":
        state = dict(checkpoint)
        sharded = state.pop(SHARDED_STATE)
        plain: dict[str, Any] = on_every_rank(lambda: to_plain(state))
        with ExitStack() as stack:
            staging = stack.enter_context(replacing(folder))
            write_state = partial(save_trainer_state, staging, plain)
            writing = ShardedWrite(staging, sharded, copy=True, write_beside=write_state)
            return cls(folder, state["global_step"], writing, stack.pop_all())

    def finish(self) -> None:
        with self.place:
            self.writing.finish()

    def give_up(self) -> None:
        self.writing.cancel()
        with suppress(_GivenUp), self.place:
            raise _GivenUp
