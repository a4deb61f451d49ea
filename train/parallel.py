"""Ranks, process groups and sharding: one way for CPU (gloo) and GPU (NCCL).

All ranks are data-parallel. Groups of `expert_parallel` neighbours share one set of experts, so
there are world / expert_parallel replicas of each expert:

    4 ranks, expert_parallel 2:   mesh  [[0, 1],      rows: one set of experts each (`ep`)
                                         [2, 3]]      columns: replicas of the same experts
                                                      (`expert_dp`)

What every rank has is sharded by FSDP2 over all ranks, experts over their replicas. Where there is
one replica, as on the usual machine whose GPUs are one expert-parallel group, nothing is left to
shard and FSDP is not used: it would still copy and cast every weight and gradient.
"""

import datetime
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, Shard

from models.gpt import GPT
from train.checkpoint.progress import waiting
from train.failure import TrainingFailed

ATTEMPT_S = 5.0
"""How long one attempt to reach rank 0 may take, where a firewall drops it silently."""


@dataclass(frozen=True)
class Ranks:
    """This process's place among the others."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh  # [expert_dp, ep]
    data_mesh: DeviceMesh  # all ranks in a row

    @property
    def is_first(self) -> bool:
        return self.rank == 0


class Peers(NamedTuple):
    """The processes that were started together, before they form a process group."""

    store: dist.Store
    """The store through which they find each other; each user has keys of its own."""
    rank: int
    world_size: int


def meet(timeout_s: int) -> Peers:
    """Wait for the other ranks that torchrun started, or be the only one.

    Raises TrainingFailed where they cannot be found.
    """
    if "RANK" not in os.environ:
        return Peers(dist.HashStore(), 0, 1)
    timeout = datetime.timedelta(seconds=timeout_s)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    where = f"MASTER_ADDR:MASTER_PORT={address}:{port}"
    theirs = rank > 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    whom = ("torchrun" if rank == 0 else "rank 0") if theirs else "the other ranks"
    try:
        with waiting(f"rank {rank} waits for {whom} at {where}", timeout_s):
            if theirs:
                _wait_for_answer(address, port, timeout_s)
            store = _in_time(partial(_common_store, rank, world_size, timeout), timeout_s)
    except (dist.DistError, ValueError, TimeoutError) as error:
        raise TrainingFailed(
            f"rank {rank} cannot meet the others at {where}: {str(error).strip().splitlines()[0]}"
        ) from None
    store.set_timeout(timeout)
    return Peers(store, rank, world_size)


def _wait_for_answer(address: str, port: int, timeout_s: float) -> None:
    """Return when something listens there. PyTorch waits too, for twice as long and with C++ stacks
    for every attempt. Raises TimeoutError."""
    deadline = time.monotonic() + timeout_s
    while (left := deadline - time.monotonic()) > 0:
        try:
            socket.create_connection((address, port), timeout=min(left, ATTEMPT_S)).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
            time.sleep(min(left, 0.2))
    raise TimeoutError(
        f"nobody has answered there for {timeout_s:g} s ({reason}); start rank 0 there, or correct "
        "the address; a firewall must let the port through"
    )


def _in_time(connect: Callable[[], dist.Store], timeout_s: float) -> dist.Store:
    """What `connect` returns. Raises TimeoutError where it does not return: PyTorch waits forever
    for a host that listens and does not answer."""
    result: Future[dist.Store] = Future()

    def work() -> None:
        try:
            result.set_result(connect())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=work, name="connect", daemon=True).start()
    try:
        return result.result(timeout_s + ATTEMPT_S)
    except TimeoutError as error:
        raise TimeoutError(
            str(error)
            or "one that listens there does not speak as torchrun or a rank would; give "
            "the job another port (torchrun --rdzv-endpoint HOST:PORT, or --master-port PORT)"
        ) from None


def _common_store(rank: int, world_size: int, timeout: datetime.timedelta) -> dist.Store:
    store = _store_of_a_restart()
    if store is None:
        store, _, _ = next(rendezvous("env://", rank, world_size, timeout=timeout))
    return store


def start(
    device_type: str, expert_parallel: int, seed: int, timeout_s: int, peers: Peers | None = None
) -> Ranks:
    """Make one process group of the ranks that have met, or meet now."""
    store, rank, world_size = peers or meet(timeout_s)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    timeout = datetime.timedelta(seconds=timeout_s)
    device = torch.device(device_type)
    if device_type == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        backend = "gloo"
    dist.init_process_group(
        backend,
        timeout=timeout,
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=world_size,
        # No `device_id`: with it every group is connected at once, those that megatron-core makes
        # and nothing here uses too, which takes gigabytes of each GPU and seconds. Without it
        # barriers are gloo's, and order nothing on a GPU.
    )

    # megatron-core's modules find their groups here; its expert-parallel ranks are neighbours too.
    parallel_state.initialize_model_parallel(
        expert_model_parallel_size=expert_parallel,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=max(1, timeout_s // 60),
    )
    # The stock router draws from this tracker; without a GPU it must be the one that holds nothing.
    # An earlier start in this process may have been on another device.
    tensor_parallel.model_parallel_cuda_manual_seed(
        seed, inference_rng_tracker=device_type != "cuda", force_reset_rng=True
    )
    torch.manual_seed(seed + dist.get_rank())

    replicas = world_size // expert_parallel
    mesh = init_device_mesh(
        device_type, (replicas, expert_parallel), mesh_dim_names=("expert_dp", "ep")
    )
    return Ranks(
        rank=dist.get_rank(),
        local_rank=local_rank,
        world_size=world_size,
        device=device,
        mesh=mesh,
        data_mesh=init_device_mesh(device_type, (world_size,), mesh_dim_names=("dp",)),
    )


def _store_of_a_restart() -> dist.Store | None:
    """Where ranks that torchrun has started again find each other.

    torchrun keeps one store for all restarts, in which the addresses of the dead ranks still stand
    (PyTorch 2.13), so a restart needs a part of it for itself. Its number is the same for all
    ranks of one torchrun alone: with several, as slurm/train.sbatch does, set
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.
    """
    environment = os.environ
    restart = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    shared = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    one_torchrun = environment.get("LOCAL_WORLD_SIZE") == environment.get("WORLD_SIZE")
    if restart == "0" or not shared or not one_torchrun:
        return None
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    return dist.PrefixStore(f"restart_{restart}", dist.TCPStore(address, port, is_master=False))


def shard(
    model: GPT,
    ranks: Ranks,
    dtype: torch.dtype,
    reshard_after_forward: bool,
    grad_dtype: torch.dtype = torch.float32,
) -> None:
    """Shard the model in place. Weights stay float32; each layer computes in `dtype`.

    Gradients are summed in `grad_dtype`, over micro-batches and ranks, not averaged: the loss is
    already divided by the tokens of the whole global batch. That is right for experts too, which
    have seen the tokens of all ranks of their group. What FSDP leaves on a rank is float32, as the
    weight is; gradients of experts without replicas stay in `grad_dtype`.
    """
    # Inputs are not cast: rotary angles and routing weights are float32, and lose their meaning in
    # bfloat16, where neighbouring positions become one. Tokens have the embedding's dtype already.
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=grad_dtype, cast_forward_inputs=False
    )
    shard_over = partial(fully_shard, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    replicas = ranks.mesh["expert_dp"]
    ours: set[nn.Parameter] = set()  # not FSDP's
    for layer in model.decoder.layers:
        experts = layer.mlp.experts
        for name, parameter in list(experts.named_parameters()):
            # A DTensor knows its place among all experts, so a checkpoint can be resharded.
            spread = DTensor.from_local(parameter.detach(), ranks.mesh["ep"], [Shard(0)])
            experts.register_parameter(name, nn.Parameter(spread))
        if replicas.size() == 1:
            ours.update(experts.parameters())
            for parameter in experts.parameters():
                parameter.grad_dtype = grad_dtype
        else:
            # Replicas cut the rows of each expert's matrices: dimension 0 is cut by `ep`.
            shard_over(experts, mesh=replicas, shard_placement_fn=lambda parameter: Shard(1))
        shard_over(layer, mesh=ranks.data_mesh, ignored_params=ours)
    shard_over(model, mesh=ranks.data_mesh, ignored_params=ours)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


def average(value: Tensor) -> Tensor:
    """Mean of a tensor over all ranks."""
    total = value.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def stop() -> None:
    """Leave the groups; `start` may follow, in a copy of this process too."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
