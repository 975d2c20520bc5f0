"""The base's tokenizer: bytes of its tokens in two families, chat templates, and what is refused."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trimtab_adapters.contract.errors import InvalidRequestError, VocabularyError
from trimtab_adapters.in_process.tokenizer import BaseTokenizer, load_base_tokenizer


def save(tokenizer: Tokenizer, directory: Path, chat_template: str | None = None) -> BaseTokenizer:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>")
    fast.chat_template = chat_template
    fast.save_pretrained(directory)
    return load_base_tokenizer(str(directory))


def byte_level() -> Tokenizer:
    """GPT-2's kind, one token per byte and a merged one with a space."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(alphabet)} | {"Ġa": 256}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ġ", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def sentence_piece() -> Tokenizer:
    """Llama 2's kind, with bytes to fall back on."""
    pieces = ["<unk>", "▁", "a", "▁a", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(make: object, tmp_path: Path) -> None:
    assert callable(make)
    tokenizer = save(make(), tmp_path)
    found = tokenizer.token_bytes()
    for text in (" a", "€uro a\n", "\u0000\x7f é 漢字 🙂"):
        ids = tokenizer.encode(text)
        assert b"".join(found[token_id] for token_id in ids).decode() == text
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
def test_special_tokens_are_their_own_text(make: object, tmp_path: Path) -> None:
    assert callable(make)
    tokenizer = save(make(), tmp_path)
    end = tokenizer.vocabulary["</s>"]
    assert tokenizer.token_bytes()[end] == b"</s>"
    assert tokenizer.eos_token_ids == {end}
    assert tokenizer.decode([end]) == ""
    assert tokenizer.decode([end], skip_special_tokens=False) == "</s>"
    assert tokenizer.num_tokens == max(tokenizer.vocabulary.values()) + 1


def test_the_models_own_ends_count_too(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    tokenizer = save(byte_level(), tmp_path)
    assert tokenizer.eos_token_ids == {7, 9, tokenizer.vocabulary["</s>"]}


def test_messages_are_written_by_the_template(tmp_path: Path) -> None:
    turns = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    template = turns + "{% if add_generation_prompt %}>{% endif %}{{ tone }}"
    tokenizer = save(byte_level(), tmp_path, template)
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.render(messages, {"add_generation_prompt": True, "tone": "!"}) == "[user]hi>!"
    assert tokenizer.render(messages, {"add_generation_prompt": False}) == "[user]hi"


def test_a_template_that_refuses_is_the_callers_error(tmp_path: Path) -> None:
    tokenizer = save(byte_level(), tmp_path, "{{ raise_exception('no system role') }}")
    with pytest.raises(InvalidRequestError, match="no system role"):
        tokenizer.render([{"role": "system", "content": "x"}], {})


def test_without_a_template_chats_are_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="give the gateway a tokenizer with one"):
        save(byte_level(), tmp_path).render([{"role": "user", "content": "x"}], {})


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VocabularyError):
        load_base_tokenizer(str(tmp_path))
