"""The tokenizer: train a byte-level BPE, load one from a checkpoint, encode text that users wrote.

A tokenizer of ours is a byte-pair encoding over bytes: every Unicode text round-trips exactly and no
token is ever unknown. Digits are single tokens, so that numbers have one spelling. The first ids are
fixed (``CONTROL_TOKENS``) and the control strings carry the names that ZAYA1's tokenizer uses
(arXiv 2605.05365), so that one chat template serves both.

Control strings in text that users wrote must not become control tokens: a user could close his own
turn and open the assistant's. ``encode_plain`` cuts each such string after its first character and
encodes the pieces apart, so the text is unchanged and no piece can match a control token. Rendered
conversations use the same rule (``openzaya.data.chat``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openzaya.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, UNK, BOS = "<pad>", "<unk>", "<bos>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
TOOL_CALL_OPEN, TOOL_CALL_CLOSE = "<zyphra_tool_call>", "</zyphra_tool_call>"
TOOL_RESPONSE_OPEN, TOOL_RESPONSE_CLOSE = "<zyphra_tool_response>", "</zyphra_tool_response>"
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"

CONTROL_TOKENS: tuple[str, ...] = (
    PAD,
    UNK,
    BOS,
    TURN_START,
    TURN_END,
    TOOL_CALL_OPEN,
    TOOL_CALL_CLOSE,
    TOOL_RESPONSE_OPEN,
    TOOL_RESPONSE_CLOSE,
    THINK_OPEN,
    THINK_CLOSE,
)
"""Control strings of a tokenizer of ours; the index is the token id."""

NUM_HIDDEN_CONTROL_TOKENS = 5
"""The first five are left out by ``decode(skip_special_tokens=True)``; thinking and tool tags stay readable."""

PIECES = r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""Merges stay inside one piece: a digit, a word or a run of signs with at most one blank before it, or blanks."""

MIN_VOCAB_SIZE = len(CONTROL_TOKENS) + 256

CHAT_TEMPLATE_PATH = Path(__file__).with_name("chat_template.jinja")


@lru_cache(maxsize=1)
def chat_template() -> str:
    """Our chat template (Jinja source)."""
    return CHAT_TEMPLATE_PATH.read_text(encoding="utf-8")


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, *, min_frequency: int = 2, max_token_length: int = 16
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on ``texts`` and return it with the chat template set.

    ``vocab_size`` counts control tokens and the 256 bytes; the result may be smaller where ``texts``
    hold too few pairs that occur ``min_frequency`` times. Control strings inside ``texts`` teach no
    merges. ``max_token_length`` is in bytes. The same texts in the same order give the same tokenizer.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from tokenizers import decoders as token_decoders
    from transformers import PreTrainedTokenizerFast

    if vocab_size < MIN_VOCAB_SIZE:
        raise DataError(
            f"vocab_size={vocab_size} is below {MIN_VOCAB_SIZE} (256 bytes and {len(CONTROL_TOKENS)} control tokens); "
            "raise it"
        )
    trained = Tokenizer(models.BPE(unk_token=UNK))
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trained.decoder = token_decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=max_token_length,
        show_progress=False,
    )
    trained.train_from_iterator(_without_control_strings(texts), trainer=trainer)

    # The trainer marks all of its special tokens as hidden; thinking and tool tags are to stay readable.
    layout = json.loads(trained.to_str())
    for token in layout["added_tokens"]:
        token["special"] = token["id"] < NUM_HIDDEN_CONTROL_TOKENS
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(layout)),
        bos_token=BOS,
        eos_token=TURN_END,
        pad_token=PAD,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template()
    check_tokenizer(tokenizer)
    return tokenizer


def _without_control_strings(texts: Iterable[str]) -> Iterator[str]:
    pattern = re.compile("|".join(re.escape(token) for token in CONTROL_TOKENS))
    for text in texts:
        yield from (piece for piece in pattern.split(text) if piece)


def check_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise ``DataError`` unless the control tokens of a tokenizer of ours have their fixed ids."""
    for expected, token in enumerate(CONTROL_TOKENS):
        found = tokenizer.convert_tokens_to_ids(token)
        if found != expected:
            raise DataError(f"tokenizer: '{token}' has id {found}, expected {expected}; train the tokenizer again")


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, path: str | Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja into the folder ``path``."""
    tokenizer.save_pretrained(str(path))


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a checkpoint folder (ours or another) or of a hub id.

    Raises ``DataError`` where there is none, or where it is not a fast tokenizer (the exact
    bookkeeping of masks and tails needs one).
    """
    from transformers import AutoTokenizer

    folder = Path(path)
    if folder.exists() and not (folder / "tokenizer.json").is_file():
        raise DataError(f"no tokenizer.json in '{folder}'; give a checkpoint folder, or train a tokenizer first")
    if not folder.exists() and str(path).count("/") != 1:
        # Asking the hub for what cannot be a name there costs a minute where it cannot be reached.
        raise DataError(f"'{path}' is no directory, and no hub id (owner/name); check the path")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(path), **_zaya_config(folder))
    except Exception as error:  # the loader also raises the errors of the configurations it reads
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"cannot load a tokenizer from '{path}': {first_line}; give a folder with tokenizer.json, or a hub id "
            "that can be reached"
        ) from None
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(f"the tokenizer in '{path}' is not a fast one (tokenizer.json); convert it with transformers")
    return tokenizer


def _zaya_config(folder: Path) -> dict[str, Any]:
    """A ZAYA configuration for the loader, which else reads the folder's and refuses that of the legacy layout."""
    from transformers import ZayaConfig

    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    is_zaya = isinstance(values, dict) and values.get("model_type") in ("zaya", "openzaya")
    return {"config": ZayaConfig()} if is_zaya else {}


