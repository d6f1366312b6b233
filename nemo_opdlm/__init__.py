"""On-policy distillation of autoregressive into block-diffusion language models, on NeMo and Megatron-core.

Importing the package is cheap: NeMo, Megatron and torch are imported when an attribute that needs them is first used.
"""

from typing import TYPE_CHECKING, Any

from nemo_opdlm.package_info import __version__

if TYPE_CHECKING:
    from nemo_opdlm.models.opdlm_model import OPDLMModel

__all__ = ["OPDLMModel", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "OPDLMModel":
        from nemo_opdlm.models.opdlm_model import OPDLMModel

        return OPDLMModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
