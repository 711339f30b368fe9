"""Tables and plots of finished runs.

    python3 -m utils.report demo CFG [CFG ...] [--out demo.png]
    python3 -m utils.report curves CFG [CFG ...] [--out curves.png]
    python3 -m utils.report checkpoints/ [--form text|markdown|csv] [--out FILE]
    python3 -m utils.report concepts DIR [DIR ...] [--out concepts.png]
    python3 -m utils.report retrieval CFG [--set KEY=VALUE] [--checkpoint FILE] [--audio-stats FILE] [--controls]
        [--png PNG] [--map PNG]

`demo` compares each run's encoder on its held-out videos with the untrained network and chance: cross-modal retrieval
and nearest-neighbour accuracy of frozen video features. `curves` plots loss and held-out retrieval over the epochs,
also for unfinished runs. A folder instead of a command tabulates all evaluations below it. `concepts` plots accuracy
over the few-shot ratio, on unseen and on seen concepts. `retrieval` measures cross-modal retrieval of any known
checkpoint on the held-out videos of a configuration. Its options add controls without motion or the order of sound, a
picture of queries with the retrieved sounds, and a two-dimensional map of the embeddings.
"""

import argparse
import math
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

from datasets import MONITOR_VIDEOS, build_held_out, build_videos
from datasets.preprocessing import BatchPrep
from datasets.statistics import audio_statistics, read_statistics
from datasets.video_dataset import ClipRecipe, EvenClips, VideoList, collate_readable, make_loader
from models import build_model
from utils import checkpoint
from utils.cli import run_script
from utils.concepts import report_concepts
from utils.config import load_config, run_folder
from utils.errors import UserError
from utils.files import write_whole
from utils.logger import percentages, read_metrics
from utils.memory import default_device
from utils.metrics import nearest_neighbour_accuracy
from utils.pictures import picture, save_picture
from utils.precision import Precision
from utils.results import collect, summary, tell_apart
from utils.retrieval import (
    NEIGHBOURS,
    controls,
    cross_modal_retrieval,
    draw_answers,
    draw_map,
    embed,
    held_out_figures,
)

COLUMNS = ("v2a_R@1", "v2a_R@5", "v2a_R@10", "a2v_R@1", "a2v_R@5", "a2v_R@10", f"kNN@{NEIGHBOURS}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="what runs on the demo data set have learned: table and picture")
    demo.add_argument("cfgs", metavar="CFG", nargs="+", help="configurations of finished runs")
    demo.add_argument("--out", type=picture, default="demo.png", help="output picture")
    curves = commands.add_parser("curves", help="plot of loss and held-out retrieval of runs over their epochs")
    curves.add_argument("cfgs", metavar="CFG", nargs="+", help="configurations of runs with monitor_every above 0")
    curves.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="change a key of every CFG")
    curves.add_argument("--out", type=picture, default="curves.png", help="output picture")
    results = commands.add_parser("results", help="table of the accuracies of all evaluations below a folder")
    results.add_argument("folder", metavar="DIR", help="such as checkpoints/")
    results.add_argument("--form", choices=("text", "markdown", "csv"), default="text")
    results.add_argument("--out", help="output file; default: the console")
    concepts = commands.add_parser("concepts", help="unseen and seen concepts over the few-shot ratio: plots and CSV")
    concepts.add_argument("folders", metavar="DIR", nargs="+", help="such as checkpoints/")
    concepts.add_argument("--out", type=picture, default="concepts.png", help="picture; figures go next to it as CSV")
    cross = commands.add_parser("retrieval", help="cross-modal retrieval of a checkpoint, ours or a known foreign one")
    cross.add_argument("cfg", metavar="CFG", help="a pre-training configuration")
    cross.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="change a key of CFG")
    cross.add_argument("--checkpoint", help="default: the configuration's own run")
    cross.add_argument("--audio-stats", help="npz with mean and std of each mel bin; default: the checkpoint's own")
    cross.add_argument("--controls", action="store_true", help="also measure on still frames, and on shuffled sound")
    cross.add_argument("--png", type=picture, help="draw videos and the sounds retrieved for them")
    cross.add_argument("--map", type=picture, help="draw the embeddings by PCA and t-SNE")
    arguments = sys.argv[1:]
    if arguments and arguments[0] not in (*commands.choices, "-h", "--help"):
        arguments.insert(0, "results")
    args = parser.parse_args(arguments)
    if args.command == "demo":
        report_demo([load_config(cfg, kind="pre-training") for cfg in args.cfgs], args.out)
    elif args.command == "curves":
        report_curves([load_config(cfg, args.set, "pre-training") for cfg in args.cfgs], args.out)
    elif args.command == "results":
        report_results(args.folder, args.form, args.out)
    elif args.command == "concepts":
        report_concepts(args.folders, args.out)
    else:
        report_retrieval(load_config(args.cfg, args.set, "pre-training"), args)


