"""OpenVINO GenAI's continuous batching behind the same stepping interface, on the same weights.

It reads GGUF with float16 tensors, not Q4_1 without loss, so the packaged model is dequantised to such a file once.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bench.peer_model import VOCAB_SIZE, converted

CACHE_GIB = 1


def float16_gguf(source: Path, target: Path) -> None:
    """Writes `source` again with every matrix in float16 and everything else as it is."""
    import gguf

    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type", "general.quantization_version"):
            continue
        kind = field.types[0]
        if kind == gguf.GGUFValueType.ARRAY:
            writer.add_array(name, field.contents())
        else:
            writer.add_key_value(name, field.contents(), kind)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, values.astype(np.float16) if values.ndim > 1 else values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class OpenVinoEngine:
    """ContinuousBatchingPipeline with dynamic split-fuse, bfloat16 compute and cache, no prefix cache.

    Args:
        token_budget: max_num_batched_tokens.

    Raises:
        ImportError: openvino_genai or the model's package is missing.
    """

    def __init__(self, token_budget: int):
        import openvino
        import openvino_genai

        model = converted("float16.gguf", float16_gguf)
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = CACHE_GIB
        scheduler.max_num_batched_tokens = token_budget
        scheduler.max_num_seqs = 64
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = False
        properties = {"INFERENCE_PRECISION_HINT": "bf16", "KV_CACHE_PRECISION": "bf16"}
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(str(model), scheduler, "CPU", properties)
        self.genai, self.openvino = openvino_genai, openvino
        self.vocab_size = VOCAB_SIZE
        self.handles: dict[int, object] = {}
        self.left: dict[int, int] = {}
        self.serial = 0

    def add(self, index: int, prompt: list[int], output_len: int) -> None:
        config = self.genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = output_len, True, False
        ids = self.openvino.Tensor(np.array([prompt], dtype=np.int64))
        self.handles[index] = self.pipeline.add_request(self.serial, ids, config)
        self.left[index] = output_len
        self.serial += 1

    def step(self) -> list[tuple[int, int]]:
        self.pipeline.step()
        new = []
        for index, handle in list(self.handles.items()):
            count = 0
            while handle.can_read():
                count += sum(len(output.generated_ids) for output in handle.read().values())
            if count:
                new.append((index, count))
                self.left[index] -= count
            if self.left[index] <= 0:
                del self.handles[index], self.left[index]
            elif not count and handle.get_status() != self.genai.GenerationStatus.RUNNING:
                # It stops at end-of-sequence in spite of ignore_eos: the request ends short, which must not hang the run.
                raise RuntimeError(f"request {index} ended {self.left[index]} tokens early, with status {handle.get_status()}")
        return new
