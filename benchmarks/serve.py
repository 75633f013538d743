"""Measure a server's throughput under load from many concurrent clients, compared with one client.

    python benchmarks/serve.py                          # 5 minutes, with 8, 32 and 64 clients
    python benchmarks/serve.py --seconds 60 --checkpoint runs/fused

``multitower serve`` runs in its own process, on loopback. Requests are mixed: transcriptions, chats with text
and audio, and speech, streamed or not. Each response is compared with that to the same request alone, at the
start. Every round measures each number of clients, including one. Without a checkpoint, two random decoders
are fused, which always generate up to the limit.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import itertools
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil
import soundfile
import torch
import transformers

import multitower as mt
from measure import begin, options, ratio, spread, write
from multitower.testing import open_links
from multitower_speech import SpeechModality
from multitower_text import TextModality

RATE = 16_000
Ask = Callable[[httpx2.AsyncClient], Awaitable[bytes]]


def make_checkpoint(folder: Path, width: int, depth: int) -> Path:
    """Fuse two random decoders of speech and text, and save the model."""
    speech = SpeechModality(torch.randn(1, 64, 160))
    graph = mt.FusionGraph()
    for name, size in (("speech", speech.vocab_size), ("text", 258)):
        config = transformers.LlamaConfig(
            vocab_size=size,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=depth,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        graph.add_tower(name, transformers.LlamaForCausalLM(config).eval())
    graph.add_link("speech", "text", interleave=1)
    graph.add_link("text", "speech", interleave=1)
    pipe = mt.Pipeline(open_links(graph.compile(), seed=1), {"speech": speech, "text": TextModality()})
    pipe.save_pretrained(folder)
    return folder


def clip(draw: random.Random) -> bytes:
    """Return random noise as a sound file."""
    length = int(RATE * draw.uniform(0.3, 3))
    noise = np.random.default_rng(draw.randrange(2**32)).normal(0, 0.1, length)
    file = io.BytesIO()
    soundfile.write(file, noise, RATE, format="WAV")
    return file.getvalue()


def make_requests(count: int, most: int, model: str, seed: int) -> list[Ask]:
    """Return ``count`` requests of all kinds, with different lengths."""
    draw, found = random.Random(seed), list[Ask]()
    for number in range(count):
        text = "".join(draw.choices("abcdefgh ", k=draw.randrange(4, 120)))
        kind, stream = number % 4, number % 8 < 4
        if kind == 0:
            found.append(_transcription(model, clip(draw), stream))
        elif kind == 1:
            body = {"model": model, "input": text[:40], "response_format": "pcm"}
            found.append(_json("/v1/audio/speech", body, stream=False))
        else:
            sound = {"data": base64.b64encode(clip(draw)).decode(), "format": "wav"}
            parts = [{"type": "text", "text": text}, {"type": "input_audio", "input_audio": sound}]
            messages = [{"role": "user", "content": parts[: kind - 1]}]
            body = {"messages": messages, "max_tokens": draw.randrange(most // 4, most), "stream": stream}
            found.append(_json("/v1/chat/completions", {"model": model, **body}, stream=stream))
    return found


def _transcription(model: str, sound: bytes, stream: bool) -> Ask:
    async def ask(client: httpx2.AsyncClient) -> bytes:
        fields = {"model": model, "stream": json.dumps(stream)}
        answer = await client.post("/v1/audio/transcriptions", data=fields, files={"file": ("a.wav", sound)})
        return said(answer, stream)

    return ask


def _json(path: str, body: dict[str, Any], *, stream: bool) -> Ask:
    async def ask(client: httpx2.AsyncClient) -> bytes:
        return said(await client.post(path, json=body), stream)

    return ask


def said(answer: httpx2.Response, stream: bool) -> bytes:
    """Return the content of a response, without id and time."""
    answer.raise_for_status()
    if not stream:
        if "json" not in answer.headers["content-type"]:
            return answer.content
        document = answer.json()
        return json.dumps(document.get("choices", document)).encode()
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
    documents = [json.loads(line) for line in lines]
    if any("error" in each for each in documents):
        raise ValueError(documents[-1])
    new = [
        each["choices"][0]["delta"].get("content") if "choices" in each else each.get("delta")
        for each in documents
    ]
    return "".join(filter(None, new)).encode()


@contextlib.contextmanager
def serving(checkpoint: Path, chosen: argparse.Namespace) -> Iterator[tuple[str, psutil.Process]]:
    """Run the server; yield its URL and process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    limits = ["--max-requests", str(2 * max(chosen.clients)), "--max-tokens", str(chosen.most)]
    command = [sys.executable, "-m", "multitower", "serve", str(checkpoint), "--port", str(port), *limits]
    environment = {**os.environ, "OMP_NUM_THREADS": str(chosen.threads)}
    process = subprocess.Popen([*command, "--name", "served", "--device", chosen.device], env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(1200):
            with contextlib.suppress(httpx2.TransportError):
                httpx2.get(f"{url}/health").raise_for_status()
                break
            if process.poll() is not None:
                raise RuntimeError("the server did not start")
            time.sleep(0.25)
        yield url, psutil.Process(process.pid)
    finally:
        process.terminate()
        if process.wait(60) != 0:
            raise RuntimeError(f"the server ended with {process.returncode}")


async def load(
    url: str, asks: list[Ask], expected: list[bytes], clients: int, seconds: float
) -> dict[str, Any]:
    """Run ``clients`` concurrent clients for ``seconds``; return counts and timings."""
    found = {"answers": 0, "lost": 0, "mixed_up": 0}
    numbers = itertools.cycle(range(len(asks)))
    started = time.perf_counter()

    async def ask_on(client: httpx2.AsyncClient) -> None:
        while time.perf_counter() - started < seconds:
            number = next(numbers)
            try:
                answer = await asks[number](client)
            except (httpx2.HTTPError, ValueError) as error:
                print(f"lost: {error!r}", file=sys.stderr)
                found["lost"] += 1
                continue
            found["answers"] += 1
            found["mixed_up"] += answer != expected[number]

    limits = httpx2.Limits(max_connections=clients)
    async with httpx2.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        await asyncio.gather(*(ask_on(client) for _ in range(clients)))
    return {**found, "seconds": time.perf_counter() - started}


async def alone(url: str, asks: list[Ask]) -> list[bytes]:
    """Return the response to each request, sent one at a time."""
    async with httpx2.AsyncClient(base_url=url, timeout=600) as client:
        return [await ask(client) for ask in asks]


class Memory(threading.Thread):
    """Records the memory of a process every second."""

    def __init__(self, process: psutil.Process) -> None:
        super().__init__(daemon=True)
        self.process, self.noted, self.over = process, list[tuple[float, float]](), threading.Event()

    def run(self) -> None:
        """Record until ``over`` is set."""
        started = time.perf_counter()
        while not self.over.wait(1):
            self.noted.append((time.perf_counter() - started, self.process.memory_info().rss / 2**20))

    def growth(self) -> float:
        """Return the growth in MiB per minute over the second half."""
        seconds, mib = np.array(self.noted[len(self.noted) // 2 :]).T
        return float(60 * np.polyfit(seconds, mib, 1)[0])


def plot(path: Path, results: list[dict[str, Any]], memory: list[tuple[float, float]]) -> None:
    """Plot responses per second by number of clients, and memory over time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    rates = [result["answers_per_second"] for result in results]
    errors = [[abs(rate["median"] - rate[side]) for rate in rates] for side in ("low", "high")]
    left.errorbar(range(len(rates)), [rate["median"] for rate in rates], yerr=errors, fmt="o-", capsize=3)
    left.set_xticks(range(len(rates)), [str(result["clients"]) for result in results])
    left.set(xlabel="clients", ylabel="answers per second", ylim=(0, None))
    right.plot(*zip(*memory, strict=True))
    right.set(xlabel="s", ylabel="MiB of the server", ylim=(0, None))
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure each number of clients in turn, round by round."""
    parser = options(__doc__, "serve")
    parser.add_argument("--checkpoint", type=Path, help="one with modalities of text and of sound")
    parser.add_argument("--clients", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--seconds", type=float, default=300, help="of load, for all but the single client")
    parser.add_argument("--requests", type=int, default=48, help="how many unlike requests there are")
    parser.add_argument("--most", type=int, default=64, help="tokens that are decoded at most")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=8)
    parser.set_defaults(repeats=3)
    chosen = begin(parser)
    checkpoint = chosen.checkpoint or make_checkpoint(chosen.out / "fused", chosen.width, chosen.depth)
    asks = make_requests(chosen.requests, chosen.most, "served", chosen.seed)
    each = chosen.seconds / len(chosen.clients) / chosen.repeats
    rounds: dict[int, list[dict[str, Any]]] = {clients: [] for clients in (1, *chosen.clients)}
    with serving(checkpoint, chosen) as (url, process):
        expected = asyncio.run(alone(url, asks))
        memory = Memory(process)
        memory.start()
        for number, clients in itertools.product(range(chosen.repeats), rounds):
            rounds[clients].append(asyncio.run(load(url, asks, expected, clients, each)))
            print(f"round {number + 1}, {clients} clients: {rounds[clients][-1]}", flush=True)
        memory.over.set()
        memory.join()
    rates = {clients: [one["answers"] / one["seconds"] for one in took] for clients, took in rounds.items()}
    results = [
        {
            "clients": clients,
            **{key: sum(one[key] for one in took) for key in ("answers", "lost", "mixed_up", "seconds")},
            "answers_per_second": spread(rates[clients]),
            "over_one_at_a_time": ratio(rates[clients], rates[1]),
        }
        for clients, took in rounds.items()
    ]
    found = {"mib": [round(mib, 1) for _, mib in memory.noted], "mib_per_minute": memory.growth()}
    write(chosen, [*results, {"memory": found}])
    plot(chosen.out / "serve.png", results, memory.noted)
    for result in results:
        print({key: result[key] for key in ("clients", "answers", "lost", "mixed_up", "over_one_at_a_time")})
    grows = found["mib_per_minute"]
    print(f"memory {memory.noted[0][1]:.0f} to {memory.noted[-1][1]:.0f} MiB, {grows:+.2f} a minute")


if __name__ == "__main__":
    main()
