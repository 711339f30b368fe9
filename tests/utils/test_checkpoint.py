"""utils.checkpoint: nothing is lost, nothing is half loaded."""

import os
import resource
import stat
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from criterions.memory_bank import MemoryBank
from utils import checkpoint
from utils.errors import UserError, lost_worker


def state(value):
    return {"epoch": value, "model": {"module.weight": torch.full((1000,), float(value))}, "train_criterion": {}}


def test_save_keeps_the_one_before_and_milestones(tmp_path):
    for value in (1, 2, 3):
        checkpoint.save(tmp_path, state(value), keep_as="checkpoint-ep2.pth.tar" if value == 2 else None)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoint-ep2.pth.tar", "checkpoint-previous.pth.tar", "checkpoint.pth.tar"]
    for name, value in zip(names, (2, 2, 3), strict=True):
        assert checkpoint.load(tmp_path / name)["epoch"] == value


def test_wrappers_leave_names_when_read(tmp_path):
    checkpoint.save(tmp_path, {"model": {"module._orig_mod.a.weight": torch.ones(1), "b._orig_mod.c": torch.ones(1)}})
    assert set(checkpoint.load(tmp_path / checkpoint.LATEST)["model"]) == {"a.weight", "b.c"}


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_latest_one_is_passed_over(tmp_path, damage, caplog):
    checkpoint.save(tmp_path, state(1))
    path = checkpoint.save(tmp_path, state(2))
    data = bytearray(path.read_bytes())
    if damage == "flip":
        place = data.find(torch.full((8,), 2.0).numpy().tobytes())
        data[place + 16] ^= 1
    path.write_bytes(b"" if damage == "empty" else data[: len(data) // 2] if damage == "cut" else data)
    with pytest.raises(UserError, match="checkpoint.pth.tar"):
        checkpoint.load(path)
    caplog.set_level("WARNING", "avssrl")
    found, used = checkpoint.load_latest(tmp_path)
    assert found["epoch"] == 1 and used.name == checkpoint.PREVIOUS
    assert "checkpoint.pth.tar" in caplog.text
    used.write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match="no good checkpoint"):
        checkpoint.load_latest(tmp_path)


@pytest.mark.parametrize(("offset", "bit"), [(8, 0), (10, 3), (38, 4)])  # encrypted, compressed, a folder
def test_a_damaged_list_of_contents_is_noticed(tmp_path, offset, bit):
    for value in (1, 2):
        checkpoint.save(tmp_path, state(value))
    latest = tmp_path / checkpoint.LATEST
    data = bytearray(latest.read_bytes())
    name = data.rindex(b"/data/0")  # of the weights, in the list at the end
    data[data.rindex(b"PK\x01\x02", 0, name) + offset] ^= 1 << bit
    latest.write_bytes(data)
    assert checkpoint.load_latest(tmp_path)[0]["epoch"] == 1


def test_a_damaged_latest_one_does_not_take_the_place_of_the_good_one(tmp_path):
    for value in (1, 2):
        checkpoint.save(tmp_path, state(value) | {"config": {}, "videos": "videos", "world_size": 1, "step": 0})
    latest = tmp_path / checkpoint.LATEST
    latest.write_bytes(latest.read_bytes()[:2000])
    checkpoints = run_checkpoints(tmp_path)
    assert checkpoints.latest()["epoch"] == 1
    for epoch, before in ((2, 1), (3, 2)):
        checkpoints.save({}, epoch=epoch, step=0)
        assert checkpoint.load(latest)["epoch"] == epoch
        assert checkpoint.load(tmp_path / checkpoint.PREVIOUS)["epoch"] == before


def test_foreign_weights_are_nothing_to_go_on_with(tmp_path):
    checkpoint.save(tmp_path, state(100))  # as the thesis' file, put where the evaluations look for it
    with pytest.raises(UserError, match="holds weights, not a run .* model.args.checkpoint="):
        run_checkpoints(tmp_path).latest()


def test_a_part_that_a_checkpoint_lacks_is_named(tmp_path):
    with pytest.raises(UserError, match="has no guard"):
        run_checkpoints(tmp_path).restore({"epoch": 1}, {"guard": nn.Linear(1, 1)})


def run_checkpoints(folder, **changes):
    optimizer = {"num_epochs": 5, "lr": {"milestones": [2]}}
    cfg = {"test_freq": 3, "keep_last": 0, "save_every_minutes": 60, "resume": True, "optimizer": optimizer, **changes}
    return checkpoint.RunCheckpoints(folder, cfg, "videos", 10, "fp32")


def test_a_run_that_goes_on_in_another_precision_is_told(tmp_path, caplog):
    """`precision: null` leaves it to the device, so the configuration does not show it."""
    run_checkpoints(tmp_path).save({}, epoch=1, step=0)
    with caplog.at_level("WARNING", logger="avssrl"):
        assert run_checkpoints(tmp_path).latest()["precision"] == "fp32"
        assert not caplog.text
        cfg = run_checkpoints(tmp_path).config
        checkpoint.RunCheckpoints(tmp_path, cfg, "videos", 10, "bf16").latest()
    assert "it ran in fp32, now in bf16: not bit-exact from here" in caplog.text


def test_what_is_saved_after_an_epoch(tmp_path):
    checkpoints = run_checkpoints(tmp_path)
    assert [epoch for epoch in range(1, 6) if checkpoints.due_after(epoch)] == [2, 3, 5]  # a milestone, the last one
    checkpoints = run_checkpoints(tmp_path, save_every_minutes=0)
    assert all(checkpoints.due_after(epoch) for epoch in range(1, 6))


def test_it_is_due_so_many_minutes_after_the_last_save(tmp_path, monkeypatch):
    now = Mock(return_value=0.0)
    monkeypatch.setattr(checkpoint.time, "monotonic", now)
    checkpoints, due = run_checkpoints(tmp_path), []
    for minutes in (59, 61, 62, 122):
        now.return_value = 60.0 * minutes
        due.append(checkpoints.due())
        if minutes == 61:
            checkpoints.save({}, epoch=1, step=1)
    assert due == [False, True, False, True]


def test_a_run_started_anew_keeps_its_own_last_epochs(tmp_path):
    for epochs, kept in ((5, {"2", "4", "5"}), (3, {"1", "2", "3"})):  # 2 is a milestone
        checkpoints = run_checkpoints(
            tmp_path, keep_last=2, optimizer={"num_epochs": epochs, "lr": {"milestones": [2]}}
        )
        for epoch in range(1, epochs + 1):
            checkpoints.save_epoch({}, epoch)
        found = {path.name.removeprefix("checkpoint-ep").split(".")[0] for path in tmp_path.glob("checkpoint-ep*")}
        assert found == kept


def test_weights_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="file.pth: 1 are not finite: bias"):
        checkpoint.load_weights(
            nn.Linear(2, 1), {"weight": torch.ones(1, 2), "bias": torch.tensor([torch.nan])}, "file.pth"
        )


