"""The forms of a training step that the benchmark compares: the plain one, then one change added at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch._inductor
import yaml
from torch import Tensor, nn

from criterions import build_criterion
from criterions.memory_bank import MemoryBank
from datasets.preprocessing import BatchPrep, num_spectrogram_frames
from models import MODELS, build_model
from models.network_blocks import (
    PointwiseConv,
    SpatialConv,
    SpatialMaxPool,
    StemConv,
    TemporalConv,
    global_max,
)
from models.video import R2Plus1d
from utils.compiling import compiles
from utils.distributed import records_graphs, wrap
from utils.errors import UserError
from utils.memory import keep_freed_memory
from utils.optim import build_optimizer
from utils.precision import Precision, multiplies_in_tf32
from utils.sync_bn import convert_head_sync_bn, synchronise_bn

INSTANCES = 50_000  # rows of the bank if the YAML gives no number


@dataclass(frozen=True)
class Form:
    """One way to run the same step; `name` says what it adds to the previous one."""

    name: str
    precision: str
    channels_last: bool = False  # and fused Adam
    in_2d: bool = False  # convolutions and max-pool
    device_negatives: bool = False
    keeps_memory: bool = False  # freed memory, on a CPU; PyTorch does so on a GPU
    compiled: bool = False
    graphs: bool = False  # CUDA graphs
    options: Mapping[str, object] = field(default_factory=dict)  # of inductor, beside utils.compiling.OPTIONS


def forms_of(cfg: dict, device: torch.device) -> tuple[list[Form], list[str]]:
    """Return the forms that apply to this configuration here, and a line for each skipped one.

    The last form is what the scripts run. Only R2Plus1d can also run in NCDHW memory and in 3D.
    """
    gpu, left_out = device.type == "cuda", []
    in_any_form = MODELS["video_backbone"][cfg["model"]["args"]["video_backbone"]] is R2Plus1d
    name = "plain: float32, NCDHW, 3D, unfused Adam" if in_any_form else "plain: float32, unfused Adam"
    form = Form(name, "tf32" if multiplies_in_tf32(device) else "fp32", in_2d=not in_any_form)
    forms = [form]

    def add(meaningful: bool, why_not: str, name: str, **changes: object) -> None:
        if meaningful:
            forms.append(replace(forms[-1], name=name, **changes))
        else:
            left_out.append(f"{name}: left out, {why_not}")

    precision = Precision(cfg["precision"], device).name
    add(precision != form.precision, "same as in the plain form", f"+ {precision}", precision=precision)
    add(True, "", "+ channels_last_3d, fused Adam" if in_any_form else "+ fused Adam", channels_last=True)
    add(in_any_form, "the backbone has one form", "+ convolutions and pool in 2D", in_2d=True)
    has_bank, why = cfg["loss"]["name"] == "xID", "the device is a CPU" if not gpu else "this loss draws none"
    add(has_bank and gpu, why, "+ negatives drawn on the device", device_negatives=True)
    forms[-1] = replace(forms[-1], device_negatives=True)
    why = "PyTorch does so on a GPU" if gpu else "it needs glibc"
    add(not gpu and keep_freed_memory(), why, "+ freed memory kept", keeps_memory=True)
    asked = cfg["compile"]
    why = "off on a CPU (--set compile=true)" if asked is None and not gpu else "off or not possible here"
    add(compiles(asked, device), why, "+ torch.compile", compiled=True)
    if forms[-1].compiled and gpu:
        why = "they need one process, accumulate: 1 and cuda_graphs: true"
        add(records_graphs(cfg, device), why, "+ CUDA graphs", graphs=True)
    return forms, left_out


def with_options(forms: list[Form], asked: Sequence[str]) -> list[Form]:
    """Add a form for each of `asked` (`KEY=VALUE[,KEY=VALUE...]`): the last form, compiled with these options.

    Raises:
        UserError: nothing is compiled, or inductor does not know a key.
    """
    if asked and not forms[-1].compiled:
        raise UserError("--inductor: nothing is compiled here; on a CPU ask for it by --set compile=true")
    known = torch._inductor.list_options()
    added = []
    for text in asked:
        options = {}
        for part in text.split(","):
            key, _, value = part.partition("=")
            if key not in known or not value:
                raise UserError(f"--inductor: {part}: expected KEY=VALUE, a key of torch._inductor.list_options()")
            options[key] = yaml.safe_load(value)
        added.append(replace(forms[-1], name=f"  with {text}", options=options))
    return forms + added


class PlainR2Plus1d(R2Plus1d):
    """The same network on contiguous (NCDHW) activations."""

    def forward(self, video: Tensor, return_embs: bool = False) -> Tensor | dict[str, Tensor]:
        x = video.contiguous()
        embs = {}
        for name in ("conv1", "conv2x", "conv3x", "conv4x", "conv5x"):
            x = embs[name] = getattr(self, name)(x)
        embs["pool"] = global_max(x)
        return embs if return_embs else embs["pool"]


class HostMemoryBank(MemoryBank):
    """Draws negatives on the CPU: the host waits for the index, and the device for the host."""

    def sample_negatives(self, index: Tensor, k: int) -> Tensor:
        others = torch.randint(self.num_instances - 1, (len(index), k))
        return (others + (others >= index.cpu()[:, None])).to(index.device)


def in_3d(backbone: R2Plus1d, channels_last: bool) -> None:
    """Switch a backbone in place to 3D convolutions and pooling, and without `channels_last` to NCDHW memory."""
    for module in backbone.modules():
        if isinstance(module, (SpatialConv, TemporalConv, PointwiseConv, StemConv)):
            module.__class__ = nn.Conv3d
        elif isinstance(module, SpatialMaxPool):
            module.__class__ = nn.MaxPool3d
    if not channels_last:
        backbone.__class__ = PlainR2Plus1d
        for module in backbone.modules():
            if isinstance(module, nn.Conv3d):
                module.weight = nn.Parameter(module.weight.detach().contiguous())


class Step:
    """A whole training step in one form: preprocessing, forward, backward, optimizer, bank. Call it to run it.

    Args:
        cfg: a pre-training configuration.
        batch: from `synthetic_batch`, on the device.
    """

    def __init__(self, cfg: dict, form: Form, batch: Mapping[str, Tensor], device: torch.device) -> None:
        self.form, self.batch, self.device = form, batch, device
        torch.manual_seed(cfg["seed"])
        self.model = build_model(cfg["model"]).to(device).train()
        if cfg["loss"]["name"] == "VICLoss":
            self.model = synchronise_bn(self.model, device, form.compiled)
        else:
            convert_head_sync_bn(self.model)
        if not form.in_2d:
            in_3d(self.model.video_model, form.channels_last)
        rows = cfg["loss"]["args"].get("num_instances") or INSTANCES
        self.criterion = build_criterion(cfg["loss"], rows, self.model.out_dim, device, None, cfg["seed"])
        if cfg["loss"]["name"] == "xID" and not form.device_negatives:
            self.criterion.nce_average.__class__ = HostMemoryBank
        self.optimizer = build_optimizer(cfg["optimizer"], self.model)
        if not form.channels_last:
            for group in self.optimizer.param_groups:
                group |= {"fused": False, "foreach": device.type == "cuda"}  # PyTorch's defaults
        self.prepare = BatchPrep(cfg["dataset"], _audio_stats(cfg) if "waveform" in batch else None, device)
        compression = cfg["gradient_compression"]
        self.net = wrap(
            self.model, form.compiled, device, compression, static=True, graphs=form.graphs, options=form.options
        )
        if form.compiled:
            self.prepare.video.compile(dynamic=False)

    def loss(self) -> Tensor:
        """Run preprocessing, forward pass and criterion; xID's bank is updated with the batch."""
        precision = Precision(self.form.precision, self.device)  # also sets the process' flags
        first, second = self.prepare(self.batch)
        with precision.autocast():
            embeddings = self.net(first, second)
        if isinstance(getattr(self.criterion, "nce_average", None), MemoryBank):
            return self.criterion(*embeddings, self.batch["index"])
        return self.criterion(*embeddings)

    def __call__(self) -> Tensor:
        keep_freed_memory(self.form.keeps_memory)
        torch.backends.cudnn.benchmark = True  # in all forms: the choice for a shape is kept
        torch.compiler.cudagraph_mark_step_begin()  # with triton.cudagraphs, what the last step returned may go
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def synthetic_batch(cfg: dict, device: torch.device, clips: int | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Noise in the shapes of a loader's batch, on the device; `clips` None: the configured batch size."""
    data, generator = cfg["dataset"], torch.Generator().manual_seed(seed)
    clips = clips or data["batch_size"]
    frames, size = round(data["video_clip_duration"] * data["video_fps"]), data["crop_size"]
    shape = (clips, frames, size, size, 3)
    change = torch.tensor([[1.0, 1.1, 0.9, 1.2, 0.05]]).repeat(clips, 1)  # flip, brightness, contrast, saturation, hue
    rows = cfg["loss"]["args"].get("num_instances") or INSTANCES
    batch = {
        "index": torch.randint(rows, (clips,), generator=generator),
        "frames": torch.randint(256, shape, dtype=torch.uint8, generator=generator),
        "video_aug": change,
    }
    if cfg["model"]["arch"] == "vicreg_v_wrapper":
        batch |= {"frames_2": batch["frames"].flip(0), "video_aug_2": change}
    else:
        batch |= _synthetic_sound(data, clips, generator)
    return {name: value.to(device) for name, value in batch.items()}


def _synthetic_sound(data: dict, clips: int, generator: torch.Generator) -> dict[str, Tensor]:
    samples, spec = round(data["audio_clip_duration"] * data["audio_srate"]), data["spec_params"]
    times = num_spectrogram_frames(samples, spec["n_fft"], spec["hop_length"])
    return {
        "waveform": 0.1 * torch.randn(clips, samples, generator=generator),
        "gain": torch.full((clips,), 0.9),
        "mel_mask": torch.rand(clips, spec["n_mels"], generator=generator) < 0.1,
        "time_mask": torch.rand(clips, times, generator=generator) < 0.1,
    }


def _audio_stats(cfg: dict) -> dict[str, Tensor]:
    mels = cfg["dataset"]["spec_params"]["n_mels"]
    return {"mean": torch.full((mels,), -2.0), "std": torch.ones(mels)}
