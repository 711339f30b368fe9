"""Results of evaluations: written to disk, read back, shown as tables and plots.

An evaluation writes to its folder `results.json` and, for each classifier, `per-class-*.csv` and `confusion-*.png`.
"""

import csv
import io
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.errors import UserError
from utils.evaluation import RANDOM, clip_accuracies, differing, top_share, video_accuracies, video_scores
from utils.features import ClipOutputs, rows_of
from utils.files import write_whole
from utils.metrics import cosines, nearest_neighbour_accuracy
from utils.pictures import drawable, save_picture

log = logging.getLogger("avssrl")

ACCURACIES = ("Clip@1", "Clip@5", "Video@1", "Video@5")

OF_THE_FOLD = {
    "dataset.fold",
    "dataset.num_folds",
    "dataset.train.split",  # may end in the fold's number
    "dataset.test.split",
    "dataset.test_dense.split",
}
"""Keys in which the recipes of an evaluation's folds differ."""
CHECKPOINT = re.compile(r"^checkpoint-.*?-[0-9a-f]{6}(?=_|$)")  # a file's part of a variant; its name has any form

METHODS = {"av_wrapper": "xID", "vicreg_wrapper": "VICReg"}  # arch in MODEL_CFG: name in the thesis
THESIS = {  # benchmark, data set, method: top-1, top-5
    ("linear", "ucf101", "xID"): (51.20, 80.91),
    ("linear", "ucf101", "VICReg"): (39.75, 71.30),
    ("linear", "hmdb51", "xID"): (28.08, 61.29),
    ("linear", "hmdb51", "VICReg"): (21.85, 52.69),
    ("finetune", "ucf101", "xID"): (73.22, 92.78),
    ("finetune", "ucf101", "VICReg"): (59.53, 85.94),
    ("finetune", "hmdb51", "xID"): (42.85, 73.69),
    ("finetune", "hmdb51", "VICReg"): (34.65, 68.96),
}
THESIS_REMARK = (
    "The thesis pre-trained on 50,000 VGGSound videos for 100 epochs. It does not say whether its figures count clips "
    "or videos, so its top-1 and top-5 are next to Video@1 and Video@5; its linear script ran the encoder's BN in "
    "training mode (encoder_bn: train)."
)


def write_json(file: Path, content: Mapping) -> None:
    """Write a JSON file atomically.

    Raises:
        UserError: it cannot be written.
    """
    write_whole(file, json.dumps(content, indent=2) + "\n")


def write_classes(
    folder: Path, name: str, classes: Sequence[str], clip_logits: Tensor, video_logits: Tensor, labels: Tensor
) -> None:
    """Write `per-class-<name>.csv` and `confusion-<name>.png` of one classifier from its clip and video logits."""
    scores = video_scores(video_logits)
    confusion = torch.zeros(len(classes), len(classes), dtype=torch.int64)
    confusion.index_put_((labels, scores.argmax(1)), torch.ones(len(labels), dtype=torch.int64), accumulate=True)
    text = io.StringIO(newline="")
    rows = csv.writer(text)
    rows.writerow(["class", "videos", *ACCURACIES, "most often taken for", "times"])
    for c, class_name in enumerate(classes):
        own = labels == c
        if not own.any():
            rows.writerow([class_name, 0, "", "", "", "", "", ""])
            continue
        clips, each = clip_logits[own].flatten(0, 1), labels[own].repeat_interleave(clip_logits.shape[1])
        figures = [top_share(clips, each, k) for k in (1, 5)] + [top_share(scores[own], labels[own], k) for k in (1, 5)]
        others = confusion[c].clone()
        others[c] = 0
        wrong, times = int(others.argmax()), int(others.max())
        taken_for = classes[wrong] if times else ""
        rows.writerow([class_name, int(own.sum()), *(f"{x:.2f}" for x in figures), taken_for, times])
    write_whole(folder / f"per-class-{name}.csv", text.getvalue(), errors="surrogateescape")
    draw_confusion(confusion.numpy(), classes, folder / f"confusion-{name}.png")


