"""Files of a hub: what is downloaded, checked and locked, and what is said when it fails.

Against a stand-in that speaks the hub's protocol; huggingface_hub itself is the client.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
from rich.console import Console
from rich.progress import Progress

from saebench import hub as files
from saebench import lock
from saebench.bars import stepping_aside
from saebench.errors import DataError, SaebenchError, WeightsError, WriteError
from saebench.hub import Wanted
from tests.hub_stand_in import HubStandIn
from tests.hub_stand_in import hub as hub

DATA = bytes(range(256)) * 2000
SHA256 = hashlib.sha256(DATA).hexdigest()
NAMES = ("model.safetensors", "pytorch_model.bin")
WANTED = Wanted("timm/vit", NAMES, "mine")


def fails(wanted: Wanted = WANTED) -> str:
    """The message that fetching ends with."""
    with pytest.raises(WeightsError) as error:
        files.fetch(wanted)
    assert error.value.hint
    return str(error.value)


@pytest.fixture
def commit(hub: HubStandIn) -> str:
    return hub.commit("timm/vit", {"model.safetensors": DATA, "config.json": b"{}"})


# What comes, and what is locked -----------------------------------------------------------------


def test_a_file_comes_whole_and_is_locked(hub: HubStandIn, commit: str) -> None:
    assert files.fetch(WANTED).read_bytes() == DATA
    found = lock.find(WANTED.asked)
    assert found is not None
    assert (found.commit, found.file) == (commit, "model.safetensors")
    assert (found.sha256, found.bytes) == (SHA256, len(DATA))
    assert found.when.endswith("Z")
    assert WANTED.asked.file == "model.safetensors or pytorch_model.bin"


def test_what_is_locked_and_cached_asks_nobody(hub: HubStandIn, commit: str) -> None:
    path = files.fetch(WANTED)
    hub.requests.clear()
    assert files.fetch(WANTED) == path
    assert files.resolve(WANTED).commit == commit
    assert files.cached(WANTED) == path
    assert hub.requests == []


def test_metadata_say_what_a_file_is_without_downloading_it(hub: HubStandIn, commit: str) -> None:
    assert files.resolve(WANTED).sha256 == SHA256
    assert files.cached(WANTED) is None
    assert [request.method for request in hub.requests] == ["HEAD"]


def test_a_small_file_is_downloaded_to_know_it(hub: HubStandIn, commit: str) -> None:
    """Git's hash of it is no sha256."""
    found = files.resolve(replace(WANTED, names=("config.json",)))
    assert found.sha256 == hashlib.sha256(b"{}").hexdigest()
    assert found.bytes == 2


def test_the_second_name_is_taken_where_the_first_is_not(hub: HubStandIn) -> None:
    hub.commit("timm/vit", {"pytorch_model.bin": DATA})
    assert files.fetch(WANTED).name == "pytorch_model.bin"


def test_a_branch_that_moves_moves_nothing_here(hub: HubStandIn, commit: str) -> None:
    files.fetch(WANTED)
    newer = hub.commit("timm/vit", {"model.safetensors": DATA[::-1], "config.json": b"{}"})
    assert files.fetch(WANTED).read_bytes() == DATA
    # Nor does it for another file of the repository: both are of one commit.
    config = replace(WANTED, names=("config.json",))
    assert files.resolve(config).commit == commit
    lock.lock_path().unlink()
    assert files.resolve(config).commit == newer
    assert files.fetch(WANTED).read_bytes() == DATA[::-1]


def test_a_tag_and_a_commit(hub: HubStandIn, commit: str) -> None:
    hub.repo("timm/vit").refs["v1"] = commit
    hub.commit("timm/vit", {"model.safetensors": DATA[::-1]})
    assert files.fetch(replace(WANTED, revision="v1")).read_bytes() == DATA
    assert files.fetch(replace(WANTED, revision=commit)).read_bytes() == DATA


def test_an_entry_that_leaves_nothing_open_needs_no_lock(hub: HubStandIn, commit: str) -> None:
    pinned = Wanted("timm/vit", NAMES[:1], "mine", revision=commit, sha256=SHA256)
    assert pinned.pinned
    assert files.resolve(pinned).sha256 == SHA256
    assert hub.requests == []
    assert files.fetch(pinned).read_bytes() == DATA
    assert not lock.lock_path().exists()


