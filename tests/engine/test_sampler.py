"""Sampling: exact sets for top-k and top-p, frequencies against probabilities, seeds."""

import pytest
import torch
from engine.request import Request, SamplingParams
from engine.sampler import sample, uniforms


def requests(n, **sampling):
    return [Request(str(i), [0] * 5, SamplingParams(**{"seed": i} | sampling)) for i in range(n)]


def logits_of(probabilities, n):
    return torch.tensor(probabilities, dtype=torch.float64).log().float().repeat(n, 1)


def frequencies(probabilities, n=20000, **sampling):
    tokens = sample(logits_of(probabilities, n), requests(n, **sampling))
    return torch.bincount(torch.tensor(tokens), minlength=len(probabilities)) / n


def test_greedy_is_the_first_of_the_largest():
    logits = torch.tensor([[0.0, 3.0, 3.0], [5.0, -1.0, 2.0], [float("-inf"), float("-inf"), -9.0]])
    assert sample(logits, requests(3)) == [1, 0, 2]


P = [0.5, 0.25, 0.125, 0.0625, 0.0625]


@pytest.mark.parametrize(
    ("sampling", "want"),
    [
        ({"temperature": 1.0}, P),
        ({"temperature": 0.5}, [p * p for p in P]),
        ({"temperature": 2.0}, [p**0.5 for p in P]),
        ({"temperature": 1.0, "top_k": 2}, [0.5, 0.25, 0, 0, 0]),
        ({"temperature": 1.0, "top_k": 99}, P),
        ({"temperature": 1.0, "top_p": 0.6}, [0.5, 0.25, 0, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.01}, [1, 0, 0, 0, 0]),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.7}, [0.5, 0.25, 0, 0, 0]),  # 0.5 / 0.875 < 0.7 <= 0.75 / 0.875
        ({"temperature": 1.0, "top_k": 1}, [1, 0, 0, 0, 0]),
    ],
)
def test_frequencies(sampling, want):
    want = torch.tensor(want) / sum(want)
    got = frequencies(P, **sampling)
    assert (got[want == 0] == 0).all(), "a token outside the set was drawn"
    # Five standard deviations of a binomial share.
    assert ((got - want).abs() <= 5 * (want * (1 - want) / 20000).sqrt() + 1e-9).all(), (got, want)


def test_rows_of_one_batch_follow_their_own_parameters():
    kinds = [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 1}, {"temperature": 1.0, "top_p": 1e-6}]
    batch = [Request(str(i), [0], SamplingParams(seed=i, **kinds[i % 4])) for i in range(400)]
    tokens = torch.tensor(sample(logits_of([0.3, 0.4, 0.3], 400), batch))
    assert all((tokens[k::4] == 1).all() for k in (0, 2, 3)) and len(tokens[1::4].unique()) == 3


def test_top_p_wider_than_the_candidates_takes_the_whole_vocabulary():
    vocab, n = 5000, 4000
    tokens = torch.tensor(sample(torch.zeros(n, vocab), requests(n, temperature=1.0, top_p=0.9)))
    assert tokens.unique().numel() > 2000
    assert tokens.max() < vocab


def test_a_seed_gives_the_same_tokens_whatever_else_runs():
    torch.manual_seed(0)
    logits = torch.randn(8, 1000)
    batch = requests(8, temperature=0.9, top_p=0.95)
    together = sample(logits, batch)
    alone = [sample(logits[i : i + 1], batch[i : i + 1])[0] for i in range(8)]
    assert together == alone
    assert sample(logits.flip(0), batch[::-1]) == together[::-1]


def test_numbers_are_uniform_and_depend_on_seed_and_position():
    many = uniforms([Request("r", [0] * (i % 50 + 1), SamplingParams(seed=i // 50)) for i in range(5000)])
    assert many.unique().numel() == 5000 and 0 <= many.min() and many.max() < 1
    share = torch.histc(many.float(), 10, 0, 1) / 5000
    assert ((share - 0.1).abs() < 5 * (0.09 / 5000) ** 0.5).all()
    assert uniforms([Request("r", [0])], 3) == uniforms([Request("s", [9], SamplingParams(seed=3))])
    assert uniforms([Request("r", [0], SamplingParams(seed=-1))]) >= 0


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_tokens", 0), ("temperature", -1.0), ("temperature", float("nan")), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.5), ("stop", ("",)), ("stop", "x")],
)
def test_nonsense_is_refused_with_the_value(field, value):
    with pytest.raises(ValueError, match=f"{field} must .*{value!r}".replace("(", r"\(").replace(")", r"\)")):
        SamplingParams(**{field: value})
