"""What the tests of several criterions need."""

import pytest
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
