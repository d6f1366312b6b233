"""NeMo's save and restore of a model on `.nemo` archives with a distributed checkpoint, in any layout."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from nemo.core.connectors.save_restore_connector import SaveRestoreConnector
from nemo.utils import logging
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_opdlm.megatron.atomic_folder import on_every_rank, on_rank_zero
from nemo_opdlm.megatron.checkpoint import save_sharded
from nemo_opdlm.models.archive_format import (
    MODEL_CLASS,
    WEIGHTS,
    Archive,
    check_class,
    check_output,
    make_scratch,
    write_nemo,
)
from nemo_opdlm.models.conversion import archive_architecture, load_archive
from nemo_opdlm.models.foreign import open_checkpoint, read_settings


class OPDLMSaveRestoreConnector(SaveRestoreConnector):
    """Saves and restores models with `sharded_state_dict`, `load_sharded_state`, `vocab_size` and `tokenizer_files`.

    `pack_nemo_file = False` writes the content of the archive as a folder. `model_extracted_dir` restores from such a
    folder; so does restoring from its path.
    """

    def save_to(self, model: Any, save_path: str) -> None:
        """Write an archive in place of any that is there; every rank calls this.

        Raises:
            OSError: it cannot be written, or the disk is full; an older archive is still there.
        """
        output = Path(save_path)
        on_rank_zero(lambda: check_output(output, overwrite=True))
        scratch = on_rank_zero(lambda: make_scratch(output))
        try:
            save_sharded(scratch / WEIGHTS, model.sharded_state_dict(include_optimizer=False))
            config = OmegaConf.to_container(model.cfg, resolve=True)
            assert isinstance(config, dict)
            on_rank_zero(
                lambda: write_nemo(
                    output,
                    config,  # type: ignore[arg-type]
                    scratch / WEIGHTS,
                    model.tokenizer_files,
                    overwrite=True,
                    pack=self.pack_nemo_file,
                )
            )
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def restore_from(
        self,
        calling_cls: Any,
        restore_path: str,
        override_config_path: DictConfig | str | None = None,
        map_location: torch.device | None = None,
        strict: bool = True,
        return_config: bool = False,
        trainer: Trainer | None = None,
        validate_access_integrity: bool = True,
    ) -> Any:
        """Build a model by the archive's settings, or by other ones, and load its weights; every rank calls this.

        While the model is built, `cfg.tokenizer.type` is a folder with the archive's tokenizer files.

        Args:
            calling_cls: class of the model.
            restore_path: `.nemo` file or extracted folder, or another checkpoint that `open_checkpoint` reads.
            override_config_path: settings to use instead of the archive's (a `model` section is taken by itself).
            map_location: where to move the model; by default it stays on the device that Megatron works on.
            strict: refuse an archive with more tensors than the model.
            return_config: return the settings only.
            trainer: passed to the model.
            validate_access_integrity: unused, Megatron's check is always on.

        Raises:
            ValueError: the archive is refused; one line that names the file, before anything is built.
        """
        source = self.model_extracted_dir or restore_path
        if return_config:
            return _settings(read_settings(source), override_config_path)
        with opened_once(source, _tokenizer_folder(override_config_path)) as archive:
            settings = _settings(archive.config, override_config_path)
            return restore_opened(calling_cls, archive, settings, trainer, map_location, strict)


def restore_opened(
    calling_cls: Any,
    archive: Archive,
    settings: DictConfig,
    trainer: Trainer | None = None,
    map_location: torch.device | None = None,
    strict: bool = True,
) -> Any:
    """Build a model by ``settings`` and load the weights of an open archive; every rank calls this.

    Raises:
        ValueError: the archive is refused; one line that names the file.
    """
    check_class(archive, calling_cls.__name__)
    if calling_cls.__name__ == MODEL_CLASS:
        archive_architecture(archive, archive.config)  # refuses what would be allocated in vain
    model = _build(calling_cls, archive, settings, trainer)
    if map_location is not None:
        model = model.to(map_location)
    wanted = model.sharded_state_dict(include_optimizer=False, is_loading=True)
    model.load_sharded_state(load_archive(archive, wanted, model.vocab_size, strict=strict))
    logging.info(f"{calling_cls.__name__} was restored from {archive.source}.")
    return model


@contextmanager
def opened_once(path: str | Path, tokenizer: str | None) -> Iterator[Archive]:
    """Open a checkpoint on the first rank for all of them: its folder lies where every rank sees it."""
    with ExitStack() as stack:
        archive = on_rank_zero(lambda: stack.enter_context(open_checkpoint(path, tokenizer)))
        on_every_rank(lambda: _check_visible(archive))
        yield archive
        on_every_rank(lambda: None)  # the first rank removes the folder only when all have read it


def _check_visible(archive: Archive) -> None:
    if not archive.folder.exists():
        raise FileNotFoundError(
            f"{archive.source} was unpacked to {archive.folder}, which other nodes cannot see: set TMPDIR to a shared folder"
        )


def _tokenizer_folder(override: DictConfig | str | None) -> str | None:
    """The tokenizer that override settings name, for checkpoints that hold none."""
    if override is None:
        return None
    named = OmegaConf.select(_settings({}, override), "tokenizer.type")
    return str(named) if named is not None and Path(named).is_dir() else None


def _settings(stored: dict[str, Any], override: DictConfig | str | None) -> DictConfig:
    if override is None:
        return OmegaConf.create(stored)
    config = OmegaConf.load(override) if isinstance(override, str | Path) else override
    config = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    assert isinstance(config, DictConfig)
    return config.model if "model" in config else config


def _build(calling_cls: Any, archive: Archive, config: DictConfig, trainer: Trainer | None) -> Any:
    """Build the model; where the settings name no other tokenizer, it finds the archive's in a folder."""
    stored_name = (archive.config.get("tokenizer") or {}).get("type")
    named = OmegaConf.select(config, "tokenizer.type")
    use_stored = archive.tokenizer is not None and named in (None, stored_name)
    if use_stored:
        with open_dict(config):
            OmegaConf.update(config, "tokenizer.type", str(archive.tokenizer), force_add=True)
    OmegaConf.set_struct(config, True)
    calling_cls._set_model_restore_state(is_being_restored=True, folder=str(archive.folder))
    try:
        model = calling_cls.from_config_dict(config=config, trainer=trainer)
    finally:
        calling_cls._set_model_restore_state(is_being_restored=False)
    if use_stored:
        with open_dict(model.cfg):
            model.cfg.tokenizer.type = stored_name
    return model
