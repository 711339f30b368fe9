"""From decoded clips to network input: one crop in the worker, everything else a whole batch at a time on the device.

The worker draws each sample's augmentation as a few numbers (`draw_video_augmentation`, `draw_audio_augmentation`); the
device applies them. So a sample does not depend on the batch, the process or the device that it lands on.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets.sampling import block_mask
from utils.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PEAK = 0.95
FLOOR = 1e-5  # of a mel magnitude, before the logarithm


def crop_and_resize(frames: Tensor, box: tuple[int, int, int, int], size: int, mode: str = "bilinear") -> Tensor:
    """Cut the box (top, left, height, width) out of frames (T, H, W, 3) uint8 and resize it to (T, size, size, 3).

    `mode` is `bilinear` (antialiased), `bilinear-plain` (without) or `nearest`.
    """
    top, left, height, width = box
    frames = frames[:, top : top + height, left : left + width]
    if (height, width) == (size, size):
        return frames.contiguous()
    images = frames.permute(0, 3, 1, 2)
    if mode == "nearest":
        images = F.interpolate(images, size=(size, size), mode="nearest")
    else:
        images = F.interpolate(images, size=(size, size), mode="bilinear", antialias=mode == "bilinear")
    return images.permute(0, 2, 3, 1).contiguous()


def draw_video_augmentation(color: list[float], rng: np.random.Generator) -> np.ndarray:
    """One clip's flip (0 or 1), brightness, contrast and saturation factors and hue shift (turns): float32 (5,).

    `color` holds the jitters: factors are uniform in 1 -+ jitter (not below 0), the hue shift in -+ jitter.
    """
    *jitters, hue = color
    factors = [rng.uniform(max(0.0, 1 - jitter), 1 + jitter) for jitter in jitters]
    return np.array([rng.random() < 0.5, *factors, rng.uniform(-hue, hue)], dtype=np.float32)


def no_video_augmentation() -> np.ndarray:
    """What `draw_video_augmentation` answers for a clip that is to stay as it is."""
    return np.array([0, 1, 1, 1, 0], dtype=np.float32)


def draw_audio_augmentation(
    n_mels: int, frames: int, tfmask: dict, rng: np.random.Generator
) -> tuple[np.float32, np.ndarray, np.ndarray]:
    """One clip's gain (0.7 to 1), covered mel bins, bool (n_mels,), and covered time frames, bool (frames,)."""
    gain = np.float32(rng.uniform(0.7, 1.0))
    variable = tfmask["var_masks"]
    mels = block_mask(n_mels, tfmask["freq_mask_ratio"], tfmask["freq_mask_size"], variable, rng)
    times = block_mask(frames, tfmask["time_mask_ratio"], tfmask["time_mask_size"], variable, rng)
    return gain, mels, times


