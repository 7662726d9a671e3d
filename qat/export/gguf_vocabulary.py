"""The tokenizer of a model in a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spectra.backend.errors import InputError

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# The regular expression that a pre-tokenizer splits by -> llama.cpp's name for it.
SPLITS = {
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + REST: "llama-bpe",
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + REST: "qwen2",
}
REMEDY = "use --format packed, or export a folder without tokenizer files and give the runtime token ids"


def add_vocabulary(writer: Any, source: Path, size: int) -> str:
    """Add the tokens, merges and special tokens of a byte-level BPE tokenizer.

    Args:
        writer: A `gguf.GGUFWriter`.
        source: The folder of the model.
        size: How many tokens the model knows.

    Returns:
        In words, what was added.

    Raises:
        InputError: The tokenizer is none that llama.cpp has under a name known here.
    """
    from spectra.integrations.loading import TOKENIZER_FILES, load_tokenizer

    if not any((source / file).is_file() for file in TOKENIZER_FILES):
        writer.add_tokenizer_model("no_vocab")
        return "none: the folder has no tokenizer"
    tokenizer: Any = load_tokenizer(source)
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise InputError(f"--format gguf covers byte-level BPE tokenizers, {source} has another: {REMEDY}")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    if content["model"]["type"] != "BPE" or content["model"].get("byte_fallback"):
        raise InputError(f"--format gguf covers byte-level BPE tokenizers, {source} has another: {REMEDY}")
    pre = pre_tokenizer_name(content)
    tokens, kinds = _tokens(content, size, source)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]])
    for token in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{token}_token_id")
        if number is not None:
            getattr(writer, f"add_{token}_token_id")(number)
    marked = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and marked[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and marked[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
    return f"byte-level BPE ({pre}), {len(tokens)} tokens"


def pre_tokenizer_name(content: dict[str, Any]) -> str:
    """llama.cpp's name for the way a tokenizer splits text before its merges.

    Args:
        content: A tokenizer.json.

    Returns:
        "gpt-2", "smollm", "llama-bpe" or "qwen2".

    Raises:
        InputError: It is none of these.
    """
    given = content.get("pre_tokenizer") or {}
    steps = given.get("pretokenizers", [given])
    byte_level = [step for step in steps if step.get("type") == "ByteLevel"]
    others = [step for step in steps if step.get("type") != "ByteLevel"]
    normalizer = (content.get("normalizer") or {}).get("type", "NFC")
    if len(byte_level) == 1 and not byte_level[0].get("add_prefix_space") and normalizer == "NFC":
        by_words = byte_level[0].get("use_regex", True)
        if by_words and not others:
            return "gpt-2"
        if by_words and [(step["type"], step.get("individual_digits")) for step in others] == [("Digits", True)]:
            return "smollm"
        if not by_words and len(others) == 1 and others[0]["type"] == "Split":
            found = SPLITS.get(others[0]["pattern"].get("Regex", ""))
            if found:
                return found
    raise InputError(f"the tokenizer splits text in a way that has no name in llama.cpp known here: {REMEDY}")


def _tokens(content: dict[str, Any], size: int, source: Path) -> tuple[list[str], list[int]]:
    """Every token by its number, and its type in llama.cpp; numbers without a token are unused."""
    import gguf

    kinds = gguf.TokenType
    table = {number: (token, kinds.NORMAL) for token, number in content["model"]["vocab"].items()}
    for added in content["added_tokens"]:
        kind = kinds.CONTROL if added["special"] else kinds.USER_DEFINED
        table[added["id"]] = (added["content"], kind)
    if max(table) >= size:
        raise InputError(
            f"the tokenizer of {source} has token {max(table)} and the model knows {size} tokens: export with its own"
        )
    rows = [table.get(number, (f"[PAD{number}]", kinds.UNUSED)) for number in range(size)]
    return [token for token, _ in rows], [int(kind) for _, kind in rows]
