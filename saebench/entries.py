"""One entry of the store: a folder whose manifest, written last, names its other files.

    <root>/<form>/<kind>/<id>/manifest.json
        protocol   version of this layout
        kind       what it is: site_mean, pooled, …
        fields     everything that can change its content
        id         sha256 of {kind, protocol, fields}, the first 32 hex digits; the folder's name
        files      name -> {bytes, sha256}, with rows where a file is one shard of many
        created_utc, saebench_version

A folder without a manifest is not an entry. docs/storage-protocol.md is for those who read it
without saebench.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import saebench
from saebench.identity import content_hash

PROTOCOL = 1
MANIFEST = "manifest.json"


def entry_id(kind: str, fields: Mapping[str, Any]) -> str:
    """What identifies an entry. Errors: ValueError for a kind that cannot name a folder."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", kind):
        raise ValueError(f"'{kind}' cannot name a kind of entry: use a-z, 0-9, - and _")
    return content_hash({"kind": kind, "protocol": PROTOCOL, "fields": fields})[:32]


def manifest_of(
    kind: str, fields: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The manifest of an entry that is complete now. files: name -> `file_record`."""
    return {
        "protocol": PROTOCOL,
        "kind": kind,
        "id": entry_id(kind, fields),
        "fields": dict(fields),
        "files": dict(files),
        "created_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "saebench_version": saebench.__version__,
    }


def file_record(data: bytes, **more: int) -> dict[str, Any]:
    """What a manifest says of one file."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), **more}


def manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    """A manifest as it is written."""
    return json.dumps(manifest, indent=1, sort_keys=True).encode()


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of an entry, or None where there is none.

    Errors: ValueError when it is damaged, or is not that of this folder.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        given = entry_id(manifest["kind"], manifest["fields"])
        complete = bool(manifest["files"])
    except (KeyError, TypeError, AttributeError):
        raise ValueError("the manifest is damaged") from None
    if folder.name != given or not complete:
        raise ValueError("the manifest is not that of this folder")
    return manifest


def damage(folder: Path, manifest: Mapping[str, Any]) -> str:
    """What is wrong with the files of an entry, or ''. Every byte of them is read."""
    for name, record in manifest["files"].items():
        path = folder / name
        try:
            if path.stat().st_size != record["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {record['bytes']}"
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != record["sha256"]:
                    return f"{name} was altered"
        except FileNotFoundError:
            return f"{name} is missing"
    return ""
