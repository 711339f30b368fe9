"""The number formats of a run: `fp32`, `tf32`, `bf16`, `fp16`."""

import contextlib

import torch
from torch import Tensor

from utils.errors import UserError


class Precision:
    """Autocast, loss scaling and the optimizer's step under one of four precisions.

    Args:
        name: `fp32` everywhere, `tf32` (float32 with the matrix units' rounding), `bf16` or `fp16` autocast, in which
            what stays in float32 (losses, mel filters) is not rounded; None means `bf16` on a GPU and `fp32` on a CPU.
        device: where the run takes place.

    Raises:
        UserError: the device does not do this precision.
    """

    def __init__(self, name: str | None, device: torch.device) -> None:
        self.name = name or ("bf16" if device.type == "cuda" else "fp32")
        self.device_type = device.type
        if self.name in ("tf32", "fp16") and device.type != "cuda":
            raise UserError(f"precision: {self.name} needs a GPU; on a CPU use fp32 or bf16")
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
        """The norm of all gradients, 0-dim, after undoing the loss scale. Once before each step."""
        self._scaler.unscale_(optimizer)
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """One step of the optimizer, which with fp16 is left out where gradients overflowed."""
        self._scaler.step(optimizer)
        self._scaler.update()

    def leave_out_step(self) -> None:
        """In place of `step`, after `gradient_norm`: the next step may unscale again, by half the scale."""
        self._scaler.update()

    def state_dict(self) -> dict:
        """The loss scale, for the checkpoint; empty unless fp16."""
        return self._scaler.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Go on with a checkpoint's loss scale."""
        if state:
            self._scaler.load_state_dict(state)
