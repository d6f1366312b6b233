"""The watch for failed ranks, within one process; `parallel/test_failures.py` has the ranks."""

import threading
import time

import pytest
import torch.distributed as dist

from nemo_opdlm.megatron import failure


class SlowStore(dist.HashStore):
    """A store that is being asked whenever somebody looks."""

    def check(self, keys: list[str]) -> bool:
        time.sleep(0.2)
        return super().check(keys)  # type: ignore[no-any-return]


def test_nobody_asks_the_store_any_more_when_the_watch_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failure, "_POLL_SECONDS", 0.01)
    watch = failure._Watch(SlowStore())
    time.sleep(0.1)
    watch.stop()
    assert not any(thread.name == "nemo_opdlm failures" for thread in threading.enumerate())
