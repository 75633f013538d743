"""Time training steps and decoding, compared with torchtune's DeepFusionModel, on the same towers.

    python -m venv tune && . tune/bin/activate
    pip install -c constraints.txt -e '.[testing]' matplotlib tqdm torchtune==0.6.1
    pip install torchao==0.13.0
    python benchmarks/peer_torchtune.py                     # tiny towers, a minute or two
    python benchmarks/peer_torchtune.py --size smollm2      # towers of the shape of SmolLM2-135M

torchtune 0.6.1, its last release, cannot be imported with the torchao of constraints.txt: 0.18 has no
torchao.dtypes.nf4tensor.

DeepFusionModel has one encoder, whose output all fusion layers read. Here it is a frozen decoder without its
head; our taps all read its last layer. The towers are Llamas, from transformers in ours and torchtune's own
in the other, with the same weights: the logits of both fusions with closed gates are compared before timing.
Fusion layers are after the same layers as our taps. They have queries, keys, values, output and a gated
feed-forward of three matrices, with a width that gives it as many parameters as our two. Neither projects the
source. Only these parameters are trained. torchtune's generation loop does not support an encoder, so
decoding is a loop of our own over its model with its caches. Both decode greedily, without an end token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import multitower as mt
from measure import begin, interleaved, milliseconds, moved, options, plot_times, ratio, write
from models import INTERLEAVE, SIZES, make_tower
from multitower.link.cross_attention import default_heads

PACKAGES = ("torchtune", "torchao")


def main() -> None:
    """Compare, then measure."""
    parser = options(__doc__, "peer_torchtune")
    parser.add_argument("--size", choices=tuple(SIZES), default="tiny")
    parser.add_argument("--rows", type=int, default=4, help="of a step")
    parser.add_argument("--length", type=int, default=128, help="tokens of each tower in a step")
    parser.add_argument("--source", type=int, default=500, help="tokens of the source that is decoded from")
    parser.add_argument("--new", type=int, default=100, help="tokens to decode")
    chosen = begin(parser)
    depth, every = SIZES[chosen.size]["num_hidden_layers"], INTERLEAVE[chosen.size]
    layers = range(every, depth + 1, every)
    source, text = (make_tower(chosen.size, seed).to(chosen.device) for seed in (0, 1))
    ours, peer = fuse(source, text, layers), Peer(source, text, layers)
    size = SIZES[chosen.size]["vocab_size"]
    given, tokens = torch.randint(3, size, (2, chosen.rows, chosen.length)).to(chosen.device)
    pairs = zip(given, tokens, strict=True)
    rows = [[mt.Segment("source", one), mt.Segment("text", two, target=True)] for one, two in pairs]
    batch = moved(mt.collate(rows), chosen.device)
    with torch.no_grad():
        torch.testing.assert_close(
            peer.model(tokens, encoder_input={"tokens": given}),
            ours(**batch).logits["text"],
            rtol=1e-3,
            atol=1e-3,
        )
    long = torch.randint(3, size, (1, chosen.source)).to(chosen.device)
    kinds: dict[str, dict[str, Callable[[], object]]] = {
        f"step, {chosen.rows} rows of {chosen.length}": {
            "multitower": partial(step, ours, batch),
            "torchtune": partial(peer.step, given, tokens),
            "transformers, bare": partial(bare, source, cut_below(copy.deepcopy(text), every), given, tokens),
            "torchtune, bare": partial(peer.bare, given, tokens),
        },
        f"{chosen.new} tokens after {chosen.source}": {
            "multitower": partial(decode, ours.eval(), long, chosen.new),
            "torchtune": partial(peer.decode, long, chosen.new),
        },
    }
    parameters = {"multitower": trained(ours), "torchtune": trained(peer.model)}
    results: list[dict[str, Any]] = []
    for kind, runs in kinds.items():
        times = interleaved(runs, chosen.repeats, clock=chosen.clock, title=kind)
        faster = ratio(times["torchtune"], times["multitower"])
        results.append({"kind": kind, "ms": milliseconds(times), "times_faster": faster})
        print(results[-1], flush=True)
        write(chosen, [*results, {"kind": "trained parameters", **parameters}], PACKAGES)
    plot_times(chosen.out / "times.png", results)


def fuse(source: Any, text: Any, layers: Sequence[int]) -> mt.FusedModel:
    """Link the last layer of the source to some layers of the text."""
    graph = mt.FusionGraph()
    graph.add_tower("source", source, adapter=None)
    graph.add_tower("text", text, adapter=None)
    last = source.config.num_hidden_layers
    graph.add_link(
        "source",
        "text",
        taps=[(last, layer) for layer in layers],
        gate="tanh",
        feed_forward=True,
        position=None,
        relative=False,
    )
    return graph.compile()


class Encoder(nn.Module):
    """A torchtune decoder without its head."""

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the state after the last layer, shape (batch, length, width)."""
        state: Tensor = self.decoder.tok_embeddings(tokens)
        for layer in self.decoder.layers:
            state = layer(state)
        return state


