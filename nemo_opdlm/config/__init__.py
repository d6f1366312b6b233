"""The schema of a run: the one home of every default, read strictly and checked before any model is built."""

from nemo_opdlm.config.architecture import Architecture
from nemo_opdlm.config.exp_manager import CheckpointCallbackConfig, ExpManagerConfig
from nemo_opdlm.config.layout import validate_layout
from nemo_opdlm.config.method import (
    MaxNewTokensScheduleConfig,
    OPDLMConfig,
    RolloutConfig,
    TeacherConfig,
    ThresholdScheduleConfig,
)
from nemo_opdlm.config.precision import FP8_RECIPES
from nemo_opdlm.config.reader import full_keys, parse, to_container, to_dictconfig, unknown_key
from nemo_opdlm.config.schema import (
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    PromptFileConfig,
    SchedConfig,
    TokenizerConfig,
    TrainerConfig,
    ValidationFileConfig,
)
from nemo_opdlm.config.validation import check_apex, validate, validate_architecture

__all__ = [
    "Architecture",
    "CheckpointCallbackConfig",
    "Config",
    "DataConfig",
    "FP8_RECIPES",
    "ExpManagerConfig",
    "MaxNewTokensScheduleConfig",
    "ModelConfig",
    "OPDLMConfig",
    "OptimConfig",
    "PromptFileConfig",
    "RolloutConfig",
    "SchedConfig",
    "TeacherConfig",
    "ThresholdScheduleConfig",
    "TokenizerConfig",
    "TrainerConfig",
    "ValidationFileConfig",
    "check_apex",
    "full_keys",
    "parse",
    "to_container",
    "to_dictconfig",
    "unknown_key",
    "validate",
    "validate_architecture",
    "validate_layout",
]