def draw_confusion(confusion: np.ndarray, classes: Sequence[str], file: Path) -> None:
    """Plot a confusion matrix (true class, predicted class), each row in percent of its videos.

    The size grows with the number of classes, so that even 101 names are legible.
    """
    from matplotlib.figure import Figure

    classes = [drawable(name) for name in classes]
    count = len(classes)
    percent = 100 * confusion / confusion.sum(1, keepdims=True).clip(1)
    side = max(4.0, 0.19 * count + 2.5)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    axis.set_xticks(range(count), classes, rotation=90, fontsize=8)
    axis.set_yticks(range(count), classes, fontsize=8)
    axis.set(xlabel="predicted class", ylabel="true class")
    axis.set_title(f"Video-level confusion, {int(confusion.sum())} videos, row percent")
    if count <= 25:
        for i, j in zip(*np.nonzero(confusion), strict=True):
            axis.text(
                j,
                i,
                f"{percent[i, j]:.0f}",
                ha="center",
                va="center",
                fontsize=7,
                color="0.1" if percent[i, j] < 60 else "w",
            )
    figure.colorbar(image, ax=axis, shrink=0.5, label="percent")
    save_picture(figure, file)


@dataclass
class Outcome:
    """Test logits (videos, clips, classes) by learning rate and feature; `num_random` clips at random times come first.

    `epochs` are the completed and the requested training epochs of the classifier.
    """

    classes: Sequence[str]
    labels: Tensor
    logits: Mapping[float, Mapping[str, Tensor]]
    num_random: int
    epochs: tuple[int, int]
    neighbours: Mapping[str, Mapping[str, float]] | None = None

    def accuracies(self, logits: Tensor) -> dict[str, float]:
        """Clip@k and Video@k in percent, and the numbers of clips and videos behind them."""
        clips, dense = logits[:, : self.num_random], logits[:, self.num_random :]
        counts = {"clips": clips[..., 0].numel(), "clips_in_video_mode": dense[..., 0].numel(), "videos": len(logits)}
        return clip_accuracies(clips, self.labels) | video_accuracies(dense, self.labels) | counts


def finish_evaluation(folder: Path, facts: Mapping, outcomes: Mapping[str, Outcome]) -> dict:
    """Write all results of an evaluation and log its table. `outcomes` is by part: `all`, or `unseen` and `seen`.

    In `results.json`, `results` holds the figures at the base learning rate by feature (and by part if there are
    several); `learning_rates` holds those at each rate.
    """
    rates: dict[str, dict] = {}
    for part, outcome in outcomes.items():
        if outcome.epochs[0] < outcome.epochs[1]:
            log.warning("%s: this classifier was trained for %d of %d epochs", part, *outcome.epochs)
        rates[part] = {
            repr(rate): {feature: outcome.accuracies(logits) for feature, logits in by_feature.items()}
            for rate, by_feature in outcome.logits.items()
        }
        for feature, logits in outcome.logits[facts["learning_rate"]].items():
            name = feature if part == "all" else f"{part}-{feature}"
            clips, dense = logits[:, : outcome.num_random], logits[:, outcome.num_random :]
            write_classes(folder, name, outcome.classes, clips, dense, outcome.labels)
    base = {part: by_rate[repr(facts["learning_rate"])] for part, by_rate in rates.items()}
    near = {part: outcome.neighbours for part, outcome in outcomes.items() if outcome.neighbours}
    results = {"results": base.get("all", base), **facts, "learning_rates": rates, "neighbours": near.get("all", near)}
    epochs = {part: outcome.epochs for part, outcome in outcomes.items()}
    results["epochs"] = {part: {"done": done, "asked": asked} for part, (done, asked) in epochs.items()}
    write_json(folder / "results.json", results)
    for line in results_table(results).splitlines():
        log.info("%s", line)
    for part, by_feature in near.items():
        for feature, figures in by_feature.items():
            shown = ", ".join(f"{name} {value:.2f}" for name, value in figures.items())
            log.info("nearest neighbours, %s, %s: %s", part, feature, shown)
    log.info("results: %s", folder / "results.json")
    return results


def finish_folds(file: Path, results: Sequence[Mapping]) -> None:
    """Write mean and standard deviation over folds to a JSON file, and log them."""
    leaves = [{leaf[:3]: leaf[3] for leaf in _leaves(one)} for one in results]
    mean = [
        {"part": part, "feature": feature, "learning_rate": rate}
        | {name: mean_and_deviation([fold[part, feature, rate][name] for fold in leaves]) for name in ACCURACIES}
        for part, feature, rate in leaves[0]
    ]
    write_json(file, {"folds": [one["fold"] for one in results], "mean": mean})
    rows = [["", "learning rate", *ACCURACIES]]
    for line in mean:
        cells = [f"{line[name]['mean']:.2f} +-{line[name]['std']:.2f}" for name in ACCURACIES]
        rows.append([f"{line['part']} {line['feature']}", f"{line['learning_rate']:g}", *cells])
    log.info("mean and standard deviation over %d folds", len(results))
    for line in _aligned(rows).splitlines():
        log.info("%s", line)


