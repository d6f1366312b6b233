"""A tiny GPT trained by Megatron inside NeMo's ModelPT: what checkpoints and archives have to carry."""

import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer import TransformerConfig
from nemo.core.classes import ModelPT
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.data import DataLoader

from nemo_opdlm.lightning.optimizer import MegatronOptimizerHandle
from nemo_opdlm.lightning.strategy import MegatronStrategy
from nemo_opdlm.megatron import parallel
from nemo_opdlm.models.archive import OPDLMSaveRestoreConnector

CONFIG = {
    "vocab_size": 32,
    "padded_vocab_size": 32,
    "num_layers": 2,
    "tensor_model_parallel_size": 1,
    "precision": "32",
    "updates_per_epoch": 1000,
    "stop_before_step": None,
    "tokenizer": {"library": "huggingface", "type": "toy"},
    "data": {"train_ds": {"file_path": "prompts.jsonl"}},
}


class Killed(Exception):
    """The process was killed at this moment."""


def build_network(config: Mapping[str, Any]) -> GPTModel:
    """A GPT of a few hundred parameters."""
    bf16 = config["precision"] == "bf16"
    transformer_config = TransformerConfig(
        num_layers=config["num_layers"],
        hidden_size=16,
        num_attention_heads=4,
        num_query_groups=2,
        gated_linear_unit=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        tensor_model_parallel_size=config["tensor_model_parallel_size"],
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        bf16=bf16,
    )
    spec = get_gpt_layer_local_spec()
    return GPTModel(
        transformer_config,
        spec,
        vocab_size=config["padded_vocab_size"],
        max_sequence_length=8,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=True,
        parallel_output=False,
    ).to(transformer_config.params_dtype)


class ToyModel(ModelPT):
    """Predicts the next of a few random tokens."""

    def __init__(self, cfg: DictConfig, trainer: Trainer | None = None) -> None:
        super().__init__(cfg, trainer)
        self._save_restore_connector = OPDLMSaveRestoreConnector()
        self.automatic_optimization = False
        self.vocab_size = self.cfg.vocab_size
        self.tokenizer_files = read_folder(self.cfg.tokenizer.type)
        parallel.initialize(tensor_model_parallel_size=self.cfg.tensor_model_parallel_size)
        torch.manual_seed(0)
        network = build_network(self.cfg)
        bf16 = network.config.bf16
        ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
        self.student = DistributedDataParallel(network.config, ddp_config, network)
        optimizer_config = OptimizerConfig(
            optimizer="adam", lr=1e-2, clip_grad=1.0, bf16=bf16, params_dtype=network.config.params_dtype
        )
        self.optimizer = get_megatron_optimizer(optimizer_config, [self.student])
        self.step_metrics: dict[str, float] = {}
        self.counter = 0

    @classmethod
    def from_config_dict(cls, config: DictConfig, trainer: Trainer | None = None) -> "ToyModel":
        return cls(cfg=config, trainer=trainer)

    @classmethod
    def restore_from(cls, restore_path: str, **kwargs: Any) -> Any:
        kwargs.setdefault("save_restore_connector", OPDLMSaveRestoreConnector())
        return super().restore_from(restore_path, **kwargs)

    @classmethod
    def list_available_models(cls) -> None:
        return None

    def setup_training_data(self, train_data_config: Any) -> None: ...

    def setup_validation_data(self, val_data_config: Any) -> None: ...

    def train_dataloader(self) -> DataLoader:
        return DataLoader(range(self.cfg.updates_per_epoch))  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader:
        return DataLoader(range(1))  # type: ignore[arg-type]

    def configure_optimizers(self) -> MegatronOptimizerHandle:
        return MegatronOptimizerHandle(self.optimizer.param_groups, self.optimizer.step)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        step = self.trainer.global_step
        if step == self.cfg.stop_before_step:
            raise Killed
        self.zero_grad_everywhere()
        loss = self.loss(seed=step)
        loss.backward()
        self.student.finish_grad_sync()
        self.optimizers().step()
        self.counter += 1
        self.step_metrics = {"train/loss": float(loss), "train/grad_norm": float("nan"), "counter": self.counter}

    def zero_grad_everywhere(self) -> None:
        self.student.zero_grad_buffer()
        self.optimizer.zero_grad()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(seed=-1).detach(), logger=False)

    def loss(self, seed: int) -> Tensor:
        tokens = torch.randint(self.vocab_size, (2, 8), generator=torch.Generator().manual_seed(seed + 1))
        positions = torch.arange(8).expand(2, 8)
        # Megatron's polarity: True is hidden.
        hidden = torch.ones(8, 8, dtype=torch.bool).triu(1)[None, None]
        logits = self.student(tokens, positions, hidden).float()
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    def sharded_state_dict(self, include_optimizer: bool, is_loading: bool = False) -> dict[str, Any]:
        model = self.student.module.sharded_state_dict(prefix="model.")
        state = {"model": model}
        if include_optimizer:
            state["optimizer"] = self.optimizer.sharded_state_dict(model, is_loading=is_loading)
        return state

    def load_sharded_state(self, state: dict[str, Any]) -> None:
        self.student.module.load_state_dict(
            {key.removeprefix("model."): value for key, value in state["model"].items()}
        )
        if "optimizer" in state:
            self.optimizer.load_state_dict(state["optimizer"])
        else:
            self.optimizer.reload_model_params()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["toy"] = {"counter": self.counter, "ids": torch.arange(4)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.counter = checkpoint["toy"]["counter"]


def read_folder(path: str) -> dict[str, bytes]:
    """Files of a folder, none if it is not there."""
    return {file.name: file.read_bytes() for file in sorted(Path(path).glob("*"))}


def make_model(**changes: Any) -> ToyModel:
    return ToyModel(OmegaConf.create({**CONFIG, **changes}))


def make_trainer(
    max_steps: int, tensor_model_parallel_size: int = 1, async_save: bool = False, **changes: Any
) -> Trainer:
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": max_steps,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "val_check_interval": 2,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
    }
    strategy = MegatronStrategy(tensor_model_parallel_size=tensor_model_parallel_size, async_save=async_save)
    return Trainer(strategy=strategy, **{**settings, **changes})


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def train(model: ToyModel, steps: range) -> None:
    """A few updates without Lightning."""
    for step in steps:
        model.zero_grad_everywhere()
        model.loss(seed=step).backward()
        model.student.finish_grad_sync()
        model.optimizer.step()


def weights(model: ToyModel) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.student.parameters()]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@contextmanager
def disk_full_after(size: int) -> Iterator[None]:
    """Files cannot grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
