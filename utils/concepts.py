"""Concept generalization: accuracy on unseen and seen concepts over the fraction of labels, one line per method.

Reads the results of `eval-action-recg-linear.py --use-rest-classes [--few-shot-ratio R]`; `python3 -m utils.sweep` runs
it for several methods, ratios and subsets.
"""

import csv
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.errors import UserError
from utils.evaluation import RANDOM
from utils.pictures import save_picture
from utils.results import (
    ACCURACIES,
    CHECKPOINT,
    OF_THE_FOLD,
    mean_and_deviation,
    result_files,
    run_folder_of,
    tell_apart,
    warn_of_recipes,
)

log = logging.getLogger("avssrl")

PARTS = {"unseen": "-", "seen": "--"}  # part: line style
SHOWN = {"Video@1": "top-1", "Video@5": "top-5"}
KEY = ("dataset", "benchmark", "method", "part", "ratio")
OF_A_SUBSET = {"few_shot_ratio", "few_shot_seed", "seed", "parts"}
COLUMNS = (*KEY, "classes", "videos", "seeds", *(f"{name} {what}" for name in ACCURACIES for what in ("mean", "std")))


def report_concepts(folders: Iterable[str | Path], out: Path) -> None:
    """Print the table of `collect_concepts`, plot it to `out`, and write the figures next to it as CSV."""
    rows = collect_concepts(folders)
    print(concepts_table(rows))
    draw_concepts(rows, out)
    write_csv(rows, out.with_suffix(".csv"))
    print(f"picture: {out}, figures: {out.with_suffix('.csv')}")


def collect_concepts(folders: Iterable[str | Path]) -> list[dict]:
    """The rows behind the plots: one per data set, benchmark, method, part (unseen, seen) and few-shot ratio.

    A row has the mean and the standard deviation (n - 1, over seeds, after averaging the folds of a seed) of each
    figure in percent, as `"Video@1 mean"` and `"Video@1 std"`, and the numbers of `classes`, test `videos` and `seeds`.
    Without `--few-shot-ratio` the ratio is 1.

    Raises:
        UserError: no such folder, or no result with unseen and seen classes below the folders.
    """
    read = []
    for file in result_files(folders):
        try:
            read += _leaves_of(json.loads(file.read_text()), run_folder_of(file))
        except (ValueError, KeyError, TypeError, AttributeError):
            log.warning("%s: not a result of this project; skipped", file)
    names = tell_apart(leaf.method for leaf in read)
    recipes: dict[tuple, list[Mapping]] = {}
    for leaf in read:
        recipes.setdefault((*leaf.of[:2], names[leaf.method]), []).append(leaf.recipe)
    for line, of_line in recipes.items():
        warn_of_recipes(" ".join(line), of_line, OF_THE_FOLD | OF_A_SUBSET)
    found: dict[tuple, dict[tuple, list[Mapping]]] = {}
    sizes: dict[tuple, tuple[int, int]] = {}
    for leaf in read:
        dataset, benchmark, feature, part, ratio = leaf.of
        key = dataset, benchmark, names[leaf.method] + feature, part, ratio
        found.setdefault(key, {}).setdefault(leaf.seed, []).append(leaf.figures)
        sizes[key] = leaf.classes, leaf.figures["videos"]
    if not found:
        raise UserError(
            f"{', '.join(map(str, folders))}: no result with unseen and seen classes; run "
            "eval-action-recg-linear.py with --use-rest-classes, or python3 -m utils.sweep"
        )
    rows = []
    for key, by_seed in sorted(found.items()):
        row = dict(zip(KEY, key, strict=True)) | dict(zip(("classes", "videos"), sizes[key], strict=True))
        row["seeds"] = len(by_seed)
        for name in ACCURACIES:
            values = [np.mean([figures[name] for figures in folds]) for folds in by_seed.values()]
            row |= {f"{name} {what}": value for what, value in mean_and_deviation(values).items()}
        rows.append(row)
    return rows


class _Leaf(NamedTuple):
    """The figures of one feature on one part of one evaluation.

    `method` is the method's name with its run's folder or, for random weights, the backbone; and the list of unseen
    classes, if it is not the thesis'.
    """

    of: tuple[str, str, str, str, float]
    method: tuple[str, str]
    seed: tuple
    recipe: Mapping
    classes: int
    figures: Mapping


def _leaves_of(results: Mapping, folder: str) -> list[_Leaf]:
    if not set(PARTS) <= set(results["results"]):
        return []
    few_shot = results["few_shot"] or {"ratio": 1.0, "seed": None}
    seed = few_shot["seed"] if few_shot["ratio"] < 1 else None, results["recipe"]["seed"]
    name = method_name(results)
    unseen_list = Path(results["recipe"].get("dataset.rest_classes") or "").name  # results of two lists have two lines
    method = name, " ".join(filter(None, [results.get("backbone", "") if name == RANDOM else folder, unseen_list]))
    leaves = []
    for part in PARTS:
        by_feature = results["results"][part]
        for feature, figures in by_feature.items():
            shown = f", {feature}" if len(by_feature) > 1 else ""
            of = results["dataset"], results["benchmark"], shown, part, few_shot["ratio"]
            leaves.append(_Leaf(of, method, seed, results["recipe"], len(results["recipe"]["parts"][part]), figures))
    return leaves


