"""Text to tokens and back, with the tables and the chat template of the model's own files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer as Backend, decoders, models, pre_tokenizers

GGUF_CONTROL = 3  # type of a token that no text makes
# The splits of GGUF's named pre-tokenizers: those that are known to equal the original's.
GGUF_SPLITS = {
    "smollm": lambda: [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)],
    "gpt-2": lambda: [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)],
}


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: printable Latin-1 as itself, the other bytes from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (b for b in range(256) if b not in set(printable))
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


class Tokenizer:
    """A model's tokenizer and chat template.

    Args:
        backend: the `tokenizers` object.
        eos_ids: tokens that end an answer.
        bos: text of the beginning-of-sequence token, "" for none; `eos` likewise. Both are for the template.
        template: chat template (Jinja), None where the model has none.
        add_bos: whether `encode` puts the beginning-of-sequence token before raw text.
    """

    def __init__(self, backend: Backend, eos_ids: Sequence[int], bos: str, eos: str, template: str | None, add_bos: bool = False):
        self.backend, self.eos_ids = backend, tuple(eos_ids)
        self.bos, self.eos, self.add_bos = bos, eos, add_bos
        self.bos_id = backend.token_to_id(bos) if bos else None
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise
        self._template = environment.from_string(template) if template else None
        self._special = {id for id, token in backend.get_added_tokens_decoder().items() if token.special}
        self._bytes = _token_bytes(backend)

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """From a GGUF file, or from a directory with tokenizer.json and tokenizer_config.json."""
        return cls._from_directory(path) if path.is_dir() else cls._from_gguf(path)

    @classmethod
    def _from_gguf(cls, path: Path) -> Tokenizer:
        import gguf

        fields = gguf.GGUFReader(path).fields

        def field(name: str, default=None):
            found = fields.get(f"tokenizer.{name}")
            return default if found is None else found.contents()

        model, pre = field("ggml.model"), field("ggml.pre")
        if model != "gpt2" or pre not in GGUF_SPLITS:
            raise ValueError(f"{path} has tokenizer {model!r}, split {pre!r}; supported is gpt2 with one of {', '.join(GGUF_SPLITS)}")
        tokens = field("ggml.tokens")
        merges = [tuple(pair.split(" ")) for pair in field("ggml.merges")]
        backend = Backend(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
        backend.pre_tokenizer = pre_tokenizers.Sequence(GGUF_SPLITS[pre]())
        backend.decoder = decoders.ByteLevel()
        control = [t for t, kind in zip(tokens, field("ggml.token_type"), strict=True) if kind == GGUF_CONTROL]
        backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
        eos, bos = field("ggml.eos_token_id"), field("ggml.bos_token_id")
        return cls(
            backend,
            [eos],
            "" if bos is None else tokens[bos],
            tokens[eos],
            field("chat_template"),
            add_bos=bool(field("ggml.add_bos_token", False)),
        )

    @classmethod
    def _from_directory(cls, path: Path) -> Tokenizer:
        backend = Backend.from_file(str(path / "tokenizer.json"))
        config = json.loads((path / "tokenizer_config.json").read_text())
        generation = path / "generation_config.json"
        bos, eos = (_content(config.get(name)) for name in ("bos_token", "eos_token"))
        eos_ids = json.loads(generation.read_text()).get("eos_token_id") if generation.exists() else None
        if eos_ids is None:
            eos_ids = backend.token_to_id(eos)
        template = config.get("chat_template")
        if (path / "chat_template.jinja").exists():
            template = (path / "chat_template.jinja").read_text()
        # tokenizer.json's own post-processor adds what raw text needs.
        return cls(backend, eos_ids if isinstance(eos_ids, list) else [eos_ids], bos, eos, template)

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Tokens of raw text. Special tokens written out in the text become themselves."""
        ids = self.backend.encode(text).ids
        return [self.bos_id, *ids] if self.add_bos else ids

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Tokens of a conversation, [{"role": ..., "content": ...}], up to where the assistant's answer begins."""
        return self.backend.encode(self.render_chat(messages), add_special_tokens=False).ids

    def render_chat(self, messages: Sequence[dict[str, str]]) -> str:
        """Text of a conversation as the model's template puts it.

        Raises:
            ValueError: the model has no template, or the template refuses the messages.
        """
        if self._template is None:
            raise ValueError("the model's files have no chat template; send a raw prompt")
        return self._template.render(messages=list(messages), add_generation_prompt=True, bos_token=self.bos, eos_token=self.eos)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens, special ones left out; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, id: int) -> bytes:
        """The bytes a token stands for; none for special tokens and for ids without a token."""
        return b"" if id in self._special else self._bytes.get(id, b"")


def _raise(message: str) -> None:
    raise ValueError(f"the chat template refuses the messages: {message}")


def _content(token: str | dict | None) -> str:
    return token["content"] if isinstance(token, dict) else token or ""


def _token_bytes(backend: Backend) -> dict[int, bytes]:
    """Bytes of every token of a byte-level vocabulary, or of one with U+2581 for spaces and <0xNN> for bytes."""
    added = backend.get_added_tokens_decoder()
    byte_level = "ByteLevel" in json.dumps(json.loads(backend.to_str())["decoder"])
    alphabet = byte_alphabet()
    table = {}
    for token, id in backend.get_vocab(with_added_tokens=True).items():
        if id in added:
            table[id] = token.encode()
        elif byte_level:
            table[id] = bytes(alphabet[c] for c in token)
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            table[id] = bytes([int(token[3:5], 16)])
        else:
            table[id] = token.replace("\u2581", " ").encode()
    return table