def report_results(folder: str, form: str, out: str | None) -> None:
    """Print, or write to `out`, the table of all evaluations below a folder."""
    table = summary(collect(folder), form)
    if out is None:
        print(table, end="")
    else:
        write_whole(Path(out), table)


def report_retrieval(cfg: dict, args: argparse.Namespace) -> None:
    """Print cross-modal retrieval of a checkpoint on the held-out videos, and the source of the audio statistics."""
    if cfg["model"]["arch"] == "vicreg_v_wrapper":
        raise UserError(f"{args.cfg}: trains on video alone; retrieval is between video and sound")
    device = default_device()
    if args.checkpoint == "":
        raise UserError("--checkpoint: expected a file, found an empty name; omit it for the run's own")
    if args.checkpoint:
        state, file = checkpoint.load(args.checkpoint), args.checkpoint
    else:
        state, file = checkpoint.load_latest(run_folder(cfg)) or (None, None)
        if state is None:
            raise UserError(f"{run_folder(cfg)}: no checkpoint; pre-train first, or give --checkpoint FILE")
    weights, words = checkpoint.recognise(state, str(file))
    model = build_model(cfg["model"]).to(device)
    checkpoint.load_weights(model, weights, str(file))
    if args.audio_stats is not None:
        stats, source = read_statistics(args.audio_stats, cfg["dataset"]["spec_params"]["n_mels"]), args.audio_stats
    else:
        stats, source = statistics_of(state, cfg)
    held_out, prepare = build_held_out(cfg, device, most=None), BatchPrep(cfg["dataset"], stats, device)
    autocast = autocast_of(cfg, device)
    embeddings = embed(model, held_out, prepare, autocast)
    print(f"{words}, {file}\naudio statistics: {source}\n{percentages(held_out_figures(embeddings))}")
    for name, without in (controls(prepare) if args.controls else {}).items():
        print(f"without {name}: {percentages(cross_modal_retrieval(embed(model, held_out, without, autocast)))}")
    if args.map is not None and len(embeddings["index"]) < 3:
        raise UserError(f"--map: {len(embeddings['index'])} videos could be read, but a map needs at least 3")
    if args.png is not None:
        figure = plt.figure(figsize=(12, 6.5), layout="constrained")
        draw_retrieval(figure, cfg, embeddings)
        save_picture(figure, args.png)
    if args.map is not None:
        draw_map(embeddings, held_out.dataset.videos.classes or (), args.map)


def autocast_of(cfg: dict, device: torch.device) -> Callable[[], AbstractContextManager]:
    """The context of a forward pass in the configured precision, or in fp32 where this device has not got it."""
    try:
        return Precision(cfg["precision"], device).autocast
    except UserError as error:
        print(f"measured in fp32 ({error})")
        return Precision("fp32", device).autocast


def statistics_of(state: Mapping, cfg: dict) -> tuple[dict[str, Tensor], str]:
    """Audio statistics of a checkpoint, or if it has none, of the training videos; and their source."""
    if "audio_stats" in state:
        return state["audio_stats"], "the checkpoint"
    videos = build_videos(cfg["dataset"], cfg["dataset"]["train"]["split"], with_sound=True)
    recipe = ClipRecipe.from_config(cfg["dataset"], augment=False)
    return audio_statistics(videos, recipe, cfg["num_workers"], cfg["cache_dir"]), f"{videos}, computed"