def quick_test(
    logits_of: Callable[[dict[str, Tensor]], dict[float, dict[str, Tensor]]],
    tests: ClipOutputs,
    rows: Tensor,
    labels: Tensor,
    clips: int,
) -> dict[str, float]:
    """Clip@1 of each classifier on the first `clips` clips of these test videos."""
    features, present = rows_of(tests, rows)
    logits = logits_of({name: values[:, :clips] for name, values in features.items()})
    return {
        f"Clip@1 {name} {rate:g}": clip_accuracies(values, labels[present])["Clip@1"]
        for rate, by_feature in logits.items()
        for name, values in by_feature.items()
    }


def neighbours(
    train: Mapping[str, Tensor], train_labels: Tensor, test: Mapping[str, Tensor], test_labels: Tensor, num_random: int
) -> dict[str, dict[str, float]]:
    """kNN@k and R@k in percent for each feature, by cosine of test to training videos, k = 1, 5, 20.

    kNN@k is the accuracy of the majority vote of the k nearest, R@k the percentage of test videos with one of their
    class among the k nearest. A training video is the mean of its views (videos, views, D), a test video the mean of
    its clips (videos, clips, D) after the first `num_random`.
    """
    figures = {}
    for name in train:
        gallery, queries = train[name].mean(1), test[name][:, num_random:].mean(1)
        figures[name] = nearest_neighbour_accuracy(gallery, train_labels, queries, test_labels, (1, 5, 20))
        nearest = cosines(queries, gallery).argsort(1, descending=True)
        hits = train_labels[nearest] == test_labels.unsqueeze(1)
        figures[name] |= {f"R@{k}": 100.0 * hits[:, :k].any(1).double().mean().item() for k in (1, 5, 20)}
    return figures


def results_table(results: Mapping) -> str:
    """Format the accuracies of one `results.json` as a table for the console."""
    rows = [["", "learning rate", *ACCURACIES, "clips", "videos"]]
    for part, feature, rate, figures in _leaves(results):
        name = feature if part == "all" else f"{part} {feature}"
        counts = str(figures["clips"]), str(figures["videos"])
        rows.append([name, f"{rate:g}", *(f"{figures[f]:.2f}" for f in ACCURACIES), *counts])
    return _aligned(rows)


def mean_and_deviation(values: Sequence[float]) -> dict[str, float]:
    """Mean and standard deviation (n - 1) of figures over several folds."""
    values = np.asarray(values, dtype=np.float64)
    return {"mean": float(values.mean()), "std": float(values.std(ddof=1)) if len(values) > 1 else 0.0}


def _leaves(results: Mapping) -> Iterator[tuple[str, str, float, Mapping]]:
    """(part, feature, learning rate, figures) of a `results.json`."""
    for part, features in results["learning_rates"].items():
        for rate, by_feature in features.items():
            for feature, figures in by_feature.items():
                yield part, feature, float(rate), figures


# ------------------------------------------------------------------------------------------- all results of a folder


COLLECTED = ("kind", "dataset", "benchmark", "model", "folder", "arch", "variant", "encoder_bn", "part", "feature")


def collect(folder: str | Path) -> list[dict]:
    """All `results.json` below a folder as rows of one table, with mean and deviation of each figure over folds.

    Folds belong to one evaluation if they are in the same run folder (`folder` of a row), since two runs in different
    places may have the same name, and of the same recipe; a warning names what differs.

    Raises:
        UserError: there is no such folder, or no result in it.
    """
    groups: dict[tuple, list[Mapping]] = {}
    recipes: dict[tuple, dict[str, Mapping]] = {}
    for file in result_files([folder]):
        try:
            results = json.loads(file.read_text())
            kind, dataset, benchmark, model, arch, variant = (results[name] for name in _PLAIN_FACTS)
            encoder_bn = results.get("encoder", {}).get("bn", "")
            variant = " ".join(filter(None, [_random(results), variant, _unfinished(results)]))
            key = kind, dataset, benchmark, model, run_folder_of(file), arch, variant, encoder_bn
            recipe = {name: value for name, value in results.get("recipe", {}).items() if name not in OF_THE_FOLD}
            digest, leaves = json.dumps(recipe, sort_keys=True), list(_leaves(results))
        except (ValueError, KeyError, TypeError, AttributeError):
            log.warning("%s: not a result of this project; skipped", file)
            continue
        for part, feature, rate, figures in leaves:
            if rate == results["learning_rate"]:
                groups.setdefault((*key, part, feature, digest), []).append(figures)
                recipes.setdefault(key, {})[digest] = recipe
    if not groups:
        raise UserError(f"{folder}: no results.json below it; run an evaluation first")
    for key, different in recipes.items():
        warn_of_recipes(" ".join(filter(None, key)), different.values())
    rows = []
    for (*key, _), found in sorted(groups.items()):
        row = dict(zip(COLLECTED, key, strict=True)) | {"folds": len(found), "videos": sum(f["videos"] for f in found)}
        rows.append(row | {f: mean_and_deviation([figures[f] for figures in found]) for f in ACCURACIES})
    return rows


