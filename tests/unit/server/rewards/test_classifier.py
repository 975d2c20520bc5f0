"""Rewards from tiny random sequence classifiers, compared with direct calls of transformers."""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from trimtab_adapters.contract.errors import InvalidRequestError, RewardError
from trimtab_adapters.contract.rewards import RewardInput, RewardModel, RewardSpec
from trimtab_server.rewards.classifier import ClassifierReward

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz"]
SIZES = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
    # Large enough for scores that differ by 0.1 and more between inputs, small enough for float32 rounding, which
    # differs with the shape of a batch, to stay below 2e-7. All comparisons with a single run are to 1e-6.
    "initializer_range": 0.2,
}
INPUTS = [
    RewardInput("a b c", "d e"),
    RewardInput("", "x"),
    RewardInput("q", "r s t u v w"),
    RewardInput("h i", "unknown words"),
]


def save_tokenizer(directory: Path, *, is_bert: bool, has_padding: bool = True, is_pair: bool = True) -> None:
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    if is_bert:
        backend.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    special = {"unk_token": "[UNK]"} | ({"pad_token": "[PAD]"} if has_padding else {})
    special |= {"cls_token": "[CLS]", "sep_token": "[SEP]"} if is_bert else {}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(directory)


def save_bert(directory: Path, **config: Any) -> Path:
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(**SIZES | {"num_labels": 3} | config)).save_pretrained(directory)
    save_tokenizer(directory, is_bert=True)
    return directory


def save_llama(directory: Path, *, has_padding: bool, **config: Any) -> Path:
    torch.manual_seed(1)
    config = SIZES | {"num_labels": 1, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None} | config
    LlamaForSequenceClassification(LlamaConfig(**config)).save_pretrained(directory)
    save_tokenizer(directory, is_bert=False, has_padding=has_padding)
    return directory


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    labels = {0: "bad", 1: "neutral", 2: "good"}
    return save_bert(tmp_path_factory.mktemp("bert"), id2label=labels, label2id={v: k for k, v in labels.items()})


@pytest.fixture
def copy(bert: Path, tmp_path: Path) -> Path:
    """A copy of the classifier that a test may damage."""
    return shutil.copytree(bert, tmp_path / "classifier")


def load(directory: Path | str, **options: str | int | float | bool) -> ClassifierReward:
    options["device"] = options.get("device", "cpu")
    return ClassifierReward.load(RewardSpec(name="judge", kind="hf_classifier", target=str(directory), options=options))


