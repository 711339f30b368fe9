"""From decoded clips to network input: the worker crops, everything else is done per batch on the device.

The worker draws the parameters of each sample's augmentation (`draw_video_augmentation`, `draw_audio_augmentation`) and
the device applies them. So a sample does not depend on its batch, process or device.
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
FLOOR = 1e-5  # minimum mel magnitude before the logarithm


def crop_and_resize(frames: Tensor, box: tuple[int, int, int, int], size: int, mode: str = "bilinear") -> Tensor:
    """Crop frames, uint8 (T, H, W, 3), to the box (top, left, height, width) and resize to (T, size, size, 3).

    `mode` is `bilinear` (antialiased), `bilinear-plain` (not antialiased) or `nearest`.
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
    """Draw a clip's flip (0 or 1), brightness, contrast and saturation factors and hue shift (turns): float32 (5,).

    `color` holds the jitters: factors are uniform in 1 +- jitter (at least 0), the hue shift in +- jitter.
    """
    *jitters, hue = color
    factors = [rng.uniform(max(0.0, 1 - jitter), 1 + jitter) for jitter in jitters]
    return np.array([rng.random() < 0.5, *factors, rng.uniform(-hue, hue)], dtype=np.float32)


def no_video_augmentation() -> np.ndarray:
    """Return the parameters, as from `draw_video_augmentation`, that leave a clip unchanged."""
    return np.array([0, 1, 1, 1, 0], dtype=np.float32)


def draw_audio_augmentation(
    n_mels: int, frames: int, tfmask: dict, rng: np.random.Generator
) -> tuple[np.float32, np.ndarray, np.ndarray]:
    """Draw a clip's gain (0.7 to 1), masked mel bins, bool (n_mels,), and masked time frames, bool (frames,)."""
    gain = np.float32(rng.uniform(0.7, 1.0))
    variable = tfmask["var_masks"]
    mels = block_mask(n_mels, tfmask["freq_mask_ratio"], tfmask["freq_mask_size"], variable, rng)
    times = block_mask(frames, tfmask["time_mask_ratio"], tfmask["time_mask_size"], variable, rng)
    return gain, mels, times


def num_spectrogram_frames(samples: int, n_fft: int, hop_length: int) -> int:
    """Number of time frames in the `LogMelSpectrogram` of `samples` samples."""
    return (samples + 2 * ((n_fft - hop_length) // 2) - n_fft) // hop_length + 1


class VideoPrep(nn.Module):
    """Augment and normalise frames, uint8 (N, T, H, W, 3), to float32 clips (N, 3, T, H, W) in the same memory layout.

    `augmentation` (N, 5) holds one draw of `draw_video_augmentation` per clip; None leaves the clips unchanged. The
    order is brightness, contrast, saturation, hue, each clipped to [0, 1] and defined as in torchvision: contrast
    blends with the mean gray of a frame, hue rotates the HSV wheel.

    Red, green and blue are separate tensors until the end. torch.compile then needs only two kernels (one sums the
    gray, one does the rest), and a CPU half the time.

    Args:
        color: the jitters used for the draws; steps with jitter 0 are skipped.
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
    """Convert colours to gray (ITU-R BT.601)."""
    return 0.299 * red + 0.587 * green + 0.114 * blue


def turn_hue(red: Tensor, green: Tensor, blue: Tensor, turns: Tensor) -> list[Tensor]:
    """Rotate the HSV hue of colours in [0, 1] by `turns` (1: full circle). Returns red, green and blue.

    With value v, chroma c and hue h (in sixths of the circle), each channel is v - c * clip(tent(h)). The tents of
    red, green and blue are a third of the circle apart.
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
    """Convert Hz to mel on Slaney's scale: linear up to 1 kHz (15 mel), then logarithmic (27 mel per factor 6.4)."""
    hz = np.asarray(hz, dtype=np.float64)
    return np.where(hz < 1000, hz * 3 / 200, 15 + 27 * np.log(np.maximum(hz, 1000) / 1000) / math.log(6.4))


def slaney_hz(mel: np.ndarray) -> np.ndarray:
    """Convert mel to Hz; the inverse of `slaney_mel`."""
    mel = np.asarray(mel, dtype=np.float64)
    return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((np.maximum(mel, 15) - 15) * math.log(6.4) / 27))


def mel_filters(sample_rate: int, n_fft: int, n_mels: int) -> Tensor:
    """Return triangular filters from 0 to sample_rate / 2 with weights that sum to 1: float32 (n_mels, n_fft/2 + 1).

    A filter too narrow to contain an FFT bin is zero.
    """
    bins = np.arange(n_fft // 2 + 1) * sample_rate / n_fft
    edges = slaney_hz(np.linspace(0, slaney_mel(sample_rate / 2), n_mels + 2))
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    filters = np.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)).clip(0)
    total = filters.sum(1, keepdims=True)
    return torch.from_numpy(filters / np.where(total > 0, total, 1)).float()


class LogMelSpectrogram(nn.Module):
    """Compute log10-mel spectrograms (N, n_mels, frames) of waveforms (N, L).

    Reflect padding by (n_fft - hop_length) / 2 on both sides, no centring, symmetric Hann window, magnitude, filters of
    `mel_filters`, log10 with floor 1e-5. Example: 2 s at 16 kHz, n_fft 512, hop 256 and 128 mels give 128 x 125.
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
    """Compute normalised log-mel spectrograms (N, 1, n_mels, frames) of waveforms (N, L).

    Each waveform is scaled to a peak of 0.95 (silence stays silent) times its gain. Mel bins are normalised by the
    training set's `mean` and `std` (n_mels,). Masked bins are set to the spectrogram's minimum.
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
    """Scale waveforms (N, L) to a peak of 0.95; silence stays silent."""
    peak = waveform.abs().amax(1, keepdim=True)
    return waveform * torch.where(peak > 0, PEAK / peak.clamp_min(1e-8), torch.ones_like(peak))


class BatchPrep(nn.Module):
    """Convert a loader's batch to network input: copy it to the device, apply `VideoPrep` and `AudioPrep`.

    Args:
        dataset: a configuration's `dataset` section.
        audio_stats: `mean` and `std` (n_mels,) of the training set; None without sound.
        device: the network's device.

    Raises:
        UserError: the statistics have another number of mel bins than the configuration.
    """

    def __init__(self, dataset: dict, audio_stats: dict[str, Tensor] | None, device: torch.device) -> None:
        super().__init__()
        self.video = VideoPrep(dataset["color"])
        self.audio = None
        if audio_stats is not None:
            bins, asked = len(audio_stats["mean"]), dataset["spec_params"]["n_mels"]
            if bins != asked:
                raise UserError(f"dataset.spec_params.n_mels: {asked}, but the audio statistics have {bins} mel bins")
            self.audio = AudioPrep(dataset["audio_srate"], dataset["spec_params"], **audio_stats)
        self.device = device
        self.to(device)

    def forward(self, batch: dict) -> tuple[Tensor, Tensor]:
        """Return clips (N, 3, T, H, W) and their spectrograms (N, 1, n_mels, frames), or pairs' second clips."""
        on_device = {
            name: value.to(self.device, non_blocking=True) for name, value in batch.items() if isinstance(value, Tensor)
        }
        get = on_device.get
        training = "video_aug" in on_device
        video = self.video if training else self.video.forward  # only training batches are compiled, if at all
        clips = video(on_device["frames"], get("video_aug"))
        if self.audio is None:
            return clips, video(on_device["frames_2"], get("video_aug_2"))
        return clips, self.audio(on_device["waveform"], get("gain"), get("mel_mask"), get("time_mask"))
