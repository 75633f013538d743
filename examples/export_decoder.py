"""Export the decoder of a fused model, compile it ahead of time, and decode without this library.

    python examples/export_decoder.py                           # a small random fusion
    python examples/export_decoder.py runs/speech_text/fused    # the main example's

Writes two programs that need only torch, encode.pt2 and step.pt2, and compiles them by AOTInductor, which
needs a C++ compiler and a few minutes. Then it decodes the same prompt with ``model.generate``, the programs
and the compiled programs, alternating on one thread, and checks that all choose the same tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import multitower as mt
from multitower.export import DecoderPrograms, export_decoder
from multitower.testing import open_links


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", help="a fused checkpoint; a small random fusion unless given")
    parser.add_argument("--tower", default="text", help="the tower to decode")
    parser.add_argument("--source", default="speech", help="the tower that it reads")
    parser.add_argument("--given", type=int, default=100, help="how many tokens of the source are given")
    parser.add_argument("--new-tokens", type=int, default=64, help="how many are decoded")
    parser.add_argument("--width", type=int, default=256, help="that of the random fusion")
    parser.add_argument("--depth", type=int, default=6, help="that of the random fusion")
    parser.add_argument("--rounds", type=int, default=5, help="how often each way is timed")
    parser.add_argument("--out", type=Path, default=Path("runs/export"), help="where programs are written")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.folder is None:
        model = random_fusion(options.width, options.depth)
    else:
        model = mt.FusedModel.from_pretrained(options.folder).eval()
    given = torch.randint(model.tower(options.source).vocab_size, (options.given,))
    streams = streams_of(model, options.source, given, options.tower)
    options.out.mkdir(parents=True, exist_ok=True)
    programs = export_decoder(model, options.tower, max_length=options.new_tokens + 1)
    written = write(programs, streams, options.tower, options.out)

    def generate() -> Tensor:
        example = [mt.Segment(options.source, given)]
        ((segment,),) = model.generate(
            [example], output=[options.tower], max_new_tokens=options.new_tokens, do_sample=False
        )
        return segment.tokens[1:]

    ways: dict[str, Callable[[], Tensor]] = {"generate": generate}
    for kind, (encode, step) in written.items():
        ways[kind] = lambda encode=encode, step=step: decode(
            encode, step, streams, options.tower, options.new_tokens
        )
    return compare(ways, options.rounds)


def random_fusion(width: int, depth: int) -> mt.FusedModel:
    """Return a fusion of two random decoders; text reads speech at every second layer."""
    graph = mt.FusionGraph()
    for seed, name in enumerate(("speech", "text")):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            vocab_size=1000,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=depth,
            num_attention_heads=4,
            bos_token_id=1,
            eos_token_id=None,
        )
        graph.add_tower(name, transformers.LlamaForCausalLM(config))
    graph.add_link("speech", "text", interleave=min(2, depth))
    return open_links(graph.compile()).eval()


def streams_of(model: mt.FusedModel, source: str, given: Tensor, tower: str) -> dict[str, dict[str, Tensor]]:
    """Return streams with the given tokens followed by the tower's begin token."""
    batch = mt.collate([[mt.Segment(source, given), mt.Segment(tower, [model.tower(tower).begin])]])
    keys = ("tokens", "times", "mask")
    return {name: {key: stream[key] for key in keys} for name, stream in batch["streams"].items()}


def write(
    programs: DecoderPrograms, streams: dict[str, dict[str, Tensor]], tower: str, out: Path
) -> dict[str, list[Callable[..., Any]]]:
    """Write the programs and the compiled ones, and load both with torch alone."""
    state = programs.encode.module()(streams)
    inputs = {"encode": (streams,), "step": (streams[tower]["tokens"], streams[tower]["times"], state)}
    exported, compiled = [], []
    for name, program in programs._asdict().items():
        torch.export.save(program, out / f"{name}.pt2")
        exported.append(torch.export.load(out / f"{name}.pt2").module())
        program.example_inputs = (inputs[name], {})  # AOTInductor needs some; sizes stay dynamic
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(out / f"{name}.compiled.pt2")
        )
        compiled.append(torch._inductor.aoti_load_package(package))
    return {"exported": exported, "compiled": compiled}


@torch.inference_mode()
def decode(
    encode: Callable[..., Any],
    step: Callable[..., Any],
    streams: dict[str, dict[str, Tensor]],
    tower: str,
    count: int,
) -> Tensor:
    """Decode one row greedily, without this library."""
    state = encode(streams)
    tokens, times = streams[tower]["tokens"], streams[tower]["times"]
    decoded = []
    for _ in range(count):
        logits = step(tokens, times, state)
        tokens, times = logits[:, -1:].argmax(-1), times[:, -1:] + 1
        decoded.append(tokens)
    return torch.cat(decoded, 1)[0]


def compare(ways: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, float]:
    """Print and return tokens per second of CPU time: medians over rounds in which the ways alternate."""
    expected = next(iter(ways.values()))()
    for name, way in ways.items():
        found = way()[: len(expected)]
        assert torch.equal(found, expected), f"{name} decodes {found.tolist()}, not {expected.tolist()}"
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    counts = {}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.process_time()
            counts[name] = len(way())
            seconds[name].append(time.process_time() - start)
    rates = {name: counts[name] / statistics.median(seconds[name]) for name in ways}
    for name, rate in rates.items():
        print(f"{name:10} {rate:8.1f} tokens/s, {rate / rates['generate']:.2f} times generate")
    return rates


if __name__ == "__main__":
    main()