def test_no_checkpoint_is_no_error(tmp_path):
    assert checkpoint.load_latest(tmp_path / "absent") is None


def test_a_crash_between_the_two_renames_loses_nothing(tmp_path):
    path = checkpoint.save(tmp_path, state(1))
    path.rename(tmp_path / checkpoint.PREVIOUS)
    assert checkpoint.load_latest(tmp_path)[0]["epoch"] == 1


def test_a_full_disk_leaves_the_last_good_one(tmp_path):
    """A limit on the size of files fails writes as a full disk does."""
    checkpoint.save(tmp_path, state(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(UserError, match="could not be saved.*File too large.*untouched"):
            checkpoint.save(tmp_path, state(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoint.load(tmp_path / checkpoint.LATEST)["epoch"] == 1
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.LATEST]


def test_only_plain_data_is_read(tmp_path):
    path = tmp_path / "evil.pth.tar"
    torch.save({"model": nn.Linear(1, 1)}, path)
    with pytest.raises(UserError, match="more than plain data and is not loaded: torch.nn.modules.linear.Linear$"):
        checkpoint.load(path)


def test_weights_load_whole_or_not_at_all():
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    good = {f"module.{name}": torch.zeros_like(value) for name, value in before.items()}
    bad = dict(good)
    bad.pop("module.1.bias")
    bad |= {"module.extra": torch.ones(1), "module.0.weight": torch.ones(9, 9)}
    with pytest.raises(UserError) as error:
        checkpoint.load_weights(module, bad, "file.pth.tar")
    for words in ("file.pth.tar", "1 missing: 1.bias", "1 unexpected: extra", "0.weight is (9, 9), expected (3, 2)"):
        assert words in str(error.value)
    assert all(torch.equal(module.state_dict()[name], value) for name, value in before.items())
    checkpoint.load_weights(module, good, "file.pth.tar")
    assert all(not value.any() for value in module.state_dict().values())


def test_an_error_in_a_worker_is_no_lost_worker():
    """Its traceback tells where the mistake is."""
    assert lost_worker(RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback")) is None
    assert lost_worker(RuntimeError("DataLoader worker (pid(s) 8, 9) exited unexpectedly")) is not None


def test_a_lost_worker_is_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    """PyTorch raises it from a signal handler, which may strike in the middle of a write."""
    checkpoint.save(tmp_path, state(1))

    def interrupted(*args):
        try:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
        except RuntimeError:
            raise RuntimeError("enforce fail") from None

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(RuntimeError) as error:
        checkpoint.save(tmp_path, state(2))
    assert lost_worker(error.value) == "DataLoader worker (pid 7) is killed by signal: Killed."
    monkeypatch.undo()
    assert checkpoint.load(tmp_path / checkpoint.LATEST)["epoch"] == 1


def test_a_run_from_before_a_key_existed_goes_on(tmp_path, caplog):
    now = {"resume": True, "save_every_minutes": 15.0, "seed": 0, "loss": {"args": {"q": 0.1, "bank_dtype": "fp32"}}}
    then = {"resume": True, "save_every_minutes": 15.0, "seed": 0, "loss": {"args": {"q": 0.1}}}
    state = {"epoch": 1, "step": 0, "world_size": 1, "videos": "list", "config": then}
    checkpoint.save(tmp_path, state)
    with caplog.at_level("INFO", logger="avssrl"):
        assert checkpoint.RunCheckpoints(tmp_path, now, "list", 10, "fp32").latest()["epoch"] == 1
    assert "loss.args.bank_dtype fp32" in caplog.text
    checkpoint.save(tmp_path, state | {"config": then | {"seed": 1}})
    with pytest.raises(UserError, match="seed was 1, is 0"):
        checkpoint.RunCheckpoints(tmp_path, now, "list", 10, "fp32").latest()


def test_a_crash_in_the_midst_of_saving_a_milestone_loses_it_not(tmp_path, monkeypatch):
    """What goes on from the checkpoint before makes it again; from the latest one on it would be lost."""
    checkpoints = run_checkpoints(tmp_path)
    checkpoints.save({}, epoch=1, step=0)
    monkeypatch.setattr(checkpoint.shutil, "copyfile", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save_epoch({}, 2)
    kept = (tmp_path / "checkpoint-ep2.pth.tar").exists()
    assert kept or checkpoint.load_latest(tmp_path)[0]["epoch"] == 1


def test_a_checkpoint_is_on_disk_before_it_has_its_name_and_the_name_with_it(tmp_path, monkeypatch):
    flushed, latest = [], tmp_path / checkpoint.LATEST

    def fsync(handle):
        about = os.fstat(handle)
        size = None if stat.S_ISDIR(about.st_mode) else about.st_size
        flushed.append((size, sorted(path.name for path in tmp_path.glob("*.tar"))))

    monkeypatch.setattr(os, "fsync", fsync)
    checkpoint.save(tmp_path, state(1), keep_as="checkpoint-ep1.pth.tar")
    whole, names = latest.stat().st_size, ["checkpoint-ep1.pth.tar", checkpoint.LATEST]
    assert flushed == [(whole, []), (whole, []), (None, names)]


def test_a_bank_of_another_run_is_taken_for_its_own_list_alone(tmp_path):
    theirs, ours = MemoryBank(5, 4, seed=1), MemoryBank(5, 4)
    file = checkpoint.save(tmp_path, {"train_criterion": theirs.state_dict(), "videos": "list"})
    cfg, before = {"model": {"args": {}}, "loss": {"args": {"checkpoint": str(file)}}}, ours.view1_mem.clone()
    with pytest.raises(UserError, match="its bank is for video list list, this one is another"):
        checkpoint.start_from_others(cfg, nn.Identity(), ours, "another")
    assert torch.equal(ours.view1_mem, before)
    checkpoint.start_from_others(cfg, nn.Identity(), ours, "list")
    assert torch.equal(ours.view1_mem, theirs.view1_mem) and torch.equal(ours.view2_mem, theirs.view2_mem)


def test_a_bank_that_does_not_say_of_which_list_it_is(tmp_path, caplog):
    """The thesis' do not: the rows may fit, and be other videos'."""
    bank = MemoryBank(5, 4)
    file = checkpoint.save(tmp_path, {"train_criterion": MemoryBank(5, 4, seed=1).state_dict()})
    cfg = {"model": {"args": {}}, "loss": {"args": {"checkpoint": str(file)}}}
    checkpoint.start_from_others(cfg, nn.Identity(), bank, "list")
    assert "does not say of which list of videos its bank is" in caplog.text
    file = checkpoint.save(tmp_path, {"train_criterion": torch.zeros(3)})
    with pytest.raises(UserError, match="holds no memory bank"):
        checkpoint.start_from_others(cfg, nn.Identity(), bank, "list")


def test_the_half_copy_of_a_killed_run_does_not_stay(tmp_path):
    (tmp_path / f"{checkpoint.LATEST}.copy.tmp").write_bytes(b"half")
    checkpoint.save(tmp_path, state(1))
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.LATEST]


def test_epochs_of_another_length_are_refused(tmp_path):
    """By another number of processes, where the smaller last batch does not divide among them."""
    run_checkpoints(tmp_path).save({}, epoch=1, step=9)
    assert run_checkpoints(tmp_path).latest()["step"] == 9
    other = run_checkpoints(tmp_path)
    other.steps = 9
    with pytest.raises(UserError, match="on 1 processes its epochs had 10 steps, on 1 they have 9"):
        other.latest()


@pytest.mark.parametrize("size", [1, 18, 0.4, 0.6, 0.9])
def test_a_file_of_the_older_format_that_is_cut_short(tmp_path, size):
    checkpoint.save(tmp_path, state(1))
    (tmp_path / checkpoint.LATEST).rename(tmp_path / checkpoint.PREVIOUS)
    latest = tmp_path / checkpoint.LATEST
    torch.save(state(2), latest, _use_new_zipfile_serialization=False)
    data = latest.read_bytes()
    latest.write_bytes(data[: size if isinstance(size, int) else int(size * len(data))])
    with pytest.raises(UserError, match="not a readable checkpoint"):
        checkpoint.load(latest)
    assert checkpoint.load_latest(tmp_path)[0]["epoch"] == 1


@pytest.mark.parametrize("found", [{0: 1}, {"model": {0: 1}}, {"model": {"a": 1}, "train_criterion": {0: 1}}])
def test_a_foreign_file_with_other_names_is_told(tmp_path, found):
    torch.save(found, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"expected weights called video_model\.\*"):
        checkpoint.recognise(checkpoint.load(tmp_path / "other.pth"), "other.pth")


def test_an_entry_that_ours_have_makes_no_file_ours():
    weights, words = checkpoint.recognise({"model": {"video_model.a": torch.ones(1)}, "videos": 5, "epoch": 3}, "x")
    assert words == "a checkpoint in the thesis' format after 3 epochs" and list(weights) == ["video_model.a"]
