"""Tables and pictures of finished runs.

    python3 -m utils.report demo CFG [CFG ...] [--out demo.png]
    python3 -m utils.report curves CFG [CFG ...] [--out curves.png]
    python3 -m utils.report checkpoints/ [--form text|markdown|csv] [--out FILE]
    python3 -m utils.report concepts DIR [DIR ...] [--out concepts.png]
    python3 -m utils.report retrieval CFG [--checkpoint FILE] [--audio-stats FILE] [--png FILE] [--map FILE]

`demo` measures each run's encoder on its held-out videos beside the untrained network and chance: cross-modal retrieval
and the nearest-neighbour accuracy of frozen video features. `curves` draws loss and held-out retrieval over the epochs,
of runs that still go on too. A folder in place of a command: all evaluations below it in one table. `concepts` draws
accuracy over the few-shot ratio, on unseen and on seen concepts. `retrieval` is the cross-modal retrieval of any known
checkpoint on the held-out videos of a configuration, with a picture of queries and answers, and a map of the embeddings
in two dimensions.
"""

import argparse
import math
import sys
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from datasets import build_held_out, build_videos
from datasets.preprocessing import BatchPrep
from datasets.statistics import audio_statistics, read_statistics
from datasets.video_dataset import ClipRecipe, EvenClips, collate_readable, make_loader
from models import build_model
from utils import checkpoint
from utils.cli import run_script
from utils.concepts import report_concepts
from utils.config import load_config
from utils.errors import UserError
from utils.figures import output_file, save_figure
from utils.logger import percentages, read_metrics
from utils.memory import default_device
from utils.metrics import nearest_neighbour_accuracy
from utils.results import collect, summary
from utils.retrieval import NEIGHBOURS, cross_modal_retrieval, draw_answers, draw_map, embed, held_out_figures

