"""AdamW with weight-decay groups, clipping, and the learning rate as a function of the step."""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from models.fp8.reference.adamw import AdamWStep
from models.gpt import GPT
from models.moe.experts import Prepared
from train.config import OptimConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Dtypes by their names in `optim.grad_dtype` and `optim.first_moment_dtype`."""


class OwnAdamW(torch.optim.AdamW):
    """AdamW by the model's operations, which accept gradients in bfloat16, may keep the first
    moment in it, and can prepare the experts' weights for the next step's GEMMs.

    Its steps are those of `torch.optim.AdamW` except for rounding, and so is its state. A tensor
    that is set as `grad_scale` divides the gradients of all steps that follow.
    """

    grad_scale: Tensor | None = None

    def __init__(
        self,
        groups: list[dict],
        model: GPT,
        dtype: torch.dtype,
        *,
        prepares: bool,
        first_moment: torch.dtype,
        lr: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        """`dtype` is the model's compute dtype. Only whole experts can be prepared."""
        super().__init__(groups, lr=lr, betas=betas, eps=eps)
        self._model, self._dtype, self._first_moment = model, dtype, first_moment
        # PyTorch casts what it loads to the parameters' dtype.
        self.register_load_state_dict_post_hook(OwnAdamW._cast_first_moments)  # type: ignore
        self._experts = [layer.experts for layer in model.moe_layers()] if prepares else []
        self._of_experts = {p for experts in self._experts for p in experts.parameters()}

    def make_state(self) -> None:
        """The state before the first step, where a parameter has none: PyTorch's except for
        dtypes."""
        for parameter in (p for group in self.param_groups for p in group["params"]):
            if not self.state[parameter]:
                self.state[parameter] |= {
                    "step": torch.zeros(()),
                    "exp_avg": torch.zeros_like(parameter, dtype=self._first_moment),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }

    def _cast_first_moments(self) -> None:
        for state in self.state.values():
            state["exp_avg"] = state["exp_avg"].to(self._first_moment)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        runtime = self._model.runtime
        self._model.forget_prepared_weights()  # before, to free their memory
        self.make_state()
        prepared: dict[Tensor, Prepared] = {}
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            rates = (group["lr"], beta1, beta2, group["eps"], group["weight_decay"])
            columns: list[list[Tensor]] = [[] for _ in range(6)]
            self._init_group(group, *columns)
            parameters, gradients, means, squares, _, numbers = columns
            torch._foreach_add_(numbers, 1)  # type: ignore[attr-defined]
            for parameter, *tensors, number in zip(
                parameters, gradients, means, squares, numbers, strict=True
            ):
                step = AdamWStep(*rates, float(number), self.grad_scale)
                w, grad, mean, square = (_local(t) for t in (parameter, *tensors))
                if parameter in self._of_experts:
                    prepared[parameter] = runtime.linear.update_weights(
                        w, grad, mean, square, step, self._dtype
                    )
                else:
                    runtime.ops.adamw(w, grad, mean, square, step)
        for experts in self._experts:
            if experts.up in prepared and experts.down in prepared:
                experts.keep_prepared(prepared[experts.up], prepared[experts.down])


def _local(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


def takes_grad_scale(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it divides gradients by its `grad_scale` as it reads them."""
    return isinstance(optimizer, OwnAdamW) or bool(optimizer.defaults.get("fused"))


def build_optimizer(
    model: nn.Module, config: OptimConfig, fused: bool, dtype: torch.dtype = torch.float32
) -> torch.optim.AdamW:
    """Matrices decay, vectors (norms) do not. `fused` is for GPUs, `dtype` is the model's compute
    dtype.

    A group's parameters are also on one device mesh, since the optimizer works on whole groups at
    a time and experts are on another mesh than the rest.
    """
    groups: dict[tuple[bool, object], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        groups.setdefault((parameter.ndim > 1, mesh), []).append(parameter)
    decaying = [
        {"params": parameters, "weight_decay": config.weight_decay if decays else 0.0}
        for (decays, _), parameters in groups.items()
    ]
    adamw: Callable[..., torch.optim.AdamW] = partial(torch.optim.AdamW, fused=fused)
    prepares = config.prepare_weights
    if prepares == "auto":
        prepares = fused and isinstance(model, GPT) and not _gathers_experts(model)
    # PyTorch's wants gradients and moments in the dtype of the weights.
    if prepares or "bf16" in (config.grad_dtype, config.first_moment_dtype):
        assert isinstance(model, GPT)
        adamw = partial(
            OwnAdamW,
            model=model,
            dtype=dtype,
            prepares=prepares,
            first_moment=DTYPES[config.first_moment_dtype],
        )
    return adamw(decaying, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)


def _gathers_experts(model: GPT) -> bool:
    """Whether a rank updates parts of experts, which have replicas: no weight is whole there."""
    return any(isinstance(layer.experts, FSDPModule) for layer in model.moe_layers())


def follow_keys(optimizer: torch.optim.Optimizer, config: OptimConfig) -> None:
    """Set the groups' values from `config`, after a checkpoint was loaded with its own."""
    for group in optimizer.param_groups:
        if group["params"][0].ndim > 1:
            group["weight_decay"] = config.weight_decay


def clip_gradients(
    parameters: list[nn.Parameter], max_norm: float, optimizer: torch.optim.Optimizer | None = None
) -> Tensor:
    """Scale all gradients so that their common norm is at most `max_norm` (0: never).

    An `optimizer` that can apply the factor itself, as it reads the gradients, saves a pass over
    them. Returns the norm before clipping, float32 on this device and the same on every rank.
    """
    gradients = [p.grad.to_local() for p in parameters if isinstance(p.grad, DTensor)]
    assert gradients, "no gradients to clip"
    # Every element of the gradient lies on exactly one rank, those of experts too.
    total = _norm(gradients).square()
    dist.all_reduce(total)
    total = total.sqrt()
    if max_norm > 0:
        excess = ((total + 1e-6) / max_norm).clamp(min=1.0)
        if optimizer is not None and takes_grad_scale(optimizer):
            optimizer.grad_scale = excess  # type: ignore[attr-defined]  # it divides by this
        else:
            torch._foreach_mul_(gradients, excess.reciprocal())  # type: ignore[attr-defined]
    return total


def _norm(gradients: list[Tensor]) -> Tensor:
    """The common norm of all gradients in float32, as PyTorch's `get_total_norm`, whose result for
    bfloat16 gradients would be bfloat16."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        by_dtype.setdefault(gradient.dtype, []).append(gradient)
    norms = [
        norm
        for of_one in by_dtype.values()
        for norm in torch._foreach_norm(of_one, 2, dtype=torch.float32)  # type: ignore[attr-defined]
    ]
    return torch.linalg.vector_norm(torch.stack(norms))


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """The rate of optimizer step `step`, counted from 0, of `steps`.

    Linear warm-up, then `constant`, `cosine` (to min_lr_ratio at the last step), or `wsd`:
    constant, then linear to min_lr_ratio over the last decay_fraction of all steps
    (arXiv 2404.06395).
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    lowest = config.lr * config.min_lr_ratio
    last = steps - 1
    if config.schedule == "cosine":
        done = (step - config.warmup_steps) / max(1, last - config.warmup_steps)
        return lowest + (config.lr - lowest) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    if config.schedule == "wsd":
        decay = max(1, round(steps * config.decay_fraction))
        left = (last - step) / decay
        return lowest + (config.lr - lowest) * min(1.0, max(0.0, left))
    return config.lr


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
