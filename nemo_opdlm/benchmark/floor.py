"""What a rollout cannot do without: FLOPs and bytes of a response token, and what this machine makes of them."""

from dataclasses import dataclass

import torch

from nemo_opdlm.benchmark.timing import best_seconds
from nemo_opdlm.benchmark.workload import Workload
from nemo_opdlm.config import Architecture
from nemo_opdlm.models.flops import layer_weights


@dataclass(frozen=True)
class Machine:
    """Speeds that were measured.

    Attributes:
        flops: of a large matmul, per second.
        bandwidth: bytes read and written per second by a copy.
    """

    flops: float
    bandwidth: float

    @staticmethod
    def measure(device: torch.device, dtype: torch.dtype) -> "Machine":
        """The best of a few tries; takes about a second."""
        size = 8192 if device.type == "cuda" else 1536
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        source = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
        target = torch.empty_like(source)
        flops = 2 * size**3 / best_seconds(lambda: torch.mm(a, b), device)
        bandwidth = 2 * source.nbytes / best_seconds(lambda: target.copy_(source), device)
        return Machine(flops, bandwidth)


@dataclass(frozen=True)
class Floor:
    """Least cost of a response token at static decoding, one token a forward.

    Every block goes through the layers once for each of its tokens, and once more to leave its keys (of which the last
    layer could spare its MLP: some half percent); a token's row reaches the LM head in each forward in which it is masked,
    (b + 1) / 2 times on average.

    Attributes:
        flops: multiplications and additions.
        num_bytes: weights, read once a forward for the whole batch, and the keys and values that its rows see.
    """

    flops: float
    num_bytes: float

    @staticmethod
    def of(arch: Architecture, work: Workload, batch_size: int, block_size: int, itemsize: int) -> "Floor":
        """Of a batch that is always full."""
        assert arch.kv_channels is not None and arch.num_query_groups is not None
        query, key = arch.num_attention_heads * arch.kv_channels, arch.num_query_groups * arch.kv_channels
        layers, head = arch.num_layers * layer_weights(arch), arch.vocab_size * arch.hidden_size
        visible = float((work.prompt_len + work.limits / 2).mean())
        attention = arch.num_layers * 2 * query * visible  # scores and weighted values
        passes = block_size + 1
        flops = 2 * (passes * (layers + attention) + (block_size + 1) / 2 * head)
        cache = 2 * arch.num_layers * key * visible
        return Floor(flops, itemsize * ((layers + head) / batch_size + cache))

    def seconds(self, machine: Machine) -> float:
        """Time of a token on a machine that is kept busy by one of the two."""
        return max(self.flops / machine.flops, self.num_bytes / machine.bandwidth)
