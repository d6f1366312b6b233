"""Processes that have imported all that a run needs: a server does so once and forks them, so that each starts in a moment."""

import multiprocessing as mp
import os
from multiprocessing.context import ForkServerContext
from pathlib import Path

_ROOT = str(Path(__file__).parents[1])


def server() -> ForkServerContext:
    """The context whose processes are forked; all tests share one server, which keeps the environment that it started in."""
    # It finds modules where its environment says.
    places = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([_ROOT, *filter(None, places)]))
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.integration.training_runs"])
    return context