def num_spectrogram_frames(samples: int, n_fft: int, hop_length: int) -> int:
    """The time frames that `LogMelSpectrogram` makes of a waveform of so many samples."""
    return (samples + 2 * ((n_fft - hop_length) // 2) - n_fft) // hop_length + 1


class VideoPrep(nn.Module):
    """Frames uint8 (N, T, H, W, 3) to normalised clips (N, 3, T, H, W), float32, without leaving their memory layout.

    `augmentation` (N, 5) is what `draw_video_augmentation` drew, one draw a clip; None leaves the clips as they are.
    Jitters come in the order brightness, contrast, saturation, hue, each clipped to [0, 1], with the meaning that they
    have in torchvision: contrast blends with the mean gray of a frame, hue turns the HSV wheel.

    Red, green and blue are tensors of their own until the end, which torch.compile makes two kernels of (one sums the
    gray, one does the rest) and which takes a CPU half the time.

    Args:
        color: the jitters that the draws come from; a step whose jitter is 0 is left out.
    """

    def __init__(self, color: Sequence[float] = (1.0, 1.0, 1.0, 0.5)) -> None:
        super().__init__()
        self.color = tuple(color)

    @torch.no_grad()
    def forward(self, frames: Tensor, augmentation: Tensor | None = None) -> Tensor:
        if augmentation is None:
            planes = [plane.float() / 255 for plane in frames.unbind(4)]
        else:
            planes = self._augment(frames, augmentation)
        normalised = [
            (plane - mean) / std for plane, mean, std in zip(planes, IMAGENET_MEAN, IMAGENET_STD, strict=True)
        ]
        return torch.stack(normalised, 4).permute(0, 4, 1, 2, 3)

    def _augment(self, frames: Tensor, augmentation: Tensor) -> list[Tensor]:
        flip, brightness, contrast, saturation, hue = augmentation.view(-1, 5, 1, 1, 1).unbind(1)
        brightness_jitter, contrast_jitter, saturation_jitter, hue_jitter = self.color
        frames = torch.where(flip.unsqueeze(4) > 0, frames.flip(3), frames)
        planes = [plane.float() / 255 for plane in frames.unbind(4)]
        if brightness_jitter:
            planes = [(plane * brightness).clamp(0, 1) for plane in planes]
        if contrast_jitter:
            gray = luma(*planes).mean((2, 3), keepdim=True)
            planes = [torch.lerp(gray, plane, contrast).clamp(0, 1) for plane in planes]
        if saturation_jitter:
            gray = luma(*planes)
            planes = [torch.lerp(gray, plane, saturation).clamp(0, 1) for plane in planes]
        return turn_hue(*planes, hue) if hue_jitter else planes


def luma(red: Tensor, green: Tensor, blue: Tensor) -> Tensor:
    """The gray of colours, by ITU-R BT.601."""
    return 0.299 * red + 0.587 * green + 0.114 * blue


def turn_hue(red: Tensor, green: Tensor, blue: Tensor, turns: Tensor) -> list[Tensor]:
    """Turn the HSV hue of colours in [0, 1] by `turns` (1 is the full circle); red, green and blue again.

    With value v, chroma c and hue h (in sixths of the circle), each channel is v - c * clip(tent(h)), where the tents
    of red, green and blue stand a third of the circle apart.
    """
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    safe = torch.where(chroma > 0, chroma, 1.0)
    sixths = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    phases = [torch.remainder(sixths + 6 * turns + offset, 6) for offset in (5, 3, 1)]
    return [value - chroma * torch.minimum(phase, 4 - phase).clamp(0, 1) for phase in phases]


def slaney_mel(hz: np.ndarray) -> np.ndarray:
    """Hz to mel on Slaney's scale: linear up to 1 kHz (15 mel), logarithmic above (27 mel a factor of 6.4)."""
    hz = np.asarray(hz, dtype=np.float64)
    return np.where(hz < 1000, hz * 3 / 200, 15 + 27 * np.log(np.maximum(hz, 1000) / 1000) / math.log(6.4))


def slaney_hz(mel: np.ndarray) -> np.ndarray:
    """The inverse of `slaney_mel`."""
    mel = np.asarray(mel, dtype=np.float64)
    return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((np.maximum(mel, 15) - 15) * math.log(6.4) / 27))


def mel_filters(sample_rate: int, n_fft: int, n_mels: int) -> Tensor:
    """Triangular filters over 0 to sample_rate / 2, each filter's weights summing to 1: float32 (n_mels, n_fft/2 + 1).

    A filter so narrow that no FFT bin falls into it stays zero.
    """
    bins = np.arange(n_fft // 2 + 1) * sample_rate / n_fft
    edges = slaney_hz(np.linspace(0, slaney_mel(sample_rate / 2), n_mels + 2))
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    filters = np.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)).clip(0)
    total = filters.sum(1, keepdims=True)
    return torch.from_numpy(filters / np.where(total > 0, total, 1)).float()