def method_name(results: Mapping) -> str:
    """The label of a line in the plot: the model, the checkpoint if not the run's own, and BN in training mode."""
    if results["encoder"]["weights"] == RANDOM:
        return RANDOM
    other = CHECKPOINT.findall(results["variant"])
    training_bn = ["encoder_bn: train"] if results["encoder"].get("bn") == "train" else []
    return " ".join([results["model"], *other, *training_bn])


def write_csv(rows: Sequence[Mapping], file: str | Path) -> None:
    """Write the figures behind the plots, one line per row of `collect_concepts`."""
    with Path(file).open("w", newline="") as out:
        writer = csv.DictWriter(out, COLUMNS)
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()})


def concepts_table(rows: Sequence[Mapping]) -> str:
    """Console table of mean and deviation of Video@1 and Video@5: a line per method and part, a column per ratio."""
    ratios = sorted({row["ratio"] for row in rows})
    cells = {tuple(row[key] for key in KEY): row for row in rows}
    data = tell_apart((row["dataset"], row["benchmark"]) for row in rows)
    lines = []
    for figure, title in SHOWN.items():
        lines.append([f"{title} ({figure})", *(f"{100 * ratio:g}%" for ratio in ratios)])
        for line in sorted({tuple(row[key] for key in KEY[:-1]) for row in rows}):
            found = [cells.get((*line, ratio)) for ratio in ratios]
            dataset, benchmark, method, part = line
            shown = [_cell(row, figure) if row else "" for row in found]
            lines.append([f"{data[dataset, benchmark]}, {method}, {part}", *shown])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _cell(row: Mapping, figure: str) -> str:
    deviation = f" +-{row[f'{figure} std']:.1f}" if row["seeds"] > 1 else ""
    return f"{row[f'{figure} mean']:.1f}{deviation}"


def draw_concepts(rows: Sequence[Mapping], file: str | Path | None = None) -> object:
    """Plot top-1 and top-5 over the few-shot ratio for each data set; returns the matplotlib figure.

    One colour per method; solid for unseen, dashed for seen concepts; error bars are one standard deviation over seeds;
    dotted lines are chance. Solid and dashed lines differ in their (number of) classes: only methods are comparable.
    """
    from matplotlib.figure import Figure

    benchmarks = sorted({(row["dataset"], row["benchmark"]) for row in rows})
    names = tell_apart(benchmarks)
    methods = sorted({row["method"] for row in rows} - {RANDOM})
    colours = {method: f"C{i}" for i, method in enumerate(methods)} | {RANDOM: "0.45"}
    figure = Figure(figsize=(10.8, 4.1 * len(benchmarks) + 0.9), layout="constrained")
    axes = figure.subplots(len(benchmarks), len(SHOWN), squeeze=False)
    for line, benchmark in zip(axes, benchmarks, strict=True):
        own = [row for row in rows if (row["dataset"], row["benchmark"]) == benchmark]
        sizes = ", ".join(f"{row['classes']} {row['part']}" for row in {row["part"]: row for row in own}.values())
        for axis, (figure_name, title) in zip(line, SHOWN.items(), strict=True):
            _draw_lines(axis, own, figure_name, colours)
            axis.set(title=f"{names[benchmark]}, {title} ({sizes} classes)", ylabel=f"{figure_name}, percent")
    labelled = {}
    for axis in axes.flat:
        handles, labels = axis.get_legend_handles_labels()
        labelled |= dict(zip(labels, handles, strict=True))
    figure.legend(labelled.values(), labelled, loc="outside lower center", ncols=4, fontsize=8, handlelength=3.5)
    if file is not None:
        save_picture(figure, file)
    return figure


def _draw_lines(axis: object, rows: Sequence[Mapping], figure: str, colours: Mapping[str, str]) -> None:
    ratios = sorted({row["ratio"] for row in rows})
    for method, colour in colours.items():
        for part, style in PARTS.items():
            points = sorted((r for r in rows if (r["method"], r["part"]) == (method, part)), key=lambda r: r["ratio"])
            if points:
                x, mean, std = ([p[name] for p in points] for name in ("ratio", f"{figure} mean", f"{figure} std"))
                axis.errorbar(
                    x, mean, std, color=colour, linestyle=style, marker="o", ms=4, capsize=3, label=f"{method}, {part}"
                )
    for part, style in PARTS.items():
        classes = [row["classes"] for row in rows if row["part"] == part]
        chance = 100 * min(1, int(figure.rpartition("@")[2]) / classes[0])
        label = f"chance, {part}"
        axis.axhline(chance, color="0.7", linestyle=":", lw=1.5 if style == "-" else 0.7, zorder=0, label=label)
    axis.set_xscale("log")
    axis.set_xticks(ratios, [f"{100 * ratio:g}%" for ratio in ratios])
    axis.minorticks_off()
    axis.set(xlabel="fraction of the labelled training videos", ylim=(0, 102))
    axis.grid(alpha=0.3)
