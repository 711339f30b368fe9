"""What the tests of several criterions need."""

import multiprocessing

import pytest
import torch.multiprocessing
from torch.utils._python_dispatch import TorchDispatchMode

SYNCS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::_unique2", "aten::masked_select")


class _NoHostSync(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split(".")[0]
        assert name not in SYNCS, f"{name} makes the host wait for the device"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_host_sync():
    """A context in which operations that make the host wait for a device fail, on a CPU too."""
    return _NoHostSync


@pytest.fixture(scope="session")
def run_ranks():
    """`run_ranks(worker, nprocs, *args)` runs `worker(rank, *args)` in processes and waits for them."""
    multiprocessing.set_forkserver_preload(["torch", "torch.distributed"])  # a second's import once, not in each

    def run(worker, nprocs, *args):
        torch.multiprocessing.start_processes(worker, args, nprocs, start_method="forkserver")

    return run
