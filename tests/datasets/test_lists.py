"""Which files and labels VGGSound and folders of videos have, and the statistics of their sound."""

import logging
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from datasets import build_fresh_clips, build_held_out, build_video_clips, build_videos, vggsound
from datasets.manifest import FILE, write_rows
from datasets.preprocessing import LogMelSpectrogram, normalise_peak
from datasets.statistics import audio_statistics
from datasets.video_dataset import VideoList
from tests import tiny, tiny_evaluation
from tests.datasets.test_video_dataset import RECIPE
from utils.config import load_config
from utils.errors import UserError


def section(name, root, **keys):
    empty = {"list": None, "labels": None, "label_column": None, "holdout_every": None, "fold": 1}
    return {"name": name, "root": root and str(root), **empty, **keys}


@pytest.fixture
def vgg(tmp_path):
    """VGGSound as people have it, of empty files."""
    for folder, files in {
        "train": ["--0PQM4-hqg_000030.mp4", "a_b-c_5.mp4", "odd name.mp4", "x_000010.mp4", "notes.txt"],
        "test": ["y_1.mp4"],
    }.items():
        (tmp_path / folder).mkdir()
        for file in files:
            (tmp_path / folder / file).touch()
    (tmp_path / "vggsound.csv").write_text(
        '--0PQM4-hqg,30,waterfall burbling,train\na_b-c,5,"bird chirping, tweeting",train\nmissing,7,zebra,test\n'
    )
    return tmp_path


def test_vggsound_takes_the_files_that_are_there(vgg):
    train = build_videos(section("vggsound", vgg), "train")
    assert train.names() == [f"train/{n}.mp4" for n in ("--0PQM4-hqg_000030", "a_b-c_5", "odd name", "x_000010")]
    assert train.classes == ("bird chirping, tweeting", "waterfall burbling", "zebra")
    assert train.labels.tolist() == [1, 0, -1, -1]
    assert build_videos(section("vggsound", vgg), "test").names() == ["test/y_1.mp4"]
    assert build_videos(section("vggsound", vgg), "train_subset").names() == train.names()


def test_two_files_of_one_clip_are_one_instance(vgg, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("avssrl"), "propagate", True)
    names = build_videos(section("vggsound", vgg), "train").names()
    assert not caplog.text
    for other in ("a_b-c_000005", "x_10", "x_010", "x_000011"):
        (vgg / "train" / f"{other}.mp4").touch()
    kept = build_videos(section("vggsound", vgg), "train").names()
    assert kept == [name.replace("a_b-c_5", "a_b-c_000005") for name in names] + ["train/x_000011.mp4"]
    assert "train: left out 3 files of clips that another file holds, such as a_b-c_5.mp4" in caplog.text


def test_vggsound_subset_by_list_and_by_rule(vgg, monkeypatch):
    listed = vgg / "subset.txt"
    listed.write_text("x_10.mp4\n--0PQM4-hqg_30\nnot_there_3\n")  # with and without leading zeros and endings
    subset = build_videos(section("vggsound", vgg, list=str(listed)), "train_subset")
    assert subset.names() == ["train/--0PQM4-hqg_000030.mp4", "train/x_000010.mp4"]
    monkeypatch.setattr(vggsound, "SUBSET_SIZE", 2)
    by_rule = build_videos(section("vggsound", vgg), "train_subset").names()
    assert len(by_rule) == 2 and by_rule == sorted(by_rule)
    (vgg / "train" / "x_000010.mp4").rename(vgg / "train" / "x_10.mp4")  # the rule looks at id and second
    assert [
        n.replace("x_10.", "x_000010.") for n in build_videos(section("vggsound", vgg), "train_subset").names()
    ] == by_rule
    monkeypatch.setattr(vggsound, "SUBSET_SIZE", 1)
    by_rule = build_videos(section("vggsound", vgg), "train_subset").names()
    assert by_rule == ["train/odd name.mp4"]  # by hashes of whole names, a_b-c_5.mp4


@pytest.mark.parametrize("name", ["vggsound", "folder", "demo", "ucf101"])
def test_missing_roots_are_named(tmp_path, name):
    with pytest.raises(UserError, match="dataset.root is not set"):
        build_videos(section(name, None), "train")
    with pytest.raises(UserError, match="nowhere: no such folder"):
        build_videos(section(name, tmp_path / "nowhere"), "train")
    with pytest.raises(UserError):
        build_videos(section(name, tmp_path), "train")