def direct_logits(directory: Path, texts: Sequence[tuple[str, ...]]) -> torch.Tensor:
    """What transformers computes for each text or pair alone."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    rows = []
    for text in texts:
        encoded = tokenizer(*text, return_tensors="pt")
        if model.config.model_type == "llama":
            encoded.pop("token_type_ids", None)
        with torch.no_grad():
            rows.append(model(**encoded).logits[0])
    return torch.stack(rows)


def test_the_logit_of_the_last_label_is_the_default(bert: Path) -> None:
    reward = load(bert, batch_size=3)
    assert isinstance(reward, RewardModel)
    expected = direct_logits(bert, [(item.output,) for item in INPUTS])[:, 2]
    assert reward.score(INPUTS) == pytest.approx(expected.tolist(), abs=1e-6)
    assert load(bert, batch_size=1).score(INPUTS) == expected.tolist()
    assert len(set(expected.tolist())) == len(INPUTS)


@pytest.mark.parametrize("label", [0, "bad"])
@pytest.mark.parametrize("function", ["logit", "probability", "log_probability"])
def test_a_label_by_name_or_index_in_any_function(bert: Path, label: str | int, function: str) -> None:
    logits = direct_logits(bert, [(item.output,) for item in INPUTS])
    functions = {"logit": logits, "probability": logits.softmax(-1), "log_probability": logits.log_softmax(-1)}
    reward = load(bert, label=label, function=function)
    assert reward.score(INPUTS) == pytest.approx(functions[function][:, 0].tolist(), abs=1e-6)


def test_prompt_and_output_are_read_as_one_text_or_as_a_pair(bert: Path) -> None:
    joined = direct_logits(bert, [(item.prompt + item.output,) for item in INPUTS])[:, 2]
    assert load(bert, template="prompt_output").score(INPUTS) == pytest.approx(joined.tolist(), abs=1e-6)
    pairs = direct_logits(bert, [(item.prompt, item.output) for item in INPUTS])[:, 2]
    assert load(bert, template="text_pair").score(INPUTS) == pytest.approx(pairs.tolist(), abs=1e-6)


@pytest.mark.parametrize("has_padding", [True, False])
def test_a_decoder_scores_a_batch_as_it_scores_each_text_alone(tmp_path: Path, has_padding: bool) -> None:
    directory = save_llama(tmp_path, has_padding=has_padding)
    expected = direct_logits(directory, [(item.prompt + " " + item.output,) for item in INPUTS])[:, 0]
    inputs = [RewardInput(item.prompt + " ", item.output) for item in INPUTS]
    assert load(directory, template="prompt_output").score(inputs) == pytest.approx(expected.tolist(), abs=1e-6)


@pytest.mark.parametrize("has_padding", [True, False])
def test_texts_of_like_length_share_a_pass_if_they_can_be_padded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_padding: bool
) -> None:
    reward = load(save_llama(tmp_path, has_padding=has_padding), batch_size=2)
    shapes: list[tuple[int, ...]] = []
    forward = LlamaForSequenceClassification.forward

    def counted(self: LlamaForSequenceClassification, **inputs: torch.Tensor) -> Any:
        shapes.append(tuple(inputs["input_ids"].shape))
        return forward(self, **inputs)

    monkeypatch.setattr(LlamaForSequenceClassification, "forward", counted)
    reward.score(INPUTS)
    # Shortest first, so that little is padded: 1, 2, 2 and 6 words.
    assert shapes == ([(2, 2), (2, 6)] if has_padding else [(1, 1), (1, 2), (1, 2), (1, 6)])


def test_one_class_and_several_labels_at_a_time_have_sigmoid_probabilities(tmp_path: Path) -> None:
    one = save_llama(tmp_path / "one", has_padding=True)
    logit = direct_logits(one, [("a",)])[0, 0].item()
    assert load(one, function="probability").score([RewardInput("", "a")])[0] == pytest.approx(
        1 / (1 + math.exp(-logit)), abs=1e-6
    )
    several = save_bert(tmp_path / "several", problem_type="multi_label_classification")
    logit = direct_logits(several, [("a",)])[0, 2].item()
    assert load(several, function="log_probability").score([RewardInput("", "a")])[0] == pytest.approx(
        -math.log1p(math.exp(-logit)), abs=1e-6
    )


def test_too_long_an_input_loses_the_beginning_of_the_prompt_first(bert: Path) -> None:
    # 10 tokens. One text: [CLS] + 8 + [SEP]. A pair: [CLS] + 7 in all + 2 [SEP].
    item = RewardInput("a b c d e f g ", "h i j k")
    [score] = load(bert, template="prompt_output", max_length=10).score([item])
    assert score == pytest.approx(direct_logits(bert, [("d e f g h i j k",)])[0, 2].item(), abs=1e-6)
    [score] = load(bert, template="text_pair", max_length=10).score([item])
    assert score == pytest.approx(direct_logits(bert, [("e f g", "h i j k")])[0, 2].item(), abs=1e-6)


@pytest.mark.parametrize("num_words", [6, 7, 8, 9, 14])
def test_too_long_an_output_loses_the_prompt_and_then_its_own_beginning(bert: Path, num_words: int) -> None:
    words = list("hijklmnopqrstu")[:num_words]
    [score] = load(bert, template="text_pair", max_length=10).score([RewardInput("a b c", " ".join(words))])
    pair = (" ".join("abc"[3 - max(0, 7 - num_words) :]), " ".join(words[-7:]))
    assert score == pytest.approx(direct_logits(bert, [pair])[0, 2].item(), abs=1e-6)
    [score] = load(bert, max_length=10).score([RewardInput("a b c", " ".join(words))])
    assert score == pytest.approx(direct_logits(bert, [(" ".join(words[-8:]),)])[0, 2].item(), abs=1e-6)


def test_the_model_s_own_limit_holds_without_an_option(bert: Path) -> None:
    # 16 positions: [CLS] + 14 + [SEP].
    [score] = load(bert).score([RewardInput("", "b " * 30)])
    assert score == pytest.approx(direct_logits(bert, [("b " * 14,)])[0, 2].item(), abs=1e-6)


def test_a_text_without_tokens_is_the_end_token_or_an_error(tmp_path: Path) -> None:
    directory = save_llama(tmp_path, has_padding=True)
    with pytest.raises(RewardError, match="cannot judge a text without tokens"):
        load(directory).score([RewardInput("", "")])
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "z"}))
    # With another input, so that both are in one batch.
    scores = load(directory).score([RewardInput("", ""), RewardInput("", "a b")])
    assert scores == pytest.approx(direct_logits(directory, [("z",), ("a b",)])[:, 0].tolist(), abs=1e-6)


def test_a_text_that_is_no_unicode_is_a_reward_error_without_the_text(bert: Path) -> None:
    with pytest.raises(RewardError, match="'judge' failed in its classifier") as caught:
        load(bert).score([RewardInput("", "lone \ud800")])
    assert "lone" not in caught.value.message


def test_the_version_follows_files_and_options_that_matter(copy: Path) -> None:
    version = load(copy).version
    assert load(copy).version == version
    assert load(copy, batch_size=1).version == version
    assert load(copy, label=0).version != version
    (copy / "README.md").write_text("notes")
    assert load(copy).version == version
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[:-4] + b"\0\0\x80\x3f")
    assert load(copy).version != version


def test_pickled_weights_are_refused(copy: Path) -> None:
    torch.save({"classifier.bias": torch.zeros(3)}, copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(InvalidRequestError, match=r"no model\.safetensors; weights in other formats are refused"):
        load(copy)


def test_a_model_without_a_trained_head_is_refused(tmp_path: Path) -> None:
    BertModel(BertConfig(**SIZES)).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, is_bert=True)
    with pytest.raises(InvalidRequestError, match=r"no trained sequence classifier: .*classifier\.bias"):
        load(tmp_path)


def test_weights_that_are_not_finite_are_refused(copy: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(copy)
    with torch.no_grad():
        model.classifier.bias[2] = math.nan
    model.save_pretrained(copy)
    with pytest.raises(InvalidRequestError, match=r"cannot score: .* returned nan"):
        load(copy)


def test_a_damaged_directory_is_refused(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(InvalidRequestError, match="cannot be loaded: SafetensorError"):
        load(copy)
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(InvalidRequestError, match="cannot be loaded: "):
        load(copy)
    (copy / "config.json").unlink()
    with pytest.raises(InvalidRequestError, match=r"no config\.json"):
        load(copy)


def test_remote_code_is_never_run(copy: Path) -> None:
    ran = copy / "ran"
    (copy / "code.py").write_text(f"open({str(ran)!r}, 'w')")
    config = json.loads((copy / "config.json").read_text())
    auto_map = {"AutoConfig": "code.C", "AutoModelForSequenceClassification": "code.M"}
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "mine", "auto_map": auto_map}))
    with pytest.raises(InvalidRequestError, match="cannot be loaded"):
        load(copy)
    assert not ran.exists()


def test_a_peft_adapter_is_refused(copy: Path) -> None:
    (copy / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    with pytest.raises(InvalidRequestError, match="merge it"):
        load(copy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": "great"}, r"no label 'great'; it has 0 \(bad\), 1 \(neutral\), 2 \(good\)"),
        ({"label": 3}, "no label 3"),
        ({"label": -1}, "no label -1"),
        ({"label": True}, "options.label"),
        ({"function": "square"}, r"'options\.function': Input should be 'logit'"),
        ({"max_length": 17}, "more than the 16 tokens"),
        ({"max_length": 0}, r"options\.max_length"),
        ({"device": "abacus"}, "cannot be loaded"),
        ({"typo": 1}, r"'options\.typo' does not exist; known options: "),
    ],
)
def test_options_that_do_not_fit_are_refused_with_the_reason(
    bert: Path, options: dict[str, str | int], message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        load(bert, **options)


def test_a_regression_has_no_probabilities(tmp_path: Path) -> None:
    directory = save_bert(tmp_path, problem_type="regression", num_labels=1)
    load(directory)
    with pytest.raises(InvalidRequestError, match="regression"):
        load(directory, function="probability")


def test_a_hub_id_is_brought_here_and_a_missing_directory_is_not(bert: Path) -> None:
    asked = []

    def download(repo_id: str, revision: str | None) -> Path:
        asked.append((repo_id, revision))
        if repo_id == "org/unknown":
            raise OSError("not in the cache")
        return bert

    def load_hub(target: str, **options: str) -> ClassifierReward:
        spec = RewardSpec(name="judge", kind="hf_classifier", target=target, options={"device": "cpu"} | options)
        return ClassifierReward.load(spec, download=download)

    assert load_hub("org/judge", revision="main").version == load(bert).version
    assert asked == [("org/judge", "main")]
    with pytest.raises(
        InvalidRequestError, match=r"neither a directory .* nor available from the hub: not in the cache"
    ):
        load_hub("org/unknown")
    for path in ("/no/such/dir", "./no", "a/b/c", "~/no", "../x"):
        with pytest.raises(InvalidRequestError, match="no directory"):
            load_hub(path)
    assert len(asked) == 2
