"""The engine's tokens on the real model: equal to transformers' for every policy, budget, mix and preemption."""

import itertools
import json
import time

import pytest
import sarathi_kernels as sk
import torch
from engine.config import EngineConfig
from engine.llm import LLM
from engine.request import SamplingParams

GREEDY = SamplingParams(max_tokens=32, ignore_eos=True)
MARGIN = 0.1  # bfloat16's rounding moves logits by less than this


@pytest.fixture(scope="module")
def engine(weights, tokenizer):
    """LLM(**config) in a dtype, sharing the weights; a small cache by default, for speed."""

    def make(dtype="float32", **config):
        return LLM(EngineConfig(**{"dtype": dtype, "num_pages": 128} | config), weights=weights(getattr(torch, dtype)), tokenizer=tokenizer)

    return make


def wrong(requests, goldens):
    return {g["prompt"]: r.output for r, g in zip(requests, goldens, strict=True) if r.output != g["greedy_ids"]}


@pytest.mark.parametrize(("policy", "budget"), list(itertools.product(("sarathi", "prefill_first"), (64, 256, None))))
def test_all_goldens_together_in_float32(engine, goldens, policy, budget):
    """Different prompts, so chunks and decodes mix in most batches; the last join when the first are in mid-answer."""
    llm = engine(policy=policy, token_budget=budget)
    requests = [llm.add_request(g["prompt_ids"], GREEDY) for g in goldens[:6]]
    for _ in range(5):
        llm.step()
    requests += [llm.add_request(g["prompt_ids"], GREEDY) for g in goldens[6:]]
    while llm.num_unfinished:
        llm.step()
    assert not wrong(requests, goldens)
    assert llm.scheduler.pages.num_free == 128


def test_each_golden_alone_in_float32(engine, goldens):
    llm = engine()
    assert not wrong([llm.generate([g["prompt_ids"]], GREEDY)[0] for g in goldens], goldens)


@pytest.mark.parametrize("policy", ["sarathi", "prefill_first"])
def test_goldens_after_preemptions_in_float32(engine, goldens, policy):
    """A cache too small for all answers at once: the newest lose their pages in mid-answer and compute them again."""
    llm = engine(policy=policy, num_pages=16, token_budget=64)
    requests = llm.generate([g["prompt_ids"] for g in goldens], GREEDY)
    assert sum(r.num_preemptions for r in requests) >= 2
    assert not wrong(requests, goldens)


@pytest.mark.parametrize("linear", ["dense"])
@pytest.mark.parametrize(("policy", "budget"), [("sarathi", 64), ("sarathi", 256), ("prefill_first", None)])
def test_goldens_with_a_margin_in_bfloat16(engine, goldens, policy, budget, linear):
    sure = [g for g in goldens if g["min_margin"] > MARGIN]
    assert len(sure) == 3
    llm = engine("bfloat16", policy=policy, token_budget=budget, linear=linear)
    requests = llm.generate([g["prompt_ids"] for g in [*sure, *goldens]], GREEDY)
    assert not wrong(requests[:3], sure)
    assert not wrong([llm.generate([g["prompt_ids"]], GREEDY)[0] for g in sure], sure)


def test_the_native_step_gives_the_single_ops_bits(engine, goldens):
    llm = engine("bfloat16", token_budget=16)
    model, native = llm.runner.model, llm.runner.model.decoder
    if native is None:
        pytest.skip("no native step here: " + str(sk.linear_reason(32, 16)))
    rows = []

    def both(step):
        rows.append(len(step.logit_rows))
        logits = model(step)
        model.decoder = None
        single = model(step)
        model.decoder = native
        assert torch.equal(logits.bfloat16(), single)
        return logits

    both.config, llm.runner.model = model.config, both
    llm.generate([[504] * 40, *(g["prompt_ids"] for g in goldens)], SamplingParams(max_tokens=4))
    assert min(rows) == 0 and max(rows) > 4


