"""What only another process shows: the environment variables, progress bars, two at once."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub_stand_in import HubStandIn

DATA = bytes(range(256)) * 3000
CODE = (
    "from saebench.hub import Wanted, fetch\n"
    "from saebench.errors import SaebenchError\n"
    "try:\n"
    "    print(fetch(Wanted('me/vit', ('model.safetensors',), 'mine')))\n"
    "except SaebenchError as error:\n"
    "    print('error:', error)\n"
)


@pytest.fixture
def hub() -> Iterator[HubStandIn]:
    with HubStandIn() as hub:
        hub.commit("me/vit", {"model.safetensors": DATA})
        yield hub


def said(env: dict[str, str], code: str = CODE) -> str:
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_hf_endpoint_and_hf_home(hub: HubStandIn, tmp_path: Path) -> None:
    path = Path(said(hub.env(tmp_path)))
    assert path.is_relative_to(tmp_path / "hf" / "hub" / "models--me--vit")
    assert path.read_bytes() == DATA
    assert (tmp_path / "config" / "saebench.lock").is_file()


def test_hf_hub_offline_before_and_after_a_fetch(hub: HubStandIn, tmp_path: Path) -> None:
    assert "HF_HUB_OFFLINE is set" in said(hub.env(tmp_path, HF_HUB_OFFLINE="1"))
    path = said(hub.env(tmp_path))
    asked = len(hub.requests)
    assert said(hub.env(tmp_path, HF_HUB_OFFLINE="1")) == path
    assert len(hub.requests) == asked


def test_hf_token(hub: HubStandIn, tmp_path: Path) -> None:
    hub.repo("me/vit").gated = True
    assert "accept its licence" in said(hub.env(tmp_path))
    assert Path(said(hub.env(tmp_path, HF_TOKEN="licensed"))).read_bytes() == DATA


def test_the_token_that_hf_auth_login_wrote(hub: HubStandIn, tmp_path: Path) -> None:
    hub.repo("me/vit").gated = True
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text("licensed")
    assert Path(said(hub.env(tmp_path))).read_bytes() == DATA


def test_a_hub_that_does_not_answer_in_time(hub: HubStandIn, tmp_path: Path) -> None:
    hub.delay = 3.0
    message = said(hub.env(tmp_path, HF_HUB_ETAG_TIMEOUT="1"))
    assert f"{hub.endpoint} did not answer in time" in message
    assert "HF_HUB_ETAG_TIMEOUT=60" in message


def test_two_processes_at_once(hub: HubStandIn, tmp_path: Path) -> None:
    hub.commit("me/other", {"model.safetensors": DATA[::-1]})
    hub.chunk_delay = 0.05  # so that the downloads meet
    command = [sys.executable, "-c", CODE]
    other = [sys.executable, "-c", CODE.replace("me/vit", "me/other")]
    running = [
        subprocess.Popen(one, env=hub.env(tmp_path), stdout=subprocess.PIPE, text=True)
        for one in (command, command, other)
    ]
    paths = [Path(process.communicate()[0].strip()) for process in running]
    assert [path.read_bytes() for path in paths] == [DATA, DATA, DATA[::-1]]
    locked = json.loads((tmp_path / "config" / "saebench.lock").read_text())["files"]
    assert sorted(line["asked"]["repo"] for line in locked) == ["me/other", "me/vit"]


def test_a_bar_on_a_terminal_and_none_in_a_file(hub: HubStandIn, tmp_path: Path) -> None:
    command = [sys.executable, "-c", CODE]
    piped = subprocess.run(command, env=hub.env(tmp_path / "a"), capture_output=True, text=True)
    assert piped.returncode == 0
    assert piped.stderr == ""
    terminal, end = pty.openpty()
    termios.tcsetwinsize(end, (24, 100))
    done = subprocess.Popen(
        command, env=hub.env(tmp_path / "b"), stdout=subprocess.PIPE, stderr=end, text=True
    )
    os.close(end)
    shown = b""
    while True:
        try:
            part = os.read(terminal, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    assert done.wait() == 0
    assert b"model.safetensors" in shown
    assert b"100%" in shown
