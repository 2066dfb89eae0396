"""Tokens, text and templates from the model's own files."""

import json

import pytest
from engine.tokenizer import Tokenizer, byte_alphabet
from hypothesis import assume, given, settings, strategies as st
from tokenizers import Tokenizer as Backend, decoders, models


def test_prompts_of_the_goldens(tokenizer, goldens):
    for golden in goldens:
        raw = golden["kind"] == "raw"
        ids = tokenizer.encode(golden["prompt"]) if raw else tokenizer.encode_chat([{"role": "user", "content": golden["prompt"]}])
        assert ids == golden["prompt_ids"], golden["prompt"]


@given(text=st.text(st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs", "Cc"]), max_size=80))
@settings(max_examples=300, deadline=None)
def test_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assume(not set(ids) & tokenizer._special)
    assert tokenizer.decode(ids) == text


def test_bytes_that_the_vocabulary_lacks_are_dropped_not_mangled(tokenizer):
    """SmolLM2's has no token for 21 bytes: those that UTF-8 cannot have, some control characters, U+40000 and above."""
    assert tokenizer.decode(tokenizer.encode("a\x04b")) == "ab"


@pytest.mark.parametrize(
    "text",
    ["", " ", "\n\n\u00bd", " \u0663 apples", "123456", "caf\u00e9 na\u00efve", "\U0001f469\u200d\U0001f4bb\u4e2d\u6587", "a\tb\r\n  c", "def f(x):\n    return x ** 2\n"],
)
def test_text_comes_back_exactly(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_are_single_tokens(tokenizer):
    """The split that the file's name for it ("smollm") stands for; plain GPT-2 splits merge them."""
    ids = tokenizer.encode("1234")
    assert [tokenizer.decode([i]) for i in ids] == ["1", "2", "3", "4"]


def test_special_tokens_are_recognised_and_left_out_of_text(tokenizer):
    ids = tokenizer.encode("<|im_start|>user\nhi<|im_end|>")
    assert ids[0] == 1 and ids[-1] == 2 and tokenizer.eos_ids == (2,)
    assert tokenizer.decode(ids) == "user\nhi"


def test_bytes_equal_what_the_library_decodes(tokenizer):
    for first in range(0, tokenizer.vocab_size, 997):
        ids = [i for i in range(first, first + 20) if i not in tokenizer._special]
        assert tokenizer.decode(ids) == tokenizer.backend.decode(ids)


def test_the_template_adds_the_system_message_only_when_there_is_none(tokenizer):
    own = tokenizer.render_chat([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    assert own == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert "SmolLM" in tokenizer.render_chat([{"role": "user", "content": "Hi"}])


def test_alphabet_is_a_bijection_of_all_bytes():
    assert sorted(byte_alphabet().values()) == list(range(256)) and byte_alphabet()["\u0120"] == ord(" ")


def save(path, backend, **config):
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def test_a_directory_gives_the_same_tokenizer(tokenizer, tmp_path):
    save(tmp_path, tokenizer.backend, bos_token={"content": "<|im_start|>"}, eos_token="<|im_end|>")
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode("Hello 42 w\u00f6rld") == tokenizer.encode("Hello 42 w\u00f6rld")
    assert loaded.eos_ids == (2, 0)
    assert loaded.render_chat([{"role": "user", "content": "x"}]) == "<|im_start|>x<|im_end|>"


def test_a_vocabulary_with_spaces_and_byte_tokens(tmp_path):
    vocab = {"<unk>": 0, "<0xE2>": 1, "<0x82>": 2, "<0xAC>": 3, "\u2581hi": 4, "\u2581": 5, "</s>": 6}
    backend = Backend(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    save(tmp_path, backend, eos_token="</s>")
    assert Tokenizer.load(tmp_path).decode([4, 5, 1, 2, 3]) == " hi \u20ac"


def test_what_is_missing_is_said(tokenizer):
    bare = Tokenizer(tokenizer.backend, [2], "", "<|im_end|>", None)
    with pytest.raises(ValueError, match="no chat template"):
        bare.encode_chat([{"role": "user", "content": "x"}])
    strict = Tokenizer(tokenizer.backend, [2], "", "", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="refuses the messages: roles must alternate"):
        strict.encode_chat([])


def test_templates_run_in_a_sandbox(tokenizer):
    from jinja2.exceptions import SecurityError

    nosy = Tokenizer(tokenizer.backend, [2], "", "", "{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(SecurityError):
        nosy.encode_chat([])
