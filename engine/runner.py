"""Runs a batch: build the tensors, one forward pass, sample."""

from __future__ import annotations

import torch

from engine.batch import BatchBuilder
from engine.model import Model
from engine.request import Batch
from engine.sampler import sample


class Runner:
    """A model with the buffers of its steps.

    Args:
        model: the model and its cache.
        builder: makes step inputs.
        seed: for requests that bring none.
    """

    def __init__(self, model: Model, builder: BatchBuilder, seed: int = 0):
        self.model, self.builder, self.seed = model, builder, seed

    @torch.inference_mode()
    def run(self, batch: Batch) -> list[int | None]:
        """Computes each request's next n tokens.

        Returns:
            One entry per request: its next token where the n tokens reach its end, else None.
        """
        step = self.builder.build(batch)
        logits = self.model(step)
        tokens: list[int | None] = [None] * len(batch)
        if step.samplers:
            drawn = sample(logits, [batch[i][0] for i in step.samplers], self.seed)
            for i, token in zip(step.samplers, drawn, strict=True):
                tokens[i] = token
        return tokens
