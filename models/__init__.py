"""Networks: backbones, heads and the wrappers that pair them. `build_model` builds one from a YAML's `model` part."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from models.audio import Conv2DNet
from models.av_wrapper import AVWrapper
from models.vicreg import VICRegVideoWrapper, VICRegWrapper
from models.video import R2Plus1d
from utils.errors import UserError, allowed

MODELS = {
    "arch": {"av_wrapper": AVWrapper, "vicreg_wrapper": VICRegWrapper, "vicreg_v_wrapper": VICRegVideoWrapper},
    "video_backbone": {"R2Plus1d": R2Plus1d},
    "audio_backbone": {"Conv2DNet": Conv2DNet},
}


def build_model(cfg: Mapping[str, Any]) -> nn.Module:
    """Build the network described by the `model` part of a pre-training YAML, with newly initialised weights.

    Args:
        cfg: `arch` (a name in `MODELS["arch"]`) and `args`: `proj_dim` or `exp_dim`, `video_backbone`,
            `video_backbone_args`, `audio_backbone`, `audio_backbone_args` and, for `av_wrapper`, `proj_norm`.
            `args.checkpoint` is ignored: the scripts load weights. `args.backbone_init`, by default the wrapper's, is
            passed to backbones that take an `init`; others make their own first weights.

    Returns:
        The wrapper; `forward(video (N, 3, T, H, W), audio (N, 1, n_mels, frames))`, or `forward(clip1, clip2)` for
        `vicreg_v_wrapper`, returns two embeddings `(N, out_dim)`.

    Raises:
        UserError: an architecture, backbone, depth or key is unknown, or a required one is missing; or
            `backbone_init` is given and no backbone takes an `init`.
    """
    wrapper = _look_up("arch", "model.arch", cfg.get("arch"))
    args = {key: value for key, value in (cfg.get("args") or {}).items() if key != "checkpoint"}
    asked = args.pop("backbone_init", None)
    kinds = [f"{s}_backbone" for s in ("video", "audio") if f"{s}_model" in inspect.signature(wrapper).parameters]
    backbones = {kind: _look_up(kind, f"model.args.{kind}", args.pop(kind, None)) for kind in kinds}
    if asked is not None and not any(map(_takes_init, backbones.values())):
        names = ", ".join(backbone.__name__ for backbone in backbones.values())
        raise UserError(f"model.args.backbone_init: no backbone ({names}) takes an `init`; remove the key")
    for kind, backbone in backbones.items():
        given = {"init": asked or wrapper.backbone_init} if _takes_init(backbone) else {}
        given |= args.pop(f"{kind}_args", None) or {}
        args[kind.replace("backbone", "model")] = _call(backbone, f"model.args.{kind}_args", given)
    return _call(wrapper, "model.args", args)


def _takes_init(backbone: Callable[..., nn.Module]) -> bool:
    return "init" in inspect.signature(backbone).parameters


def _look_up(kind: str, key: str, name: object) -> Callable[..., nn.Module]:
    if name not in list(MODELS[kind]):
        raise UserError(f"{key}: unknown {name!r}; {allowed(name, MODELS[kind])}")
    return MODELS[kind][name]


def _call(cls: Callable[..., nn.Module], key: str, args: Mapping[str, Any]) -> nn.Module:
    """Construct `cls(**args)`; raises a UserError that names an unknown or missing key."""
    known = inspect.signature(cls).parameters
    for name in args:
        if name not in known:
            settings = [k for k in known if not k.endswith("_model")]
            raise UserError(f"{key}.{name}: unknown key for {cls.__name__}; {allowed(name, settings)}")
    for name, parameter in known.items():
        if parameter.default is parameter.empty and name not in args:
            raise UserError(f"{key}.{name}: missing, {cls.__name__} needs it; add it to the YAML")
    return cls(**args)
