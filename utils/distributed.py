"""Process groups: launching and connecting a run's processes, and collectives that also work in a single process.

`rank()`, `world_size()`, `is_main()`, `gather()` etc. can be called without a process group; they then behave as in a
run of one process.
"""

import argparse
import contextlib
import ctypes
import inspect
import logging
import os
import re
import signal
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import resource_tracker
from types import FrameType

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from utils.compiling import CUDA_GRAPHS, OPTIONS, compiles
from utils.errors import STATUS, Preempted, RunFailed, UserError, end_log, in_one_line, lost_worker, message_of
from utils.memory import default_device
from utils.processes import cores

log = logging.getLogger("avssrl")

TIMEOUT = timedelta(minutes=30)  # of a collective call; rank 0 may be preparing data meanwhile
_ARGUMENTS = inspect.signature(DistributedDataParallel).parameters  # newer PyTorch renamed one
_FORWARD_SYNC = "forward_sync_buffers" if "forward_sync_buffers" in _ARGUMENTS else "broadcast_buffers"
GRACE = 10.0  # seconds for the node's other processes to end by themselves, and again after SIGTERM


def _has_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process' rank, 0 to world_size() - 1."""
    return dist.get_rank() if _has_group() else 0


def world_size() -> int:
    """The number of processes in the run."""
    return dist.get_world_size() if _has_group() else 1


def local_world_size() -> int:
    """The number of the run's processes on this node, from torchrun's variable, which `launch` sets otherwise."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if _has_group() else 1


def is_main() -> bool:
    """True in the one process that writes files and logs (rank 0)."""
    return rank() == 0


def barrier() -> None:
    """Wait for every process."""
    if _has_group():
        dist.barrier()


def gather(x: torch.Tensor) -> torch.Tensor:
    """Concatenate `x` (N, ...) of all ranks along the first dimension, in rank order: (W * N, ...). No gradient.

    All ranks must pass the same shape.
    """
    if world_size() == 1:
        return x.detach()
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


class _GatherWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: torch.Tensor) -> torch.Tensor:
        ctx.rows = x.shape[0]
        return gather(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor) -> torch.Tensor:
        grad = all_reduce_sum(grad.contiguous())
        start = rank() * ctx.rows
        return grad[start : start + ctx.rows]


def gather_with_grad(x: torch.Tensor) -> torch.Tensor:
    """`gather` with gradients: the backward pass sums the gradients of all ranks and returns each rank its rows."""
    return x if world_size() == 1 else _GatherWithGrad.apply(x)


def all_reduce_sum(x: torch.Tensor) -> torch.Tensor:
    """The sum of `x` over all ranks, as a new tensor without gradient."""
    x = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def all_to_all(x: torch.Tensor) -> torch.Tensor:
    """Send row r of `x` (W, ...) to rank r; row r of the result (W, ...) comes from rank r. No gradient."""
    if world_size() == 1:
        return x.detach()
    received = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, x.detach().contiguous())
    return received


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on any rank; every rank must call it. Uses gloo, so no host waits for its device."""
    if world_size() == 1:
        return flag
    flags = torch.tensor(int(flag))
    dist.all_reduce(flags)
    return bool(flags)


def broadcast_object(value: object) -> object:
    """Rank 0's `value`, on every rank (sent as a pickle)."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: object) -> list:
    """Every rank's `value` (sent as a pickle), in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def records_graphs(cfg: Mapping, device: torch.device) -> bool:
    """Whether a pre-training's compiled forward and backward passes are recorded as CUDA graphs, each queued as one.

    As `cuda_graphs` says, if a single process on a GPU steps after every micro-batch. DDP's buckets would split the
    graphs, and accumulated gradients would be overwritten.
    """
    if not cfg["cuda_graphs"] or device.type != "cuda" or world_size() > 1 or cfg["accumulate"] > 1:
        return False
    return compiles(cfg["compile"], device)