@pytest.mark.parametrize("name", ["vggsound", "folder", "demo", "ucf101", "hmdb51"])
def test_keys_of_another_data_set_are_refused(tmp_path, name):
    for key, heeded in (
        ("list", "vggsound"),
        ("labels", "folder"),
        ("label_column", "folder"),
        ("holdout_every", "folder"),
    ):
        with pytest.raises(UserError) as error:
            build_videos(section(name, tmp_path, **{key: 5 if key == "holdout_every" else "5"}), "train")
        told = f"dataset.{key}: 5 is for data set {heeded}, not for {name}; remove it"
        assert (str(error.value) == told) == (name != heeded)


def test_mistakes_in_vggsound(vgg, unreadable, caplog):
    with pytest.raises(UserError, match="dataset.*split: 'valid'"):
        build_videos(section("vggsound", vgg), "valid")
    with pytest.raises(UserError, match="none of its 1 videos"):
        (vgg / "other.txt").write_text("z_1")
        build_videos(section("vggsound", vgg, list=str(vgg / "other.txt")), "train_subset")
    with pytest.raises(UserError, match="is for split train_subset, and the split is train"):
        build_videos(section("vggsound", vgg, list=str(vgg / "other.txt")), "train")
    for mistake, told in (
        ("id,label\n", "no labels: .*vggsound.csv: expected rows of id"),
        ('a,1,"dog,train\n' + 200_000 * "x", "no labels: .*vggsound.csv: cannot be read: field larger"),
    ):
        (vgg / "vggsound.csv").write_text(mistake)
        assert (build_videos(section("vggsound", vgg), "train").labels == -1).all()  # pre-training needs none
        assert re.search(told, caplog.messages[-1])
    with pytest.raises(UserError, match="/train: cannot be listed: Permission denied; make it readable"):
        unreadable(vgg / "train")
        build_videos(section("vggsound", vgg), "train")


