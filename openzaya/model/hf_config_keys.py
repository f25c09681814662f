"""The keys of config.json that both released layouts share, and the rule that none passes unseen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

IGNORED_KEYS = frozenset(
    """architectures transformers_version dtype torch_dtype use_cache return_dict output_hidden_states
    output_attentions output_router_logits id2label label2id problem_type chunk_size_feed_forward
    is_encoder_decoder _name_or_path _commit_hash torchscript pruned_heads tokenizer_class task_specific_params
    finetuning_task attn_implementation _attn_implementation _attn_implementation_autoset
    experts_implementation _experts_implementation auto_map model_type""".split()  # noqa: SIM905
)
"""Keys that say nothing about the model's function (``dtype`` and ``model_type`` are looked at elsewhere)."""

# Keys that must have one value, because the architecture implements no other.
FIXED: dict[str, tuple[Any, ...]] = {
    "tie_word_embeddings": (True,),
    "attention_bias": (False,),
    "lm_head_bias": (False,),
    "attention_dropout": (0, None),
    "hidden_act": ("silu",),
    "num_experts_per_tok": (1,),
}
# Fields that have the same name in ZayaConfig and in both released layouts.
SHARED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "head_dim",
    "num_experts",
    "cca_time0",
    "cca_time1",
    "max_position_embeddings",
    "initializer_range",
    "pad_token_id",
    "bos_token_id",
)


Refuse = Callable[[str], None]
"""Notes one problem of a configuration."""


def check_keys(raw: dict[str, Any], used: set[str], fixed: dict[str, tuple[Any, ...]], refuse: Refuse) -> None:
    """Every key of ``raw`` is in ``used``, has its one supported value, or says nothing about the model."""
    for key, allowed in fixed.items():
        if key in raw and not any(raw[key] == value and type(raw[key]) in (type(value), float) for value in allowed):
            refuse(f"{key}={raw[key]!r} is not supported (only {allowed[0]!r}); use a checkpoint of the released kind")
    for key in sorted(raw.keys() - used - fixed.keys() - IGNORED_KEYS):
        refuse(f"unknown key '{key}'={short(raw[key])}; remove it if it says nothing about the model")


def short(value: Any) -> str:
    """``value`` as an error message shows it."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def single_token_id(raw: dict[str, Any], refuse: Refuse) -> Any:
    """``eos_token_id``, which may be a list of one."""
    value = raw["eos_token_id"]
    if isinstance(value, list):
        if len(value) != 1:
            refuse(
                f"eos_token_id={value} lists {len(value)} ids, one is supported; keep the end-of-turn id "
                "in config.json and the others in generation_config.json"
            )
        value = value[0] if value else None
    return value