class Peer:
    """torchtune's fusion of copies of two towers."""

    def __init__(self, source: Any, text: Any, layers: Sequence[int]) -> None:
        from torchtune.modules.model_fusion import DeepFusionModel, FusionLayer

        decoder, alone = as_torchtune(text), as_torchtune(text)
        for layer in layers:
            own = decoder.layers[layer - 1]
            fusion = cross_attention(text.config)
            decoder.layers[layer - 1] = FusionLayer(layer=own, fusion_layer=fusion, fusion_first=False)
        self.model: Any = DeepFusionModel(decoder, Encoder(as_torchtune(source))).to(text.device)
        self.alone = alone.to(text.device).requires_grad_(False)
        first = self.alone.layers[layers[0] - 1]
        first.register_forward_hook(lambda module, args, output: output.detach().requires_grad_())

    def step(self, given: Tensor, tokens: Tensor) -> None:
        """Run forward and backward."""
        loss_of(self.model(tokens, encoder_input={"tokens": given}), tokens).backward()

    def bare(self, given: Tensor, tokens: Tensor) -> None:
        """Run the towers alone."""
        self.model.encoder(given)
        loss_of(self.alone(tokens), tokens).backward()

    @torch.no_grad()
    def decode(self, given: Tensor, new: int) -> Tensor:
        """Decode greedily with torchtune's caches."""
        from torchtune.modules.common_utils import local_kv_cache

        with local_kv_cache(
            self.model,
            batch_size=1,
            device=given.device,
            dtype=torch.float32,
            encoder_max_seq_len=given.shape[1],
            decoder_max_seq_len=new,
        ):
            tokens = torch.ones_like(given[:, :1])
            causal = torch.ones(new, new, dtype=torch.bool, device=given.device).tril()
            sees = torch.ones_like(given[:, None], dtype=torch.bool)
            places = torch.arange(new, device=given.device)
            source: dict[str, Any] = {"encoder_input": {"tokens": given}}
            for place in range(new):
                logits = self.model(
                    tokens[:, -1:],
                    mask=causal[None, place, None],
                    encoder_mask=sees,
                    input_pos=places[place, None],
                    **source,
                )
                source = {}
                tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
        return tokens


def as_torchtune(model: Any) -> Any:
    """Convert a transformers Llama to torchtune's decoder, with the same weights."""
    from torchtune.models.convert_weights import hf_to_tune
    from torchtune.models.llama2._component_builders import llama2_mlp
    from torchtune.modules import (
        MultiHeadAttention,
        RMSNorm,
        RotaryPositionalEmbeddings,
        TiedLinear,
        TransformerDecoder,
        TransformerSelfAttentionLayer,
    )

    config = model.config
    width, heads, groups = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    head_width, length = width // heads, 1024
    rotary = RotaryPositionalEmbeddings(
        head_width, max_seq_len=length, base=config.rope_parameters["rope_theta"]
    )
    layers = nn.ModuleList(
        TransformerSelfAttentionLayer(
            attn=MultiHeadAttention(
                embed_dim=width,
                num_heads=heads,
                num_kv_heads=groups,
                head_dim=head_width,
                **projections(width, groups * head_width),
                pos_embeddings=rotary,
                max_seq_len=length,
            ),
            mlp=llama2_mlp(width, config.intermediate_size),
            sa_norm=RMSNorm(width, eps=config.rms_norm_eps),
            mlp_norm=RMSNorm(width, eps=config.rms_norm_eps),
        )
        for _ in range(config.num_hidden_layers)
    )
    embeddings = nn.Embedding(config.vocab_size, width)
    decoder = TransformerDecoder(
        tok_embeddings=embeddings,
        layers=layers,
        max_seq_len=length,
        num_heads=heads,
        head_dim=head_width,
        norm=RMSNorm(width, eps=config.rms_norm_eps),
        output=TiedLinear(embeddings),
    )
    weights = {key: value for key, value in model.state_dict().items() if key != "lm_head.weight"}
    decoder.load_state_dict(hf_to_tune(weights, heads, groups, width))
    return decoder.eval()


def cross_attention(config: Any) -> nn.Module:
    """Return a gated cross-attention with a gated feed-forward, with as many heads as our tap."""
    from torchtune.models.llama2._component_builders import llama2_mlp
    from torchtune.modules import (
        MultiHeadAttention,
        RMSNorm,
        TanhGate,
        TransformerCrossAttentionLayer,
    )

    width = config.hidden_size
    heads = default_heads(width)
    return TransformerCrossAttentionLayer(
        attn=MultiHeadAttention(
            embed_dim=width,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=width // heads,
            **projections(width, width),
            is_causal=False,
        ),
        mlp=llama2_mlp(width, 8 * width // 3),
        ca_norm=RMSNorm(width),
        mlp_norm=RMSNorm(width),
        ca_scale=TanhGate(),
        mlp_scale=TanhGate(),
    )


def projections(width: int, narrow: int) -> dict[str, nn.Module]:
    """Return the four projections of an attention."""
    outputs = {"q_proj": width, "k_proj": narrow, "v_proj": narrow, "output_proj": width}
    return {name: nn.Linear(width, output, bias=False) for name, output in outputs.items()}


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the mean next-token cross-entropy."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def step(model: mt.FusedModel, batch: mt.batch.Batch) -> None:
    """Run forward and backward."""
    loss = model(**batch, logits=False).loss
    assert loss is not None
    loss.backward()


def cut_below(text: Any, layer: int) -> Any:
    """Make a frozen tower's backward end at the first layer with a tap, as in a fusion."""
    text.requires_grad_(False).model.layers[layer - 1].register_forward_hook(
        lambda module, args, output: output.detach().requires_grad_()
    )
    return text


def bare(source: Any, text: Any, given: Tensor, tokens: Tensor) -> None:
    """Run the towers alone."""
    with torch.no_grad():
        source.model(input_ids=given, use_cache=False)
    text(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()


def decode(model: mt.FusedModel, given: Tensor, new: int) -> Tensor:
    """Decode after one source."""
    limits = {"max_new_tokens": new, "eos_token_id": None, "do_sample": False}
    ((segment,),) = model.generate([[mt.Segment("source", given[0])]], ["text"], **limits)
    return torch.as_tensor(segment.tokens)


def trained(model: nn.Module) -> int:
    """Return the number of trained parameters."""
    return sum(each.numel() for each in model.parameters() if each.requires_grad)


if __name__ == "__main__":
    main()
