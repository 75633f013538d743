"""Time training steps and decoding, compared with the same fusion by forward hooks (hook_version.py).

    python benchmarks/peer_hooks.py                     # tiny towers, a minute or two
    python benchmarks/peer_hooks.py --size smollm2      # towers of the shape of SmolLM2-135M

Both have the same frozen towers and tap weights; losses, gradients of all taps and greedily decoded tokens
are compared before timing. A step is a forward and a backward. Decoding includes the source, and generates
--new tokens after a prompt of one token. The hooks compute the source's keys and values in every decoding
step. "hooks" calls the models in the usual way; "careful hooks" skips the source's head and unneeded masks.
Rows of a step have equal lengths, without masks, or are "ragged", with segments of half that length and more.
"kept states" reads the source's states from disk (``train.KeptStates``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import multitower as mt
from hook_version import Hooked
from measure import begin, interleaved, milliseconds, moved, options, plot_times, ratio, write
from models import INTERLEAVE, SIZES, ZIPPER, make_tower
from multitower.testing import open_links

HOOKED = {"hooks": False, "careful hooks": True}


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
    source, target = (make_tower(chosen.size, seed).to(chosen.device) for seed in (0, 1))
    ours = fuse(source, target, taps)
    hooked = {
        name: by_hooks(ours, copy.deepcopy(source), copy.deepcopy(target), taps, careful=careful)
        for name, careful in HOOKED.items()
    }
    size = SIZES[chosen.size]["vocab_size"]
    lengths = torch.randint(chosen.length // 2, chosen.length + 1, (2, chosen.rows))
    full = moved(rows_of(torch.full((2, chosen.rows), chosen.length), size), chosen.device)
    ragged = moved(rows_of(lengths, size), chosen.device)
    long = torch.randint(3, size, (1, chosen.source)).to(chosen.device)
    prompt = torch.ones(1, 1, dtype=torch.long, device=chosen.device)
    limits = {"max_new_tokens": chosen.new, "min_new_tokens": chosen.new, "do_sample": False}
    few = {**limits, "max_new_tokens": 8, "min_new_tokens": 8}
    for each in hooked.values():
        for rows in (full, ragged):
            compare(ours, each, rows)
        assert decode(ours, long, **few) == decode_hooked(each, long, prompt, **few)
    print("losses, gradients and decoded tokens are the same", flush=True)
    kept = mt.train.KeptStates.compute(ours, [full.batch, ragged.batch], chosen.out / "states")
    kinds: dict[str, dict[str, Callable[[], object]]] = {}
    for kind, rows in ((f"{chosen.rows} x {chosen.length}", full), ("ragged", ragged)):
        kinds[f"step, {kind}"] = {
            "multitower": partial(step, ours, rows),
            "multitower, kept states": partial(step, ours, rows, kept),
        }
        kinds[f"step, {kind}"] |= {name: partial(step_hooked, each, rows) for name, each in hooked.items()}
    decoding = f"{chosen.new} tokens after {chosen.source}"
    kinds[decoding] = {"multitower": partial(decode, ours, long, **limits)}
    kinds[decoding] |= {
        name: partial(decode_hooked, each, long, prompt, **limits) for name, each in hooked.items()
    }
    results: list[dict[str, Any]] = []
    for kind, runs in kinds.items():
        times = interleaved(runs, chosen.repeats, clock=chosen.clock, title=kind)
        faster = {
            f"{name} / {own}": ratio(times[name], times[own])
            for name in hooked
            for own in times
            if own not in hooked
        }
        results.append({"kind": kind, "ms": milliseconds(times), "times_faster": faster})
        print(results[-1], flush=True)
        write(chosen, results)
    plot_times(chosen.out / "times.png", results)


def fuse(source: Any, target: Any, taps: Sequence[tuple[int, int]]) -> mt.FusedModel:
    """Link two frozen towers with open gates."""
    graph = mt.FusionGraph()
    graph.add_tower("source", source, adapter=None)
    graph.add_tower("text", target, adapter=None)
    graph.add_link("source", "text", taps=taps, **ZIPPER)
    return open_links(graph.compile())


def by_hooks(
    model: mt.FusedModel, source: Any, target: Any, taps: Sequence[tuple[int, int]], *, careful: bool
) -> Hooked:
    """Join the towers by hooks, with the weights of the model's taps."""
    modules = [model.tap(tap) for tap in sorted(model.schedule.taps, key=lambda tap: tap.target_layer)]
    hooked = Hooked(source, target, taps, heads=modules[0].heads, careful=careful)
    for own, module in zip(hooked.taps, modules, strict=True):
        own.load_state_dict(module.state_dict())
    return hooked.to(source.device)


class Rows(NamedTuple):
    """The inputs of a step: a batch of ours, and arguments of the hook version."""

    batch: mt.batch.Batch
    hooked: dict[str, Tensor]


def rows_of(lengths: Tensor, vocabulary: int) -> Rows:
    """Draw random rows of a source segment and a text segment.

    Args:
        lengths: Lengths of source and text in each row, shape (2, rows).
        vocabulary: Vocabulary size of the towers.
    """
    parts = [[torch.randint(3, vocabulary, (int(length),)) for length in each] for each in lengths]
    batch = mt.collate(
        [
            [mt.Segment("source", one), mt.Segment("text", two, target=True)]
            for one, two in zip(*parts, strict=True)
        ]
    )
    given, tokens = (pad_sequence(each, batch_first=True) for each in parts)
    labels = pad_sequence(parts[1], batch_first=True, padding_value=-100)
    hooked = {"source": given, "tokens": tokens, "labels": labels}
    if len(lengths.unique()) > 1:
        hooked["source_mask"] = torch.arange(given.shape[1]) < lengths[0, :, None]
    return Rows(batch, hooked)


def compare(model: mt.FusedModel, hooked: Hooked, rows: Rows) -> None:
    """Check that both give the same loss and the same gradients of all trained parameters."""
    loss, expected = model(**rows.batch, logits=False).loss, hooked(**rows.hooked)
    assert loss is not None
    torch.testing.assert_close(loss, expected)
    modules = [model.tap(tap) for tap in sorted(model.schedule.taps, key=lambda tap: tap.target_layer)]
    for module, own in zip(modules, hooked.taps, strict=True):
        names = [name for name, _ in module.named_parameters()]
        assert set(names) == {name for name, _ in own.named_parameters()}
        found, others = (
            torch.autograd.grad(value, [part.get_parameter(name) for name in names], retain_graph=True)
            for value, part in ((loss, module), (expected, own))
        )
        for one, other in zip(found, others, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()) + 1e-7)


def step(model: mt.FusedModel, rows: Rows, kept: mt.train.KeptStates | None = None) -> None:
    """Run forward and backward, with the source's cached states if given."""
    batch = rows.batch if kept is None else kept(rows.batch)
    loss = model(**batch, logits=False).loss
    assert loss is not None
    loss.backward()


def step_hooked(hooked: Hooked, rows: Rows) -> None:
    """Run forward and backward of the hook version."""
    hooked(**rows.hooked).backward()


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