class LogMelSpectrogram(nn.Module):
    """Waveforms (N, L) to log10-mel spectrograms (N, n_mels, frames).

    Reflect-padded by (n_fft - hop_length) / 2 on both sides, no centring, symmetric Hann window, magnitude, mel filters
    of `mel_filters`, log10 with floor 1e-5. 2 s at 16 kHz, n_fft 512, hop 256, 128 mels: 128 x 125.
    """

    def __init__(self, sample_rate: int, n_fft: int, hop_length: int, n_mels: int) -> None:
        super().__init__()
        self.n_fft, self.hop_length = n_fft, hop_length
        self.pad = (n_fft - hop_length) // 2
        self.register_buffer("window", torch.hann_window(n_fft, periodic=False), persistent=False)
        self.register_buffer("filters", mel_filters(sample_rate, n_fft, n_mels), persistent=False)

    @torch.no_grad()
    def forward(self, waveform: Tensor) -> Tensor:
        padded = F.pad(waveform.unsqueeze(1), (self.pad, self.pad), mode="reflect").squeeze(1)
        spectrum = torch.stft(
            padded, self.n_fft, self.hop_length, window=self.window, center=False, return_complex=True
        ).abs()
        return (self.filters @ spectrum).clamp_min(FLOOR).log10()


class AudioPrep(nn.Module):
    """Waveforms (N, L) to normalised log-mel spectrograms (N, 1, n_mels, frames).

    Each waveform is scaled to a peak of 0.95 (silence stays silence), times its gain; each mel bin is z-normalised by
    the training set's `mean` and `std` (n_mels,); covered bins take the spectrogram's minimum.
    """

    def __init__(self, sample_rate: int, spec_params: dict, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.log_mel = LogMelSpectrogram(sample_rate, **spec_params)
        self.register_buffer("mean", mean.float().view(-1, 1), persistent=False)
        self.register_buffer("std", std.float().clamp_min(1e-3).view(-1, 1), persistent=False)

    @torch.no_grad()
    def forward(
        self,
        waveform: Tensor,
        gain: Tensor | None = None,
        mel_mask: Tensor | None = None,
        time_mask: Tensor | None = None,
    ) -> Tensor:
        waveform = normalise_peak(waveform)
        if gain is not None:
            waveform = waveform * gain.unsqueeze(1)
        spectrogram = (self.log_mel(waveform) - self.mean) / self.std
        if mel_mask is not None and time_mask is not None:
            covered = mel_mask.unsqueeze(2) | time_mask.unsqueeze(1)
            spectrogram = torch.where(covered, spectrogram.amin((1, 2), keepdim=True), spectrogram)
        return spectrogram.unsqueeze(1)


def normalise_peak(waveform: Tensor) -> Tensor:
    """Scale waveforms (N, L) to a peak of 0.95; silence stays silence."""
    peak = waveform.abs().amax(1, keepdim=True)
    return waveform * torch.where(peak > 0, PEAK / peak.clamp_min(1e-8), torch.ones_like(peak))


class BatchPrep(nn.Module):
    """A loader's batch to network input on the device: the copy, `VideoPrep` and `AudioPrep`.

    Args:
        dataset: a configuration's `dataset` section.
        audio_stats: `mean` and `std` (n_mels,) of the training set; None where no sound is used.
        device: where the network is.

    Raises:
        UserError: the statistics are of another number of mel bins than the configuration's.
    """

    def __init__(self, dataset: dict, audio_stats: dict[str, Tensor] | None, device: torch.device) -> None:
        super().__init__()
        self.video = VideoPrep(dataset["color"])
        self.audio = None
        if audio_stats is not None:
            bins, asked = len(audio_stats["mean"]), dataset["spec_params"]["n_mels"]
            if bins != asked:
                raise UserError(f"dataset.spec_params.n_mels: {asked}, but the audio statistics are of {bins} mel bins")
            self.audio = AudioPrep(dataset["audio_srate"], dataset["spec_params"], **audio_stats)
        self.device = device
        self.to(device)

    def forward(self, batch: dict) -> tuple[Tensor, Tensor]:
        """Clips (N, 3, T, H, W) and their spectrograms (N, 1, n_mels, frames), or the second clips of pairs."""
        on_device = {
            name: value.to(self.device, non_blocking=True) for name, value in batch.items() if isinstance(value, Tensor)
        }
        get = on_device.get
        training = "video_aug" in on_device
        video = self.video if training else self.video.forward  # compiled for a training batch's shape, if at all
        clips = video(on_device["frames"], get("video_aug"))
        if self.audio is None:
            return clips, video(on_device["frames_2"], get("video_aug_2"))
        return clips, self.audio(on_device["waveform"], get("gain"), get("mel_mask"), get("time_mask"))
