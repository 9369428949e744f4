"""A thin wrapper of a ``tokenizers`` tokenizer: plain encoding, chat, streaming decoding."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from flora_jax.core.errors import ConfigError, FormatError, unknown
from flora_jax.io.files import atomic, read_json

ROLES = ("system", "user", "assistant", "tool")
START, END = "<|im_start|>", "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"
SMOLLM_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


class Tokenizer:
    """Text to ids and back.

    Args:
      backend: a ``tokenizers.Tokenizer``; its own padding and truncation are switched off.
      bos_id, eos_id, pad_id: ids or ``None``; a BERT tokenizer's are its ``[CLS]`` and ``[SEP]``.
      system: what :meth:`apply_chat` says first when the messages have no system message.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        bos_id: int | None = None,
        eos_id: int | None = None,
        pad_id: int | None = None,
        system: str | None = None,
    ):
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self.bos_id, self.eos_id, self.pad_id = bos_id, eos_id, pad_id
        self.system = system

    @classmethod
    def byte_level(cls) -> Tokenizer:
        """One id a byte (UTF-8), 0-255, and 256 for the end of a text; needs no file.

        >>> Tokenizer.byte_level().decode(Tokenizer.byte_level().encode("naïve\\n"))
        'naïve\\n'
        """
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {letter: index for index, letter in enumerate(letters)}
        backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([END_OF_TEXT])
        return cls(backend, eos_id=backend.token_to_id(END_OF_TEXT))

    @classmethod
    def from_hf(cls, path: str | Path) -> Tokenizer:
        """From a ``tokenizer.json``, or a folder with one and a ``tokenizer_config.json``.

        Raises:
          FormatError: no such file, or not a tokenizer.
        """
        path = Path(path)
        folder, file = (path, path / "tokenizer.json") if path.is_dir() else (path.parent, path)
        if not file.is_file():
            raise FormatError(f"{file}: no such file")
        try:
            backend = Backend.from_file(str(file))
        except Exception as error:  # noqa: BLE001  (the library raises bare Exception)
            raise FormatError(f"{file}: not a tokenizer: {error}") from None
        names: dict[str, Any] = {}
        for extra in ("special_tokens_map.json", "tokenizer_config.json"):
            if (folder / extra).is_file():
                names |= read_json(folder / extra)

        def special(*keys: str) -> int | None:
            for key in keys:
                token = names.get(key)
                token = token.get("content") if isinstance(token, dict) else token
                if isinstance(token, str) and backend.token_to_id(token) is not None:
                    return backend.token_to_id(token)
            return None

        template = names.get("chat_template")
        return cls(
            backend,
            bos_id=special("bos_token", "cls_token"),
            eos_id=special("eos_token", "sep_token"),
            pad_id=special("pad_token"),
            system=default_system(template if isinstance(template, str) else ""),
        )

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size()

    def encode(self, text: str, *, bos: bool = False, special: bool = True) -> list[int]:
        """Ids of a text; no token is added but ``bos`` if asked for.

        Args:
          special: read ``<|im_start|>`` and its like as the special token, not as plain text.
        """
        self.backend.encode_special_tokens = not special
        ids = self.backend.encode(text, add_special_tokens=False).ids
        if bos and self.bos_id is None:
            raise ConfigError("bos=True, but this tokenizer has no beginning-of-text token")
        return [self.bos_id, *ids] if bos else ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of ids; bytes that are no UTF-8 come out as U+FFFD."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def apply_chat(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Ids of a conversation in ChatML: ``<|im_start|>role\\ncontent<|im_end|>\\n`` each.

        Contents are encoded as plain text: a marker inside them stays text.

        Args:
          messages: ``{"role": ..., "content": ...}`` each.
          add_generation_prompt: end with ``<|im_start|>assistant\\n``.

        Raises:
          ConfigError: a tokenizer without the markers, no message, or an unknown role.
        """
        start, end = self.backend.token_to_id(START), self.backend.token_to_id(END)
        if start is None or end is None:
            raise ConfigError(f"this tokenizer has no {START} and {END}: not a ChatML model")
        if not messages:
            raise ConfigError("apply_chat needs at least one message")
        if self.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        ids: list[int] = []
        newline = self.encode("\n")
        for message in messages:
            if message["role"] not in ROLES:
                raise ConfigError(unknown("role", message["role"], ROLES))
            text = f"{message['role']}\n{message['content']}"
            ids += [start, *self.encode(text, special=False), end, *newline]
        return [*ids, start, *self.encode("assistant\n")] if add_generation_prompt else ids

    def stream(self, *, skip_special: bool = True) -> StreamDecoder:
        """A decoder that takes one id after the other."""
        return StreamDecoder(self, skip_special)

    def save(self, folder: str | Path) -> None:
        """``tokenizer.json`` and ``tokenizer_config.json``, which ``transformers`` reads."""
        name = lambda i: None if i is None else self.backend.id_to_token(i)  # noqa: E731
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": name(self.bos_id),
            "eos_token": name(self.eos_id),
            "pad_token": name(self.pad_id),
        }
        with atomic(Path(folder) / "tokenizer.json") as partial:
            partial.write_text(self.backend.to_str(pretty=True), encoding="utf-8")
        with atomic(Path(folder) / "tokenizer_config.json") as partial:
            partial.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def default_system(template: str) -> str | None:
    """The system message that SmolLM2's chat template adds; ``None`` for other templates."""
    return SMOLLM_SYSTEM if SMOLLM_SYSTEM in template else None


class StreamDecoder:
    """Text piece by piece: a character whose bytes span tokens comes out when it is whole."""

    # A UTF-8 character has at most four bytes and a token at least one: a replacement character
    # that four tokens did not resolve is in the text.
    LONGEST = 4

    def __init__(self, tokenizer: Tokenizer, skip_special: bool):
        self.tokenizer, self.skip_special = tokenizer, skip_special
        self.ids: list[int] = []
        self.waiting = 0

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special=self.skip_special)

    def push(self, token: int) -> str:
        """The text that this token completes, maybe none."""
        self.ids.append(int(token))
        self.waiting += 1
        text = self._text(self.ids)
        if text.endswith("\ufffd") and self.waiting < self.LONGEST:
            return ""
        return self._emit(text)

    def flush(self) -> str:
        """What is left at the end."""
        return self._emit(self._text(self.ids)) if self.waiting else ""

    def _emit(self, text: str) -> str:
        done = self._text(self.ids[: len(self.ids) - self.waiting])
        # One settled token stays as context: decoders treat the first token of a text apart.
        self.ids, self.waiting = self.ids[-1:], 0
        return text[len(done) :]
