"""A stage of a cell, in a process of its own: train, evaluate on the way and at the end, save the student."""

import json
from pathlib import Path
from typing import Any

from nemo_opdlm.config import Config
from nemo_opdlm.diffusion.remasking import RemaskingParams, RemaskingStrategy
from nemo_opdlm.evaluation.compare import GREEDY, compare, respond, respond_as_original
from nemo_opdlm.evaluation.decoding import judge
from nemo_opdlm.lightning.evaluations import EvaluationLog, read_evaluations
from nemo_opdlm.models import training
from nemo_opdlm.models.opdlm_model import OPDLMModel

#: Confidence thresholds of dynamic decoding; at 1 a forward reveals one token of a row, as static decoding does. Small models
#: are seldom surer than 0.8.
THRESHOLDS = (0.4, 0.6, 0.8, 0.85, 0.9, 0.95, 1.0)


def run(config: Config, student: Path, result: Path) -> None:
    """Train and write what became of it; a stage that was killed goes on at its last checkpoint.

    Args:
        config: of the run, with its own log folder.
        student: `.nemo` file to write.
        result: JSON file to write, the last thing that is done.

    Raises:
        ValueError, OSError: bad input; one line.
    """
    log_dir = Path(str(config.exp_manager.explicit_log_dir))
    model = training.train(config, [EvaluationLog(log_dir, figures)])
    model.save_to(str(student))
    found = {
        "evaluations": read_evaluations(log_dir),
        "decoding": decoding(model),
        "heldout_checksum": model.heldout.checksum,
    }
    partial = result.with_suffix(".partial")
    partial.write_text(json.dumps(found), encoding="utf-8")
    partial.replace(result)


def figures(model: OPDLMModel) -> dict[str, float]:
    """Quality after the updates so far, and what they have cost."""
    counts = {name: model.step_metrics.get(name, 0) for name in ("trained_tokens", "generated_tokens")}
    return {**counts, **compare(model).figures}


def decoding(model: OPDLMModel) -> dict[str, dict[str, Any]]:
    """Greedy text of the student by mode, and of the AR original, in the original's eyes."""
    teacher = model.teacher
    assert teacher is not None
    modes = {"static": RemaskingParams(RemaskingStrategy.LOW_CONFIDENCE_STATIC)} | {
        f"{threshold:.2f}": RemaskingParams(RemaskingStrategy.LOW_CONFIDENCE_DYNAMIC, threshold)
        for threshold in THRESHOLDS
    }
    found = {mode: judge(teacher, respond(model, GREEDY, remasking=how)).as_dict() for mode, how in modes.items()}
    return {**found, "original": judge(teacher, respond_as_original(model)).as_dict()}