def wrap(
    model: nn.Module,
    compiled: bool | None,
    device: torch.device,
    compression: str | None = None,
    static: bool = False,
    graphs: bool = False,
    options: Mapping[str, object] | None = None,
) -> nn.Module:
    """Prepare `model` for training steps: compile it, and with several processes wrap it in DDP.

    The model is compiled in place, which keeps its parameter names. DDP does not broadcast BN's running statistics
    before each step: measurements and checkpoints use rank 0's in any case.

    Args:
        compiled: see `compiles` (None: on a GPU).
        compression: `bf16`: gradients are sent between processes in bf16, in half the bytes, and summed in bf16, or by
            more than two CPU processes in float32.
        static: every step runs the same graph and synchronises (no accumulation). Ignored for a compiled model, whose
            graph is split at DDP's buckets, which rules it out.
        graphs: see `records_graphs`. Outputs and gradients of a step are then overwritten by the next.
        options: of torch.compile's inductor, in addition to `OPTIONS`.
    """
    if compiled := compiles(compiled, device):
        model.compile(options={**OPTIONS, **(CUDA_GRAPHS if graphs else {}), **(options or {})})
    if world_size() == 1:
        return model
    net = DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        static_graph=static and not compiled,
        **{_FORWARD_SYNC: False},
    )
    if device.type == "cpu" and world_size() > 2:
        net.register_comm_hook(torch.bfloat16 if compression == "bf16" else torch.float32, _mean_in_rank_order)
    elif compression == "bf16":
        net.register_comm_hook(None, bf16_compress_hook)
    return net


