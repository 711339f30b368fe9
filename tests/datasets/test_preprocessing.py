"""datasets.preprocessing against slow references, torchvision and torchaudio where they can be imported."""

import colorsys
import math

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from datasets import preprocessing as prep

SPEC = {"n_fft": 256, "hop_length": 128, "n_mels": 16}
IDENTITY = torch.tensor([[0.0, 1, 1, 1, 0]])


def optional(name):
    """The module, or a skip with the reason: both refuse to load beside some builds of PyTorch."""
    try:
        return pytest.importorskip(name)
    except RuntimeError as error:
        pytest.skip(f"{name} does not load: {error}")


def test_clips_keep_their_memory_layout():
    frames = torch.randint(0, 256, (2, 4, 10, 12, 3), dtype=torch.uint8)
    clips = prep.VideoPrep()(frames)
    assert clips.shape == (2, 3, 4, 10, 12)
    assert clips.is_contiguous(memory_format=torch.channels_last_3d)
    expected = (frames[1, 2, 3, 4] / 255 - torch.tensor(prep.IMAGENET_MEAN)) / torch.tensor(prep.IMAGENET_STD)
    torch.testing.assert_close(clips[1, :, 2, 3, 4], expected)
    torch.testing.assert_close(prep.VideoPrep()(frames, IDENTITY.expand(2, 5)), clips, atol=1e-5, rtol=0)


def shown(frames, factors, color):
    """The clip of one video, with the mean and deviation of ImageNet taken back: (T, H, W, 3)."""
    clip = prep.VideoPrep(color)(torch.tensor([frames], dtype=torch.uint8), torch.tensor([[0.0, *factors, 0.0]]))[0]
    return clip.permute(1, 2, 3, 0) * torch.tensor([0.229, 0.224, 0.225]) + torch.tensor([0.485, 0.456, 0.406])


def test_clips_are_normalised_by_the_mean_and_deviation_of_imagenet():
    frames = torch.tensor([0, 255], dtype=torch.uint8).view(1, 2, 1, 1, 1).expand(1, 2, 1, 1, 3)
    expected = torch.tensor([[-2.1179, -2.0357, -1.8044], [2.2489, 2.4286, 2.6400]])
    torch.testing.assert_close(prep.VideoPrep()(frames)[0, :, :, 0, 0].T, expected, atol=1e-4, rtol=0)


def test_contrast_is_of_each_frame():
    frames = [[[[51] * 3, [51] * 3]], [[[204] * 3, [204] * 3]]]  # one dark, one bright
    found = shown(frames, (1.0, 2.0, 1.0), (0.0, 1.0, 0.0, 0.0))
    torch.testing.assert_close(found, torch.tensor(frames) / 255, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("pixels", "factors", "expected"),
    [
        ([[204] * 3, [51] * 3], (2.0, 0.5, 1.0), [[0.85] * 3, [0.55] * 3]),  # 0.8 and 0.2 become 1 and 0.4, of mean 0.7
        ([[255, 0, 0]] * 2, (1.0, 2.0, 0.5), [[0.6495, 0.1495, 0.1495]] * 2),  # red has a gray of 0.299
        ([[255, 0, 0]] * 2, (1.0, 1.0, 2.0), [[1.0, 0.0, 0.0]] * 2),
    ],
)
def test_each_step_is_clipped_before_the_next(pixels, factors, expected):
    found = shown([[pixels]], factors, (1.0, 1.0, 1.0, 0.0))
    torch.testing.assert_close(found[0, 0], torch.tensor(expected), atol=1e-5, rtol=0)


