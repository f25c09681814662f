"""The shape of a ZAYA model, its presets, and counts that follow from the shape alone.

One frozen record describes everything that decides which tensors exist (arXiv 2605.05365, model
section; field names are those of the released native checkpoints where one exists). Counts of
parameters, FLOPs and cache bytes are computed from the record and equal the built model
(``tests/model/test_config.py`` builds it on the meta device and compares).
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from openzaya.config import describe_validation_error
from openzaya.errors import ConfigError

AttentionKind = Literal["cca", "gqa", "mha", "mla"]
RouterKind = Literal["mlp+eda", "mlp", "linear"]
ResidualKind = Literal["learned", "plain"]
LayerType = Literal["hybrid", "hybrid_sliding"]


class ZayaConfig(BaseModel):
    """Shape of a model. Frozen; derive variants with :meth:`with_changes`.

    The defaults are ZAYA1-8B. ``attention``, ``router`` and ``residual`` are ablation switches: only
    their first option is a ZAYA model that the released layouts can hold.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    vocab_size: int = Field(262_272, ge=1)
    hidden_size: int = Field(2048, ge=1)
    num_hidden_layers: int = Field(40, ge=1)
    num_attention_heads: int = Field(8, ge=1)
    num_key_value_heads: int = Field(2, ge=1)
    head_dim: int = Field(128, ge=2)
    num_experts: int = Field(16, ge=1, le=254)
    moe_intermediate_size: int = Field(2048, ge=1)
    router_hidden_size: int = Field(256, ge=1)
    cca_time0: int = Field(2, ge=1)
    """Kernel size of the depthwise convolution."""
    cca_time1: int = Field(2, ge=1)
    """Kernel size of the grouped (one group a head) convolution."""
    rms_norm_eps: float = Field(1e-5, gt=0)
    rope_theta: float = Field(5_000_000.0, gt=0)
    """RoPE base of full-attention layers (10,000 in pretraining, 5e6 in the release)."""
    rope_theta_sliding: float = Field(10_000.0, gt=0)
    """RoPE base of sliding-window layers."""
    partial_rotary_factor: float = Field(0.5, gt=0, le=1)
    """Share of each head's dimensions that RoPE turns."""
    sliding_window: int | None = Field(None, ge=1)
    """Tokens a sliding layer sees, itself included."""
    layer_types: tuple[LayerType, ...] = ()
    """One entry a layer; empty means full attention everywhere."""
    max_position_embeddings: int = Field(131_072, ge=1)
    initializer_range: float = Field(0.02, gt=0)
    pad_token_id: int = Field(0, ge=0)
    bos_token_id: int = Field(2, ge=0)
    eos_token_id: int = Field(106, ge=0)

    attention: AttentionKind = "cca"
    router: RouterKind = "mlp+eda"
    residual: ResidualKind = "learned"
    mla_latent_size: int = Field(256, ge=1)
    """Width of the shared key/value latent; used by ``attention = "mla"`` only."""

    @model_validator(mode="before")
    @classmethod
    def _fill_layer_types(cls, values: Any) -> Any:
        if isinstance(values, dict) and not values.get("layer_types"):
            layers = values.get("num_hidden_layers", 40)
            values = {**values, "layer_types": ("hybrid",) * layers if isinstance(layers, int) else ()}
        return values

    @model_validator(mode="after")
    def _check(self) -> ZayaConfig:
        def refuse(problem: str) -> None:
            raise ValueError(problem)

        if self.num_attention_heads % self.num_key_value_heads:
            refuse(
                f"num_attention_heads={self.num_attention_heads} is no multiple of "
                f"num_key_value_heads={self.num_key_value_heads}; change one of them"
            )
        if self.attention == "cca" and (self.num_key_value_heads * self.head_dim) % 2:
            refuse(
                f"num_key_value_heads*head_dim={self.num_key_value_heads * self.head_dim} is odd, but CCA takes half "
                "of the value channels from the previous token; make it even"
            )
        if len(self.layer_types) != self.num_hidden_layers:
            refuse(
                f"layer_types names {len(self.layer_types)} layers, num_hidden_layers={self.num_hidden_layers}; "
                "give one type a layer, or leave layer_types out"
            )
        if "hybrid_sliding" in self.layer_types and self.sliding_window is None:
            refuse("layer_types holds 'hybrid_sliding' but sliding_window is not set; set it (the token itself counts)")
        if self.rotary_dim % 2 or self.rotary_dim < 2:
            refuse(
                f"head_dim*partial_rotary_factor={self.head_dim * self.partial_rotary_factor} must be an even number "
                "of at least 2; change head_dim or partial_rotary_factor"
            )
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if getattr(self, name) >= self.vocab_size:
                refuse(f"{name}={getattr(self, name)} is outside the vocabulary of {self.vocab_size}; lower it")
        return self

    @property
    def rotary_dim(self) -> int:
        """Dimensions of each head that RoPE turns (the first ones)."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def conv_channels(self) -> int:
        """Channels of the CCA convolutions: all query and key heads."""
        return (self.num_attention_heads + self.num_key_value_heads) * self.head_dim

    @property
    def num_router_classes(self) -> int:
        """Experts plus the skip class, which is the last."""
        return self.num_experts + 1

    @property
    def num_cache_heads(self) -> int:
        """Key/value heads in use: every head has its own in ``mha`` and ``mla``."""
        return self.num_attention_heads if self.attention in ("mha", "mla") else self.num_key_value_heads

    @property
    def is_released_architecture(self) -> bool:
        """True where ZAYA's own checkpoint layouts can hold the model."""
        return self.attention == "cca" and self.router == "mlp+eda" and self.residual == "learned"

    def with_changes(self, /, **changes: Any) -> ZayaConfig:
        """A validated copy with some fields changed; raises :class:`ConfigError`."""
        values = self.model_dump()
        if "num_hidden_layers" in changes and "layer_types" not in changes:
            # Keep the pattern of layer types when the depth changes.
            pattern = self.layer_types
            layers = changes["num_hidden_layers"]
            if isinstance(layers, int):
                values["layer_types"] = tuple(pattern[i % len(pattern)] for i in range(layers))
        return parse_config({**values, **changes})

    # --- counts ---------------------------------------------------------------------------------

    def num_parameters(self, *, embeddings: bool = True) -> int:
        """Trainable parameters (balancing biases are a buffer and do not count)."""
        from openzaya.model.counts import num_parameters

        return num_parameters(self, embeddings=embeddings)


