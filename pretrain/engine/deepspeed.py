"""The engine on DeepSpeed: ZeRO 0-3, offload, bf16 and fp16. The only file that imports deepspeed.

DeepSpeed computes the updates and nothing else: its schedulers, data loaders, monitors and checkpoints stay unused.
The window of micro-batches varies from update to update, so it is told by hand which micro-batch is the last.
"""

import contextlib
import copy
import io
import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.config import EngineConfig, OptimConfig
from pretrain.distributed import World, broadcast, together
from pretrain.engine.base import Engine, StepResult, clip, deal, nothing_to_gather
from pretrain.engine.tensor_parallel import TensorParallel
from pretrain.errors import ConfigError
from pretrain.objectives.base import LossSums, ObjectiveModule
from pretrain.optim import MOMENTS, adamw, create_state, parameter_groups

BUCKET = 50_000_000
# of ZeRO-3; of ZeRO-1 and 2; of the optimizer that deepspeed takes for bf16 with ZeRO-1
MASTERS = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LOSS_SCALE_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class DeepSpeedEngine(Engine):
    """ZeRO stage 0 keeps everything on every rank, 1 shards optimizer state, 2 gradients too, 3 weights too."""

    def __init__(
        self,
        config: EngineConfig,
        optim: OptimConfig,
        module: ObjectiveModule,
        world: World,
        user: Mapping[str, Any],
        shared_by: TensorParallel | None = None,
    ) -> None:
        deepspeed = _import(world)
        self.module, self.world, self.shared_by = module, world, shared_by
        self.loss_factor = float(world.data_size)  # gradients are averaged over ranks
        self._stage, self._clip = config.zero_stage, optim.clip
        self.whole_gradients = self._stage < 3
        self._own_shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
        # deepspeed makes its masters from weights it has rounded to 16 bits; they shall start unrounded
        exact = self._exact() if config.precision != "fp32" else None
        derived = derive(config, optim, sum(p.numel() for p in module.parameters()))
        merged = together(lambda: merge(derived, user))
        self._adam = adamw(parameter_groups(module, optim.weight_decay), optim)
        if self._stage == 3:
            self._cut(merged, PRECISIONS[config.precision])
        with contextlib.redirect_stdout(io.StringIO()):  # the bf16 optimizer prints memory figures
            self._engine, *_ = deepspeed.initialize(model=module, optimizer=self._adam, config=merged, mpu=shared_by)
        self._zero: Any = self._engine.optimizer
        create_state(self._adam, self._flat())
        if self._stage in (1, 2):
            self._zero._lazy_init_hp_params_optimizer_state()  # links the moments to the parameters they belong to
        if exact is not None:
            self._write_exact(exact)
        self.refresh()
        if config.precision == "fp16":
            # at the smallest scale the loop decides what to do about another overflow
            self._zero.loss_scaler.raise_error_at_min_scale = False

    def _cut(self, config: Mapping[str, Any], dtype: torch.dtype) -> None:
        """Gives every rank its share of each weight, one by one: deepspeed would first move the whole to the device."""
        import deepspeed

        for parameter in self.module.parameters():
            parameter.data = parameter.data.to(dtype)
        for buffer in self.module.buffers():
            buffer.data = buffer.data.to(self.world.device)
        group = self.shared_by.data_group if self.shared_by else None
        deepspeed.init_distributed()  # `Init` would read the configuration for a world of one
        deepspeed.zero.Init(self.module, data_parallel_group=group, config_dict_or_path=config, mpu=self.shared_by)

    def _exact(self) -> dict[str, Tensor]:
        """Copies of the weights, each on one of the ranks that hold it."""
        named, mine = dict(self.module.named_parameters()), self.world.data_rank
        return {name: named[name].detach().clone() for name, owner in self._owners().items() if owner == mine}

    def _owners(self) -> dict[str, int]:
        """{name: data-parallel rank} of those that keep the weights."""
        sizes = [math.prod(shape) for shape in self._own_shapes.values()]
        return dict(zip(self._own_shapes, deal(sizes, self.world.data_size), strict=True))

    def _write_exact(self, exact: dict[str, Tensor]) -> None:
        world, group = self.world, self.shared_by.data_group if self.shared_by else None
        for name, data_rank in self._owners().items():
            owner = data_rank * world.tensor_parallel + world.tensor_rank
            value = exact.pop(name) if owner == world.rank else torch.empty(self._own_shapes[name])
            value = value.to(world.device)
            broadcast(value, owner, group)
            self._write(name, {"param": value})

    def step(self, lr: float) -> StepResult:
        for group in self._adam.param_groups:
            group["lr"] = lr
        if self._stage == 0:  # plain AdamW underneath: no norm, no check
            norm = clip({p: p for p in self.module.parameters()}, self._clip, self.shared_by)
            if norm < float("inf"):
                self._engine.step()
                return StepResult(norm, True)
            self._engine.zero_grad()
            return StepResult(norm, False)
        self._engine.step()
        applied = bool(self._engine.was_step_applied())
        norm = float(self._engine.get_global_grad_norm()) if applied else float("inf")
        return StepResult(norm, applied, self._loss_scale())

    def drop(self) -> None:
        if self._stage == 0:
            self._engine.zero_grad()
            return
        # ZeRO drops by itself what is not finite, with all that it keeps of a gradient in half a dozen buffers. What it
        # looks at differs: the gradients on every rank, flags, norms that were taken when gradients went to the host.
        scale = self.loss_scale_state()
        for parameter in self.module.parameters():
            self._poison(parameter)
        if self._stage == 3:
            self._zero.inf_or_nan_tracker.fill_(True)
            if self.world.device.type == "cuda":
                torch.cuda.synchronize(self.world.device)  # deepspeed reads it on a stream of its own
        if hasattr(self._zero, "norm_for_param_grads"):
            self._zero.local_overflow = True
            self._zero.norm_for_param_grads = dict.fromkeys(self._zero.norm_for_param_grads, torch.tensor(float("nan")))
        assert not self.step(0.0).applied
        if scale is not None:
            self.restore_loss_scale(scale)

    def _poison(self, parameter: Any) -> None:
        # deepspeed's own setters fail where a share is padded, or a parameter lies on several ranks
        if self._stage == 3:
            size = parameter.partition_numel() * self.world.size
            self._zero.set_fp32_grad_for_param(torch.full((size,), float("nan")), parameter)
        elif parameter._hp_mapping is not None:
            parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group).fill_(float("nan"))

    def gathered(self) -> contextlib.AbstractContextManager[None]:
        return self._gathered() if self._stage == 3 else nothing_to_gather()

    @contextlib.contextmanager
    def _gathered(self) -> Iterator[None]:
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.module.parameters())):
            yield

    # ------------------------------------------------------------------- state

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return self._own_shapes

    def _whole(self, name: str) -> dict[str, Tensor]:
        parameter: Any = self.module.get_parameter(name)
        state = {}
        for key in ("param", *MOMENTS):
            moment = None if key == "param" else key
            if self._stage == 0:
                value = self._adam.state[parameter][key] if moment else parameter
            elif self._stage == 3:
                value = self._zero.get_full_hp_param(parameter, moment)
            else:
                value = parameter.get_full_hp_param(moment)
            state[key] = value.detach().reshape(self._own_shapes[name])
        return state

    @torch.no_grad()
    def _write(self, name: str, state: Mapping[str, Tensor]) -> None:
        parameter: Any = self.module.get_parameter(name)
        for key, value in state.items():
            if self._stage == 0:
                (parameter if key == "param" else self._adam.state[parameter][key]).copy_(value)
            elif self._stage == 3:
                self._write_shard(parameter, key, value)
            else:
                parameter.set_full_hp_param(value, None if key == "param" else key)

    def _write_shard(self, parameter: Any, key: str, value: Tensor) -> None:
        # deepspeed's own setter of full values fails where the last shard is padded
        size = parameter.partition_numel()
        shard = value.flatten()[size * self.world.data_rank : size * (self.world.data_rank + 1)]
        shard = F.pad(shard, (0, size - shard.numel()))
        self._zero.set_local_hp_param(shard, parameter, None if key == "param" else key)

    @torch.no_grad()
    def refresh(self) -> None:
        if self._stage in (1, 2):
            self._zero.update_lp_params()
        elif self._stage == 3:
            if hasattr(self._zero, "invalidate_secondary_tensor"):
                self._zero.invalidate_secondary_tensor()  # of `zero_hpz_partition_size`, from the weights before
            # small weights stay gathered between steps: drop those copies before, gather the new ones after
            self._zero._partition_all_parameters()
            for group in range(len(self._zero.fp32_partitioned_groups_flat)):
                self._zero._reassign_or_swap_out_partitioned_parameters(group)
            persistent = self._zero.persistent_parameters
            if persistent:
                persistent[0].all_gather(persistent)

    def loss_scale_state(self) -> dict[str, float] | None:
        if self._loss_scale() is None:
            return None
        return {key: getattr(self._zero.loss_scaler, key) for key in LOSS_SCALE_STATE}

    def restore_loss_scale(self, state: Mapping[str, float]) -> None:
        if self._loss_scale() is not None:
            for key in LOSS_SCALE_STATE:
                setattr(self._zero.loss_scaler, key, state[key])

    def _loss_scale(self) -> float | None:
        scaler: Any = getattr(self._zero, "loss_scaler", None)
        return float(scaler.cur_scale) if getattr(scaler, "dynamic", False) else None

    def _flat(self) -> list[Tensor]:
        """The tensors that AdamW updates: this rank's flat share of the master weights, or the weights themselves."""
        if self._stage == 0:
            return list(self.module.parameters())
        for attribute in MASTERS:
            if hasattr(self._zero, attribute):
                return list(getattr(self._zero, attribute))
        raise TypeError(f"{type(self._zero).__name__} must keep its master weights in one of {', '.join(MASTERS)}")

    # ---------------------------------------------------------- implementation

    def _open_window(self) -> None:
        # ZeRO-3 and offload keep gradient buffers between updates and only overwrite what the next backward reaches:
        # a weight that no term touches would be updated with the gradient of an earlier window.
        if self._stage == 3:
            self._zero.grad_partitions_flat_buffer.zero_()
        for flat in self._flat() if self._stage else []:
            if flat.grad is not None:
                flat.grad.zero_()

    def _forward(self, batch: Any, scale: Mapping[str, float]) -> LossSums:
        terms: LossSums = self._engine(batch, scale)[1]
        return terms

    def _forward_backward(self, batch: Any, scale: Mapping[str, float], last: bool) -> LossSums:
        self._engine.set_gradient_accumulation_boundary(last)
        total, terms = self._engine(batch, scale)
        self._engine.backward(total)
        found: LossSums = terms
        return found


