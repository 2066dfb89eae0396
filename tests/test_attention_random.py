"""Random batches of random models, on every backend that runs here, against the oracle."""

import cuda_sim
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings, strategies as st

from random_cases import cases, strided
from sarathi_kernels import backends, testing
from sarathi_kernels.backends import Problem

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SPLITS = st.sampled_from([None, 64, 128])
STRIDES = st.sampled_from(["", "q", "caches"])
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
# Half units in the last place: for a batch of one or two keys the yardstick may be exact by luck.
ROUNDINGS = 4


def config_of(backend, spec, split):
    config = backends.get(backend).plan_config(spec)
    return config if split is None else config._replace(decode_split=split, prefill_split=split)


def run_and_check(backend, case, dtype, strides, split):
    assume(backends.get(backend).supports(Problem(case.with_dtype(dtype), torch.device("cpu"))) is None)
    inputs = strided(testing.make_inputs(case, dtype), strides)
    testing.check(inputs, *inputs.attention(backend, config=config_of(backend, inputs.spec, split)), roundings=ROUNDINGS)


@settings(max_examples=100, deadline=None, suppress_health_check=SLOW)
@given(cases(max_kv=600, head_dims=[8, 24, 64, 80, 96, 128, 256], kv_dtypes=(None, None, torch.int8)), DTYPES, STRIDES, SPLITS)
def test_cpu(case, dtype, strides, split):
    run_and_check("cpu", case, dtype, strides, split)


@pytest.mark.interpreter
@settings(max_examples=15, deadline=None, suppress_health_check=SLOW)
@given(cases(max_kv=150, head_dims=[16, 64, 80, 128, 256], kv_dtypes=(None, None, torch.int8, torch.float8_e4m3fn)), DTYPES, STRIDES, SPLITS)
def test_triton_in_the_interpreter(case, dtype, strides, split):
    pytest.importorskip("triton")
    run_and_check("triton", case, dtype, strides, split)


@settings(max_examples=15, deadline=None, suppress_health_check=SLOW)
@given(
    cases(max_kv=150, head_dims=[64, 64, 128, 256]), st.sampled_from([torch.bfloat16, torch.float16]), STRIDES, SPLITS,
    st.integers(0, 99), st.sampled_from(["late", "eager", "random"]),
)  # fmt: skip
def test_cuda_in_the_simulator(case, dtype, strides, split, seed, completion):
    inputs = strided(testing.make_inputs(case, dtype), strides)
    out, lse, _ = cuda_sim.attention(inputs, config=config_of("cuda", inputs.spec, split), seed=seed, completion=completion)
    testing.check(inputs, out, lse, roundings=ROUNDINGS)