COLUMNS = ("v2a_R@1", "v2a_R@5", "v2a_R@10", "a2v_R@1", "a2v_R@5", "a2v_R@10", f"kNN@{NEIGHBOURS}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="what runs on the demo data set have learned: a table and a picture")
    demo.add_argument("cfgs", metavar="CFG", nargs="+", help="configurations of finished runs")
    demo.add_argument("--out", default="demo.png", help="the picture")
    curves = commands.add_parser("curves", help="loss and held-out retrieval of runs over their epochs: a picture")
    curves.add_argument("cfgs", metavar="CFG", nargs="+", help="configurations of runs with monitor_every above 0")
    curves.add_argument("--out", default="curves.png", help="the picture")
    results = commands.add_parser("results", help="the accuracies of all evaluations below a folder: one table")
    results.add_argument("folder", metavar="DIR", help="such as checkpoints/")
    results.add_argument("--form", choices=("text", "markdown", "csv"), default="text")
    results.add_argument("--out", help="a file; default: the console")
    concepts = commands.add_parser("concepts", help="unseen and seen concepts over the few-shot ratio: plots and CSV")
    concepts.add_argument("folders", metavar="DIR", nargs="+", help="such as checkpoints/")
    concepts.add_argument("--out", default="concepts.png", help="the picture; the figures go beside it as CSV")
    cross = commands.add_parser("retrieval", help="cross-modal retrieval of a checkpoint, ours or a foreign one")
    cross.add_argument("cfg", metavar="CFG", help="a pre-training configuration")
    cross.add_argument("--checkpoint", help="default: the configuration's own run")
    cross.add_argument("--audio-stats", help="npz with mean and std of each mel bin; default: the checkpoint's own")
    cross.add_argument("--png", help="a picture of videos and the sounds found for them")
    cross.add_argument("--map", help="a picture of the embeddings by PCA and t-SNE")
    arguments = sys.argv[1:]
    if arguments and arguments[0] not in commands.choices and not arguments[0].startswith("-"):
        arguments.insert(0, "results")
    args = parser.parse_args(arguments)
    if args.command == "demo":
        report_demo([load_config(cfg, kind="pre-training") for cfg in args.cfgs], Path(args.out))
    elif args.command == "curves":
        report_curves([load_config(cfg, kind="pre-training") for cfg in args.cfgs], Path(args.out))
    elif args.command == "results":
        report_results(args.folder, args.form, args.out)
    elif args.command == "concepts":
        report_concepts(args.folders, Path(args.out))
    else:
        report_retrieval(load_config(args.cfg, kind="pre-training"), args)


def report_results(folder: str, form: str, out: str | None) -> None:
    """Show, or write, the table of all evaluations below a folder."""
    table = summary(collect(folder), form)
    if out is None:
        print(table, end="")
    else:
        output_file(out).write_text(table)


def report_retrieval(cfg: dict, args: argparse.Namespace) -> None:
    """Cross-modal retrieval of a checkpoint on the held-out videos, which says where the audio statistics are from."""
    if cfg["model"]["arch"] == "vicreg_v_wrapper":
        raise UserError(f"{args.cfg}: trains on video alone; retrieval is between video and sound")
    device = default_device()
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
    elif "audio_stats" in state:
        stats, source = state["audio_stats"], "the checkpoint"
    else:
        videos = build_videos(cfg["dataset"], cfg["dataset"]["train"]["split"])
        recipe = ClipRecipe.from_config(cfg["dataset"], augment=False)
        stats, source = audio_statistics(videos, recipe, cfg["num_workers"], cfg["cache_dir"]), f"{videos}, computed"
    held_out = build_held_out(cfg, device, most=None)
    embeddings = embed(model, held_out, BatchPrep(cfg["dataset"], stats, device))
    print(f"{words}, {file}\naudio statistics: {source}\n{percentages(held_out_figures(embeddings))}")
    if args.png is not None:
        figure = plt.figure(figsize=(12, 6.5), layout="constrained")
        draw_retrieval(figure, cfg, embeddings)
        save_figure(figure, args.png)
    if args.map is not None:
        draw_map(embeddings, held_out.dataset.videos.classes or (), args.map)


def report_demo(cfgs: list[dict], out: Path) -> None:
    """Measure the runs, print the table, draw the picture."""
    device = default_device()
    held_out = build_held_out(cfgs[0], device, most=None)
    labels = held_out.dataset.videos.labels
    count = len(labels)
    rows = {"chance": chance(count, labels)}
    runs = {}
    for cfg in cfgs:
        state, path = checkpoint.load_latest(run_folder(cfg)) or (None, None)
        if state is None:
            raise UserError(f"{run_folder(cfg)}: no checkpoint; pre-train first")
        prepare = BatchPrep(cfg["dataset"], state["audio_stats"], device)
        torch.manual_seed(cfg["seed"])
        model = build_model(cfg["model"]).to(device)
        name = cfg["model"]["name"]
        rows[f"{name} untrained"], _ = measure(model, cfg, prepare, device)
        checkpoint.load_weights(model, state["model"], str(path))
        rows[name], runs[name] = measure(model, cfg, prepare, device)
    print_table(rows, count)
    draw(cfgs, rows, runs, out)
    print(f"picture: {out}")


def report_curves(cfgs: list[dict], out: Path) -> None:
    """Draw the runs' losses and held-out retrieval."""
    for cfg in cfgs:
        if not any(row["epoch"] for row in read_metrics(run_folder(cfg), "retrieval")):
            raise UserError(f"{run_folder(cfg)}: no held-out retrieval yet; pre-train with monitor_every above 0")
    videos = len(build_held_out(cfgs[0], torch.device("cpu")).dataset)
    figure = plt.figure(figsize=(4 * len(cfgs) + 4, 3.8), layout="constrained")
    draw_curves(figure, cfgs, 100 * min(1.0, 10 / videos))
    save_figure(figure, out)
    plt.close(figure)
    print(f"picture: {out}")


def run_folder(cfg: dict) -> Path:
    """Where a run's output lies."""
    return Path(cfg["model"]["model_dir"]) / cfg["model"]["name"]


def measure(
    model: torch.nn.Module, cfg: dict, prepare: BatchPrep, device: torch.device
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Retrieval and nearest-neighbour figures in percent, and the held-out embeddings behind them."""
    test = embed(model, build_held_out(cfg, device, most=None), prepare)
    recipe = ClipRecipe.from_config(cfg["dataset"], augment=False)
    train_videos = EvenClips(build_videos(cfg["dataset"], cfg["dataset"]["train"]["split"]), recipe, windows=1)
    loader = make_loader(
        train_videos,
        cfg["num_workers"],
        device,
        batch_size=cfg["dataset"]["batch_size"],
        collate_fn=collate_readable,
    )
    train = embed(model, loader, prepare)
    neighbours = nearest_neighbour_accuracy(
        train["features"].mean(1), train["label"], test["features"].mean(1), test["label"], (NEIGHBOURS,)
    )
    return cross_modal_retrieval(test) | neighbours, test


def chance(count: int, labels: torch.Tensor) -> dict[str, float]:
    """What guessing gives, in percent."""
    figures = {name: 100 * min(1.0, int(name.rpartition("@")[2]) / count) for name in COLUMNS[:-1]}
    return figures | {COLUMNS[-1]: 100 * labels.bincount().max().item() / count}


def standard_error(percent: float, count: int) -> float:
    """Of a share of so many independent trials, in percent."""
    share = percent / 100
    return 100 * math.sqrt(share * (1 - share) / count)


def print_table(rows: dict[str, dict[str, float]], count: int) -> None:
    """A row a network, a column a figure."""
    width = max(map(len, rows))
    print(f"\n{count} held-out videos; percent; +- is the standard error of R@10 and kNN")
    print(f"{'':{width}}  " + "  ".join(f"{name:>12}" for name in COLUMNS))
    for row, figures in rows.items():
        cells = []
        for name in COLUMNS:
            error = "" if row == "chance" or name.endswith(("@1", "R@5")) else standard_error(figures[name], count)
            cells.append(f"{figures[name]:.1f}" + (f" +-{error:.1f}" if error != "" else ""))
        print(f"{row:{width}}  " + "  ".join(f"{cell:>12}" for cell in cells))
    print()


def draw(cfgs: list[dict], rows: dict, runs: dict, out: Path) -> None:
    """Loss and retrieval over the epochs, and queries of the first run with the sounds it finds for them."""
    figure = plt.figure(figsize=(12, 10), layout="constrained")
    curves, pairs = figure.subfigures(2, 1, height_ratios=(1, 1.7))
    draw_curves(curves, cfgs, rows["chance"]["v2a_R@10"])
    draw_retrieval(pairs, cfgs[0], runs[cfgs[0]["model"]["name"]])
    save_figure(figure, out)
    plt.close(figure)


def draw_curves(figure: plt.Figure, cfgs: list[dict], chance: float) -> None:
    """Each run's loss and, together, the runs' R@10 in percent over the epochs; `chance` is that of R@10."""
    *loss_axes, recall_axis = figure.subplots(1, len(cfgs) + 1)
    for cfg, loss_axis in zip(cfgs, loss_axes, strict=True):
        name, folder = cfg["model"]["name"], run_folder(cfg)
        train, held_out = read_metrics(folder, "train"), read_metrics(folder, "retrieval")
        steps_per_epoch = held_out[-1]["step"] / held_out[-1]["epoch"]
        loss_axis.plot([r["step"] / steps_per_epoch for r in train], [r["loss"] for r in train])
        loss_axis.set(xlabel="epoch", ylabel="loss", title=f"Training loss, {name}")
        for direction, style in (("v2a", "-"), ("a2v", "--")):
            epochs, recall = zip(*((r["epoch"], r[f"{direction}_R@10"]) for r in held_out), strict=True)
            recall_axis.plot(epochs, recall, style, marker="o", label=f"{name}, {direction}")
    recall_axis.axhline(chance, color="gray", linestyle=":", label="chance")
    recall_axis.set(xlabel="epoch", ylabel="R@10, percent", ylim=(0, None), title="Held-out cross-modal retrieval")
    recall_axis.legend(fontsize=8)
    for axis in (*loss_axes, recall_axis):
        axis.grid(alpha=0.3)


def draw_retrieval(figure: plt.Figure, cfg: dict, run: dict[str, torch.Tensor]) -> None:
    """Some of a run's held-out videos, and the sounds that are nearest to them (see `draw_answers`)."""
    clips = build_held_out(cfg, torch.device("cpu"), most=None).dataset
    mels = cfg["dataset"]["spec_params"]["n_mels"]
    prepare = BatchPrep(cfg["dataset"], {"mean": torch.zeros(mels), "std": torch.ones(mels)}, torch.device("cpu"))

    def show(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        sample = clips[index]
        return sample["frames"][0], prepare.audio(sample["waveform"][:1])[0, 0]

    draw_answers(figure, run, show, clips.videos.classes or ())


if __name__ == "__main__":
    run_script(main)
