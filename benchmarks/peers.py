"""Time a step of training, and decoding, beside CALM-pytorch on the same towers of x-transformers.

    python -m venv peers && . peers/bin/activate
    pip install -c constraints.txt -e '.[testing]' x-transformers matplotlib tqdm CALM-pytorch==0.2.2
    PYTHONPATH=examples python benchmarks/peers.py

Both read a frozen source of 8 layers from every second layer of a frozen text decoder, through taps at the
same layers; the towers have the same weights. The bare towers are the source, without autograd, and the text
decoder, whose backward goes down to the first tap; overhead is what a step takes beyond these. A tap of CALM
is a cross-attention, one of ours has a feed-forward and a projection of three linears as well, so what our
taps alone take is given too. Decoding goes on from a prompt of the text decoder, by greedy choice here and as
CALM samples there.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from x_transformers import Decoder, TransformerWrapper

import multitower as mt
from custom_tower import XTransformersTower
from measure import begin, interleaved, milliseconds, options, plot_times, write
from models import Parts

VOCABULARY = 256


def main() -> None:
    """Measure."""
    from CALM_pytorch import CALM

    parser = options(__doc__, "peers")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--new", type=int, default=20, help="tokens to decode")
    chosen = begin(parser)
    source, text = make_tower(), make_tower()
    ours = fuse(copy.deepcopy(source), copy.deepcopy(text))
    peer = CALM(copy.deepcopy(text), augment(copy.deepcopy(source)))
    prompt, row = torch.randint(2, VOCABULARY, (2, chosen.rows, chosen.length))
    pairs = list(zip(prompt, row, strict=True))
    batch = mt.collate(
        [[mt.Segment("source", one), mt.Segment("text", two, target=True)] for one, two in pairs]
    )
    taps = Parts(ours, batch)
    first = text.requires_grad_(False).attn_layers.layers[1][-1]
    first.register_forward_hook(lambda module, args, output: output.detach().requires_grad_())
    runs = {
        "multitower": lambda: ours(**batch, logits=False).loss.backward(),
        "CALM-pytorch": lambda: peer(row, prompt=prompt).backward(),
        "bare towers": partial(bare, source, text, prompt, row),
        "our taps": partial(taps.links, backward=True),
    }
    times = interleaved(runs, chosen.repeats, clock=chosen.clock, title="step")
    over = {
        name: [whole - part for whole, part in zip(times[name], times["bare towers"], strict=True)]
        for name in ("multitower", "CALM-pytorch")
    }
    results: list[dict[str, Any]] = [
        {"kind": "step", "ms": milliseconds(times), "overhead_ms": milliseconds(over)}
    ]
    print(results[-1], flush=True)
    given = [[mt.Segment("source", one), mt.Segment("text", one)] for one in prompt]
    limits = {"max_new_tokens": chosen.new, "min_new_tokens": chosen.new, "do_sample": False}
    runs = {
        "multitower": partial(ours.eval().generate, given, ["text"], **limits),
        "CALM-pytorch": partial(peer.generate, prompt, seq_len=chosen.length + chosen.new),
    }
    times = interleaved(runs, max(2, chosen.repeats // 3), clock=chosen.clock, title="decoding")
    results.append({"kind": f"{chosen.new} tokens", "ms": milliseconds(times)})
    print(results[-1], flush=True)
    write(chosen, results)
    plot_times(chosen.out / "times.png", results)


def make_tower() -> TransformerWrapper:
    """Give a decoder of 8 layers of width 256."""
    layers = Decoder(dim=256, depth=8, heads=4, attn_dim_head=64, attn_flash=True, rotary_pos_emb=True)
    return TransformerWrapper(
        num_tokens=VOCABULARY, max_seq_len=1024, attn_layers=layers, use_abs_pos_emb=False
    )


def augment(source: nn.Module) -> Any:
    """Say to CALM what is read and how often."""
    from CALM_pytorch.CALM import AugmentParams

    return AugmentParams(model=source, connect_every_num_layers=2)


def fuse(source: TransformerWrapper, text: TransformerWrapper) -> mt.FusedModel:
    """Link the towers at the layers that CALM connects."""
    graph = mt.FusionGraph()
    graph.add_tower("source", XTransformersTower(source), adapter=None)
    graph.add_tower("text", XTransformersTower(text), adapter=None)
    graph.add_link("source", "text", taps=[(layer, layer) for layer in (1, 3, 5, 7)])
    return graph.compile()


def bare(source: nn.Module, text: nn.Module, prompt: Tensor, row: Tensor) -> None:
    """Run the towers by themselves."""
    with torch.no_grad():
        source(prompt)
    logits = text(row[:, :-1])
    F.cross_entropy(logits.flatten(0, 1), row[:, 1:].flatten()).backward()


if __name__ == "__main__":
    main()
