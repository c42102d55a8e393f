"""CLIP's tokenizer (Radford et al., 2021): byte-level BPE on lower-cased words, without ``transformers``.

It reads and writes the files of the class of the same name in ``transformers`` and gives the same ids; it
is here because importing that one takes longer than making a small picture.
"""

from __future__ import annotations

import functools
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..core import hub
from ..core.config import read_json
from ..core.errors import CheckpointError
from ..core.files import write_atomically

_SPACES = "\t\n\v\f\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_BLANKS = re.compile(f"[{_SPACES}]+")
_CONTRACTION = re.compile("'(?:s|t|re|ve|m|ll|d)")
_START, _END = "<|startoftext|>", "<|endoftext|>"
_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
_UNBOUNDED = int(1e30)
_KNOWN_STEPS = {"NFC", "Replace", "Lowercase", "Sequence", "Split", "ByteLevel"}


class BatchEncoding(dict[str, Any]):
    """Token ids and mask of a batch, as entries and as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def to(self, device: Any) -> BatchEncoding:
        """Move the tensors in it."""
        for key, value in self.items():
            self[key] = value.to(device) if hasattr(value, "to") else value
        return self


@functools.cache
def _letters() -> dict[int, str]:
    """The visible letter that byte-level BPE writes each byte as."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    return {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}


@functools.cache
def _kind(char: str) -> str:
    """``"L"`` letter, ``"N"`` number, ``" "`` space, ``"."`` anything else."""
    if _BLANKS.match(char):
        return " "
    category = unicodedata.category(char)[0]
    return category if category in "LN" else "."


def split_words(text: str) -> list[str]:
    """Normalised text cut into contractions, runs of letters, single digits and runs of other signs."""
    words, i = [], 0
    while i < len(text):
        kind = _kind(text[i])
        stop = i + 1
        found = _CONTRACTION.match(text, i) if text[i] == "'" else None
        if found:
            stop = found.end()
        elif kind in "L.":
            while stop < len(text) and _kind(text[stop]) == kind:
                stop += 1
        if kind != " ":
            words.append(text[i:stop])
        i = stop
    return words


def normalize(text: str) -> str:
    """Composed (NFC), single spaces, lower case letter by letter."""
    return "".join(c.lower() for c in _BLANKS.sub(" ", unicodedata.normalize("NFC", text)))