def parse_config(values: dict[str, Any]) -> ZayaConfig:
    """Validate ``values``; every problem is named in one :class:`ConfigError`."""
    try:
        return ZayaConfig(**values)
    except ValidationError as error:
        raise ConfigError(describe_validation_error(error, ZayaConfig, "model configuration")) from None


PRESETS: dict[str, ZayaConfig] = {
    "zaya1-8b": ZayaConfig(),
    "zaya1-74b-preview": ZayaConfig(
        num_hidden_layers=60,
        hidden_size=4096,
        num_attention_heads=16,
        num_experts=24,
        moe_intermediate_size=4096,
        sliding_window=4097,
        layer_types=("hybrid_sliding", "hybrid") * 30,
    ),
    "nano": ZayaConfig(
        vocab_size=1024,
        hidden_size=128,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        moe_intermediate_size=192,
        router_hidden_size=64,
        rope_theta=10_000.0,
        max_position_embeddings=4096,
        eos_token_id=4,
    ),
    "smoke": ZayaConfig(
        vocab_size=512,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        moe_intermediate_size=64,
        router_hidden_size=32,
        rope_theta=10_000.0,
        max_position_embeddings=2048,
        eos_token_id=4,
    ),
}


def preset(name: str) -> ZayaConfig:
    """The preset called ``name``; an unknown name lists the known ones."""
    if name not in PRESETS:
        raise ConfigError(f"unknown preset '{name}'; choose one of: {', '.join(PRESETS)}")
    return PRESETS[name]
