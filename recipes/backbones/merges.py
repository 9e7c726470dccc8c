"""The byte-pair merges of the embedded CLIP's tokenizer, learned from its captions.

    python -m recipes.backbones.merges --out registry/weights/tiny-clip

open_clip's SimpleTokenizer takes any merges file; its vocabulary is 512 bytes and word-final bytes,
the merges, and two special tokens. Ours has 256 merges against CLIP's 48,894: 770 tokens.
"""

from __future__ import annotations

import argparse
import gzip
import re
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from recipes.backbones.captions import coarse, taxonomic

FILE = "bpe_merges.txt.gz"
N_MERGES = 256
_FRAMES = ("a photo drawing picture scan of the digit number handwritten one {}, with.",)


def learn(texts: Iterable[str], n_merges: int) -> list[tuple[str, str]]:
    """Merge the most frequent neighbouring pair, `n_merges` times; ties go to the first by name.

    Every distinct word counts once. Errors: ValueError when the words allow fewer merges.
    """
    words = {word for text in texts for word in re.findall(r"[a-z]+", text.lower())}
    pieces = {word: [*word[:-1], word[-1] + "</w>"] for word in sorted(words)}
    merges: list[tuple[str, str]] = []
    for _ in range(n_merges):
        pairs = Counter(p for word in pieces.values() for p in pairwise(word))
        if not pairs:
            raise ValueError(f"the words allow only {len(merges)} merges, not {n_merges}")
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        pieces = {word: _merged(parts, best) for word, parts in pieces.items()}
    return merges


def _merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for part in parts:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return out


def write(folder: Path) -> Path:
    """Learn the merges and write them as open_clip reads them (a title line, then one a line)."""
    texts = (*coarse(_FRAMES, _FRAMES).texts, *taxonomic(_FRAMES).texts)
    lines = ["#version: saebench 1", *(" ".join(merge) for merge in learn(texts, N_MERGES))]
    path = folder / FILE
    path.write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the tokenizer's merges")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write to")
    print(write(parser.parse_args().out))
