"""The backbone's forward pass as in linear evaluation: eval mode, no gradients, the pooled feature.

CFG is the YAML of an evaluation (e.g. 8 frames of 224 pixels) or a pre-training; rows are as in `step`.
"""

import argparse
from dataclasses import replace

import torch
from torch import Tensor

from datasets.preprocessing import VideoPrep
from models.video import R2Plus1d
from utils.benchmark.forms import Form, in_3d, with_options
from utils.benchmark.step import add_measuring_arguments, configured, first_calls, measure_and_report
from utils.cli import at_least
from utils.compiling import compiles
from utils.memory import default_device, keep_freed_memory
from utils.precision import Precision


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `inference`."""
    parser.add_argument("cfg", metavar="CFG", help="YAML of an evaluation or a pre-training")
    parser.add_argument("--depth", type=at_least(1), help="depth of R(2+1)D; default: the YAML's, else 18")
    add_measuring_arguments(parser)


class Forward:
    """One form of the forward pass; call it to run it."""

    def __init__(self, depth: int, form: Form, frames: Tensor, device: torch.device) -> None:
        self.form, self.frames, self.device = form, frames, device
        torch.manual_seed(0)
        self.model, self.prepare = R2Plus1d(depth).to(device).eval(), VideoPrep().to(device)
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
    depth = args.depth or cfg["model"]["args"].get("video_backbone_args", {}).get("depth", 18)
    size = (round(data["video_clip_duration"] * data["video_fps"]), data["crop_size"], data["crop_size"])
    frames = torch.randint(256, (data["batch_size"], *size, 3), dtype=torch.uint8, device=device)
    forms, left_out = inference_forms(cfg, device)
    forms = with_options(forms, args.inductor)
    rows, failed = first_calls(forms, lambda form: Forward(depth, form, frames, device), device)
    measure_and_report(args, cfg, device, rows, left_out + failed, f"forward pass of R(2+1)D-{depth}")


def inference_forms(cfg: dict, device: torch.device) -> tuple[list[Form], list[str]]:
    """Return the forms that apply here, and a line for each skipped one."""
    gpu, precision = device.type == "cuda", Precision(cfg["precision"], device).name
    forms, left_out = [Form("plain: float32, NCDHW, 3D", "tf32" if gpu else "fp32")], []
    if precision != forms[0].precision:
        forms.append(Form(f"+ {precision}", precision))
    else:
        left_out.append(f"+ {precision}: left out, same as in the plain form")
    forms.append(Form("+ channels_last_3d", precision, channels_last=True))
    forms.append(Form("+ convolutions and pool in 2D", precision, channels_last=True, in_2d=True))
    if not gpu and keep_freed_memory():
        forms.append(replace(forms[-1], name="+ freed memory kept", keeps_memory=True))
    if compiles(cfg["compile"], device):
        forms.append(replace(forms[-1], name="+ torch.compile", compiled=True))
    else:
        left_out.append("+ torch.compile: left out, off on a CPU (--set compile=true) or not possible here")
    return forms, left_out