class Crossings(TorchDispatchMode):
    """Notes the operations whose tensors are on more than one device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        if len({x.device for x in tensors}) > 1:
            self.found.append(str(func))
        return out


def test_preparing_a_batch_sends_nothing_to_the_gpu():
    """A number sent from the host makes the host wait. On tensors that have a shape and a device and no numbers."""
    with FakeTensorMode(), torch.device("cuda"):
        video = prep.VideoPrep().to("cuda")
        audio = prep.AudioPrep(8000, SPEC, torch.zeros(16), torch.ones(16)).to("cuda")
        frames, waveform = torch.empty(2, 3, 12, 12, 3, dtype=torch.uint8), torch.empty(2, 4000)
        masks = torch.empty(2, 16, dtype=torch.bool), torch.empty(2, 31, dtype=torch.bool)
        change, gain = torch.empty(2, 5), torch.empty(2)
        with Crossings() as crossings:
            assert video(frames, change).device.type == "cuda"
            assert audio(waveform, gain, *masks).device.type == "cuda"
    assert crossings.found == []


def test_flip_is_one_draw_a_clip():
    frames = torch.randint(0, 256, (2, 3, 5, 6, 3), dtype=torch.uint8)
    flips = IDENTITY.repeat(2, 1)
    flips[1, 0] = 1
    clips, plain = prep.VideoPrep()(frames, flips), prep.VideoPrep()(frames)
    torch.testing.assert_close(clips[0], plain[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(clips[1], plain[1].flip(-1), atol=1e-5, rtol=0)


def test_hue_turns_as_colorsys_does():
    rgb = torch.rand(500, 3, generator=torch.Generator().manual_seed(0))
    for turns in (-0.2, 0.0, 0.07, 0.5):
        expected = []
        for pixel in rgb.double().tolist():
            hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
            expected.append(colorsys.hsv_to_rgb((hue + turns) % 1, saturation, value))
        turned = torch.stack(prep.turn_hue(*rgb.unbind(1), torch.tensor(turns)), 1)
        torch.testing.assert_close(turned, torch.tensor(expected).float(), atol=1e-5, rtol=0)
    gray = torch.full((4,), 0.3)
    torch.testing.assert_close(prep.turn_hue(gray, gray, gray, torch.tensor(0.3)), [gray, gray, gray])


def test_jitter_equals_torchvision():
    functional = optional("torchvision.transforms.functional")
    frames = torch.randint(0, 256, (1, 2, 9, 9, 3), dtype=torch.uint8)
    _, brightness, contrast, saturation, hue = draw = (0.0, 0.7, 1.3, 0.6, 0.15)
    images = frames[0].permute(0, 3, 1, 2).float() / 255
    images = functional.adjust_brightness(images, brightness)
    images = functional.adjust_contrast(images, contrast)
    images = functional.adjust_saturation(images, saturation)
    images = functional.normalize(functional.adjust_hue(images, hue), prep.IMAGENET_MEAN, prep.IMAGENET_STD)
    ours = prep.VideoPrep()(frames, torch.tensor([draw]))[0].transpose(0, 1)
    torch.testing.assert_close(ours, images, atol=2e-2, rtol=0)  # torchvision's gray weights have four digits


@pytest.mark.parametrize("color", [(0.4, 0.3, 0.0, 0.0), (0.0, 0.0, 0.5, 0.2), (0.0, 0.0, 0.0, 0.0)])
def test_steps_without_a_jitter_are_left_out_and_no_others(color):
    rng = np.random.default_rng(3)
    frames = torch.randint(0, 256, (6, 2, 9, 11, 3), dtype=torch.uint8)
    draws = torch.from_numpy(np.stack([prep.draw_video_augmentation(list(color), rng) for _ in range(6)]))
    torch.testing.assert_close(prep.VideoPrep(color)(frames, draws), prep.VideoPrep()(frames, draws), atol=1e-5, rtol=0)


def test_draws_stay_within_the_jitter():
    rng = np.random.default_rng(0)
    draws = np.array([prep.draw_video_augmentation([0.4, 1.5, 0.0, 0.2], rng) for _ in range(2000)])
    assert set(draws[:, 0]) == {0.0, 1.0} and 0.45 < draws[:, 0].mean() < 0.55
    assert 0.6 <= draws[:, 1].min() < 0.62 and 1.38 < draws[:, 1].max() <= 1.4
    assert draws[:, 2].min() >= 0 and draws[:, 2].max() > 2.4
    assert (draws[:, 3] == 1).all()
    assert -0.2 <= draws[:, 4].min() < -0.19 and 0.19 < draws[:, 4].max() <= 0.2


def test_gains_and_masks_are_drawn_by_their_own_limits():
    tfmask = {"freq_mask_ratio": 1.0, "freq_mask_size": 40, "time_mask_ratio": 0.5, "time_mask_size": 1}
    rng = np.random.default_rng(0)
    draws = [prep.draw_audio_augmentation(40, 100, tfmask | {"var_masks": False}, rng) for _ in range(500)]
    gains, mels, times = (np.array(kind) for kind in zip(*draws, strict=True))
    assert 0.7 <= gains.min() < 0.71 and 0.99 < gains.max() <= 1
    assert mels.sum(1).max() > 35 and 45 < times.sum(1).max() <= 50
    blocks = [(np.diff(masks, axis=1, prepend=False) & masks).sum(1) for masks in (mels, times)]
    assert blocks[0].max() == 1 and blocks[1].max() > 20


def slow_log_mel(wave, rate, n_fft, hop, n_mels):
    """The definition, in float64, with a DFT matrix and loops."""
    pad = (n_fft - hop) // 2
    wave = np.pad(np.asarray(wave, dtype=np.float64), pad, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / (n_fft - 1))
    dft = np.exp(-2j * np.pi * np.outer(np.arange(n_fft // 2 + 1), np.arange(n_fft)) / n_fft)

    def to_hz(mel):
        return mel * 200 / 3 if mel < 15 else 1000 * math.exp(math.log(6.4) / 27 * (mel - 15))

    top = 15 + 27 * math.log(rate / 2 / 1000) / math.log(6.4)
    edges = [to_hz(top * i / (n_mels + 1)) for i in range(n_mels + 2)]
    frames = range(0, len(wave) - n_fft + 1, hop)
    out = np.zeros((n_mels, len(frames)))
    for column, start in enumerate(frames):
        magnitude = np.abs(dft @ (wave[start : start + n_fft] * window))
        for mel in range(n_mels):
            low, middle, high = edges[mel : mel + 3]
            weights = []
            for bin_ in range(n_fft // 2 + 1):
                hz = bin_ * rate / n_fft
                weights.append(max(0.0, min((hz - low) / (middle - low), (high - hz) / (high - middle))))
            total = sum(weights)
            value = float(np.dot(weights, magnitude)) / total if total else 0.0
            out[mel, column] = math.log10(max(value, 1e-5))
    return out


@pytest.mark.parametrize(("rate", "n_fft", "hop", "n_mels"), [(16000, 512, 256, 64), (8000, 128, 32, 40)])
def test_log_mel_equals_its_definition(rate, n_fft, hop, n_mels):
    wave = np.random.default_rng(0).uniform(-1, 1, 2000).astype(np.float32)
    ours = prep.LogMelSpectrogram(rate, n_fft, hop, n_mels)(torch.from_numpy(wave)[None])[0].numpy()
    reference = slow_log_mel(wave, rate, n_fft, hop, n_mels)
    assert ours.shape == reference.shape == (n_mels, prep.num_spectrogram_frames(2000, n_fft, hop))
    np.testing.assert_allclose(ours, reference, atol=2e-4)


def test_the_thesis_spectrogram_has_128_by_125():
    mel = prep.LogMelSpectrogram(16000, 512, 256, 128)
    assert mel(torch.randn(3, 32000)).shape == (3, 128, 125)
    sums = mel.filters.sum(1)
    torch.testing.assert_close(sums, torch.ones_like(sums))


def test_mel_filters_equal_torchaudio():
    functional = optional("torchaudio.functional")
    theirs = functional.melscale_fbanks(257, 0.0, 8000.0, 128, 16000, norm=None, mel_scale="slaney").T
    torch.testing.assert_close(
        prep.mel_filters(16000, 512, 128), theirs / theirs.sum(1, keepdim=True), atol=1e-4, rtol=0
    )


def test_mel_filters_of_an_odd_window_lie_where_its_bins_do():
    filters, bins = prep.mel_filters(8000, 255, 8).double(), torch.arange(128).double() * 8000 / 255
    edges = torch.from_numpy(prep.slaney_hz(np.linspace(0, prep.slaney_mel(4000), 10)))
    for row, (low, centre, high) in zip(filters, edges.unfold(0, 3, 1), strict=True):
        expected = torch.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)).clamp_min(0)
        torch.testing.assert_close(row, expected / expected.sum(), atol=1e-6, rtol=0)


def test_silence_lies_at_the_floor_and_is_finite_where_no_bin_varies():
    silence = torch.zeros(1, 1000)
    assert (prep.LogMelSpectrogram(8000, **SPEC)(silence) == -5).all()
    assert (prep.AudioPrep(8000, SPEC, torch.full((16,), -5.0), torch.zeros(16))(silence) == 0).all()


@pytest.mark.parametrize("peak", [2.0, 0.01, 1e-6])
def test_quiet_sound_is_raised_to_the_peak_of_loud(peak):
    waves = torch.tensor([[0.5, -1.0, 0.25], [0.0, 0.0, 0.0]]) * peak
    expected = torch.tensor([[0.475, -0.95, 0.2375], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(prep.normalise_peak(waves), expected)


def test_audio_prep_normalises_and_masks():
    mean, std = torch.linspace(-3, -1, 40), torch.linspace(0.5, 2, 40)
    audio = prep.AudioPrep(8000, {"n_fft": 128, "hop_length": 32, "n_mels": 40}, mean, std)
    wave = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    mels, times = torch.zeros(2, 40, dtype=torch.bool), torch.zeros(2, 31, dtype=torch.bool)
    mels[0, 3:6] = times[1, 7] = True
    gain = torch.tensor([1.0, 0.7])
    out = audio(wave, gain, mels, times)
    peak = wave * (0.95 / wave.abs().amax(1, keepdim=True))
    plain = (audio.log_mel(peak * gain[:, None]) - mean[:, None]) / std[:, None]
    assert out.shape == (2, 1, 40, 31)
    torch.testing.assert_close(out[0, 0, 10:], plain[0, 10:], atol=1e-4, rtol=0)
    torch.testing.assert_close(out[0, 0, 3:6], plain[0].min().expand(3, 31), atol=1e-4, rtol=0)
    torch.testing.assert_close(out[1, 0, :, 7], plain[1].min().expand(40), atol=1e-4, rtol=0)
    assert audio(torch.zeros(1, 1000)).isfinite().all()


def test_a_batch_is_prepared_by_all_that_was_drawn_for_it():
    section = {"color": (0.4, 0.4, 0.4, 0.2), "audio_srate": 8000, "spec_params": SPEC}
    stats = {"mean": torch.linspace(-3, -1, 16), "std": torch.linspace(0.5, 2, 16)}
    mels, times = torch.zeros(2, 16, dtype=torch.bool), torch.zeros(2, 7, dtype=torch.bool)
    mels[0, 3:6] = times[1, 2] = True
    frames, second = torch.randint(0, 256, (2, 2, 3, 6, 7, 3), dtype=torch.uint8)
    change, other = torch.tensor([[[1, 0.7, 1.3, 0.8, 0.1]], [[0, 1.2, 0.9, 1.4, -0.1]]]).expand(2, 2, 5)
    sound = {"waveform": torch.randn(2, 1000), "gain": torch.tensor([0.7, 0.9]), "mel_mask": mels, "time_mask": times}
    clips = {"frames": frames, "video_aug": change}
    prepare, video = prep.BatchPrep(section, stats, torch.device("cpu")), prep.VideoPrep(section["color"])
    found = prepare(clips | sound | {"failures": []})
    assert torch.equal(found[0], video(frames, change))
    assert torch.equal(found[1], prep.AudioPrep(8000, SPEC, **stats)(*sound.values()))
    pairs = prep.BatchPrep(section, None, torch.device("cpu"))(clips | {"frames_2": second, "video_aug_2": other})
    assert torch.equal(pairs[0], video(frames, change)) and torch.equal(pairs[1], video(second, other))


@pytest.mark.parametrize("mode", ["bilinear", "bilinear-plain", "nearest"])
def test_crop_and_resize_keeps_a_ramp(mode):
    ramp = torch.arange(0, 200, 2, dtype=torch.uint8).view(1, 1, 100, 1).expand(2, 80, 100, 3)
    out = prep.crop_and_resize(ramp, (10, 20, 40, 60), 30, mode)
    assert out.shape == (2, 30, 30, 3) and out.dtype == torch.uint8 and out.is_contiguous()
    expected = 2 * (20 + (torch.arange(30) + 0.5) * 2 - 0.5)
    assert (out[0, 5, 2:-2, 0].float() - expected[2:-2]).abs().max() <= (3 if mode == "nearest" else 1)


def test_antialiasing_alone_grays_fine_stripes():
    stripes = torch.arange(90, dtype=torch.uint8).remainder(2).mul(255).view(1, 1, 90, 1).expand(1, 90, 90, 3)
    gray, plain, nearest = (
        prep.crop_and_resize(stripes, (0, 0, 90, 90), 30, mode)[0, 5, :, 0]
        for mode in ("bilinear", "bilinear-plain", "nearest")
    )
    assert (gray[1:-1].float() - 127.5).abs().max() < 20
    assert torch.equal(plain, stripes[0, 0, 1::3, 0]) and torch.equal(nearest, stripes[0, 0, ::3, 0])
