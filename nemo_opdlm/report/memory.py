"""The memory that a run will need, as tables for the terminal."""

from rich.table import Table

from nemo_opdlm.config import Config
from nemo_opdlm.models.memory_moments import RunPlan

_GIB = 2**30
_MIB = 2**20
#: Phases of a training step, by the start of the names of their moments.
_PHASES = ("rollout", "teacher", "update")


def memory_table(config: Config, plan: RunPlan) -> Table:
    """Items of the stage that needs most, one column per phase: that of its largest moment."""
    phases = [found for name in _PHASES if (found := plan.worst.phase(name)) is not None]
    where = "" if len(plan.stages) == 1 else f" in pipeline stage {plan.worst.stage + 1} of {len(plan.stages)}"
    device = "process" if config.trainer.accelerator == "cpu" else "GPU"
    title = f"Memory of a {device}{where}: {size(plan.worst.peak.total)}"
    table = Table(title=title, title_justify="left", caption=_longest_row(config, plan), caption_justify="left")
    table.add_column("")
    for moment in phases:
        table.add_column(moment.name, justify="right")
    for item in phases[0].items:
        if any(moment.items[item] for moment in phases):
            table.add_row(item, *(size(moment.items[item]) for moment in phases))
    table.add_section()
    table.add_row("total", *(size(moment.total) for moment in phases), style="bold")
    return table


def stage_table(plan: RunPlan) -> Table:
    """The totals of every pipeline stage."""
    table = Table(title="Pipeline stages", title_justify="left")
    table.add_column("stage", justify="right")
    for name in (*_PHASES, "peak"):
        table.add_column(name, justify="right")
    for stage in plan.stages:
        phases = (stage.phase(name) for name in _PHASES)
        totals = ["" if moment is None else size(moment.total) for moment in phases]
        style = "bold" if stage is plan.worst else ""
        table.add_row(str(stage.stage + 1), *totals, size(stage.peak.total), style=style)
    return table


def size(num_bytes: int) -> str:
    """Bytes in GiB, or in MiB below one."""
    return f"{num_bytes / _GIB:.2f} GiB" if num_bytes >= _GIB else f"{num_bytes / _MIB:.1f} MiB"


def _longest_row(config: Config, plan: RunPlan) -> str:
    row, rows, pack = plan.row, config.model.micro_batch_size, config.model.opdlm.pack_to_tokens
    tokens = f"{rows} x {row.two_stream} tokens in a micro-batch"
    if pack is not None:
        tokens = f"micro-batches packed to {pack} tokens, {row.two_stream} of a row"
    return (
        f"The most that the keys allow: {tokens} (a prompt of {row.prompt}, a response "
        f"of {row.response} and {row.copies} of its states), all of them supervised. Not counted: what CUDA, NCCL and the "
        "allocator keep for themselves."
    )
