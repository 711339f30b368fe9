"""utils.logger and utils.bad_videos: what a run's files keep."""

import pytest

from utils.bad_videos import BadVideos
from utils.errors import UserError
from utils.figures import output_file
from utils.logger import MetricsWriter, read_metrics


@pytest.mark.parametrize(("resume_step", "kept"), [(0, [9]), (2, [1, 2, 9]), (None, [1, 2, 3, 9])])
def test_figures_of_steps_that_will_be_taken_again_are_dropped(tmp_path, resume_step, kept):
    writer = MetricsWriter(tmp_path)
    for step in (1, 2, 3):
        writer.write("train", step, {"loss": 1.0})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"group": "train", "st')  # of a killed run
    writer = MetricsWriter(tmp_path, resume_step)
    writer.write("train", 9, {"loss": 1.0})
    writer.close()
    assert [line["step"] for line in read_metrics(tmp_path, "train")] == kept


def test_a_bad_video_whose_name_is_no_utf_8_is_noted(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.bad_videos.log.disabled", True)  # pytest's processes cannot send each other such a name
    bad = BadVideos(tmp_path, 1.0, 10)
    bad._flush([("clip\udce9.mp4", "cannot be opened")])
    assert b"clip\xe9.mp4,cannot be opened,1" in (tmp_path / "bad-videos.csv").read_bytes()


def test_a_file_goes_into_a_folder_that_is_not_there_yet(tmp_path):
    output_file(tmp_path / "new/deeper/table.csv").write_text("a,b\n")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="its folder cannot be made"):
        output_file(tmp_path / "file/table.csv")
