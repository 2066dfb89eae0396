import pytest
from engine.metrics import Trace, longest_stall, summarize


def test_figures_of_a_run_worked_by_hand():
    a = Trace("a", 0.0, [1.0, 2.0, 5.0, 6.0])
    b = Trace("b", 1.5, [4.0, 5.0])
    got = summarize([a, b])
    assert got["ttft_p50_s"] == pytest.approx(1.75)  # of 1.0 and 2.5
    assert got["tbt_p50_s"] == pytest.approx(1.0) and got["tbt_max_s"] == pytest.approx(3.0)  # of 1, 3, 1, 1
    assert got["output_tok_s"] == pytest.approx(6 / 6.0)
    assert longest_stall([a, b]) == (2.0, 2.0)  # b's first token ends it: somebody got one


def test_idle_time_is_no_stall():
    assert longest_stall([Trace("a", 0, [1.0, 1.5]), Trace("b", 9, [10.0, 10.2])]) == (0.5, 1.0)
    assert summarize([Trace("a", 0, [1.0])])["tbt_max_s"] == 0
