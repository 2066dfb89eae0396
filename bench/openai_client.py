"""A load generator for any OpenAI-compatible server: /v1/completions with token ids, streamed. Standard library only."""

from __future__ import annotations

import http.client
import json
import threading
import time
import urllib.parse
from collections.abc import Sequence

from bench.serving import Served
from bench.workload import Arrival

TIMEOUT_SECONDS = 600


def drive(url: str, model: str, arrivals: Sequence[Arrival], prompts: Sequence[list[int]]) -> list[Served]:
    """Sends every request at its time, one thread each; returns what the clients saw."""
    served = [Served(a.prompt_len, 0.0) for a in arrivals]
    produced = _Counter()
    begin = time.perf_counter()
    threads = []
    for i in sorted(range(len(arrivals)), key=lambda i: (arrivals[i].at is None, arrivals[i].after_tokens if arrivals[i].at is None else arrivals[i].at)):
        arrival = arrivals[i]
        if arrival.at is not None:
            time.sleep(max(0.0, arrival.at - (time.perf_counter() - begin)))
        elif not produced.wait_for(arrival.after_tokens, TIMEOUT_SECONDS):
            served[i].error = f"never arrived: fewer than {arrival.after_tokens} tokens were put out in {TIMEOUT_SECONDS} s"
            continue
        served[i].start = time.perf_counter() - begin
        body = {"model": model, "prompt": prompts[i], "max_tokens": arrival.output_len, "temperature": 0.0, "ignore_eos": True, "stream": True}
        thread = threading.Thread(target=_request, args=(url, body, served[i], begin, produced), daemon=True)
        thread.start()
        threads.append(thread)
    for thread in threads:
        thread.join(TIMEOUT_SECONDS)
    for s, a in zip(served, arrivals):
        if not s.error and len(s.token_times) < a.output_len:
            s.error = f"{len(s.token_times)} of {a.output_len} tokens came"
    return served


class _Counter:
    def __init__(self):
        self.value, self.changed = 0, threading.Condition()

    def add(self, n: int) -> None:
        with self.changed:
            self.value += n
            self.changed.notify_all()

    def wait_for(self, value: int, timeout: float) -> bool:
        with self.changed:
            return self.changed.wait_for(lambda: self.value >= value, timeout)


def _request(url: str, body: dict, served: Served, begin: float, produced: _Counter) -> None:
    """One streamed completion. Any failure becomes the request's `error`: a load test outlives its requests."""
    try:
        for count in stream(url, body):
            served.token_times += [time.perf_counter() - begin] * count
            produced.add(count)
    except (OSError, http.client.HTTPException, ValueError) as error:
        served.error = f"{type(error).__name__}: {error}"


def stream(url: str, body: dict):
    """Yields the number of tokens of each event of a streamed completion.

    A server that merges tokens into one event says so in `usage` or `logprobs`, or not at all: then the event counts as one.
    """
    parts = urllib.parse.urlsplit(url)
    make = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = make(parts.netloc, timeout=TIMEOUT_SECONDS)
    try:
        path = parts.path.rstrip("/") + "/v1/completions" if not parts.path.endswith("/completions") else parts.path
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json", "Accept": "text/event-stream"})
        response = connection.getresponse()
        if response.status != 200:
            raise ValueError(f"HTTP {response.status}: {response.read(500).decode(errors='replace')}")
        for line in response:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            event = json.loads(data)
            if "error" in event:
                raise ValueError(str(event["error"]))
            for choice in event.get("choices", []):
                ids = choice.get("token_ids")
                if ids is not None:
                    yield len(ids)
                elif choice.get("text") or choice.get("finish_reason") is None:
                    yield 1
    finally:
        connection.close()