@pytest.mark.parametrize("offline", [True, False])
def test_a_file_here_at_a_declared_commit_needs_no_lock(
    offline: bool,
    hub: HubStandIn,
    commit: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = replace(WANTED, names=("config.json",), revision=commit)
    path = files.fetch(config)
    (tmp_path / ".my.lock.writing").mkdir()  # so that it cannot be written
    monkeypatch.setenv("SAEBENCH_LOCK", str(tmp_path / "my.lock"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    assert files.fetch(config) == path
    assert files.resolve(config).commit == commit
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(WriteError, match="SAEBENCH_LOCK=FILE"):  # a branch is open
        files.fetch(replace(config, revision="main"))


def test_a_lock_that_cannot_be_written_does_for_a_commit_that_it_has(
    hub: HubStandIn, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.resolve(WANTED)

    def unwritable(*_: Any) -> NoReturn:
        raise WriteError("read-only")

    monkeypatch.setattr("saebench.lock.write_bytes", unwritable)
    assert files.fetch(WANTED).read_bytes() == DATA
    assert files.fetch(replace(WANTED, names=("config.json",))).read_bytes() == b"{}"


def test_a_file_in_a_folder(hub: HubStandIn) -> None:
    commit = hub.commit("me/x", {"a/b/model.safetensors": DATA})
    wanted = Wanted("me/x", ("a/b/model.safetensors",), "mine")
    assert files.fetch(wanted).read_bytes() == DATA
    lock.lock_path().unlink()
    assert files.resolve(replace(wanted, revision=commit)).commit == commit


def test_a_dataset_is_locked_at_its_commit(hub: HubStandIn) -> None:
    first = hub.commit("me/d", {"README.md": b"1"}, kind="dataset")
    assert files.resolve_revision("me/d", None, kind="dataset", by="mine") == first
    hub.commit("me/d", {"README.md": b"2"}, kind="dataset")
    hub.requests.clear()
    assert files.resolve_revision("me/d", None, kind="dataset", by="mine") == first
    assert files.resolve_revision("me/d", "c" * 40, kind="dataset", by="mine") == "c" * 40
    assert hub.requests == []
    with pytest.raises(DataError, match=r"(?s)no such dataset.*/datasets/me/none"):
        files.resolve_revision("me/none", None, kind="dataset", by="mine")


# Bytes that are not the right ones --------------------------------------------------------------


def test_altered_bytes_are_never_handed_out(hub: HubStandIn, commit: str) -> None:
    hub.repo("timm/vit").altered["model.safetensors"] = DATA[::-1]
    for _ in range(2):  # not when they came, and not from the cache
        message = fails()
        assert f"known ({lock.lock_path()}) is {SHA256}" in message
        assert hashlib.sha256(DATA[::-1]).hexdigest() in message
    blob = message.partition("(rm '")[2].partition("')")[0]
    Path(blob).unlink()  # as it says
    hub.repo("timm/vit").altered.clear()
    assert files.fetch(WANTED).read_bytes() == DATA


def test_a_file_damaged_in_the_cache_is_seen(hub: HubStandIn, commit: str) -> None:
    path = files.fetch(WANTED).resolve()
    path.write_bytes(DATA[:-1] + b"\0")
    assert "it was altered or damaged" in fails()


def test_a_declared_hash_is_held_against_the_hub_before_a_download(
    hub: HubStandIn, commit: str
) -> None:
    message = fails(replace(WANTED, sha256="0" * 64))
    assert f"the hub has sha256 {SHA256}, and the entry declares {'0' * 64}" in message
    assert "correct  sha256  or  revision" in message
    assert not any("/cdn/" in path for path in hub.gets())
    assert lock.find(WANTED.asked) is None


def test_a_declared_hash_is_held_against_the_lock(hub: HubStandIn, commit: str) -> None:
    files.fetch(WANTED)
    message = fails(replace(WANTED, sha256="0" * 64))
    assert f"locked in {lock.lock_path()} sha256 {SHA256}" in message
    assert "saebench fetch mine --update" in message


def test_a_declared_hash_of_a_pinned_file(hub: HubStandIn, commit: str) -> None:
    wanted = Wanted("timm/vit", NAMES[:1], "mine", revision=commit, sha256="0" * 64)
    assert f"declared in the entry is {'0' * 64}" in fails(wanted)


def test_a_commit_is_itself(hub: HubStandIn, commit: str) -> None:
    hub.repo("timm/vit").refs["f" * 40] = commit
    message = fails(replace(WANTED, revision="f" * 40))
    assert f"the hub has commit {commit}" in message
    assert lock.find(replace(WANTED, revision="f" * 40).asked) is None


# Downloads that break off -----------------------------------------------------------------------


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)


def test_a_download_that_breaks_off_goes_on_where_it_was(
    hub: HubStandIn, commit: str, patient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It keeps what came in pieces of 10 MB; of smaller ones here.
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 8192)
    hub.break_after = [100_000, 70_000]
    assert files.fetch(WANTED).read_bytes() == DATA
    spans = [request.headers.get("Range") for request in hub.requests if "/cdn/" in request.path]
    assert len(spans) == 3
    assert spans[0] is None
    starts = [int(str(span).removeprefix("bytes=").rstrip("-")) for span in spans[1:]]
    assert 0 < starts[0] <= 100_000 < starts[1] <= 170_000


def test_a_download_that_keeps_breaking_off(hub: HubStandIn, commit: str, patient: None) -> None:
    hub.break_after = [0] * 10
    assert "timm/vit" in (message := fails())
    assert "try again" in message
    hub.break_after.clear()
    assert files.fetch(WANTED).read_bytes() == DATA


# Who may not, and what is not there -------------------------------------------------------------


def test_no_such_repository(hub: HubStandIn) -> None:
    message = fails()
    assert f"there is no such model on {hub.endpoint}, or it is private" in message
    assert f"check the name at {hub.endpoint}/timm/vit" in message
    assert "hf auth login" in message


def test_no_such_file_says_what_was_looked_for_and_what_is_there(hub: HubStandIn) -> None:
    hub.commit("timm/vit", {"weights.pth": DATA, "README.md": b""})
    message = fails()
    assert "mine: model.safetensors or pytorch_model.bin of timm/vit: there is no such" in message
    assert "it has weights.pth: say which by  filename" in message


def test_no_such_revision(hub: HubStandIn, commit: str) -> None:
    message = fails(replace(WANTED, revision="v9"))
    assert "timm/vit at v9: there is no such revision" in message
    assert f"{hub.endpoint}/timm/vit/commits/main" in message


def test_a_locked_commit_that_is_no_longer_there(hub: HubStandIn, commit: str) -> None:
    files.resolve(WANTED)
    del hub.repo("timm/vit").commits[commit]
    message = fails()
    assert "there is no such revision any more" in message
    assert "saebench fetch mine --update" in message


def test_what_is_no_name_of_a_repository(hub: HubStandIn) -> None:
    assert "write it as  owner/name" in fails(replace(WANTED, repo="not a name"))


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("", "the hub does not know who you are.*accept its licence at .*/timm/vit.*hf auth login"),
        ("reader", "your account has no access.*accept its licence at .*/timm/vit"),
        ("wrong", "answers 401.*your token is not accepted.*hf auth login"),
    ],
)
def test_a_gated_repository(
    token: str, message: str, hub: HubStandIn, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repo("timm/vit").gated = True
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(WeightsError, match=f"(?s){message}"):
        files.fetch(WANTED)
    monkeypatch.setenv("HF_TOKEN", "licensed")
    assert files.fetch(WANTED).read_bytes() == DATA


def test_a_private_repository(
    hub: HubStandIn, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repo("timm/vit").private = True
    assert "or it is private" in fails()
    monkeypatch.setenv("HF_TOKEN", "reader")
    assert files.fetch(WANTED).read_bytes() == DATA


@pytest.mark.parametrize(
    ("status", "hint"), [(429, "wait a few minutes"), (403, "another token"), (500, "try again")]
)
def test_a_hub_that_refuses(status: int, hint: str, hub: HubStandIn, commit: str) -> None:
    hub.failing = [status]
    message = fails()
    assert f"answers {status}" in message
    assert hint in message


# Nobody answers ---------------------------------------------------------------------------------


def test_offline_what_is_not_here_is_said(
    hub: HubStandIn, commit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.use(monkeypatch, tmp_path, offline=True)
    message = fails()
    assert "it is not on this machine, and HF_HUB_OFFLINE is set" in message
    assert "on a machine with internet:  saebench fetch mine" in message
    assert hub.requests == []
    with pytest.raises(DataError, match="HF_HUB_OFFLINE is set"):
        files.resolve_revision("me/d", None, kind="dataset", by="mine")


def test_offline_what_is_locked_but_not_cached(
    hub: HubStandIn, commit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.resolve(WANTED)
    hub.use(monkeypatch, tmp_path, offline=True)
    assert f"at {commit}: it is not on this machine" in fails()


@pytest.mark.parametrize("revision", ["", "main", "commit"])
def test_offline_what_another_program_fetched_is_taken_and_locked(
    revision: str,
    hub: HubStandIn,
    commit: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from huggingface_hub import hf_hub_download

    asked = commit if revision == "commit" else revision
    hf_hub_download("timm/vit", "model.safetensors", revision=asked or None)
    hub.use(monkeypatch, tmp_path, offline=True)
    wanted = replace(WANTED, revision=asked)
    assert files.fetch(wanted).read_bytes() == DATA
    found = lock.find(wanted.asked)
    assert found is not None
    assert (found.commit, found.sha256) == (commit, SHA256)


def test_offline_a_dataset_that_the_cache_has_seen(
    hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import hf_hub_download

    commit = hub.commit("me/d", {"README.md": b"1"}, kind="dataset")
    hf_hub_download("me/d", "README.md", repo_type="dataset")
    hub.use(monkeypatch, tmp_path, offline=True)
    assert files.resolve_revision("me/d", None, kind="dataset", by="mine") == commit


def test_nobody_listens(
    hub: HubStandIn,
    commit: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from huggingface_hub import constants

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
    template = nowhere + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    pinned = Wanted("timm/vit", NAMES[:1], "mine", revision=commit, sha256=SHA256)
    for wanted in (WANTED, pinned):
        started = time.perf_counter()
        message = fails(wanted)
        assert f"{nowhere} cannot be reached" in message
        assert "check the connection, the proxy and HF_ENDPOINT" in message
        assert "saebench fetch mine" in message
        assert time.perf_counter() - started < 10  # huggingface_hub alone tries for 25 seconds
    started = time.perf_counter()
    with pytest.raises(WeightsError, match="cannot be reached"):
        files.files_of(WANTED)
    assert time.perf_counter() - started < 10
    assert caplog.text == ""


def test_what_answers_is_no_hub(
    hub: HubStandIn, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    class Nothing:
        commit_hash = None
        etag = None

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url: Nothing())
    assert "is not a hub" in (message := fails())
    assert "check HF_ENDPOINT" in message


# The disk ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("Data processing error: IO Error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk(
    error: Exception,
    hub: HubStandIn,
    commit: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def full(*_: Any, **__: Any) -> NoReturn:
        raise error

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    message = fails()
    assert f"there is no space left for it in {tmp_path / 'hf' / 'hub'}" in message
    assert "let HF_HOME name a folder on another disk" in message


def test_what_the_fast_way_of_large_files_raises(
    hub: HubStandIn, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> NoReturn:
        raise RuntimeError("CAS Client Error: request failed")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", failing)
    assert "it cannot be downloaded: CAS Client Error" in (message := fails())
    assert "HF_HUB_DISABLE_XET=1" in message


def test_a_cache_that_cannot_be_written(hub: HubStandIn, commit: str, tmp_path: Path) -> None:
    (tmp_path / "hf").write_text("a file, where a folder should be")
    message = fails()
    assert "cannot be written" in message
    assert "let HF_HOME name a folder that you may write to" in message


def test_the_lock_is_read_before_the_hub_is_asked(hub: HubStandIn, commit: str) -> None:
    lock.lock_path().write_text("{")
    with pytest.raises(SaebenchError, match=r"the lock file .* cannot be read"):
        files.fetch(WANTED)
    assert hub.requests == []
    lock.lock_path().write_text(json.dumps({"version": 1, "files": []}))
    assert files.fetch(WANTED).read_bytes() == DATA


# Bars -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terminal", [True, False])
def test_another_bar_steps_aside_while_something_is_downloaded(
    terminal: bool, hub: HubStandIn, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    console = Console(file=io.StringIO(), force_terminal=terminal)
    bar = Progress(console=console, disable=not terminal)
    drawn: list[bool] = []
    download = huggingface_hub.hf_hub_download

    def watched(*args: Any, **options: Any) -> str:
        drawn.append(bar.live.is_started)
        return download(*args, **options)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", watched)
    with bar, stepping_aside(bar):
        files.fetch(WANTED)
        assert bar.live.is_started == terminal
        files.fetch(WANTED)  # nothing is downloaded now
    assert drawn == [False]