def report_demo(cfgs: list[dict], out: Path) -> None:
    """Measure the runs, print the table, save the picture."""
    device = default_device()
    for cfg in cfgs:
        if cfg["model"]["arch"] == "vicreg_v_wrapper":
            raise UserError(f"{run_folder(cfg)}: trains on video alone; this table is about video and sound")
    labels = shared_held_out(cfgs).labels
    rows, runs = {"chance": chance(len(labels), labels)}, {}
    for cfg, name in zip(cfgs, run_names(cfgs), strict=True):
        state, path = checkpoint.load_latest(run_folder(cfg)) or (None, None)
        if state is None:
            raise UserError(f"{run_folder(cfg)}: no checkpoint; pre-train first")
        weights, _ = checkpoint.recognise(state, str(path))
        prepare = BatchPrep(cfg["dataset"], statistics_of(state, cfg)[0], device)
        torch.manual_seed(cfg["seed"])
        model = build_model(cfg["model"]).to(device)
        rows[f"{name} untrained"], _ = measure(model, cfg, prepare, device)
        checkpoint.load_weights(model, weights, str(path))
        rows[name], runs[name] = measure(model, cfg, prepare, device)
    print_table(rows, labels)
    figure = plt.figure(figsize=(12, 10), layout="constrained")
    curves, pairs = figure.subfigures(2, 1, height_ratios=(1, 1.7))
    trained_here = [cfg for cfg in cfgs if (run_folder(cfg) / "metrics.jsonl").exists()]
    draw_curves(curves, trained_here, rows["chance"]["v2a_R@10"])
    draw_retrieval(pairs, cfgs[0], next(iter(runs.values())))
    save_picture(figure, out)
    plt.close(figure)
    print(f"picture: {out}")


def report_curves(cfgs: list[dict], out: Path) -> None:
    """Plot the runs' losses and held-out retrieval."""
    for cfg in cfgs:
        if not any(row["epoch"] for row in read_metrics(run_folder(cfg), "retrieval")):
            raise UserError(f"{run_folder(cfg)}: no held-out retrieval yet; pre-train with monitor_every above 0")
    videos = min(len(shared_held_out(cfgs)), MONITOR_VIDEOS)
    figure = plt.figure(figsize=(4 * len(cfgs) + 4, 3.8), layout="constrained")
    draw_curves(figure, cfgs, 100 * min(1.0, 10 / videos))
    save_picture(figure, out)
    plt.close(figure)
    print(f"picture: {out}")


def shared_held_out(cfgs: list[dict]) -> VideoList:
    """The common held-out videos of runs to be compared.

    Raises:
        UserError: they are not the same for all runs.
    """
    first, *others = (build_videos(cfg["dataset"], cfg["dataset"]["test"]["split"], with_sound=True) for cfg in cfgs)
    for cfg, videos in zip(cfgs[1:], others, strict=True):
        if videos.fingerprint != first.fingerprint:
            raise UserError(
                f"{run_folder(cfg)}: its held-out videos, {videos}, are not those of {run_folder(cfgs[0])}, {first}; "
                "report runs on other data separately"
            )
    return first


def run_names(cfgs: list[dict]) -> list[str]:
    """Display names of runs: `model.name`, with the folder if several runs share it.

    Raises:
        UserError: a run is given twice.
    """
    runs = [(cfg["model"]["name"], str(run_folder(cfg))) for cfg in cfgs]
    if len(set(runs)) < len(runs):
        raise UserError(f"{next(run for run in runs if runs.count(run) > 1)[1]}: given twice")
    names = tell_apart(runs)
    return [names[run] for run in runs]


