"""The whole model: embedding, L blocks of attention and experts, tied head (arXiv 2605.05365).

    x = (Emb[ids] + b_in) * a_in                                             fp32 from here on
    x = merge(attention(RMSNorm(x)), x);  x = merge(experts(RMSNorm(x)), x)  L times, see layers.py for merge
    logits = Emb RMSNorm(x)

Parameter names are those of the released native checkpoints. The model is single-device code: nothing here
knows of processes or shards. Inside, a batch is one row of N = B*T tokens (layout.py).

Shape suffixes: B rows, T tokens a row, N = B*T, D hidden, V vocabulary, L layers, E experts, X = E + 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openzaya.errors import DataError
from openzaya.model.attention import Attention
from openzaya.model.cache import DecodeCache, LayerCache
from openzaya.model.config import ZayaConfig
from openzaya.model.experts import Experts
from openzaya.model.layers import RESIDUALS, Linear, RMSNorm, at_least_float, embed, rotary_tables
from openzaya.model.layout import TokenLayout, make_layout
from openzaya.model.paged import PagedLayer
from openzaya.model.quantised import QuantisedMatrix, QuantScheme, prepare_quantised
from openzaya.model.router import ROUTERS, Route, Router


@dataclass
class ForwardRecord:
    """What a forward pass leaves behind for the caller who passes one in: one entry a layer."""

    measure_residual: bool = False
    routes: list[Route] = field(default_factory=list)
    residual_rms: list[Tensor] = field(default_factory=list)
    """Root mean square of the residual stream behind each layer, where asked for; without gradient."""

    def experts_NL(self) -> Tensor:
        """Chosen classes, uint8 (N, L); E is the skip class."""
        return torch.stack([route.choice_N for route in self.routes], dim=1).to(torch.uint8)


class SparseBlock(nn.Module):
    """Router and experts; named as in the checkpoints (``mlp.gate``, ``mlp.experts``)."""

    def __init__(self, config: ZayaConfig, layer_index: int):
        super().__init__()
        self.gate = ROUTERS[config.router](config, layer_index)
        self.experts = Experts(config)


class Block(nn.Module):
    """One layer: attention, then experts, each merged into the residual stream."""

    def __init__(self, config: ZayaConfig, layer_index: int):
        super().__init__()
        residual = RESIDUALS[config.residual]
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer_index)
        self.post_attention_residual_scale = residual(config.hidden_size)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SparseBlock(config, layer_index)
        self.post_mlp_residual_scale = residual(config.hidden_size)

    def forward(
        self,
        x_ND: Tensor,
        router_state_NR: Tensor | None,
        layout: TokenLayout,
        rotary: tuple[Tensor, Tensor],
        cache: LayerCache | PagedLayer | None,
        forced_N: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Route]:
        attended_ND = self.self_attn(self.input_layernorm(x_ND), layout, rotary, cache)
        x_ND = self.post_attention_residual_scale(attended_ND, x_ND)
        hidden_ND = self.post_attention_layernorm(x_ND)
        route, router_state_NR = self.mlp.gate(hidden_ND, router_state_NR, forced_N)
        x_ND = self.post_mlp_residual_scale(self.mlp.experts(hidden_ND, route), x_ND)
        return x_ND, router_state_NR, route


class Backbone(nn.Module):
    """Everything but the head; named ``model`` in the checkpoints."""

    def __init__(self, config: ZayaConfig):
        super().__init__()
        self.embed_tokens = Linear(config.hidden_size, config.vocab_size)
        """A row a token; the same matrix is the head."""
        self.input_hidden_states_scale = nn.Parameter(torch.ones(config.hidden_size))
        self.input_hidden_states_bias = nn.Parameter(torch.zeros(config.hidden_size))
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Zaya(nn.Module):
    """A ZAYA language model with freshly initialised weights.

    Args:
        config: the shape.
        seed: of the generator that draws the weights; the same seed gives the same model.

    Under ``torch.device("meta")`` nothing is drawn.
    """

    def __init__(self, config: ZayaConfig, *, seed: int = 0):
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.quantisation: QuantScheme | None = None
        """Set by ``quantise_model``: which matrices are quantised, and how."""
        self.lm_head: QuantisedMatrix | None = None
        """The head where it is quantised; the embedding stays in float."""
        self.initialize(seed)

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Matrices and convolutions from N(0, initializer_range), biases 0; scales and temperatures start at 1."""
        if self.device.type == "meta":
            return
        generator = torch.Generator(self.device).manual_seed(seed)
        starts_at_one = ("norm.weight", "_scale", "layernorm.weight", "temp")
        for name, parameter in self.named_parameters():
            if name.endswith(starts_at_one):
                parameter.fill_(1)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.normal_(std=self.config.initializer_range, generator=generator)
        for module in self.modules():
            if isinstance(module, Router):
                module.reset_balancing_biases()

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype

    @property
    def head_weight(self) -> Tensor:
        """The LM head (V, D) in float: the embedding itself; :meth:`logits` also knows quantised heads."""
        return self.model.embed_tokens.weight

    def with_config(self, config: ZayaConfig) -> Zaya:
        """This model under a configuration of the same shapes (another RoPE base, say); weights are shared."""
        with torch.device("meta"):
            other = Zaya(config)
            if self.quantisation is not None:
                prepare_quantised(other, self.quantisation)
        other.load_state_dict(self.state_dict(keep_vars=True), assign=True)
        return other

    def set_experts_implementation(self, implementation: str) -> None:
        """``grouped`` (default) or ``loop``, its plain twin."""
        for module in self.modules():
            if isinstance(module, Experts):
                module.implementation = implementation

    def make_cache(self, batch_size: int, capacity: int) -> DecodeCache:
        """An empty decoding state for rows of up to ``capacity`` tokens."""
        return DecodeCache(self.config, batch_size, capacity, device=self.device, dtype=self.dtype)

    def forward(
        self,
        tokens: Tensor,
        *,
        document_ids: Tensor | None = None,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: DecodeCache | None = None,
        forced_experts: Tensor | None = None,
        record: ForwardRecord | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits (B, T, V) in fp32 for int64 tokens (B, T); with ``last_only`` (B, 1, V) of each row's last token.

        The keyword arguments are those of :meth:`hidden_states`.
        """
        hidden_BTD = self.hidden_states(
            tokens,
            document_ids=document_ids,
            positions=positions,
            attention_mask=attention_mask,
            cache=cache,
            forced_experts=forced_experts,
            record=record,
        )
        if last_only:
            hidden_BTD = hidden_BTD[:, -1:]
        return self.logits(hidden_BTD)

    def logits(self, hidden: Tensor) -> Tensor:
        """The head: logits (..., V) in fp32 of normed hidden states (..., D)."""
        if self.lm_head is not None:
            return at_least_float(self.lm_head(at_least_float(hidden)))
        return F.linear(at_least_float(hidden), at_least_float(self.head_weight))

    def hidden_states(
        self,
        tokens: Tensor,
        *,
        document_ids: Tensor | None = None,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: DecodeCache | None = None,
        forced_experts: Tensor | None = None,
        record: ForwardRecord | None = None,
    ) -> Tensor:
        """The normed hidden states (B, T, D) that the head turns into logits.

        Args:
            tokens: int64 (B, T).
            document_ids: int (B, T) of packed windows: tokens see only their own document.
            positions: int (B, T) RoPE positions; by default the index in the document, or behind the cache.
            attention_mask: bool or 0/1 (B, T), 0 at padding, which must be on the left.
            cache: decoding state to continue and extend, from :meth:`make_cache`.
            forced_experts: integers (B, T, L): replay these choices (E = skip) instead of routing.
            record: filled with routes and residual sizes.

        Raises:
            DataError: arguments whose shapes or values do not fit; token ids outside the vocabulary.
        """
        self._check(tokens, forced_experts)
        layout = make_layout(
            tokens, document_ids=document_ids, positions=positions, attention_mask=attention_mask, cache=cache
        )
        if cache is not None:
            cache.begin(layout)
        forced_NL = None if forced_experts is None else forced_experts.flatten(0, 1)
        hidden_ND = self.run(tokens.reshape(-1), layout, forced_NL=forced_NL, record=record)
        if cache is not None:
            cache.advance(layout.row_length)
        return hidden_ND.view(*tokens.shape, -1)

    def run(
        self,
        tokens_N: Tensor,
        layout: TokenLayout,
        *,
        forced_NL: Tensor | None = None,
        record: ForwardRecord | None = None,
    ) -> Tensor:
        """The normed hidden states (N, D) of tokens that stand as ``layout`` says; nothing is checked."""
        rotary = self._rotary_tables(layout)
        embedded_ND = embed(tokens_N, self.model.embed_tokens.weight)
        x_ND = (at_least_float(embedded_ND) + self.model.input_hidden_states_bias) * (
            self.model.input_hidden_states_scale
        )
        x_ND, router_state_NR = at_least_float(x_ND), None
        for index, block in enumerate(self.model.layers):
            x_ND, router_state_NR, route = block(
                x_ND,
                router_state_NR,
                layout,
                rotary[self.config.layer_types[index]],
                None if layout.cache is None else layout.cache.layers[index],
                None if forced_NL is None else forced_NL[:, index],
            )
            if record is not None:
                record.routes.append(route)
                if record.measure_residual:
                    record.residual_rms.append(torch.linalg.vector_norm(x_ND.detach()) / x_ND.numel() ** 0.5)
        return self.model.norm(x_ND)

    def _rotary_tables(self, layout: TokenLayout) -> dict[str, tuple[Tensor, Tensor]]:
        bases = {"hybrid": self.config.rope_theta, "hybrid_sliding": self.config.rope_theta_sliding}
        return {
            kind: rotary_tables(layout.positions_N, self.config.rotary_dim, bases[kind])
            for kind in set(self.config.layer_types)
        }

    def _check(self, tokens: Tensor, forced_experts: Tensor | None) -> None:
        if tokens.dim() != 2 or tokens.numel() == 0:
            raise DataError(f"tokens have shape {tuple(tokens.shape)}; pass (rows, tokens) with at least one token")
        if tokens.dtype not in (torch.int64, torch.int32):
            raise DataError(f"tokens have dtype {tokens.dtype}, expected torch.int64; pass token ids")
        num_layers, num_experts = self.config.num_hidden_layers, self.config.num_experts
        if forced_experts is not None and forced_experts.shape != (*tokens.shape, num_layers):
            raise DataError(
                f"forced_experts have shape {tuple(forced_experts.shape)}, expected {(*tokens.shape, num_layers)}; "
                "pass one class a token and layer"
            )
        if tokens.device.type == "meta":
            return
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.config.vocab_size:
            raise DataError(
                f"token ids range from {low} to {high}, the vocabulary holds {self.config.vocab_size}; "
                "use the tokenizer that belongs to this checkpoint"
            )
        if forced_experts is not None:
            low, high = int(forced_experts.min()), int(forced_experts.max())
            if low < 0 or high > num_experts:
                raise DataError(
                    f"forced_experts name class {low if low < 0 else high}, the classes are 0 to {num_experts} (skip); "
                    "replay choices recorded with this model"
                )
