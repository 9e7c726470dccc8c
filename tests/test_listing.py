"""`saebench ls`: whole lines for a pipe, lines that fit for a terminal."""

from __future__ import annotations

from pathlib import Path

import pytest

from saebench import cli
from saebench.listing import lines
from saebench.registry import Registry

ROWS = [
    ("small/a", "topk · L0 8 · blocks.1 · all", "built-in"),
    ("small/" + "long-" * 8 + "b", "relu · blocks.1 · patches", "my-saes"),
]


def shown(width: int | None) -> list[str]:
    return [line + origin for line, origin in lines(ROWS, width)]


def test_columns_are_aligned_and_whole_where_there_is_room() -> None:
    whole = shown(None)
    assert whole == shown(len(whole[0]) + 1)
    for line, (name, text, origin) in zip(whole, ROWS, strict=True):
        assert line.split("  ", 1)[1].startswith(name)
        assert line.index(text) == whole[0].index(ROWS[0][1])
        assert line.index(origin) == whole[0].index(ROWS[0][2])


@pytest.mark.parametrize("width", range(20, 100))
def test_a_narrow_line_keeps_the_name(width: int) -> None:
    for line, (name, text, _) in zip(shown(width), ROWS, strict=True):
        assert line.startswith(f"  {name}")
        assert len(line) <= max(width, len(name) + 2)
        rest = line.removeprefix(f"  {name}").strip()
        assert rest.startswith(text) or text.startswith(rest.removesuffix("…"))
        assert rest.startswith(text) or rest.endswith("…") or len(name) + 5 >= width


def test_no_origin_leaves_no_space_behind() -> None:
    assert lines([("a", "b", ""), ("c", "long", "")], None) == [("  a  b", ""), ("  c  long", "")]


@pytest.mark.parametrize("columns", ["60", "80", "120", None])
def test_the_command(
    columns: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    for arguments in (["ls"], ["ls", "saes"]):
        with pytest.raises(SystemExit):
            cli.main(arguments)
        printed = capsys.readouterr().out.splitlines()
        names = {line.split()[0] for line in printed if line.startswith("  ")}
        if arguments == ["ls"]:
            assert {"tiny-vit", "tiny-vit/*", "reconstruction", "shapes"} <= names
        else:
            assert "tiny-vit/topk-k8" in names
        longest = max(map(len, printed))
        cut = any(line.endswith("…") for line in printed)
        if columns is None:
            assert not cut
        else:
            assert longest <= max(int(columns), 2 + max(map(len, names)))


def test_a_pipe_is_not_wrapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    description = "word " * 60
    embedded = (Registry.load().origins[-1].root / "leaderboards/embedded.toml").read_text()
    (tmp_path / "leaderboards").mkdir()
    (tmp_path / "leaderboards/mine.toml").write_text(
        embedded.replace("The embedded benchmark", description.strip())
    )
    with pytest.raises(SystemExit):
        cli.main(["ls", "leaderboards", "--registry", str(tmp_path)])
    assert description.strip() in capsys.readouterr().out
