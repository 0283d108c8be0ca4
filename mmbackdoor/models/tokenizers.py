"""The real CLIP vocabulary without a download: it lies inside the open_clip package."""

from __future__ import annotations

import functools
import gzip
import importlib.util
from pathlib import Path

from transformers import CLIPTokenizer

from mmbackdoor.types import InputError

VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
IDS = 49408
BEGIN, END = "<|startoftext|>", "<|endoftext|>"


def clip_vocabulary_tokenizer(pad_token: str = END) -> CLIPTokenizer:
    """A new `CLIPTokenizer` with CLIP's 49408 ids and 77 positions. `pad_token`: "!" in SD 2 and SDXL's second."""
    vocabulary, merges = _vocabulary()
    return CLIPTokenizer(vocab=dict(vocabulary), merges=list(merges), model_max_length=77, pad_token=pad_token)


@functools.lru_cache(1)
def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Ids: 256 bytes, 256 bytes that end a word, the merges in order of rank, then begin and end of text."""
    # Looked up, not imported: open_clip takes seconds to import.
    found = importlib.util.find_spec("open_clip")
    if found is None or not found.submodule_search_locations:
        raise InputError("the CLIP vocabulary lies in open_clip_torch, which is missing; pip install open_clip_torch")
    lines = gzip.decompress((Path(found.submodule_search_locations[0]) / VOCABULARY).read_bytes()).decode().split("\n")
    byte_names = _byte_names()
    count = IDS - 2 * len(byte_names) - 2
    merges = [tuple(line.split()) for line in lines[1 : count + 1]]
    names = [*byte_names, *(name + "</w>" for name in byte_names), *map("".join, merges), BEGIN, END]
    return {name: number for number, name in enumerate(names)}, merges


def _byte_names() -> list[str]:
    """One visible character for each byte: itself where it is visible in Latin-1, else one from U+0100 on."""
    visible = [byte for byte in range(256) if 0x21 <= byte <= 0x7E or (0xA1 <= byte <= 0xFF and byte != 0xAD)]
    others = len(range(256)) - len(visible)
    return [chr(byte) for byte in visible] + [chr(0x100 + number) for number in range(others)]