def is_own_template(tokenizer: PreTrainedTokenizerFast) -> bool:
    """True where the tokenizer carries our chat template and every tag of it is one token."""
    if tokenizer.chat_template != chat_template():
        return False
    tags = (TURN_START, TURN_END, THINK_OPEN, THINK_CLOSE)
    return all(tag in _control_strings(tokenizer) for tag in tags)


# --- encoding --------------------------------------------------------------------------------------


def _control_strings(tokenizer: PreTrainedTokenizerFast) -> frozenset[str]:
    """Added tokens that steer a model: special ones, and thinking, turn and tool tags.

    Other added tokens (Gemma's runs of blanks and HTML tags) are ordinary vocabulary.
    """
    cached = tokenizer.__dict__.get("_openzaya_control_strings")
    if cached is None:
        cached = frozenset(
            token.content
            for token in tokenizer.added_tokens_decoder.values()
            if token.special or token.content in CONTROL_TOKENS
        )
        tokenizer.__dict__["_openzaya_control_strings"] = cached
    return cached


def control_pattern(tokenizer: PreTrainedTokenizerFast) -> re.Pattern[str]:
    """Matches any control string of the tokenizer, the longest first."""
    cached = tokenizer.__dict__.get("_openzaya_control_pattern")
    if cached is None:
        strings = sorted(_control_strings(tokenizer), key=lambda text: (-len(text), text))
        cached = re.compile("|".join(re.escape(text) for text in strings) if strings else r"(?!)")
        tokenizer.__dict__["_openzaya_control_pattern"] = cached
    return cached


def backend(tokenizer: PreTrainedTokenizerFast) -> Any:
    """The Rust tokenizer, without the padding, truncation or splitting an earlier call may have left in it."""
    rust = tokenizer.backend_tokenizer
    if rust.padding is not None:
        rust.no_padding()
    if rust.truncation is not None:
        rust.no_truncation()
    if rust.encode_special_tokens:
        rust.encode_special_tokens = False
    return rust


def encode_plain(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, nothing added; control strings in the texts become ordinary tokens.

    Raises ``DataError`` for text that is not valid Unicode (a lone surrogate).
    """
    pattern = control_pattern(tokenizer)
    pieces: list[str] = []
    counts: list[int] = []
    for text in texts:
        if pattern.search(text) is None:
            pieces.append(text)
            counts.append(1)
        else:
            broken = split_control_strings(text, pattern)
            pieces.extend(broken)
            counts.append(len(broken))
    encoded = encode_batch(tokenizer, pieces)
    results: list[list[int]] = []
    position = 0
    for count in counts:
        if count == 1:
            results.append(encoded[position])
        else:
            results.append([token for piece in encoded[position : position + count] for token in piece])
        position += count
    return results


def split_control_strings(text: str, pattern: re.Pattern[str]) -> list[str]:
    """``text`` in pieces that hold no control string; joined they are ``text``."""
    pieces = []
    start = position = 0
    while (match := pattern.search(text, position)) is not None:
        # One character of the match goes to the left piece: neither side holds the whole string. The search
        # goes on inside the match, since control strings may overlap.
        position = match.start() + 1
        pieces.append(text[start:position])
        start = position
    pieces.append(text[start:])
    return [piece for piece in pieces if piece]


def encode_batch(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Token ids of each text as it stands, control strings included; no BOS or EOS is added."""
    try:
        return [encoding.ids for encoding in backend(tokenizer).encode_batch_fast(texts, add_special_tokens=False)]
    except (UnicodeEncodeError, TypeError):
        raise _not_unicode(texts) from None


def encode_with_offsets(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of ``text`` and the characters [start, end) each came from."""
    try:
        encoding = backend(tokenizer).encode(text, add_special_tokens=False)
    except (UnicodeEncodeError, TypeError):
        raise _not_unicode([text]) from None
    return encoding.ids, encoding.offsets


def batch_offsets(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[tuple[int, int]]]:
    """For each text, the characters [start, end) of each of its tokens."""
    try:
        return [encoding.offsets for encoding in backend(tokenizer).encode_batch(texts, add_special_tokens=False)]
    except (UnicodeEncodeError, TypeError):
        raise _not_unicode(texts) from None


def _not_unicode(texts: list[str]) -> DataError:
    for text in texts:
        for position, character in enumerate(text):
            if 0xD800 <= ord(character) <= 0xDFFF:
                return DataError(
                    f"text holds a lone surrogate U+{ord(character):04X} at character {position}, which is not valid "
                    "Unicode; remove it or decode the source as UTF-8"
                )
    return DataError("text could not be encoded by the tokenizer; give valid Unicode strings")
