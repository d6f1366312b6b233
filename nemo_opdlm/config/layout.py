"""The ranks of a run and what they must divide; every refusal names the nearest values that work."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from nemo_opdlm.config.architecture import Architecture
from nemo_opdlm.config.schema import Config

_logger = logging.getLogger(__name__)

_TP, _PP, _CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
_VPP = "virtual_pipeline_model_parallel_size"
#: Sizes of the network that tensor parallelism splits. The vocabulary is padded to fit, see `Architecture`.
_SPLIT_BY_TP = ("num_attention_heads", "num_query_groups", "ffn_hidden_size")
#: Values on each side of a refused one that are tried; a slip of the finger may be off by millions.
_SEARCHED = 100_000
#: To Lightning, too, Slurm jobs of these names are shells in which nothing is launched.
_SLURM_SHELLS = ("bash", "interactive")


def settle_ranks(config: Config, environment: Mapping[str, str]) -> Config:
    """Fill in `trainer.devices` where it is open: as launched or, without a launcher, the GPUs of this machine.

    Args:
        config: whose keys are in range.
        environment: variables of this process; torchrun, Slurm and Lightning count their processes there.

    Raises:
        ValueError: other processes were launched than are configured. Each would be a run of its own, or wait forever.
    """
    trainer = config.trainer
    is_open, launched = trainer.world_size is None, _launched(environment, trainer.num_nodes)
    if launched is None:
        devices = _visible_devices(trainer.accelerator) if is_open else trainer.devices
    else:
        variable, world, nodes = launched
        devices = world // nodes
        if trainer.num_nodes != nodes or not (is_open or trainer.devices == devices):
            raise ValueError(
                f"trainer.devices={trainer.devices!r} x trainer.num_nodes={trainer.num_nodes} contradicts the launcher's "
                f"{variable}={world}: set trainer.devices={devices} trainer.num_nodes={nodes}"
            )
    if is_open:
        _logger.info("trainer.devices=%r means %d here.", trainer.devices, devices)
    return replace(config, trainer=replace(trainer, devices=devices))


def check_layout(config: Config) -> None:
    """Check, once the ranks are settled, what needs no weights: ranks, batch, and sizes of the network that are given.

    Raises:
        ValueError: the ranks hold no whole copies of the model, or do not divide the batch or the network.
    """
    _check_ranks(config)
    _check_batch(config)
    _check_network(config, vars(config.model), "")


def validate_layout(config: Config, arch: Architecture, path: str | None) -> None:
    """Check that the layout divides a network: the student's, or the teacher's.

    Args:
        config: as returned by `validate`.
        arch: the network.
        path: where it comes from, for the message.

    Raises:
        ValueError: it does not.
    """
    _check_network(config, vars(arch), f" of {path}")


def _check_ranks(config: Config) -> None:
    trainer, model, size = config.trainer, config.model, config.model.model_parallel_size
    world, devices = trainer.world_size, trainer.devices
    assert world is not None and isinstance(devices, int)
    if world % size:
        raise ValueError(
            f"trainer.devices={devices} x trainer.num_nodes={trainer.num_nodes} = {world} ranks must be a multiple of "
            f"model.{_TP}={model.tensor_model_parallel_size} x {_PP}={model.pipeline_model_parallel_size} x "
            f"{_CP}={model.context_parallel_size} = {size}; "
            + _nearest(devices, devices + size, lambda v: v * trainer.num_nodes % size == 0, "trainer.devices")
        )


def _check_batch(config: Config) -> None:
    model, rollout, world = config.model, config.model.opdlm.rollout, config.trainer.world_size
    assert world is not None
    batch, responses, ranks = model.global_batch_size, rollout.num_samples_per_step, world // model.model_parallel_size
    whole = model.micro_batch_size * ranks
    if batch % whole:
        suits_rollout = responses % whole == 0
        total, note = (responses, "") if suits_rollout else (0, " (if num_prompts_per_step is a multiple, too)")
        raise ValueError(
            f"model.global_batch_size={batch} must be a multiple of micro_batch_size={model.micro_batch_size} x {ranks} "
            "data-parallel ranks; "
            + _nearest(batch, max(responses, batch + whole), lambda v: v % whole == 0 and total % v == 0)
            + note
        )
    if responses % batch:
        prompts, repeats = rollout.num_prompts_per_step, rollout.num_responses_per_prompt
        raise ValueError(
            f"model.opdlm.rollout.num_prompts_per_step={prompts} x num_responses_per_prompt={repeats} = {responses} "
            f"responses must be a multiple of model.global_batch_size={batch}; "
            + _nearest(prompts, prompts + batch, lambda v: v * repeats % batch == 0, "num_prompts_per_step")
        )


def _check_network(config: Config, network: Mapping[str, Any], of: str) -> None:
    """Check the sizes of `network` that are not None; `of` says in the message whose they are."""
    _check_tensor(config, {name: network[name] for name in _SPLIT_BY_TP if network[name] is not None}, of)
    _check_pipeline(config, network["num_layers"], of)


def _check_tensor(config: Config, sizes: Mapping[str, int], of: str) -> None:
    tp = config.model.tensor_model_parallel_size
    uneven = [f"{name}={size}" for name, size in sizes.items() if size % tp]
    if uneven:
        room, common = _room(config, tp), math.gcd(*sizes.values())
        raise ValueError(
            f"model.{_TP}={tp} must divide {' and '.join(uneven)}{of}; "
            + _nearest(tp, common, lambda v: common % v == 0 and room % v == 0)
            + f" (on {config.trainer.world_size} ranks)"
        )


def _check_pipeline(config: Config, layers: int | None, of: str) -> None:
    pp, vpp = config.model.pipeline_model_parallel_size, config.model.virtual_pipeline_model_parallel_size
    if vpp is not None and pp == 1:
        raise ValueError(f"model.{_VPP}={vpp} needs several pipeline stages, not {_PP}={pp}; use null")
    chunks = vpp or 1
    if layers is None or layers % (pp * chunks) == 0:
        return
    if layers % pp == 0:
        found = _nearest(chunks, layers, lambda v: v > 1 and layers % (pp * v) == 0, otherwise="null")
        raise ValueError(f"model.{_VPP}={vpp} x {_PP}={pp} must divide num_layers={layers}{of}; {found}")
    room, fewest = _room(config, pp), 1 if vpp is None else 2
    raise ValueError(
        f"model.{_PP}={pp}{'' if vpp is None else f' x {_VPP}={vpp}'} must divide num_layers={layers}{of}; "
        + _nearest(pp, layers, lambda v: v >= fewest and layers % (v * chunks) == 0 and room % v == 0)
        + f" (on {config.trainer.world_size} ranks)"
    )


def _nearest(value: int, limit: int, works: Callable[[int], bool], key: str = "", otherwise: str = "none") -> str:
    """The end of a refusal: the closest values of `key` on both sides of `value`, from 1 to `limit`, that work."""
    top = min(value - 1, limit)
    below = next((v for v in range(top, max(top - _SEARCHED, 0), -1) if works(v)), None)
    above = next((v for v in range(value + 1, min(limit, value + _SEARCHED) + 1) if works(v)), None)
    found = ", ".join(str(v) for v in (below, above) if v is not None)
    return f"nearest values {f'of {key} ' if key else ''}that work: {found or otherwise}"


def _room(config: Config, parts: int) -> int:
    """Ranks that one axis of the layout, now of `parts`, can have while the other axes stay as they are."""
    assert config.trainer.world_size is not None
    return parts * config.trainer.world_size // config.model.model_parallel_size


def _launched(environment: Mapping[str, str], num_nodes: int) -> tuple[str, int, int] | None:
    """The variable that counts the launched processes, their number and that of their nodes; None without a launcher."""
    world = int(environment.get("WORLD_SIZE") or 1)
    if "LOCAL_WORLD_SIZE" in environment:  # torchrun
        return "WORLD_SIZE", world, math.gcd(world, world // int(environment["LOCAL_WORLD_SIZE"]))
    # Started by hand or by Lightning, which leaves WORLD_SIZE=1 behind in a process that has trained on one rank. Without
    # LOCAL_RANK it is still to start the processes, whatever WORLD_SIZE says.
    if "LOCAL_RANK" in environment and world > 1:
        return "WORLD_SIZE", world, math.gcd(world, num_nodes)
    if environment.get("SLURM_NTASKS") and environment.get("SLURM_JOB_NAME") not in _SLURM_SHELLS:
        tasks = int(environment["SLURM_NTASKS"])
        return "SLURM_NTASKS", tasks, math.gcd(tasks, int(environment.get("SLURM_NNODES", num_nodes)))
    return None


def _visible_devices(accelerator: str) -> int:
    """Asked only where the configuration leaves it open: importing torch takes longer than everything else here."""
    if accelerator == "cpu":
        return 1
    import torch

    return max(torch.cuda.device_count(), 1)
