"""The number formats of a run: `fp32`, `tf32`, `bf16`, `fp16`."""

import contextlib
import functools
import logging

import torch
from torch import Tensor

from utils.errors import UserError

log = logging.getLogger("avssrl")

AMPERE = (8, 0)  # the compute capability from which GPUs multiply in bf16 and tf32


class Precision:
    """Autocast, loss scaling and optimizer steps for one of four precisions.

    Args:
        name: `fp32`; `tf32` (float32 with the rounding of tensor cores); `bf16` or `fp16` autocast, under which ops
            that stay in float32 (losses, mel filters) are not rounded; None: `bf16` on a GPU (`fp16` on one older than
            Ampere), `fp32` on a CPU.
        device: the run's device.

    Raises:
        UserError: the device does not support this precision.
    """

    def __init__(self, name: str | None, device: torch.device) -> None:
        self.name = name or _default(device)
        self.device_type = device.type
        if self.name in ("tf32", "fp16") and device.type != "cuda":
            raise UserError(f"precision: {self.name} needs a GPU; on a CPU use fp32 or bf16")
        if self.name in ("tf32", "bf16") and device.type == "cuda" and not multiplies_in_tf32(device):
            raise UserError(
                f"precision: {self.name} needs a GPU of compute capability {_dotted(AMPERE)} or more, found "
                f"{_dotted(torch.cuda.get_device_capability(device))}; use fp16 or fp32"
            )
        torch.set_float32_matmul_precision("high" if self.name == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = self.name == "tf32"
        self._scaler = torch.amp.GradScaler(device.type, enabled=self.name == "fp16")

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context of a forward pass."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.name)
        return torch.autocast(self.device_type, dtype=dtype, enabled=dtype is not None)

    def backward(self, loss: Tensor) -> None:
        """Backward pass of the (scaled) loss."""
        self._scaler.scale(loss).backward()

    def gradient_norm(self, optimizer: torch.optim.Optimizer) -> Tensor:
        """Unscale the gradients and return their total norm (0-dim). Call it once before each step."""
        self._scaler.unscale_(optimizer)
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Step the optimizer; with fp16 the step is skipped if gradients overflowed."""
        self._scaler.step(optimizer)
        self._scaler.update()

    def leave_out_step(self) -> None:
        """Skip a step: replaces `step` after `gradient_norm`. The next step can unscale again, with half the scale."""
        self._scaler.update()

    def state_dict(self) -> dict:
        """The loss scale, for the checkpoint; empty unless fp16."""
        return self._scaler.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Restore a checkpoint's loss scale."""
        if state:
            self._scaler.load_state_dict(state)


def multiplies_in_tf32(device: torch.device) -> bool:
    """Whether `device` is a GPU with arithmetic in tf32, and then in bf16, too."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= AMPERE


@functools.cache  # the log names a choice once
def _default(device: torch.device) -> str:
    if device.type != "cuda":
        return "fp32"
    if multiplies_in_tf32(device):
        return "bf16"
    capability = _dotted(torch.cuda.get_device_capability(device))
    log.info("precision: fp16, since this GPU (compute capability %s) does not multiply in bf16", capability)
    return "fp16"


def _dotted(capability: tuple[int, int]) -> str:
    return "{}.{}".format(*capability)
