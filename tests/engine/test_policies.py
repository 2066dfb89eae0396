"""Policies as pure functions: the exact batches they make."""

import ast
import functools
from pathlib import Path

import pytest
import sarathi_kernels as sk
from engine.policies import POLICIES, prefill_first, sarathi
from engine.request import Request, View

ROOT = Path(__file__).parents[2]


def decode(name):
    return Request(name, [1, 2, 3], num_computed_tokens=2)


def prompt(name, remaining, done=0):
    return Request(name, [1] * (remaining + done), num_computed_tokens=done)


def run(policy, running, waiting, budget, tile=1):
    view = View(tuple(running), tuple(waiting), functools.partial(sk.aligned_chunk, tile=tile))
    return [(request.request_id, n) for request, n in policy(view, budget)]


def test_sarathi_takes_decodes_then_prompts_under_way_then_new_ones():
    running = [prompt("p", 10, done=4), decode("a"), decode("b")]
    assert run(sarathi, running, [prompt("w", 8), prompt("x", 8)], 16) == [("a", 1), ("b", 1), ("p", 10), ("w", 4)]


def test_sarathi_fills_the_budget_exactly_when_there_is_work():
    batch = run(sarathi, [decode("a")], [prompt("w", 1000)], 256)
    assert batch == [("a", 1), ("w", 255)]


def test_sarathi_aligns_chunks_to_the_tile_but_never_loses_a_step():
    assert run(sarathi, [decode("a")], [prompt("w", 1000)], 256, tile=64) == [("a", 1), ("w", 192), ]
    assert run(sarathi, [decode("a")], [prompt("w", 200)], 256, tile=64) == [("a", 1), ("w", 200)]
    assert run(sarathi, [decode("a")], [prompt("w", 1000)], 33, tile=64) == [("a", 1), ("w", 32)]


def test_sarathi_with_more_decodes_than_budget_runs_the_oldest_and_no_prompt():
    running = [decode(str(i)) for i in range(5)]
    assert run(sarathi, running, [prompt("w", 4)], 3) == [("0", 1), ("1", 1), ("2", 1)]
    assert run(sarathi, [*running[:3], prompt("p", 9, done=3)], [], 3) == [("0", 1), ("1", 1), ("2", 1)]


def test_prefill_first_never_mixes():
    running = [decode("a"), decode("b")]
    assert run(prefill_first, running, [prompt("w", 100), prompt("x", 50)], 8192) == [("w", 100), ("x", 50)]
    assert run(prefill_first, running, [], 8192) == [("a", 1), ("b", 1)]


def test_prefill_first_takes_whole_prompts_in_order_until_one_does_not_fit():
    waiting = [prompt("w", 100), prompt("x", 200), prompt("y", 10)]
    assert run(prefill_first, [decode("a")], waiting, 150) == [("w", 100)]


def test_prefill_first_splits_only_a_prompt_longer_than_the_budget():
    assert run(prefill_first, [decode("a")], [prompt("w", 100)], 64) == [("w", 64)]
    assert run(prefill_first, [decode("a"), prompt("w", 36, done=64)], [prompt("x", 20)], 64) == [("w", 36), ("x", 20)]


@pytest.mark.parametrize("policy", POLICIES.values())
def test_policies_change_nothing(policy):
    running, waiting = [decode("a"), prompt("p", 10, done=4)], [prompt("w", 8)]
    before = [(r.request_id, list(r.tokens), r.num_computed_tokens, list(r.pages)) for r in running + waiting]
    first = run(policy, running, waiting, 16)
    assert run(policy, running, waiting, 16) == first
    assert [(r.request_id, list(r.tokens), r.num_computed_tokens, list(r.pages)) for r in running + waiting] == before


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("path", sorted((ROOT / "engine" / "policies").glob("[!_]*.py")), ids=lambda p: p.name)
def test_policies_import_only_request(path):
    assert set(imports(path)) == {"engine.request"}


def test_engine_uses_only_the_public_ops():
    for path in (ROOT / "engine").rglob("*.py"):
        assert not [name for name in imports(path) if name.startswith("sarathi_kernels.")], path


ARROWS = {  # who may import whom within the engine; no arrow points upward
    "request": set(), "pages": set(), "config": set(), "metrics": set(), "weights": set(), "linear": set(), "tokenizer": set(),
    "stream": {"tokenizer"}, "sampler": {"request"}, "batch": {"request"}, "scheduler": {"pages", "request"},
    "model": {"batch", "linear", "weights"}, "runner": {"batch", "model", "request", "sampler"},
}  # fmt: skip


@pytest.mark.parametrize("module", ARROWS)
def test_engine_modules_import_only_what_is_below(module):
    inner = {name.split(".")[1] for name in imports(ROOT / "engine" / f"{module}.py") if name.startswith("engine.")}
    assert inner <= ARROWS[module]


def test_there_is_no_phase_flag():
    for path in (ROOT / "engine").rglob("*.py"):
        names = {n.id for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Name)}
        names |= {n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}
        assert not {n for n in names if "phase" in n or n in ("is_prefill", "is_decode", "prefill_done")}, path