class CLIPTokenizer:
    """Text to token ids: ``tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")``."""

    _library = "transformers"  # under which pipelines list it
    model_input_names = ("input_ids", "attention_mask")

    def __init__(
        self,
        vocab: dict[str, int],
        merges: Sequence[tuple[str, str]],
        added: dict[str, dict[str, Any]] | None = None,
        model_max_length: int = _UNBOUNDED,
        **config: Any,
    ) -> None:
        self.encoder = vocab
        self._ranks = {pair: i for i, pair in enumerate(merges)}
        self.model_max_length = model_max_length
        self.padding_side, self.name_or_path = "right", ""
        for name in _NAMES:
            setattr(self, name, _content(config.pop(name, None) or (_START if name == "bos_token" else _END)))
        self.init_kwargs = config
        self._added: dict[str, dict[str, Any]] = dict(added or {})
        for token in {self.bos_token, self.eos_token, self.pad_token, self.unk_token} - set(self._added):
            if token in vocab:
                self._added[token] = {"id": vocab[token], "special": True, "normalized": False}
        self._index()

    bos_token: str
    eos_token: str
    unk_token: str
    pad_token: str

    def _index(self) -> None:
        self._words: dict[str, list[int]] = {}
        self._decoder = {i: t for t, i in self.encoder.items()} | {e["id"]: t for t, e in self._added.items()}
        raw = [t for t, e in self._added.items() if not e.get("normalized")]
        cooked = {normalize(t): t for t, e in self._added.items() if e.get("normalized")}
        self._raw, self._cooked, self._original = _splitter(raw), _splitter(cooked), cooked

    # -- loading and saving ----------------------------------------------------------------------

    @classmethod
    def supports(cls, folder: Path) -> bool:
        """Whether the files in ``folder`` are of the plain CLIP kind that this class understands."""
        if (folder / "tokenizer.json").is_file():
            saved = read_json(folder / "tokenizer.json")
            steps = _types(saved.get("normalizer")) | _types(saved.get("pre_tokenizer"))
            suffix = (saved.get("model") or {}).get("end_of_word_suffix")
            after = _types(saved.get("post_processor"))
            return steps <= _KNOWN_STEPS and suffix == "</w>" and after == {"RobertaProcessing"}
        return (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> CLIPTokenizer:
        """Read a tokenizer from a folder or hub repository; other keyword arguments replace its settings.

        Raises:
            CheckpointError: its files are missing or broken.
        """
        where, changes = hub.split_location(kwargs)
        where = {**where, "subfolder": subfolder}

        def find(name: str) -> dict[str, Any]:
            found = hub.try_file(path, name, **where)
            return read_json(found) if found else {}

        config = {**find("special_tokens_map.json"), **find("tokenizer_config.json"), **changes}
        saved = find("tokenizer.json")
        if saved:
            vocab, pairs = saved["model"]["vocab"], saved["model"]["merges"]
            merges = [_pair(p.split(" ") if isinstance(p, str) else p) for p in pairs]
            added = {e["content"]: e for e in saved.get("added_tokens", ())}
        else:
            vocab = find("vocab.json")
            if not vocab:
                raise CheckpointError(f"{path}: no tokenizer there: neither tokenizer.json nor vocab.json")
            merges = _read_merges(hub.resolve_file(path, "merges.txt", **where))
            added = {t: {"id": i, "normalized": False} for t, i in find("added_tokens.json").items()}
            listed = config.get("added_tokens_decoder") or {}
            added |= {e["content"]: {**e, "id": int(i)} for i, e in listed.items()}
        config.pop("added_tokens_decoder", None)
        config = {k: v for k, v in config.items() if k not in ("name_or_path", "special_tokens_map_file")}
        tokenizer = cls(vocab, merges, added, **config)
        tokenizer.name_or_path = str(path)
        return tokenizer

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write the files that every version of ``transformers`` reads."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        special = {name: getattr(self, name) for name in _NAMES}
        listed = {str(e["id"]): {**_FLAGS, **e, "content": t} for t, e in self._added.items()}
        for entry in listed.values():
            entry.pop("id")
        config = {**self.init_kwargs, **special, "model_max_length": self.model_max_length}
        config |= {"tokenizer_class": "CLIPTokenizer", "added_tokens_decoder": listed}
        merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in self._ranks)])
        _write_json(folder / "vocab.json", self.encoder)
        _write_json(folder / "special_tokens_map.json", special)
        _write_json(folder / "tokenizer_config.json", config)
        write_atomically(folder / "merges.txt", (merges + "\n").encode())

    # -- vocabulary ------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        return len(self.encoder)

    def __len__(self) -> int:
        return len(set(self._decoder))

    def get_vocab(self) -> dict[str, int]:
        return {**self.encoder, **self.get_added_vocab()}

    def get_added_vocab(self) -> dict[str, int]:
        return {token: entry["id"] for token, entry in self._added.items()}

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        return self.get_added_vocab()

    def __getattr__(self, name: str) -> Any:
        if name in ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id"):
            return self.convert_tokens_to_ids(getattr(self, name.removesuffix("_id")))
        raise AttributeError(name)

    @property
    def all_special_tokens(self) -> list[str]:
        return list(dict.fromkeys(getattr(self, name) for name in _NAMES))

    @property
    def all_special_ids(self) -> list[int]:
        return [self._id(token) for token in self.all_special_tokens]

    @property
    def special_tokens_map(self) -> dict[str, str]:
        return {name: getattr(self, name) for name in _NAMES}

    def add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """Add tokens (text, or objects with a ``content``) that are not there yet; returns how many were new."""
        tokens = [new_tokens] if isinstance(new_tokens, str) or not isinstance(new_tokens, Iterable) else new_tokens
        before = len(self._added)
        for token in tokens:
            text = _content(token)
            if text not in self._added and text not in self.encoder:
                normalized = bool(getattr(token, "normalized", not special_tokens))
                entry = {"id": max(self._decoder) + 1, "special": special_tokens, "normalized": normalized}
                self._added[text] = entry
                self._decoder[entry["id"]] = text
        self._index()
        return len(self._added) - before

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """Ids of a token or a list of them; unknown ones are that of ``unk_token``."""
        return self._id(tokens) if isinstance(tokens, str) else [self._id(token) for token in tokens]

    def _id(self, token: str) -> int:
        if token in self._added:
            return int(self._added[token]["id"])
        return self.encoder[token] if token in self.encoder else self._unknown()

    def _unknown(self) -> int:
        found = self._added.get(self.unk_token, {}).get("id", self.encoder.get(self.unk_token))
        if found is None:
            raise ValueError(f"the tokenizer has no token {self.unk_token!r} to stand for unknown ones")
        return int(found)

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        if isinstance(ids, int):
            return self._decoder[ids]
        skip = set(self.all_special_ids) if skip_special_tokens else set()
        return [self._decoder[int(i)] for i in ids if int(i) not in skip]

    # -- text to ids -----------------------------------------------------------------------------

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:
        """The tokens of ``text``, without start and end."""
        return [self._decoder[i] for i in self._ids(text)]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = []
        for raw, is_added in _cut(text, self._raw):
            if is_added:
                ids.append(self._added[raw]["id"])
                continue
            for part, is_cooked in _cut(normalize(raw), self._cooked):
                if is_cooked:
                    ids.append(self._added[self._original[part]]["id"])
                else:
                    for word in split_words(part):
                        ids += self._word(word)
        return ids

    def _word(self, word: str) -> list[int]:
        known = self._words.get(word)
        if known is None:
            letters = [_letters()[b] for b in word.encode()]
            letters[-1] += "</w>"
            known = self._words[word] = [self._id(piece) for piece in self._merge(letters)]
        return known

    def _merge(self, parts: list[str]) -> list[str]:
        """Byte pair encoding (Sennrich et al., 2016): join the pair learned first until none is left."""
        while len(parts) > 1:
            ranked = [(self._ranks.get(pair, -1), i) for i, pair in enumerate(pairwise(parts))]
            rank, _ = min(((r, i) for r, i in ranked if r >= 0), default=(-1, 0))
            if rank < 0:
                break
            joined: list[str] = []
            i = 0
            while i < len(parts):
                if i + 1 < len(parts) and self._ranks.get((parts[i], parts[i + 1])) == rank:
                    joined.append(parts[i] + parts[i + 1])
                    i += 2
                else:
                    joined.append(parts[i])
                    i += 1
            parts = joined
        return parts

    def encode(self, text: str, add_special_tokens: bool = True, **kwargs: Any) -> list[int]:
        """The ids of one text."""
        return list(self(text, add_special_tokens=add_special_tokens, **kwargs)["input_ids"])

    def __call__(
        self,
        text: str | Sequence[str],
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        add_special_tokens: bool = True,
        return_tensors: str | None = None,
        return_attention_mask: bool = True,
        **kwargs: Any,
    ) -> BatchEncoding:
        """Ids and mask of one text (flat lists) or several, ``(B, L)`` with ``return_tensors="pt"`` or ``"np"``.

        Raises:
            ValueError: rows of different lengths as one tensor; an unknown padding.
        """
        single = isinstance(text, str)
        limit = self.model_max_length if max_length is None else max_length
        rows = [self._ids(t) for t in ([text] if isinstance(text, str) else text)]
        if truncation not in (False, None, "do_not_truncate"):
            rows = [row[: max(limit - 2 * add_special_tokens, 0)] for row in rows]
        if add_special_tokens:
            rows = [[self.bos_token_id, *row, self.eos_token_id] for row in rows]
        rows, mask = self._pad(rows, padding, limit)
        if return_tensors is None and single:
            found = {"input_ids": rows[0], "attention_mask": mask[0]}
        else:
            found = {"input_ids": _tensor(rows, return_tensors), "attention_mask": _tensor(mask, return_tensors)}
        if not return_attention_mask:
            found.pop("attention_mask")
        return BatchEncoding(found)

    def _pad(self, rows: list[list[int]], padding: bool | str, limit: int) -> tuple[list[list[int]], list[list[int]]]:
        if padding not in (True, False, "longest", "max_length", "do_not_pad"):
            raise ValueError(f"padding={padding!r}: give 'longest', 'max_length' or 'do_not_pad'")
        width = 0
        if padding == "max_length":
            width = limit if limit < _UNBOUNDED else 0
        elif padding in (True, "longest"):
            width = max(map(len, rows), default=0)
        fill = [self.pad_token_id]
        mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
        return [row + fill * (width - len(row)) for row in rows], mask

    def pad(
        self, encoded: Any, padding: bool | str = True, max_length: int | None = None, **kwargs: Any
    ) -> BatchEncoding:
        """Rows of ids, padded to one length."""
        rows = encoded["input_ids"] if not isinstance(encoded, (list, tuple)) else [e["input_ids"] for e in encoded]
        ids, mask = self._pad([list(row) for row in rows], padding, max_length or self.model_max_length)
        kind = kwargs.get("return_tensors")
        return BatchEncoding({"input_ids": _tensor(ids, kind), "attention_mask": _tensor(mask, kind)})

    # -- ids to text -----------------------------------------------------------------------------

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **kwargs: Any) -> str:
        """The text of ids, words separated by single spaces."""
        bytes_of = {letter: b for b, letter in _letters().items()}
        out = bytearray()
        for token in self.convert_ids_to_tokens(_flat(token_ids), skip_special_tokens):
            if token in self._added:
                out += token.encode()
            else:
                body = token.removesuffix("</w>")
                out += bytes(bytes_of[c] for c in body if c in bytes_of) + (b" " if token.endswith("</w>") else b"")
        return out.decode("utf-8", errors="replace").strip()

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, **kwargs: Any) -> list[str]:
        return [self.decode(row, skip_special_tokens) for row in sequences]


_FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else getattr(token, "content", token))


def _types(step: Any) -> set[str]:
    if not isinstance(step, dict):
        return set()
    inner = [*(step.get("normalizers") or ()), *(step.get("pretokenizers") or ())]
    return {str(step.get("type"))}.union(*(_types(s) for s in inner))


def _splitter(tokens: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern that finds any of ``tokens``, the longest where several start."""
    ordered = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


def _cut(text: str, pattern: re.Pattern[str] | None) -> Iterable[tuple[str, bool]]:
    """``text`` as (piece, whether it is one of the tokens)."""
    at = 0
    for found in pattern.finditer(text) if pattern else ():
        if found.start() > at:
            yield text[at : found.start()], False
        yield found[0], True
        at = found.end()
    if at < len(text):
        yield text[at:], False


def _pair(pieces: Sequence[str]) -> tuple[str, str]:
    first, second = pieces
    return first, second


def _read_merges(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is no list of merges: {error}") from error
    lines = lines[1:] if lines and lines[0].startswith("#version") else lines
    pairs = [tuple(line.split()) for line in lines if line.strip()]
    if any(len(pair) != 2 for pair in pairs):
        raise CheckpointError(f"{path}: every line must be a pair of pieces")
    return [(a, b) for a, b in pairs]


def _write_json(path: Path, value: Any) -> None:
    write_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def _flat(ids: Any) -> list[int]:
    return [ids] if isinstance(ids, int) else [int(i) for i in ids]


def _tensor(rows: list[list[int]], kind: str | None) -> Any:
    if kind is None:
        return rows
    if len({len(row) for row in rows}) > 1:
        raise ValueError("rows of different lengths make no tensor: give `padding=True` or `truncation=True`")
    if kind == "np":
        import numpy as np

        return np.array(rows)
    import torch

    return torch.tensor(rows)