def derive(config: EngineConfig, optim: OptimConfig, weights: int) -> dict[str, Any]:
    """The DeepSpeed configuration of a model with that many weights."""
    stage = config.zero_stage
    bucket = min(weights + weights % 2, BUCKET)  # even, as ZeRO wants
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if config.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if config.offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    derived: dict[str, Any] = {
        # nominal: windows are counted by hand and the scale of the loss is exact already
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optim.clip if stage else 0.0,
        "steps_per_print": None,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
    }
    derived["bf16"] = {"enabled": config.precision == "bf16"}  # also where it is off, so that a user's own conflicts
    derived["fp16"] = {"enabled": config.precision == "fp16"}
    if config.precision == "fp16":
        derived["fp16"] |= {"loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000}
    if config.precision != "fp32":
        # sums of gradients, over micro-batches and over ranks, lose too much in 16 bits
        derived["data_types"] = {"grad_accum_dtype": "fp32"}
        derived["communication_data_type"] = "fp32"
    return derived


def merge(derived: Mapping[str, Any], user: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """`user` laid over `derived`.

    Raises:
        ConfigError: naming a key that both set, to different values.
    """
    merged = copy.deepcopy(dict(derived))
    for key, value in user.items():
        name = f"{path}{key}"
        if key in merged and isinstance(merged[key], dict) and isinstance(value, Mapping):
            merged[key] = merge(merged[key], value, f"{name}.")
        elif key in merged and merged[key] != value:
            raise ConfigError(f"deepspeed `{name}` must be {merged[key]!r} with this configuration, got {value!r}")
        else:
            merged[key] = value
    return merged


def _import(world: World) -> Any:
    """Imports deepspeed so that it compiles nothing, waits for no lock and speaks only when something is wrong."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(cache / "parlance" / "torch_extensions"))
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    if world.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # once per collective otherwise: deepspeed calls them by the names of older torch versions
    warnings.filterwarnings("ignore", message="`torch.distributed.*deprecated", category=FutureWarning)
    if world.device.type == "cpu":
        # the shared-memory collectives would be compiled now, for a minute; gloo does without
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
