import json
from pathlib import Path

import pytest
import torch
from engine.tokenizer import Tokenizer
from engine.weights import find_model, load_weights

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "golden_smollm2.json").read_text())["outputs"]


@pytest.fixture(scope="session")
def model_path():
    return find_model("smollm2")


@pytest.fixture(scope="session")
def tokenizer(model_path):
    return Tokenizer.load(model_path)


@pytest.fixture(scope="session")
def weights(model_path):
    """Of SmolLM2, by dtype, each loaded once."""
    loaded = {}

    def get(dtype: torch.dtype):
        if dtype not in loaded:
            loaded[dtype] = load_weights(model_path, dtype)
        return loaded[dtype]

    return get


@pytest.fixture(scope="session")
def goldens():
    return GOLDEN
