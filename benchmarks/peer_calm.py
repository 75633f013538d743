"""Time training steps and decoding, compared with CALM-pytorch, on the same x-transformers towers.

    python -m venv calm && . calm/bin/activate
    pip install -c constraints.txt -e '.[testing]' x-transformers matplotlib tqdm CALM-pytorch==0.2.2
    PYTHONPATH=examples python benchmarks/peer_calm.py

In both, every second layer of a frozen text decoder reads a frozen source of 8 layers, through taps at the
same layers; the towers have the same weights. The bare towers are the source, without autograd, and the text
decoder with a backward down to the first tap; the overhead is the time of a step beyond these.

A CALM tap is a cross-attention after a linear projection, with 8 heads of 64 channels by default; "4 heads"
gives its attention the shape of ours. Our tap also has a feed-forward and a projection of three linear
layers; "attention only" omits these.

Decoding continues a prompt of the text decoder, greedily in ours and by CALM's own sampling in CALM. CALM
runs the text decoder on all tokens in each step, ours only on the new one, because the example's tower has a
cache.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from x_transformers import Decoder, TransformerWrapper

import multitower as mt
from custom_tower import XTransformersTower
from measure import begin, interleaved, milliseconds, moved, options, plot_times, ratio, write
from models import ZIPPER

VOCABULARY = 256
OURS: dict[str, dict[str, Any]] = {
    "multitower": {},
    "multitower, attention only": {"projection": "linear", "feed_forward": False},
}
CALM_HEADS = {"CALM": 8, "CALM, 4 heads": 4}


def main() -> None:
    """Measure."""
    parser = options(__doc__, "peer_calm")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--new", type=int, default=100, help="tokens to decode")
    chosen = begin(parser)
    source, text = make_tower().to(chosen.device), make_tower().to(chosen.device)
    ours = {name: fuse(source, text, **link) for name, link in OURS.items()}
    calm = {name: make_calm(source, text, heads).to(chosen.device) for name, heads in CALM_HEADS.items()}
    prompt, row = torch.randint(2, VOCABULARY, (2, chosen.rows, chosen.length)).to(chosen.device)
    pairs = list(zip(prompt, row, strict=True))
    rows = [[mt.Segment("source", one), mt.Segment("text", two, target=True)] for one, two in pairs]
    batch = moved(mt.collate(rows), chosen.device)
    first = text.requires_grad_(False).attn_layers.layers[1][-1]
    first.register_forward_hook(lambda module, args, output: output.detach().requires_grad_())
    runs: dict[str, Callable[[], object]] = {"bare towers": partial(bare, source, text, prompt, row)}
    runs |= {name: partial(step, model, batch) for name, model in ours.items()}
    runs |= {name: partial(calm_step, peer, prompt, row) for name, peer in calm.items()}
    times = interleaved(runs, chosen.repeats, clock=chosen.clock, title="step")
    over = {
        name: [whole - part for whole, part in zip(times[name], times["bare towers"], strict=True)]
        for name in times
        if name != "bare towers"
    }
    results: list[dict[str, Any]] = [
        {
            "kind": "step",
            "ms": milliseconds(times),
            "overhead_ms": milliseconds(over),
            "overhead_of_calm": {
                f"{name} / {peer}": ratio(over[name], over[peer]) for name in ours for peer in calm
            },
            "trained_parameters": {
                **{name: trained(model.parameters()) for name, model in ours.items()},
                **{name: trained(peer.cross_attns.parameters()) for name, peer in calm.items()},
            },
        }
    ]
    print(results[-1], flush=True)
    given = [[mt.Segment("source", one), mt.Segment("text", one)] for one in prompt]
    limits = {"max_new_tokens": chosen.new, "min_new_tokens": chosen.new, "do_sample": False}
    runs = {
        **{name: partial(model.eval().generate, given, ["text"], **limits) for name, model in ours.items()},
        **{
            name: partial(peer.generate, prompt, seq_len=chosen.length + chosen.new)
            for name, peer in calm.items()
        },
    }
    times = interleaved(runs, max(2, chosen.repeats // 3), clock=chosen.clock, title="decoding")
    faster = {f"{peer} / {name}": ratio(times[peer], times[name]) for name in ours for peer in calm}
    results.append({"kind": f"{chosen.new} tokens", "ms": milliseconds(times), "times_faster": faster})
    print(results[-1], flush=True)
    write(chosen, results, ("CALM-pytorch", "x-transformers"))
    plot_times(chosen.out / "times.png", results)


def make_tower() -> TransformerWrapper:
    """Return a decoder of 8 layers of width 256."""
    layers = Decoder(dim=256, depth=8, heads=4, attn_dim_head=64, attn_flash=True, rotary_pos_emb=True)
    return TransformerWrapper(
        num_tokens=VOCABULARY, max_seq_len=1024, attn_layers=layers, use_abs_pos_emb=False
    )


def make_calm(source: nn.Module, text: nn.Module, heads: int) -> Any:
    """Compose copies of the towers with CALM-pytorch."""
    from CALM_pytorch import CALM
    from CALM_pytorch.CALM import AugmentParams

    augment = AugmentParams(model=copy.deepcopy(source), connect_every_num_layers=2)
    attention = {"linear_project_context": True, "pre_rmsnorm": True, "flash": True, "heads": heads}
    return CALM(copy.deepcopy(text), augment, attn_kwargs=attention)


def fuse(source: TransformerWrapper, text: TransformerWrapper, **link: Any) -> mt.FusedModel:
    """Link copies of the towers at the layers that CALM connects."""
    graph = mt.FusionGraph()
    graph.add_tower("source", XTransformersTower(copy.deepcopy(source)), adapter=None)
    graph.add_tower("text", XTransformersTower(copy.deepcopy(text)), adapter=None)
    graph.add_link("source", "text", taps=[(layer, layer) for layer in (1, 3, 5, 7)], **{**ZIPPER, **link})
    return graph.compile()


def step(model: mt.FusedModel, batch: mt.batch.Batch) -> None:
    """Run forward and backward."""
    loss = model(**batch, logits=False).loss
    assert loss is not None
    loss.backward()


def calm_step(model: Any, prompt: Tensor, row: Tensor) -> None:
    """Run forward and backward as CALM's own trainer does."""
    model(row, prompt=prompt).backward()


def bare(source: nn.Module, text: nn.Module, prompt: Tensor, row: Tensor) -> None:
    """Run the towers alone."""
    with torch.no_grad():
        source(prompt)
    logits = text(row[:, :-1])
    F.cross_entropy(logits.flatten(0, 1), row[:, 1:].flatten()).backward()


def trained(parameters: Iterable[nn.Parameter]) -> int:
    """Return the number of trained parameters."""
    return sum(each.numel() for each in parameters if each.requires_grad)


if __name__ == "__main__":
    main()
