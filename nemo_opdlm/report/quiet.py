"""Third-party chatter that says nothing about a run: switched off where a newcomer reads every line."""

import logging
import warnings

_WARNINGS = (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "full scope is deprecated",  # Megatron about a default of its own
    "Please use DTensor instead",  # torch about Megatron's checkpoints
    "It is recommended to use `self.log",  # Lightning, about a number that is the same on every rank
)
_LOGGERS = ("megatron", "nv_one_logger", "lightning.pytorch", "lightning.fabric")


def quiet_imports() -> None:
    """Switch off what Megatron, NeMo and Lightning say while they are imported. Call it before."""
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def quiet_runs() -> None:
    """Keep NeMo's and Lightning's reports off the terminal: whole configurations, a list of every parameter.

    Call it after NeMo was imported, which sets all levels back. Its log files are not touched.
    """
    quiet_imports()
    for handler in logging.getLogger("nemo_logger").handlers:
        if type(handler) is logging.StreamHandler:
            handler.setLevel(logging.ERROR)