def warn_of_recipes(name: str, recipes: Iterable[Mapping], free: Container[str] = ()) -> None:
    """Warn if results shown under one name have recipes that differ in keys other than `free`."""
    first, *others = recipes
    keys = sorted({key for other in others for key in differing(first, other, free)})
    if keys:
        log.warning("%s: these results differ in %s; evaluate them alike to compare them", name, ", ".join(keys))


def _random(results: Mapping) -> str:
    """A label for random weights if the variant lacks one because the benchmark's name ends in -random."""
    random = results.get("encoder", {}).get("weights") == RANDOM
    return "random" if random and "random-weights" not in results["variant"] else ""


def _unfinished(results: Mapping) -> str:
    """A label for a classifier that was tested before its training was complete."""
    return "unfinished" if any(e["done"] < e["asked"] for e in results.get("epochs", {}).values()) else ""


_PLAIN_FACTS = ("kind", "dataset", "benchmark", "model", "arch", "variant")


def result_files(folders: Iterable[str | Path]) -> list[Path]:
    """Every `results.json` below the given folders.

    Raises:
        UserError: a folder does not exist.
    """
    files = set()
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; give the one that holds the runs, such as checkpoints/")
        files.update(folder.rglob("results.json"))
    return sorted(files)


def run_folder_of(file: Path) -> str:
    """The folder of the pre-training run that a `results.json` evaluates."""
    evaluation = next((path for path in file.parents if path.name.startswith("eval-")), None)
    return (file.parent if evaluation is None else evaluation.parent).as_posix()


def tell_apart(pairs: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """A display name for each pair of name and detail: the name, with the detail if several pairs share the name."""
    pairs = set(pairs)
    times = Counter(name for name, _ in pairs)
    return {(name, detail): name if times[name] == 1 else f"{name} ({detail})" for name, detail in pairs}


def thesis_figures(row: Mapping) -> tuple[float, float] | None:
    """The thesis' top-1 and top-5 for a row of `collect`, if it is a plain result of one of its methods.

    It may be that of a file given by `--checkpoint`, such as the thesis' own.
    """
    method = METHODS.get(row["arch"])
    plain = not CHECKPOINT.sub("", row["variant"]) and not row["benchmark"].endswith("-random")
    if not plain or row["part"] != "all" or row["feature"] != "pool":
        return None
    return THESIS.get((row["kind"], row["dataset"], method))


def summary(rows: Sequence[Mapping], form: str) -> str:
    """Format the table of `collect` as `text`, `markdown` or `csv`, next to the thesis' corresponding figures.

    Where the thesis has none, on other data sets, `text` and `markdown` omit its columns.
    """
    heads = ["evaluation", "data", "benchmark", "model", "variant", "part", "feature", "folds", "videos", *ACCURACIES]
    table = [[*heads, "thesis top-1", "thesis top-5"]]
    models = tell_apart((row["model"], row["folder"]) for row in rows)
    for row in rows:
        several = row["folds"] > 1
        figures = [f"{row[f]['mean']:.2f}" + (f" +-{row[f]['std']:.2f}" if several else "") for f in ACCURACIES]
        thesis = [f"{value:.2f}" for value in thesis_figures(row) or ()] or ["", ""]
        kind, dataset, benchmark, part, feature = (row[n] for n in ("kind", "dataset", "benchmark", "part", "feature"))
        encoder_bn = "encoder_bn: train" if row["encoder_bn"] == "train" else ""
        variant = " ".join(filter(None, [row["variant"], encoder_bn]))
        names = [kind, dataset, benchmark, models[row["model"], row["folder"]], variant, part, feature]
        table.append([*names, str(row["folds"]), str(row["videos"]), *figures, *thesis])
    if form == "csv":
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows(table)
        return text.getvalue()
    remark = f"\n{THESIS_REMARK}\n"
    if not any(map(thesis_figures, rows)):
        table, remark = [line[:-2] for line in table], ""
    if form == "markdown":
        lines = ["| " + " | ".join(line) + " |" for line in table]
        lines.insert(1, "|" + "---|" * len(table[0]))
        return "\n".join(lines) + "\n" + remark
    return _aligned(table) + remark


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines) + "\n"