def _mean_in_rank_order(dtype: torch.dtype, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """DDP's mean of gradients, sent in `dtype` and summed in an order that depends only on the ranks.

    DDP rebuilds its buckets after the first step, and gloo's ring sums in an order that depends on the position in a
    bucket: with three or more processes, a resumed run would round differently.
    """
    own = bucket.buffer()
    parts = [torch.empty_like(own, dtype=dtype) for _ in range(world_size())]
    sent = dist.all_gather(parts, own.to(dtype), async_op=True).get_future()

    def mean(_: torch.futures.Future) -> torch.Tensor:
        total = parts[0].to(own.dtype)
        for part in parts[1:]:
            total += part
        return own.copy_(total / len(parts))

    return sent.then(mean)


@dataclass(frozen=True)
class Processes:
    """The process layout of a run, from the view of one process or of the one that starts them.

    `local` is the number of processes to start here, None if a launcher (torchrun, Slurm, a person) starts each;
    `here` is the number on this node, whoever starts them.
    """

    world_size: int
    first_rank: int  # the rank of this node's first process, or of this process
    local: int | None
    here: int
    local_rank: int
    url: str
    backend: str


def launch(worker: Callable, options: argparse.Namespace, *args: object) -> None:
    """Run `worker(device, *args)` in each process that command line and environment ask for, as a process group.

    By default this process runs alone, on the GPU if there is one; with `--gpu N` on that GPU. Under torchrun or Slurm
    it is one of their processes. `--distributed` or `--multiprocessing-distributed` starts one process per GPU here
    (without GPUs one, or `--nproc`). With `--world-size`, `--rank` and `--dist-url`, or as one Slurm task per node,
    this node is one of several.

    Raises:
        UserError: the options do not match each other or the machine, or a process raised one.
        RunFailed: a process died; the message names its rank.
    """
    plan = plan_processes(options)
    if plan is None:
        worker(_single_device(options.gpu), *args)
    elif plan.local is None:
        if plan.url == "env://":
            _end_with_torchrun()
        _run_one(plan, plan.first_rank, plan.local_rank, worker, args)
    else:
        _spawn(plan, worker, args)


def _end_with_torchrun() -> None:
    """Have Linux send SIGTERM (save and exit) to this process when torchrun, which started it, dies.

    Not used if a shell started it: logging out should not stop a run.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def plan_processes(options: argparse.Namespace) -> Processes | None:
    """The process layout for `launch`, from the options and the environment; None: this process alone.

    Raises:
        UserError: the options do not match each other, the environment or the machine.
    """
    gpus, env = torch.cuda.device_count(), os.environ
    backend = options.dist_backend or ("nccl" if gpus else "gloo")
    if backend == "nccl" and not gpus:
        raise UserError("--dist-backend nccl: needs GPUs and none is visible; use gloo")
    nodes = options.world_size
    if nodes is not None and nodes < 1 or options.nproc is not None and options.nproc < 1:
        raise UserError(f"--world-size {nodes}, --nproc {options.nproc}: expected 1 or more")
    many = options.distributed or (nodes or 1) > 1
    if (options.dist_url or "").startswith("tcp://") and not re.fullmatch(r"tcp://[^/?#]+:\d+", options.dist_url):
        raise UserError(f"--dist-url {options.dist_url}: expected tcp://HOST:PORT, such as tcp://node1:29500")
    torchrun = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"} <= env.keys()
    slurm = (nodes is None or not many) and _from_launcher("SLURM_STEP_NUM_TASKS", 1) > 1 and "SLURM_PROCID" in env
    if options.gpu is not None and (many or torchrun or slurm):
        raise UserError(f"--gpu {options.gpu}: selects a single GPU; omit it in a run of several processes")
    if torchrun:
        return _plan_torchrun(options, gpus, backend)
    if options.nproc is not None and not options.distributed:
        raise UserError(f"--nproc {options.nproc}: is for several processes; add --distributed")
    if slurm:
        if options.rank is not None:
            raise UserError(f"--rank {options.rank}: Slurm sets the rank of this process; omit it")
        task = _plan_slurm(int(env["SLURM_STEP_NUM_TASKS"]), options.dist_url, backend)
        if task.here > 1 and options.nproc is not None:
            raise UserError(f"--nproc {options.nproc}: Slurm started {task.here} processes here; omit it")
        if task.here > 1 or not options.distributed:
            _check_gpus("Slurm", task.here, gpus, backend)
            return task
        local = _processes_here(options.nproc, gpus, backend)
        return Processes(task.world_size * local, task.first_rank * local, local, local, 0, task.url, backend)
    if not many:
        for name, value in (("rank", options.rank), ("dist-url", nodes is None and options.dist_url)):
            if value:
                raise UserError(f"--{name} {value}: is for several processes; add --distributed or --world-size N")
        return None
    nodes = nodes or 1
    rank_here = 0 if options.rank is None and nodes == 1 else options.rank
    if rank_here is None or not 0 <= rank_here < nodes:
        raise UserError(f"--rank {options.rank}: with --world-size {nodes} expected 0 to {nodes - 1}")
    if nodes > 1 and options.dist_url is None:
        raise UserError(f"--world-size {nodes}: needs --dist-url tcp://HOST:PORT of the first node")
    if not options.distributed:
        return Processes(nodes, rank_here, None, 1, 0, options.dist_url, backend)
    local = _processes_here(options.nproc, gpus, backend)
    url = options.dist_url or f"tcp://127.0.0.1:{_free_port()}"
    return Processes(nodes * local, rank_here * local, local, local, 0, url, backend)


def _processes_here(nproc: int | None, gpus: int, backend: str) -> int:
    """The number of processes to start on this node."""
    local = nproc or gpus or 1
    if backend == "nccl" and local > gpus:
        raise UserError(
            f"--nproc {local}: nccl takes one process a GPU, but {gpus} are visible; or use --dist-backend gloo"
        )
    return local


def _plan_torchrun(options: argparse.Namespace, gpus: int, backend: str) -> Processes:
    world, own_rank, local_rank = (_from_launcher(name) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"))
    if options.world_size not in (None, 1, world):
        raise UserError(f"--world-size {options.world_size}: torchrun started {world} processes; omit it")
    url = options.dist_url if options.dist_url != "env://" else None
    for name, value in (("nproc", options.nproc), ("rank", options.rank), ("dist-url", url)):
        if value is not None:
            raise UserError(f"--{name} {value}: torchrun sets the processes, their ranks and address; omit it")
    here = _from_launcher("LOCAL_WORLD_SIZE", 1)
    _check_gpus("torchrun", here, gpus, backend)
    return Processes(world, own_rank, None, here, local_rank, "env://", backend)


def _check_gpus(launcher: str, here: int, gpus: int, backend: str) -> None:
    """UserError if two of this node's processes would share a GPU. (One visible GPU may be each process' own.)"""
    if backend == "nccl" and 1 < gpus < here:
        raise UserError(
            f"{launcher} started {here} processes on this node, but {gpus} GPUs are visible and nccl takes one process "
            f"a GPU; start {gpus}, or use --dist-backend gloo"
        )


def _plan_slurm(tasks: int, url: str | None, backend: str) -> Processes:
    env = os.environ
    if url is None:
        host = env.get("MASTER_ADDR") or _first_host(env.get("SLURM_STEP_NODELIST", env.get("SLURM_NODELIST", "")))
        port = env.get("MASTER_PORT") or 20000 + _from_launcher("SLURM_JOB_ID", 0) % 20000
        url = f"tcp://{host}:{port}"
    here = _tasks_on_node(env.get("SLURM_STEP_TASKS_PER_NODE", ""), _from_launcher("SLURM_NODEID", 0))
    own_rank, local_rank = _from_launcher("SLURM_PROCID"), _from_launcher("SLURM_LOCALID")
    return Processes(tasks, own_rank, None, here, local_rank, url, backend)


def _from_launcher(name: str, default: int | None = None) -> int:
    """An integer that torchrun or Slurm put into the environment. Raises UserError if it is none."""
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal():
        found = "nothing" if text is None else repr(text)
        raise UserError(f"environment variable {name}: expected a number from torchrun or Slurm, found {found}")
    return int(text)


def _tasks_on_node(tasks_per_node: str, node: int) -> int:
    """A node's number of tasks from Slurm's list (`8(x3),4`: nodes 0 to 2 have 8, node 3 has 4); 1 if it is empty."""
    counts = []
    for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks_per_node):
        counts += [int(tasks)] * int(times or 1)
    return counts[node] if node < len(counts) else 1


def _first_host(nodelist: str) -> str:
    """The first host of a Slurm list: `gpu[003-007,012],cpu1` is gpu003, `rack[1-2]n[3-4]` is rack1n3."""
    first = re.match(r"(?:[^\[,]|\[[^\]]*\])*", nodelist)[0]  # up to a comma outside brackets
    host = re.sub(r"\[([^-,\]]+)[^\]]*\]", r"\1", first)
    if not host:
        raise UserError(f"SLURM_STEP_NODELIST={nodelist!r}: names no host; give --dist-url tcp://HOST:PORT")
    return host


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _single_device(gpu: int | None) -> torch.device:
    gpus = torch.cuda.device_count()
    if gpu is None:
        return default_device()
    if not 0 <= gpu < gpus:
        raise UserError(f"--gpu {gpu}: {gpus} GPUs are visible; omit the option to run on the CPU")
    torch.cuda.set_device(gpu)
    return torch.device("cuda", gpu)


def _run_one(plan: Processes, own_rank: int, local_rank: int, worker: Callable, args: tuple) -> None:
    os.environ["LOCAL_WORLD_SIZE"] = str(plan.here)
    device = default_device()
    if device.type == "cuda":
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    try:
        # gloo besides nccl: lets hosts agree on something without waiting for their devices
        backend = "cpu:gloo,cuda:nccl" if plan.backend == "nccl" else plan.backend
        with _interruptible():
            store, *_ = next(dist.rendezvous(plan.url, own_rank, plan.world_size, timeout=TIMEOUT))
            store = _clean_store(store, own_rank, plan.world_size)
            dist.init_process_group(backend, None, TIMEOUT, plan.world_size, own_rank, store)
            dist.all_reduce(torch.zeros(()))  # a process that ended now would break the others' connecting
    except (ValueError, RuntimeError) as error:  # DistError is a RuntimeError
        raise UserError(f"--dist-url {plan.url}: no process group: {' '.join(str(error).split())[:200]}") from error
    worker(device, *args)
    dist.destroy_process_group()


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C end this process at once: Python's handler cannot run while PyTorch waits for other processes."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # unless ignored, as in a shell's background job
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if before is signal.default_int_handler:
            signal.signal(signal.SIGINT, before)


def _clean_store(store: dist.Store, own_rank: int, world_size: int) -> dist.Store:
    """`store` with a prefix known only to the processes starting now.

    torchrun's store outlives its processes: after a restart it still holds the addresses of dead ones, which may be
    mistaken for new ones (pytorch#135712), and its restart count is local to a node. So rank 0 chooses a random prefix
    and sends it to each rank that asks; each request carries a random mark.

    Raises:
        UserError: a rank did not connect in time.
    """
    mark = uuid.uuid4().hex
    if own_rank > 0:
        store.set(f"question/{own_rank}", mark)
        name = store.get(f"answer/{mark}").decode()
        store.set(f"heard/{name}/{own_rank}", "")
        return dist.PrefixStore(name, store)
    end = time.monotonic() + TIMEOUT.total_seconds()
    for other in range(1, world_size):
        while not store.check([f"heard/{mark}/{other}"]):
            if store.check([f"question/{other}"]):
                store.set(f"answer/{store.get(f'question/{other}').decode()}", mark)
            if time.monotonic() > end:
                raise UserError(f"rank {other} of {world_size} did not connect within {TIMEOUT}; was it started?")
            time.sleep(0.01)
    return dist.PrefixStore(mark, store)


def _spawn(plan: Processes, worker: Callable, args: tuple) -> None:
    default = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    resource_tracker.ensure_running()  # inherits ignored signals and ignores SIGTERM: it must outlive both
    signal.signal(signal.SIGUSR1, default)
    messages = mp.get_context("spawn").SimpleQueue()
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # we report ourselves who ended and why
    asked, processes = [], []  # signals received, and the processes to forward them to

    def pass_on(number: int, frame: FrameType | None = None) -> None:
        asked.append(signal.Signals(number).name)
        for process in processes:
            if process.is_alive():
                os.kill(process.pid, number)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, pass_on)
    context = mp.spawn(_spawned, (plan, worker, args, messages), nprocs=plan.local, join=False)
    processes += context.processes
    if asked:  # received before the processes existed
        pass_on(signal.Signals[asked[0]])
    try:
        while not context.join(grace_period=GRACE):
            pass
    except KeyboardInterrupt:  # may have reached only this process; from a terminal it goes to all
        pass_on(signal.SIGTERM)
        for process in processes:
            process.join(GRACE)
            process.kill()
        raise
    except mp.ProcessExitedException as error:
        if not messages.empty():
            kind, message = messages.get()
            raise kind(message) from None
        if error.signal_name in asked:  # ranks that have installed StopSignal do not die of these
            raise Preempted(f"stopped by {error.signal_name} before the first step; run it again to go on") from None
        how = f"by {error.signal_name}" if error.signal_name else f"with exit status {error.exit_code}"
        own_rank = plan.first_rank + error.error_index
        raise RunFailed(f"rank {own_rank} ended {how}; the other processes of this node were stopped") from None
    except mp.ProcessRaisedException as error:
        own_rank = plan.first_rank + error.error_index
        raise RunFailed(f"rank {own_rank} failed; the other processes of this node were stopped: {error}") from None


def _spawned(local_rank: int, plan: Processes, worker: Callable, args: tuple, messages: mp.SimpleQueue) -> None:
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cores() // plan.local))
    try:
        _run_one(plan, plan.first_rank + local_rank, local_rank, worker, args)
    except (UserError, RunFailed, Preempted) as error:
        messages.put((type(error), message_of(error)))
        end_log(in_one_line(error))
        sys.exit(STATUS[type(error)])
    except RuntimeError as error:
        if (message := lost_worker(error)) is None:
            raise
        failure = RunFailed(f"rank {plan.first_rank + local_rank}: {message}")
        messages.put((RunFailed, str(failure)))
        end_log(in_one_line(failure))
        sys.exit(STATUS[RunFailed])