@pytest.mark.parametrize("page_size", [1, 7, 128])
def test_page_sizes(engine, goldens, page_size):
    llm = engine(page_size=page_size, num_pages=2048 // page_size, token_budget=50)
    assert not wrong(llm.generate([g["prompt_ids"] for g in goldens[:4]], GREEDY), goldens[:4])


def test_only_rows_that_give_a_token_get_logits(engine):
    llm = engine(token_budget=16, chunk_tile=1)
    shapes = []
    head = llm.runner.model.head
    llm.runner.model.head = lambda x: shapes.append(len(x)) or head(x)
    llm.add_request([504] * 40, SamplingParams(max_tokens=3))
    while llm.num_unfinished:
        llm.step()
    assert shapes == [0, 0, 1, 1, 1]


def test_seeds_give_the_same_text_alone_and_in_company(engine):
    llm = engine()
    warm = SamplingParams(max_tokens=12, temperature=0.8, top_p=0.9, seed=7)
    alone = llm.generate(["Once upon a time"], warm)[0].output
    company = llm.generate(["The sea is", "Once upon a time", "Rain"], warm)
    assert company[1].output == alone
    assert llm.generate(["Once upon a time"], SamplingParams(max_tokens=12, temperature=0.8, top_p=0.9, seed=8))[0].output != alone


def test_stop_strings_and_eos_end_an_answer(engine, goldens):
    llm = engine()
    prime = next(g for g in goldens if "prime" in g["prompt"])
    request = llm.add_request(prime["prompt_ids"], SamplingParams(max_tokens=32, stop=(", 7",)))
    text = "".join(o.text for _ in iter(lambda: llm.num_unfinished, 0) for o in llm.step())
    assert text == " 2, 3, 5" and request.finish_reason == "stop" and llm.scheduler.pages.num_free == 128
    ends = next(g for g in goldens if g["eos_in"])
    request = llm.generate([ends["prompt_ids"]], SamplingParams(max_tokens=32))[0]
    assert request.finish_reason == "stop" and request.output == ends["greedy_ids"][: ends["greedy_ids"].index(2) + 1]


def test_bad_requests_are_refused_and_harm_nothing(engine, goldens):
    llm = engine()
    running = llm.add_request(goldens[3]["prompt_ids"], GREEDY)
    llm.step()
    for prompt, message in [
        ([5] * 3000, r"prompt of 3000 tokens; the limit is 2047 .*KV cache holds 2048"),
        ([], "empty prompt"), ("", "empty prompt"), ([5, 49152], r"ints in \[0, 49151\], got 49152"), ([-1], "got -1"), ([1.5], "got 1.5"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            llm.add_request(prompt)
    with pytest.raises(ValueError, match=f"{running.request_id!r} is in use"):
        llm.add_request("x", request_id=running.request_id)
    while llm.num_unfinished:
        llm.step()
    assert running.output == goldens[3]["greedy_ids"]


def test_the_models_own_limit_refuses_a_prompt(engine):
    llm = engine(num_pages=600)
    with pytest.raises(ValueError, match="the limit is 8191"):
        llm.add_request([5] * 8192)
    with pytest.raises(ValueError, match="max_model_len 9000 exceeds the model's limit of 8192"):
        engine(num_pages=600, max_model_len=9000)


def test_a_step_that_fails_loses_nothing(engine, goldens):
    llm = engine(token_budget=16)
    requests = [llm.add_request(g["prompt_ids"], GREEDY) for g in goldens[:4]]
    model, calls = llm.runner.model, itertools.count()

    def flaky(step):
        logits = model(step)
        if next(calls) % 3 == 1:
            raise RuntimeError("injected")
        return logits

    llm.runner.model, failures = flaky, 0
    while llm.num_unfinished:
        try:
            llm.step()
        except RuntimeError as error:
            assert str(error) == "injected"
            failures += 1
    assert failures > 5 and not wrong(requests, goldens[:4])


def test_abort_in_every_state_returns_the_pages(engine, goldens):
    llm = engine(token_budget=16, max_num_seqs=2)
    decoding, reading, waiting = (llm.add_request(goldens[i]["prompt_ids"], GREEDY) for i in (3, 5, 6))
    llm.step()
    assert (decoding.num_output_tokens, reading.num_output_tokens, len(waiting.pages)) == (1, 0, 0)
    assert 0 < reading.num_computed_tokens < reading.num_prompt_tokens
    for request in (waiting, reading, decoding):
        llm.abort(request.request_id)
        assert request.finish_reason == "abort" and not request.pages
    llm.abort("never seen")
    assert llm.step() == [] and llm.num_unfinished == 0 and llm.scheduler.pages.num_free == 128


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"dtype": "int4"}, "dtype must be one of auto, float32.*'int4'"),
        ({"token_budget": 0}, "token_budget must be a positive int or None, got 0"),
        ({"num_pages": -1}, "num_pages must be a positive int, got -1"),
        ({"linear": "fp4"}, "linear must be one of dense.*'fp4'"),
    ],
)
def test_nonsense_in_the_configuration_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig(**config)


def test_an_unknown_policy_or_backend_is_refused(engine):
    with pytest.raises(ValueError, match="policy must be one of sarathi, prefill_first, got 'lifo'"):
        engine(policy="lifo")
    with pytest.raises(ValueError, match="unknown backend 'abacus'"):
        engine(backend="abacus")


def test_demo(tmp_path, monkeypatch, capsys):
    """The main job at its real size: chats keep streaming while two long prompts are read."""
    from engine.__main__ import main

    monkeypatch.chdir(tmp_path)
    started = time.perf_counter()
    assert main(["demo", "--json", "figures.json"]) == 0
    took = time.perf_counter() - started
    policies = json.loads((tmp_path / "figures.json").read_text())["policies"]
    keys = {"ttft_p50_s", "tbt_p50_s", "tbt_p99_s", "tbt_max_s", "longest_stall_s", "output_tok_s"}
    assert set(policies) == {"sarathi", "prefill_first"} and all(set(row) == keys for row in policies.values())
    assert policies["sarathi"]["longest_stall_s"] <= policies["prefill_first"]["longest_stall_s"] / 3
    assert took < 180
    assert (tmp_path / "out" / "demo_timeline.png").read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr().out
    assert "curvature of spacetime" in printed and "Gravity" in printed


def test_chat_streams_an_answer(capsys):
    from engine.__main__ import main

    assert main(["chat", "What is gravity?", "--max-tokens", "16"]) == 0
    assert capsys.readouterr().out.startswith("Gravity is a fundamental concept in physics")
    assert main(["chat", "x", "--model", "nowhere"]) == 2
    assert "no model at 'nowhere'" in capsys.readouterr().err
