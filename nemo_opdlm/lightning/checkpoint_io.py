"""Lightning's checkpoints as folders: Megatron's distributed checkpoint plus `trainer_state.pt`."""

from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from typing_extensions import override

from nemo_opdlm.lightning.trainer_state import load_trainer_state, save_trainer_state
from nemo_opdlm.megatron import atomic_folder
from nemo_opdlm.megatron.checkpoint import load_sharded, write_sharded

#: Key under which the strategy passes Megatron's sharded state dict with the rest of a checkpoint.
SHARDED_STATE = "sharded_state"


def checkpoint_folder(path: str | Path) -> Path:
    """Where the checkpoint `path` lies: Lightning and NeMo name it `….ckpt`, the folder has no such ending."""
    return Path(str(path).removesuffix(".ckpt"))


class MegatronCheckpointIO(CheckpointIO):
    """Writes and reads checkpoint folders; a folder is whole or not there. Every rank calls every method."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint; one of the same name stays untouched until the new one is whole.

        Args:
            checkpoint: Lightning's checkpoint, with Megatron's sharded state dict under `SHARDED_STATE`.
            path: its name, with or without `.ckpt`.
            storage_options: unused.

        Raises:
            OSError: the folder cannot be written to, or the disk is full.
            TypeError: the checkpoint holds an object that is no plain value.
        """
        state = dict(checkpoint)
        sharded = state.pop(SHARDED_STATE)
        with atomic_folder.replacing(checkpoint_folder(path)) as staging:
            write_sharded(staging, sharded)
            atomic_folder.on_rank_zero(lambda: save_trainer_state(staging, state))

    @override
    def load_checkpoint(self, path: str | Path, map_location: Any | None = None) -> dict[str, Any]:
        """Read what a checkpoint holds besides sharded tensors.

        Raises:
            ValueError: the checkpoint is missing, damaged or unsafe; one line that names the file.
        """
        folder = checkpoint_folder(path)
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such checkpoint folder")
        return atomic_folder.on_every_rank(lambda: load_trainer_state(folder))

    def load_sharded(self, path: str | Path, sharded_state_dict: dict[str, Any], vocab_size: int) -> dict[str, Any]:
        """Read the sharded tensors of a checkpoint into the layout of `sharded_state_dict`.

        Raises:
            ValueError: the checkpoint is damaged, unsafe or of another model; one line that names the file.
        """
        return load_sharded(checkpoint_folder(path), sharded_state_dict, vocab_size=vocab_size)

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint if it is there; rank 0 only."""
        folder = checkpoint_folder(path)
        if folder.is_dir():
            atomic_folder.remove(folder)