def measure(
    model: torch.nn.Module, cfg: dict, prepare: BatchPrep, device: torch.device
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Retrieval and nearest-neighbour figures in percent, and the held-out embeddings behind them."""
    autocast = autocast_of(cfg, device)
    test = embed(model, build_held_out(cfg, device, most=None), prepare, autocast)
    recipe = ClipRecipe.from_config(cfg["dataset"], augment=False)
    videos = build_videos(cfg["dataset"], cfg["dataset"]["train"]["split"], with_sound=True)
    train_videos = EvenClips(videos, recipe, windows=1)
    loader = make_loader(
        train_videos,
        cfg["num_workers"],
        device,
        batch_size=cfg["dataset"]["batch_size"],
        collate_fn=collate_readable,
    )
    train = embed(model, loader, prepare, autocast)
    known, known_test = train["label"] >= 0, test["label"] >= 0
    if known.sum() < NEIGHBOURS or not known_test.any():
        return cross_modal_retrieval(test), test
    neighbours = nearest_neighbour_accuracy(
        train["features"].mean(1)[known],
        train["label"][known],
        test["features"].mean(1)[known_test],
        test["label"][known_test],
        (NEIGHBOURS,),
    )
    return cross_modal_retrieval(test) | neighbours, test


def chance(count: int, labels: torch.Tensor) -> dict[str, float]:
    """Chance level of each figure, in percent. Videos without a label have -1."""
    figures = {name: 100 * min(1.0, int(name.rpartition("@")[2]) / count) for name in COLUMNS[:-1]}
    known = labels[labels >= 0]
    return figures | ({COLUMNS[-1]: 100 * known.bincount().max().item() / len(known)} if len(known) else {})


def standard_error(percent: float, count: int) -> float:
    """The standard error, in percent, of a percentage over `count` independent trials."""
    share = percent / 100
    return 100 * math.sqrt(share * (1 - share) / count)


def print_table(rows: dict[str, dict[str, float]], labels: torch.Tensor) -> None:
    """Print a row per network and a column per figure; `-` if it needs labels and there are none.

    `labels` are those of the held-out videos.
    """
    width = max(map(len, rows))
    print(f"\n{len(labels)} held-out videos; percent; +- is the standard error of R@10 and kNN")
    print(f"{'':{width}}  " + "  ".join(f"{name:>12}" for name in COLUMNS))
    for row, figures in rows.items():
        cells = []
        for name in COLUMNS:
            cells.append(f"{figures[name]:.1f}" if name in figures else "-")
            if name in figures and row != "chance" and not name.endswith(("@1", "R@5")):
                trials = len(labels) if name.partition("_")[2] else int((labels >= 0).sum())
                cells[-1] += f" +-{standard_error(figures[name], trials):.1f}"
        print(f"{row:{width}}  " + "  ".join(f"{cell:>12}" for cell in cells))
    print()


def draw_curves(figure: plt.Figure, cfgs: list[dict], chance: float) -> None:
    """Plot each run's loss, and all runs' R@10 in percent in one axis, over the epochs; `chance` is that of R@10.

    A run has one colour; of its two directions of retrieval the second is dashed.
    """
    *loss_axes, recall_axis = figure.subplots(1, len(cfgs) + 1, squeeze=False)[0]
    for number, (cfg, name, loss_axis) in enumerate(zip(cfgs, run_names(cfgs), loss_axes, strict=True)):
        color = f"C{number}"
        train, held_out = (read_metrics(run_folder(cfg), group) for group in ("train", "retrieval"))
        epoch_steps = steps_of_an_epoch(train)
        loss_axis.plot([r["step"] / epoch_steps for r in train], [r.get("loss", math.nan) for r in train], color=color)
        loss_axis.set(xlabel="epoch", ylabel="loss", title=f"Training loss, {name}")
        for direction, style in (("v2a", "-"), ("a2v", "--")):
            epochs, recall = ([row[key] for row in held_out] for key in ("epoch", f"{direction}_R@10"))
            recall_axis.plot(epochs, recall, style, color=color, marker="o", label=f"{name}, {direction}")
    recall_axis.axhline(chance, color="gray", linestyle=":", label="chance")
    recall_axis.set(xlabel="epoch", ylabel="R@10, percent", ylim=(0, None), title="Held-out cross-modal retrieval")
    recall_axis.legend(fontsize=8)
    for axis in (*loss_axes, recall_axis):
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def steps_of_an_epoch(train: list[dict]) -> float:
    """Steps per epoch from a run's training metrics, where each epoch's last line follows its last step."""
    last = {row["epoch"]: row["step"] for row in train}
    whole = {epoch: step for epoch, step in last.items() if epoch + 1 in last} or last
    return max((step / (epoch + 1) for epoch, step in whole.items()), default=1.0)


def draw_retrieval(figure: plt.Figure, cfg: dict, run: dict[str, torch.Tensor]) -> None:
    """Draw some of a run's held-out videos and the sounds nearest to them (see `draw_answers`)."""
    clips = build_held_out(cfg, torch.device("cpu"), most=None).dataset
    mels = cfg["dataset"]["spec_params"]["n_mels"]
    prepare = BatchPrep(cfg["dataset"], {"mean": torch.zeros(mels), "std": torch.ones(mels)}, torch.device("cpu"))

    def show(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        sample = clips[index]
        return sample["frames"][0], prepare.audio(sample["waveform"][:1])[0, 0]

    draw_answers(figure, cfg["model"]["name"], run, show, clips.videos.classes or ())


if __name__ == "__main__":
    run_script(main)
