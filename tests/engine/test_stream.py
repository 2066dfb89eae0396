"""Streaming: pieces are whole characters, add up to the text, and end before a stop string."""

import pytest
from engine.stream import TextStream
from hypothesis import given, settings, strategies as st


def pieces(stream, ids):
    return [stream.push(token, last=i + 1 == len(ids)) for i, token in enumerate(ids)]


@given(text=st.text(st.characters(max_codepoint=0x1FFFF, exclude_categories=["Cs", "Cc"]), min_size=1, max_size=60))
@settings(max_examples=300, deadline=None)
def test_pieces_add_up_to_the_text_and_are_never_broken(tokenizer, text):
    ids = tokenizer.encode(text)
    got = pieces(TextStream(tokenizer), ids)
    assert "".join(got) == tokenizer.decode(ids)
    assert "\ufffd" not in "".join(got) or "\ufffd" in text


@given(ids=st.lists(st.integers(0, 49151), min_size=1, max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_tokens_add_up_to_what_they_decode_to(tokenizer, ids):
    assert "".join(pieces(TextStream(tokenizer), ids)) == tokenizer.decode(ids)


def test_a_character_of_several_tokens_comes_with_its_last(tokenizer):
    ids = tokenizer.encode("\U0001f9ff")
    assert len(ids) > 1
    assert pieces(TextStream(tokenizer), ids) == [""] * (len(ids) - 1) + ["\U0001f9ff"]


def test_an_unfinished_character_at_the_end_is_marked(tokenizer):
    ids = tokenizer.encode("ok \U0001f9ff")[:-1]
    assert "".join(pieces(TextStream(tokenizer), ids)).endswith("\ufffd")


@given(text=st.text("ab", min_size=1, max_size=30), stop=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
@settings(max_examples=300, deadline=None)
def test_text_ends_before_the_first_stop_string(tokenizer, text, stop):
    stream = TextStream(tokenizer, tuple(stop))
    ids = [tokenizer.backend.token_to_id(c) for c in text]  # one character a token: every split of the stop string occurs
    got = "".join(pieces(stream, ids))
    # The stop that is complete first ends the text; of those complete at once, the one that begins first.
    ends = [(at + len(s), at) for s in stop if (at := text.find(s)) >= 0]
    assert got == (text[: min(a for e, a in ends if e == min(ends)[0])] if ends else text)
    assert stream.stopped == bool(ends)


@pytest.mark.parametrize(("text", "held"), [("ab", ""), ("aST", "ST"), ("aSTO", "STO"), ("aSTx", "")])
def test_only_what_may_begin_a_stop_string_is_held_back(tokenizer, text, held):
    stream = TextStream(tokenizer, ("STOP",))
    shown = "".join(stream.push(tokenizer.backend.token_to_id(c)) for c in text)
    assert shown == text.removesuffix(held)
