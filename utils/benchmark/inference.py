"""The backbone's forward pass as in linear evaluation: eval mode, no gradients, the pooled feature.

CFG is the YAML of an evaluation (e.g. 8 frames of 224 pixels) or a pre-training; rows are as in `step`.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from datasets.preprocessing import VideoPrep
from models import MODELS
from models.video import R2Plus1d
from utils.benchmark.forms import Form, in_3d, with_options
from utils.benchmark.step import add_measuring_arguments, configured, first_calls, measure_and_report
from utils.cli import at_least
from utils.compiling import compiles
from utils.errors import UserError
from utils.memory import default_device, keep_freed_memory
from utils.precision import Precision, multiplies_in_tf32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `inference`."""
    parser.add_argument("cfg", metavar="CFG", help="YAML of an evaluation or a pre-training")
    parser.add_argument("--depth", type=at_least(1), help="depth of R(2+1)D; default: the YAML's, else 18")
    add_measuring_arguments(parser)


class Forward:
    """One form of the forward pass; call it to run it."""

    def __init__(self, backbone: Callable[[], nn.Module], form: Form, frames: Tensor, device: torch.device) -> None:
        self.form, self.frames, self.device = form, frames, device
        torch.manual_seed(0)
        self.model, self.prepare = backbone().to(device).eval(), VideoPrep().to(device)
        if not form.in_2d:
            in_3d(self.model, form.channels_last)
        if form.compiled:
            self.model.compile(options=form.options or None)
            self.prepare.compile(dynamic=False)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        keep_freed_memory(self.form.keeps_memory)
        precision = Precision(self.form.precision, self.device)
        torch.compiler.cudagraph_mark_step_begin()
        with precision.autocast():
            return self.model(self.prepare(self.frames))


def run(args: argparse.Namespace) -> None:
    """Measure, print the table and write the requested files."""
    device = default_device()
    cfg = configured(args)
    data = cfg["dataset"]
    kind, options = backbone_of(cfg, args.depth)
    size = (round(data["video_clip_duration"] * data["video_fps"]), data["crop_size"], data["crop_size"])
    frames = torch.randint(256, (data["batch_size"], *size, 3), dtype=torch.uint8, device=device)
    forms, left_out = inference_forms(cfg, device, kind is R2Plus1d)
    forms = with_options(forms, args.inductor)
    rows, failed = first_calls(forms, lambda form: Forward(partial(kind, **options), form, frames, device), device)
    name = ", ".join([kind.__name__, *(f"{key} {value}" for key, value in options.items())])
    measure_and_report(args, cfg, device, rows, left_out + failed, f"forward pass of {name}")


def backbone_of(cfg: dict, depth: int | None) -> tuple[type[nn.Module], dict]:
    """The class and arguments of a pre-training's backbone, or for an evaluation R2Plus1d; `depth` replaces its own."""
    args = cfg["model"]["args"]
    kind = MODELS["video_backbone"][args.get("video_backbone", "R2Plus1d")]
    options = dict(args.get("video_backbone_args", {"depth": 18}))
    if depth is not None and "depth" not in options:
        raise UserError(f"--depth {depth}: {kind.__name__} has no depth; omit it")
    return kind, options | ({"depth": depth} if depth is not None else {})


def inference_forms(cfg: dict, device: torch.device, in_any_form: bool) -> tuple[list[Form], list[str]]:
    """Return the forms that apply here, and a line for each skipped one. Only R2Plus1d can run `in_any_form`."""
    gpu, precision = device.type == "cuda", Precision(cfg["precision"], device).name
    plain = Form(
        "plain: float32, NCDHW, 3D" if in_any_form else "plain: float32",
        "tf32" if multiplies_in_tf32(device) else "fp32",
    )
    forms, left_out = [replace(plain, channels_last=not in_any_form, in_2d=not in_any_form)], []
    if precision != forms[0].precision:
        forms.append(replace(forms[0], name=f"+ {precision}", precision=precision))
    else:
        left_out.append(f"+ {precision}: left out, same as in the plain form")
    if in_any_form:
        forms.append(replace(forms[-1], name="+ channels_last_3d", channels_last=True))
        forms.append(replace(forms[-1], name="+ convolutions and pool in 2D", in_2d=True))
    if not gpu and keep_freed_memory():
        forms.append(replace(forms[-1], name="+ freed memory kept", keeps_memory=True))
    if compiles(cfg["compile"], device):
        forms.append(replace(forms[-1], name="+ torch.compile", compiled=True))
    else:
        left_out.append("+ torch.compile: left out, off on a CPU (--set compile=true) or not possible here")
    return forms, left_out