def test_a_folder_of_links_is_followed_and_taken_once(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for name in ("root/a/1.mp4", "elsewhere/2.mp4", "elsewhere/deep/3.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (root / "b").symlink_to(elsewhere)  # a part of the data on another disk
    (root / "c").symlink_to(elsewhere)
    (elsewhere / "deep/back").symlink_to(root)
    assert build_videos(section("folder", root), "all").names() == ["a/1.mp4", "b/2.mp4", "b/deep/3.mp4"]


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, unreadable):
    for name in ("a/1.mp4", "b/2.mp4", "lost+found/3.mp4"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    unreadable(tmp_path / "lost+found")
    assert build_videos(section("folder", tmp_path), "all").names() == ["a/1.mp4", "b/2.mp4"]
    unreadable(tmp_path / "b")
    with pytest.raises(UserError, match="/b: cannot be listed: Permission denied; make it readable"):
        build_videos(section("folder", tmp_path), "all")


def test_a_video_that_could_not_be_prepared_moves_no_other_to_the_other_side(tmp_path):
    rows = [
        {"path": f"{name}.mp4", "source": name, "error": "cannot be decoded" if name == "b" else ""}
        for name in "abcdef"
    ]
    write_rows(tmp_path / FILE, rows)
    test, train = (build_videos(section("folder", tmp_path, holdout_every=3), split) for split in ("test", "train"))
    assert test.names() == ["a.mp4", "d.mp4"] and train.names() == ["c.mp4", "e.mp4", "f.mp4"]


def test_a_folder_holds_out_every_nth_name(tmp_path):
    for name in ("b/3.MP4", "a/2.avi", "a/1.mp4", "c.webm", "d.mkv", "a/readme.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "labels.csv").write_text("path,colour,size\na/1.mp4,red,big\n./c.webm,blue,small\n")
    (tmp_path / "others.csv").write_text("path,colour\n1.mp4,red\n", encoding="utf-8-sig")
    keys = {"holdout_every": 2, "labels": "labels.csv"}
    test = build_videos(section("folder", tmp_path, **keys), "test")
    train = build_videos(section("folder", tmp_path, **keys, label_column="size"), "train")
    assert test.names() == ["a/1.mp4", "b/3.MP4", "d.mkv"] and train.names() == ["a/2.avi", "c.webm"]
    assert test.classes == ("blue", "red") and test.labels.tolist() == [1, -1, -1]
    assert train.classes == ("big", "small") and train.labels.tolist() == [-1, 1]
    assert len(build_videos(section("folder", tmp_path), "all")) == 5
    (tmp_path / "labels.csv").write_text("path,colour\nc.webm,blue\n")  # labels of the other split alone are no mistake
    assert build_videos(section("folder", tmp_path, **keys), "test").labels.tolist() == [-1, -1, -1]
    (tmp_path / "labels.csv").write_text("path,colour\na/1.mp4,\nc.webm,blue\n")
    assert build_videos(section("folder", tmp_path, labels="labels.csv"), "all").classes == ("blue",)
    (tmp_path / "labels.csv").write_text("path,colour,size\na/1.mp4,red,big\n")
    (tmp_path / "tabs.csv").write_text("path\tcolour\na/1.mp4\tred\n")
    (tmp_path / "empty.csv").touch()
    (tmp_path / "quote.csv").write_text('path,colour\na/1.mp4,"red\n' + 200_000 * "x")  # more than csv takes
    for keys, split, words in (
        ({}, "train", "holdout_every"),
        (
            {"holdout_every": 1},
            "train",
            "dataset.holdout_every: 1 holds out all 5 videos; none is left for split train",
        ),
        ({"holdout_every": 2}, "trian", "train, test, all"),
        ({"labels": "no.csv"}, "all", "no.csv"),
        ({"labels": "labels.csv", "label_column": "shape"}, "all", "path, colour, size"),
        ({"labels": "others.csv"}, "all", "names none of the videos: it has 1.mp4, the folder has a/1.mp4"),
        ({"labels": "tabs.csv"}, "all", "columns that commas separate"),
        ({"labels": "empty.csv"}, "all", "columns that commas separate"),
        ({"labels": "quote.csv"}, "all", "quote.csv: expected a CSV file"),
    ):
        with pytest.raises(UserError, match=words):
            build_videos(section("folder", tmp_path, **keys), split)


def test_labels_are_of_the_videos_that_are_there(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.mp4").touch()
    labels, keys = tmp_path / "labels.csv", {"labels": "labels.csv", "holdout_every": 2}
    labels.write_text("path, colour\na.mp4, red\n b.mp4,red \nb.mp4,red\ngone.mp4,blue\n")
    for split, more in (("all", {"label_column": "colour"}), ("train", {})):
        videos = build_videos(section("folder", tmp_path, **keys, **more), split)
        assert videos.classes == ("red",) and set(videos.labels.tolist()) == {0}
    labels.write_text("path,colour\na.mp4,red\nb.mp4,red\n./b.mp4,blue\n")
    with pytest.raises(UserError, match="labels.csv: b.mp4 has two labels, red and blue; keep one"):
        build_videos(section("folder", tmp_path, **keys), "train")


def test_audio_statistics_are_those_of_the_clips_and_computed_once(tmp_path, make_video, monkeypatch):
    for i in range(3):
        make_video(tmp_path / f"{i}.mp4", seconds=0.5, fps=16, audio_rate=8000, audio_codec="aac")
    (tmp_path / "3.mp4").write_text("no video")
    videos = VideoList(tmp_path, [f"{i}.mp4" for i in range(4)])
    stats = audio_statistics(videos, RECIPE, 0, tmp_path / "cache")
    mel = LogMelSpectrogram(8000, **RECIPE.spec_params)
    from datasets.decoding import read_clip

    clips = [read_clip(tmp_path / f"{i}.mp4", audio_start=0.0, audio_seconds=0.5, sample_rate=8000) for i in range(3)]
    waves = normalise_peak(torch.stack([torch.from_numpy(clip.waveform) for clip in clips]))
    spectrograms = mel(waves).transpose(0, 1).flatten(1).double()
    np.testing.assert_allclose(stats["mean"], spectrograms.mean(1), atol=0.02)
    np.testing.assert_allclose(stats["std"], spectrograms.std(1, correction=0), atol=0.02)
    monkeypatch.setattr("datasets.statistics._compute", None)  # the second time it is not called
    again = audio_statistics(videos, RECIPE, 0, tmp_path / "cache")
    assert all(torch.equal(stats[name], again[name]) for name in ("mean", "std"))
    monkeypatch.undo()
    stored = next((tmp_path / "cache").glob("*.npz"))
    stored.write_bytes(stored.read_bytes()[:100])
    again = audio_statistics(videos, RECIPE, 0, tmp_path / "cache")
    torch.testing.assert_close(again, stats)
    make_video(tmp_path / "0.mp4", seconds=0.7, fps=16, audio_rate=16000)  # another file of that name
    other = audio_statistics(videos, RECIPE, 0, tmp_path / "cache")
    assert not torch.equal(other["mean"], stats["mean"])
    with pytest.raises(UserError, match="none of 1 videos could be read"):
        audio_statistics(VideoList(tmp_path, ["3.mp4"]), RECIPE, 0, tmp_path / "cache")


def test_audio_statistics_are_kept_apart_by_what_they_are_of(tmp_path, make_video):
    make_video(tmp_path / "0.mp4", seconds=0.6, fps=16, audio_rate=8000)
    videos = VideoList(tmp_path, ["0.mp4"])
    recipes = [
        RECIPE,
        replace(RECIPE, audio_seconds=0.25),
        replace(RECIPE, sample_rate=4000),
        replace(RECIPE, spec_params=RECIPE.spec_params | {"hop_length": 64}),
        replace(RECIPE, spec_params=RECIPE.spec_params | {"n_fft": 128}),
    ]
    found = [audio_statistics(videos, recipe, 0, tmp_path / "cache")["mean"].numpy().tobytes() for recipe in recipes]
    assert len(set(found)) == len(recipes)


@pytest.mark.parametrize(("split", "told"), [("all", "2 of 2 held-out videos are training videos, too"), ("train", "")])
def test_held_out_videos_that_are_trained_on_are_told(tmp_path, caplog, monkeypatch, split, told):
    monkeypatch.setattr(logging.getLogger("avssrl"), "propagate", True)
    for name in "abcd":
        (tmp_path / f"{name}.mp4").touch()
    file = tiny.write_config(tmp_path, tmp_path, dataset__holdout_every=2, dataset__train__split=split)
    cfg = load_config(file)
    build_held_out(cfg, torch.device("cpu"), trained=build_videos(cfg["dataset"], split))
    assert told in caplog.text and bool(told) == bool(caplog.text)


def test_held_out_videos_are_spread_over_the_list(tmp_path):
    for i in range(19):
        (tmp_path / f"{i:02d}.mp4").touch()
    cfg = load_config(tiny.write_config(tmp_path, tmp_path, dataset__holdout_every=2))
    loader = build_held_out(cfg, torch.device("cpu"), most=4)
    videos = loader.dataset.dataset.videos
    assert [videos.name(i) for i in loader.dataset.indices] == ["00.mp4", "06.mp4", "12.mp4", "18.mp4"]
    assert len(build_held_out(cfg, torch.device("cpu"), most=10).dataset) == 10


def test_held_out_videos_are_at_most_200_and_their_windows_fill_a_batch(tmp_path):
    for i in range(402):
        (tmp_path / f"{i:03d}.mp4").touch()
    changes = {"holdout_every": 2, "batch_size": 7, "test__clips_per_video": 3}
    cfg = load_config(tiny.write_config(tmp_path, tmp_path, **{f"dataset__{key}": v for key, v in changes.items()}))
    loader = build_held_out(cfg, torch.device("cpu"))
    assert len(loader.dataset) == 200 and loader.batch_size == 2
    assert len(build_held_out(cfg, torch.device("cpu"), most=None).dataset) == 201
    cfg["dataset"]["test"]["clips_per_video"] = 8
    assert build_held_out(cfg, torch.device("cpu")).batch_size == 1


def test_clips_of_an_evaluation_are_drawn_by_its_seed(tmp_path):
    cfg = load_config(tiny_evaluation.write_evaluation(tmp_path, tmp_path, seed=7))
    videos = VideoList(tmp_path, ["a.mp4"] * 3)
    assert build_video_clips(cfg, videos, torch.device("cpu"), num_random=1).dataset.seed == 7
    assert build_fresh_clips(cfg, videos, torch.device("cpu")).dataset.seed == 7
