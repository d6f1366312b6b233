"""Version and identity of the package."""

MAJOR = 0
MINOR = 1
PATCH = 0

__version__ = f"{MAJOR}.{MINOR}.{PATCH}"
__package_name__ = "nemo_opdlm"
__description__ = "On-policy distillation of autoregressive into block-diffusion language models for NeMo"
__license__ = "Apache-2.0"
