"""Folders that are whole or not there: written beside their place, then renamed into it.

A killed process or a full disk therefore never damages the folder that was there before. What such a process leaves
behind has names of its own (`.saving-*`, also of files; `.removing-*`, `.replaced-*`) and `settle` clears it up.
"""

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

_SAVING, _REMOVING, _REPLACED = ".saving-", ".removing-", ".replaced-"
#: A folder with one of these files is a distributed checkpoint, which a newer one may replace.
_CHECKPOINT_FILES = (".metadata", "metadata.json")

Result = TypeVar("Result")


class OtherRankError(RuntimeError):
    """An action failed on another rank."""


def on_rank_zero(action: Callable[[], Result]) -> Result:
    """Run `action` on the first rank only; its result, or its exception, reaches every rank."""
    if not _is_distributed():
        return action()
    outcome: list[tuple[Result | None, Exception | None]] = [(None, None)]
    if dist.get_rank() == 0:
        try:
            outcome = [(action(), None)]
        except Exception as error:
            outcome = [(None, error)]
    dist.broadcast_object_list(outcome, src=0)
    result, problem = outcome[0]
    if problem is not None:
        raise problem
    return result  # type: ignore[return-value]


def on_every_rank(action: Callable[[], Result]) -> Result:
    """Run `action` on every rank; where it fails on one it raises on all, so that none waits for the others."""
    problem: BaseException | None = None
    try:
        result = action()
    except (Exception, CheckpointException) as error:
        problem = error
    if _is_distributed():
        problems: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(problems, None if problem is None else str(problem))
        elsewhere = next((text for text in problems if text is not None), None)
        if problem is None and elsewhere is not None:
            problem = OtherRankError(f"another rank failed: {elsewhere}")
    if problem is not None:
        raise problem
    return result


@contextmanager
def replacing(directory: str | Path) -> Iterator[Path]:
    """Fill a new folder that takes the place of `directory` once the block has ended well; every rank calls this.

    Yields:
        The empty folder to write to, on the same filesystem.

    Raises:
        FileExistsError: `directory` is neither a checkpoint nor empty.
        OSError: its parent cannot be written to.
    """
    target = Path(directory).absolute()
    staging = on_rank_zero(lambda: _make_staging(target))
    try:
        yield staging
        on_rank_zero(lambda: _take_place(staging, target))
    except BaseException:
        if _rank() == 0:
            shutil.rmtree(staging, ignore_errors=True)
        raise


def remove(directory: str | Path) -> None:
    """Remove a folder so that at no moment half of it is there under its name; rank 0 only."""
    target = Path(directory).absolute()
    doomed = target.with_name(f"{_REMOVING}{uuid.uuid4().hex[:12]}")
    target.rename(doomed)
    shutil.rmtree(doomed)


def settle(parent: str | Path) -> None:
    """Finish or undo what killed processes began in a folder; no process may be writing there. Rank 0 only."""
    for leftover in sorted(Path(parent).glob(".*")):
        if leftover.name.startswith((_SAVING, _REMOVING)):
            shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)
        elif leftover.name.startswith(_REPLACED):
            target = leftover.with_name(leftover.name.removeprefix(_REPLACED))
            if target.exists():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.rename(target)


def _make_staging(target: Path) -> Path:
    if target.exists() and not _may_replace(target):
        raise FileExistsError(f"{target} exists and is no checkpoint: it is left as it is; choose another path")
    staging = target.with_name(f"{_SAVING}{uuid.uuid4().hex[:12]}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
    except OSError as error:
        raise OSError(f"cannot write {target}: {error.strerror} ({target.parent})") from error
    return staging


def _may_replace(target: Path) -> bool:
    if not target.is_dir():
        return False
    return any((target / name).exists() for name in _CHECKPOINT_FILES) or not any(target.iterdir())


def _take_place(staging: Path, target: Path) -> None:
    replaced = target.with_name(_REPLACED + target.name)
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        target.rename(replaced)
    os.rename(staging, target)
    shutil.rmtree(replaced, ignore_errors=True)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
