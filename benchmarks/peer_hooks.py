"""Time a step of training, and decoding, beside hook_version.py: the same fusion by forward hooks.

    python benchmarks/peer_hooks.py                     # tiny towers, a minute or two
    python benchmarks/peer_hooks.py --size smollm2      # towers of the shape of SmolLM2-135M

Both have the same frozen towers and the same values in every tap; before anything is timed, the losses, the
gradients of all taps and greedily decoded tokens are compared. A step is a forward and a backward. Decoding
begins with the source and ends with --new tokens; each starts from one prompt token. The hooks compute the
source's keys and values at each step, as a hook in the target's forward does.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import multitower as mt
from hook_version import Hooked
from measure import begin, interleaved, milliseconds, options, plot_times, ratio, write
from models import INTERLEAVE, SIZES, make_tower
from multitower.testing import open_gates


def main() -> None:
    """Compare, then measure."""
    parser = options(__doc__, "peer_hooks")
    parser.add_argument("--size", choices=tuple(SIZES), default="tiny")
    parser.add_argument("--rows", type=int, default=4, help="of a step")
    parser.add_argument("--length", type=int, default=128, help="tokens of each tower in a step")
    parser.add_argument("--source", type=int, default=500, help="tokens of the source that is decoded from")
    parser.add_argument("--new", type=int, default=100, help="tokens to decode")
    chosen = begin(parser)
    depth, every = SIZES[chosen.size]["num_hidden_layers"], INTERLEAVE[chosen.size]
    taps = [(layer, layer) for layer in range(every, depth + 1, every)]
    source, target = make_tower(chosen.size, 0), make_tower(chosen.size, 1)
    ours = fuse(source, target, taps)
    hooked = by_hooks(ours, copy.deepcopy(source), copy.deepcopy(target), taps)
    size = SIZES[chosen.size]["vocab_size"]
    given, tokens = torch.randint(3, size, (2, chosen.rows, chosen.length))
    batch = batch_of(given, tokens)
    long, prompt = torch.randint(3, size, (1, chosen.source)), torch.ones(1, 1, dtype=torch.long)
    limits = {"max_new_tokens": chosen.new, "min_new_tokens": chosen.new, "do_sample": False}
    compare(ours, hooked, batch, given, tokens)
    assert decode(ours, long, **limits) == decode_hooked(hooked, long, prompt, **limits)
    print("losses, gradients and decoded tokens are the same", flush=True)
    kinds = {
        f"step, {chosen.rows} rows of {chosen.length}": {
            "multitower": partial(step, ours, batch),
            "hooks": partial(step_hooked, hooked, given, tokens),
        },
        f"{chosen.new} tokens after {chosen.source}": {
            "multitower": partial(decode, ours, long, **limits),
            "hooks": partial(decode_hooked, hooked, long, prompt, **limits),
        },
    }
    results: list[dict[str, Any]] = []
    for kind, runs in kinds.items():
        times = interleaved(runs, chosen.repeats, clock=chosen.clock, title=kind)
        faster = ratio(times["hooks"], times["multitower"])
        results.append({"kind": kind, "ms": milliseconds(times), "times_faster": faster})
        print(results[-1], flush=True)
        write(chosen, results)
    plot_times(chosen.out / "times.png", results)


def fuse(source: Any, target: Any, taps: Sequence[tuple[int, int]]) -> mt.FusedModel:
    """Link two frozen towers, with gates that are open."""
    graph = mt.FusionGraph()
    graph.add_tower("source", source, adapter=None)
    graph.add_tower("text", target, adapter=None)
    graph.add_link("source", "text", taps=taps)
    return open_gates(graph.compile())


def by_hooks(model: mt.FusedModel, source: Any, target: Any, taps: Sequence[tuple[int, int]]) -> Hooked:
    """Join copies of the towers by hooks, with the values of the model's own taps."""
    modules = [model.tap(tap) for tap in sorted(model.schedule.taps, key=lambda tap: tap.target_layer)]
    hooked = Hooked(source, target, taps, heads=modules[0].heads)
    for own, module in zip(hooked.taps, modules, strict=True):
        own.load_state_dict(module.state_dict())
    return hooked


def batch_of(given: Tensor, tokens: Tensor) -> mt.stream.Batch:
    """Put the source before the text in each row."""
    return mt.collate(
        [
            [mt.Segment("source", one), mt.Segment("text", two, target=True)]
            for one, two in zip(given, tokens, strict=True)
        ]
    )


def compare(
    model: mt.FusedModel, hooked: Hooked, batch: mt.stream.Batch, given: Tensor, tokens: Tensor
) -> None:
    """Check that both give the same loss and the same gradient of every value that is trained."""
    loss, expected = model(**batch, logits=False).loss, hooked(given, tokens)
    assert loss is not None
    torch.testing.assert_close(loss, expected)
    modules = [model.tap(tap) for tap in sorted(model.schedule.taps, key=lambda tap: tap.target_layer)]
    gradients = torch.autograd.grad(loss, [each for module in modules for each in module.parameters()])
    names = {name for name, _ in modules[0].named_parameters()}
    others = torch.autograd.grad(
        expected,
        [tap.get_parameter(name) for tap in hooked.taps for name, _ in modules[0].named_parameters()],
    )
    assert names == {name for name, _ in hooked.taps[0].named_parameters()}
    for found, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(found, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()) + 1e-7)


def step(model: mt.FusedModel, batch: mt.stream.Batch) -> None:
    """Run forward and backward."""
    loss = model(**batch, logits=False).loss
    assert loss is not None
    loss.backward()


def step_hooked(hooked: Hooked, given: Tensor, tokens: Tensor) -> None:
    """Run forward and backward of the hook version."""
    hooked(given, tokens).backward()


def decode(model: mt.FusedModel, given: Tensor, **limits: Any) -> list[int]:
    """Decode after one source."""
    ((segment,),) = model.generate([[mt.Segment("source", given[0])]], ["text"], **limits)
    tokens: list[int] = segment.tokens.tolist()
    return tokens


def decode_hooked(hooked: Hooked, given: Tensor, prompt: Tensor, **limits: Any) -> list[int]:
    """Decode after one source by hooks."""
    tokens: list[int] = hooked.generate(given, prompt, **limits)[0].tolist()
    return tokens


if __name__ == "__main__":
    main()
