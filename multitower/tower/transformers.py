"""A tower made from any transformers causal LM, without a table of architectures."""

from __future__ import annotations

import functools
import inspect
import warnings
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..errors import TowerError
from .abilities import count_positions, tells_examples_apart, why_not_faithful, why_not_resumed
from .base import Tower
from .decode_transformers import make_decoder
from .peft_tower import base_model
from .probe import (
    LENGTH,
    Layers,
    Proof,
    check_causal,
    evaluated,
    forward_options,
    last_position,
    logits_of,
    plain_layers,
    probe,
    probe_tokens,
    vocabulary,
)
from .shell import (
    Context,
    Inject,
    LayersReached,
    Script,
    Shell,
    StandIn,
    Unexpected,
    as_tuple,
    make_shell,
    play,
    resolve,
    stand_in,
)
from .weights import execution_device


class TransformersTower(Tower):
    """A causal LM from transformers, run layer by layer.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
    ...                      num_attention_heads=2, bos_token_id=1, eos_token_id=2)
    >>> model = LlamaForCausalLM(config).eval()
    >>> tower = TransformersTower(model)
    >>> tower.depth, tower.width, tower.vocab_size
    (2, 16, 50)
    >>> tokens = torch.tensor([[1, 7, 9]])
    >>> torch.equal(tower(tokens), model(tokens, use_cache=False).logits)
    True

    The layers are found by running the model once on a few tokens. A second run checks that the
    layer-by-layer logits equal the model's own.

    Args:
        model: The model. It is used as it is, not copied, and still works alone. Its embeddings, norm and
            head may be resized or replaced later; quantisation and changes to the number of layers must come
            first. Of a ``peft.PeftModel``, the model inside runs, including adapters, and ``native`` is the
            PeftModel.
        layers: Path of the ``ModuleList`` of layers, as in "model.layers", if there are several candidates.
        proof: The ``proof`` of a tower of the same model, to skip the two runs.

    Raises:
        TowerError: No list of layers is found, the layers do not run once each in order, the layer-by-layer
            logits differ from the model's own, or the model is not causal.
    """

    def __init__(self, model: nn.Module, *, layers: str | None = None, proof: Proof | None = None) -> None:
        super().__init__()
        # Native model and shell are not registered as submodules: they share the model's parameters.
        self._native = _Unregistered(model)
        self.model = base_model(model)
        self._layers: Layers
        with _without_values(self.model):
            if proof is None:
                self._layers, logits = probe(self.model, layers)
            else:
                self._layers = plain_layers(self.model, proof.path, proof.width)
            self.path = self._layers.path
            self.depth = len(self._layers.order)
            self._shell = _Unregistered(self._make_shell())
            self._heads_masked = False
            self._packs: dict[Any, bool] = {}
            if proof is None:
                self.width, scored = self._prove(logits)
                self._scored_beyond = scored - vocabulary(self.model)
                self.hard_limit = count_positions(self)
            else:
                _, self.width, self._scored_beyond, self._heads_masked, self.hard_limit = proof
        self._heads_at = "logits_to_keep" in inspect.signature(type(self.model).forward).parameters

    @property
    def proof(self) -> Proof | None:
        """The results of the checks; None if some layers do not run, or states have other axes."""
        if self._layers != plain_layers(self.model, self.path, self.width):
            return None
        return Proof(self.path, self.width, self._scored_beyond, self._heads_masked, self.hard_limit)

    def train(self, mode: bool = True) -> TransformersTower:
        """Set training mode."""
        super().train(mode)
        self._shell.it.follow()
        return self

    @property
    def device(self) -> torch.device:
        """Device of the model's input."""
        return execution_device(self.model)

    @property
    def begin(self) -> int | None:  # type: ignore[override]  # read from the model, which may change it
        """The model's ``bos_token_id``."""
        return next(iter(_token_ids(self.model, "bos_token_id")), None)

    @property
    def end(self) -> tuple[int, ...]:  # type: ignore[override]  # read from the model, which may change it
        """The model's ``eos_token_id``, one or several."""
        return _token_ids(self.model, "eos_token_id")

    @property
    def max_length(self) -> int | None:  # type: ignore[override]  # read from the model
        """The model's ``max_position_embeddings``, or ``hard_limit`` if that is smaller."""
        limits = [last_position(self.model), self.hard_limit]
        return min((each for each in limits if each is not None), default=None)

    @property
    def vocab_size(self) -> int:  # type: ignore[override]  # read from the model, which may be resized
        """Number of token ids that the head scores."""
        return vocabulary(self.model) + self._scored_beyond

    @property
    def native(self) -> nn.Module:
        """The transformers model itself, or the PeftModel around it."""
        native: nn.Module = self._native.it
        return native

    def embed(self, tokens: Tensor, *, positions: Tensor | None = None) -> tuple[Tensor, Context]:
        """Run the model up to layer 1; see ``Tower.embed``."""
        options: dict[str, Any] = {**forward_options(self.model)}
        if positions is not None:
            options["position_ids"] = positions
        return self._embed(tokens, options, options)

    def resume(self, tokens: Tensor, cache: Any, mask: Tensor | None = None) -> tuple[Tensor, Context]:
        """See ``Tower.resume``; the model's own forward makes the masks."""
        options: dict[str, Any] = {**forward_options(self.model)}
        inputs = {**options, "use_cache": True, "past_key_values": cache}
        if mask is not None:
            inputs["attention_mask"] = mask.long()
            if "position_ids" in inspect.signature(type(self.model).forward).parameters:
                places = (mask.long().cumsum(1) - 1).clamp(min=0)
                now = torch.arange(tokens.shape[1], device=mask.device) + cache.get_seq_length()
                inputs["position_ids"] = places.index_select(1, now)
        return self._embed(tokens, inputs, options)

    def _embed(
        self, tokens: Tensor, inputs: dict[str, Any], options: dict[str, Any]
    ) -> tuple[Tensor, Context]:
        """Run the model with ``inputs`` up to its layers; its head will be run with ``options``."""
        script, shell = Script(), self._shell.it
        shell.follow()
        if any(twin.training and getattr(twin, "layerdrop", 0) for twin, *_ in shell.copies):
            raise TowerError(
                f"{type(self.model).__name__} drops layers at random in training, but links need the state "
                "after each; load it with layerdrop=0 (in BART decoder_layerdrop=0), or keep it frozen"
            )
        with suppress(LayersReached):
            play(shell, script, {"input_ids": tokens, **inputs})
        calls = tuple(script.calls)
        if len(calls) != self.depth:
            raise TowerError(
                f"{type(self.model).__name__}: its forward reached {len(calls)} of its {self.depth} layers. "
                "Was a forward of the model replaced after it was made, or does it skip layers in training?"
            )
        stack = list(self._stack)
        layers = tuple(stack[place] for place in self._layers.order)
        return self._layers.layout.to_tower(calls[0].hidden), Context(tokens, options, layers, calls, {})

    def layer(self, index: int, hidden: Tensor, context: Context) -> Tensor:
        """Run layer ``index``, counted from 1, with the arguments that the model would pass to it."""
        call, layout = context.calls[index - 1], self._layers.layout
        args, kwargs = call.args, call.kwargs
        if context.carried:
            args = tuple(resolve(value, context) for value in args)
            kwargs = {key: resolve(value, context) for key, value in kwargs.items()}
        output = context.layers[index - 1](layout.to_model(hidden), *args, **kwargs)
        if self._layers.extras[index - 1]:
            context.carried[index] = as_tuple(output)[1:]
        return layout.to_tower(as_tuple(output)[0])

    def head(self, hidden: Tensor, context: Context) -> Tensor:
        """Run what follows the last layer in the model: norm, head, scaling, caps."""
        return self._finish(hidden, context, {})

    def head_at(self, hidden: Tensor, context: Context, places: Tensor) -> Tensor:
        """Return the logits of some tokens, skipping the others if the model can; see ``Tower.head_at``."""
        if not self._heads_at:
            return super().head_at(hidden, context, places)
        return self._finish(hidden, context, {"logits_to_keep": places})

    def _finish(self, hidden: Tensor, context: Context, options: dict[str, Any]) -> Tensor:
        options = {**context.options, **options}
        if self._heads_masked:
            options["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=hidden.device)
        final = self._layers.layout.to_model(hidden)
        script = Script((final, *context.carried.get(self.depth, ())))
        return logits_of(play(self._shell.it, script, {"input_ids": context.tokens, **options}))

    def decoder(self, inject: Inject) -> Any:
        """Return a copy of the model, sharing its parameters, that calls ``inject`` after each layer.

        If the model's ``generate`` does not match its forward, each step runs the whole sequence instead, and
        a warning says why.
        """
        if not hasattr(self.model, "generate"):
            raise TowerError(f"{type(self.model).__name__} cannot decode: it has no generate")
        if not self.decodes_cached:
            warnings.warn(
                f"{type(self.model).__name__} decodes without its cache, which is slower: its own generate "
                f"does not give what its forward gives ({self._unfaithful})",
                stacklevel=2,
            )
            return super().decoder(inject)
        return make_decoder(self.model, self._layers, inject)

    @property
    def decodes_cached(self) -> bool:
        """Whether ``decoder`` uses the model's own cache; tested once."""
        return not self._unfaithful

    @functools.cached_property
    def pads_left(self) -> bool:  # needed only for rows of different lengths
        """Whether rows with left padding decode as they do alone; tested once."""
        return not self.decodes_cached or not why_not_faithful(self.model, length=LENGTH, padding=LENGTH - 1)

    @property
    def resumes(self) -> bool:
        """Whether the model can continue from the keys and values of an earlier call; tested once."""
        return self.decodes_cached and not self._unresumed

    @functools.cached_property
    def _unresumed(self) -> str:  # needed only for keeping caches
        paddings = (0, LENGTH - 3) if self.pads_left else (0,)
        return next(filter(None, (why_not_resumed(self, padding=each) for each in paddings)), "")

    @property
    def packs(self) -> bool:  # type: ignore[override]  # tested only if a batch is packed
        """Whether packed examples give the same logits as alone; tested once per attention implementation."""
        attention = getattr(self.model.config, "_attn_implementation", None)
        if attention not in self._packs:
            self._packs[attention] = tells_examples_apart(self)
        return self._packs[attention]

    @functools.cached_property
    def _unfaithful(self) -> str:
        lengths = (LENGTH, 1)
        return next(filter(None, (why_not_faithful(self.model, length=each) for each in lengths)), "")

    @property
    def _stack(self) -> nn.ModuleList:
        stack = self.model.get_submodule(self.path)
        assert isinstance(stack, nn.ModuleList)
        return stack

    def _make_shell(self) -> Shell:
        found = self._layers
        layers = [stand_in(layer, Unexpected(place + 1)) for place, layer in enumerate(self._stack)]
        for index, place in enumerate(found.order, 1):
            layers[place].forward = StandIn(
                index, index == self.depth, found.extras[index - 1], found.keyword
            )
        return make_shell(self.model, found.path, layers)

    @torch.no_grad()
    def _prove(self, native: Tensor) -> tuple[int, int]:
        """Compare layer-by-layer logits with the model's own; return the width and the vocabulary size."""
        name = type(self.model).__name__
        with evaluated(self.model):
            hidden, context = self.embed(probe_tokens(self.model))
            width = hidden.shape[-1]
            hidden = self.run_layers(hidden, context)
            logits = self.head(hidden, context)
            self._heads_masked = self._can_head_masked(hidden, context, logits)
            if self.native is not self.model:
                native = logits_of(self.native(input_ids=context.tokens, use_cache=False))
        if native.device.type != "meta":
            if not torch.equal(native, logits):
                worst = (native.float() - logits.float()).abs().max().item()
                raise TowerError(
                    f"{name} run layer by layer gives other logits than its own forward (largest difference "
                    f"{worst:.2g}); write a small multitower.Tower for it"
                )
            check_causal(name, native)
        return width, logits.shape[-1]

    def _can_head_masked(self, hidden: Tensor, context: Context, logits: Tensor) -> bool:
        """Whether norm and head give the same results if the model gets a mask.

        Without one, transformers synchronises with the device, to see whether rows are packed. A mask of four
        dimensions is used as it is.
        """
        self._heads_masked = True
        try:
            with warnings.catch_warnings(action="error"):
                return torch.equal(self.head(hidden, context), logits)
        except Exception:  # the model does not accept such a mask
            return False


class _Unregistered(NamedTuple):
    it: Any


def _without_values(model: nn.Module) -> AbstractContextManager[Any]:
    """Let a model on the meta device run even if its forward needs values."""
    on_meta = execution_device(model).type == "meta"
    return FakeTensorMode(allow_non_fake_inputs=True) if on_meta else nullcontext()


def _token_ids(model: nn.Module, key: str) -> tuple[int, ...]:
    """Return token ids from the generation config, else from the config; empty if there are none."""
    config: Any = model.config
    for each in (getattr(model, "generation_config", None), config, config.get_text_config(decoder=True)):
        value = getattr(each, key, None)
        if value is not None:
            return tuple(value) if isinstance(value, list | tuple) else (int(value),)
    return ()
