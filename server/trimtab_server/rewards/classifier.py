"""Rewards from a sequence classifier in Hugging Face's format. torch and transformers are imported on loading only."""

import hashlib
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, StrictInt, StrictStr

from trimtab_adapters.contract.errors import InvalidRequestError, RewardError
from trimtab_adapters.contract.rewards import RewardInput, RewardSpec, check_scores
from trimtab_server.rewards.limits import LIMIT_NAMES, RewardLimits, parse_options

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FILES = ("*.json", "*.txt", "*.model", "*.safetensors")
_UNSET_LENGTH = 10**9
"""Tokenizers without a limit report a huge one."""


class ClassifierOptions(RewardLimits):
    """The `options` of a reward of kind `hf_classifier`."""

    label: StrictInt | StrictStr | None = None
    """Name or index of the class that is wanted; the last one when not given."""
    function: Literal["logit", "probability", "log_probability"] = "logit"
    """What of that class is the reward. Probabilities are a softmax over the classes; a sigmoid where there is one
    class only or the model was trained for several labels at a time."""
    template: Literal["output", "prompt_output", "text_pair"] = "output"
    """What the classifier reads: the output alone; prompt and output as one text, nothing between; or both as the
    tokenizer's pair of texts."""
    max_length: int | None = Field(default=None, ge=8)
    """Most tokens that the classifier reads, special tokens included; the model's own limit when not given. What is
    too long loses tokens from its beginning: first of the prompt, then, if the output alone is too long, of that."""
    batch_size: int = Field(default=16, ge=1, le=1024)
    device: str = "auto"
    """A torch device; `auto` is CUDA where there is any, else the CPU."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    revision: str | None = None
    """Branch, tag or commit of a hub id."""


class ClassifierReward:
    """A reward that reads one class of a sequence classifier.

    Only safetensors weights are loaded, never a pickle and never code from the model's directory. The version is a hash
    of all its configuration, tokenizer and weight files and of the options that influence the score. Inputs are
    batched by length; the scores do not depend on the batch beyond rounding.

    Args:
        name: Name of the reward.
        version: See above.
        model: The classifier, on its device and in evaluation mode.
        tokenizer: Its tokenizer.
        options: See `ClassifierOptions`.
    """

    def __init__(self, name: str, version: str, model: Any, tokenizer: Any, options: ClassifierOptions) -> None:
        self._name = name
        self._version = version
        self._model = model
        self._tokenizer = tokenizer
        self._options = options
        self._label = _label_index(model.config, options.label)
        problem = getattr(model.config, "problem_type", None)
        self._is_sigmoid = model.config.num_labels == 1 or problem == "multi_label_classification"
        if problem == "regression" and options.function != "logit":
            raise InvalidRequestError(
                "the classifier was trained for regression and has no probabilities; use function 'logit'",
                param="options.function",
            )
        self._max_length = _max_length(model.config, tokenizer, options.max_length)
        self._pad_token_id = _set_up_padding(model.config, tokenizer)
        self._lock = threading.Lock()

    @classmethod
    def load(cls, spec: RewardSpec, *, download: Callable[[str, str | None], Path] | None = None) -> Self:
        """Load the classifier from a local directory or, when the target is a hub id, from the hub or its cache.

        One input is scored, so that a model that cannot run, or has weights that are not finite, is refused here.

        Args:
            spec: Target and options.
            download: Brings a hub id at a revision onto this machine and returns its directory.

        Raises:
            InvalidRequestError: The options do not fit, or the classifier cannot be loaded.
        """
        options = parse_options(ClassifierOptions, spec, has_target=True)
        directory = _resolve(spec.target, options.revision, download or _download)
        _check_files(directory)
        model, tokenizer = _load(directory, options)
        reward = cls(spec.name, _hash(directory, options), model, tokenizer, options)
        try:
            reward.score([RewardInput(prompt="a", output="a")])
        except RewardError as exc:
            raise InvalidRequestError(
                f"the classifier in {directory} cannot score: {exc.message}", param="target"
            ) from exc
        return reward

    @property
    def name(self) -> str:
        """The name that routes and jobs use."""
        return self._name

    @property
    def version(self) -> str:
        """Changes whenever scores could change."""
        return self._version

    def score(self, inputs: Sequence[RewardInput]) -> list[float]:
        """One finite number per input, in order. Calls from several threads run one after the other.

        Raises:
            RewardError: The classifier failed, for example for want of memory, or gave NaN or Inf.
        """
        with self._lock:
            try:
                scores = self._score(inputs)
            except RewardError:
                raise
            # Not to be listed: tokenizers raises bare Exceptions, torch its own kinds for want of memory.
            except Exception as exc:
                raise RewardError(f"the reward {self._name!r} failed in its classifier: {type(exc).__name__}") from exc
        return check_scores(self._name, scores, len(inputs))

    def _score(self, inputs: Sequence[RewardInput]) -> list[float]:
        encoded = [self._encode(item) for item in inputs]
        by_length = sorted(range(len(inputs)), key=lambda i: len(encoded[i]["input_ids"]))
        batch_size = self._options.batch_size if self._pad_token_id is not None else 1
        scores = [0.0] * len(inputs)
        for start in range(0, len(by_length), batch_size):
            rows = by_length[start : start + batch_size]
            for i, score in zip(rows, self._forward([encoded[i] for i in rows]), strict=True):
                scores[i] = score
        return scores

    def _encode(self, item: RewardInput) -> dict[str, list[int]]:
        """Token ids of one input and what else the model takes per token, cut to the longest length."""
        tokenizer = self._tokenizer
        limits: dict[str, Any] = {"truncation": self._max_length is not None, "max_length": self._max_length}
        if self._options.template == "text_pair":
            encoded = tokenizer(item.prompt, item.output)
            if self._max_length is not None and len(encoded["input_ids"]) > self._max_length:
                without_prompt = tokenizer("", item.output)
                if len(without_prompt["input_ids"]) < self._max_length:
                    encoded = tokenizer(item.prompt, item.output, **limits | {"truncation": "only_first"})
                else:
                    encoded = tokenizer("", item.output, **limits | {"truncation": "only_second"})
        else:
            text = item.output if self._options.template == "output" else item.prompt + item.output
            encoded = tokenizer(text, **limits)
        if not encoded["input_ids"]:
            encoded = self._encode_nothing() | {
                key: [0] for key in encoded if key not in ("input_ids", "attention_mask")
            }
        return dict(encoded)

    def _encode_nothing(self) -> dict[str, list[int]]:
        """A text without tokens, for a tokenizer that adds none: its end or beginning token alone."""
        for token_id in (self._tokenizer.eos_token_id, self._tokenizer.bos_token_id):
            if token_id is not None:
                return {"input_ids": [token_id], "attention_mask": [1]}
        raise RewardError(f"the reward {self._name!r} cannot judge a text without tokens")

    def _forward(self, encoded: list[dict[str, list[int]]]) -> list[float]:
        import torch  # noqa: PLC0415

        width = max(len(row["input_ids"]) for row in encoded)
        fill = {"input_ids": self._pad_token_id or 0}
        tensors = {
            # Padded on the right: on the left it would move the absolute positions of some architectures.
            key: torch.tensor([row[key] + [fill.get(key, 0)] * (width - len(row[key])) for row in encoded])
            for key in encoded[0]
        }
        with torch.inference_mode():
            logits = self._model(**{key: t.to(self._model.device) for key, t in tensors.items()}).logits.float()
            if self._options.function == "logit":
                values = logits[:, self._label]
            else:
                log_probs = (
                    torch.nn.functional.logsigmoid(logits) if self._is_sigmoid else torch.log_softmax(logits, dim=-1)
                )[:, self._label]
                values = log_probs if self._options.function == "log_probability" else log_probs.exp()
            return [float(v) for v in values.tolist()]


def _resolve(target: str, revision: str | None, download: Callable[[str, str | None], Path]) -> Path:
    directory = Path(target).expanduser()
    if directory.is_dir():
        return directory
    if directory.is_absolute() or target.startswith((".", "~")) or _HUB_ID.fullmatch(target) is None:
        raise InvalidRequestError(f"there is no directory {target!r} on the gateway's machine", param="target")
    try:
        return download(target, revision)
    # The hub's own errors are OSErrors and ValueErrors.
    except (OSError, ValueError) as exc:
        raise InvalidRequestError(
            f"{target!r} is neither a directory on the gateway's machine nor available from the hub: {exc}",
            param="target",
        ) from exc


def _download(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415

    return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(_FILES), ignore_patterns=["*/*"]))


def _check_files(directory: Path) -> None:
    if not (directory / "config.json").is_file():
        raise InvalidRequestError(f"{directory} holds no config.json", param="target")
    if (directory / "adapter_config.json").exists():
        raise InvalidRequestError(
            f"{directory} holds a PEFT adapter; merge it into its base model and save the result", param="target"
        )
    if not any((directory / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        raise InvalidRequestError(
            f"{directory} holds no model.safetensors; weights in other formats are refused because loading a pickle "
            "can run code. Save the model again with save_pretrained",
            param="target",
        )


def _load(directory: Path, options: ClassifierOptions) -> tuple[Any, Any]:
    try:
        import torch  # noqa: PLC0415
        from transformers import AutoModelForSequenceClassification, AutoTokenizer  # noqa: PLC0415
    except ImportError as exc:
        raise InvalidRequestError(
            "a reward of kind 'hf_classifier' needs torch and transformers where the gateway runs: "
            "install the extra trimtab[engine]",
            param="kind",
        ) from exc
    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            directory,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=getattr(torch, options.dtype),
            output_loading_info=True,
        )
        model = model.to(device).eval()
    # Not to be listed: damaged files make tokenizers and safetensors raise direct children of Exception.
    except Exception as exc:
        raise InvalidRequestError(
            f"the classifier in {directory} cannot be loaded: {type(exc).__name__}: {exc}", param="target"
        ) from exc
    # transformers fills missing weights with random numbers; a reward made of those must never be served.
    if info["missing_keys"]:
        raise InvalidRequestError(
            f"{directory} is no trained sequence classifier: it has no weights for {sorted(info['missing_keys'])[:4]}",
            param="target",
        )
    tokenizer.truncation_side = "left"
    return model, tokenizer


def _label_index(config: Any, label: int | str | None) -> int:
    names = [str(config.id2label.get(i, i)) for i in range(config.num_labels)]
    if label is None:
        return len(names) - 1
    if isinstance(label, str) and label in names:
        return names.index(label)
    if isinstance(label, int) and 0 <= label < len(names):
        return label
    raise InvalidRequestError(
        f"the classifier has no label {label!r}; it has {', '.join(f'{i} ({name})' for i, name in enumerate(names))}",
        param="options.label",
    )


def _max_length(config: Any, tokenizer: Any, wanted: int | None) -> int | None:
    known = [tokenizer.model_max_length, getattr(config.get_text_config(), "max_position_embeddings", None)]
    limit = min((n for n in known if n is not None and 0 < n < _UNSET_LENGTH), default=None)
    if wanted is not None and limit is not None and wanted > limit:
        raise InvalidRequestError(
            f"max_length {wanted} is more than the {limit} tokens that the classifier can read",
            param="options.max_length",
        )
    return wanted if wanted is not None else limit


def _set_up_padding(config: Any, tokenizer: Any) -> int | None:
    """The id to pad with; None when there is no padding token, and inputs must be run one at a time.

    Decoder classifiers read the logits at the last token that is not the padding token, which they take from the
    configuration of the model, not of the tokenizer.
    """
    text_config = config.get_text_config()
    if text_config.pad_token_id is None:
        text_config.pad_token_id = tokenizer.pad_token_id
    pad_token_id: int | None = text_config.pad_token_id
    return pad_token_id


def _hash(directory: Path, options: ClassifierOptions) -> str:
    digest = hashlib.sha256()
    for path in sorted({path for pattern in _FILES for path in directory.glob(pattern)}):
        with path.open("rb") as file:
            digest.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    digest.update(options.model_dump_json(exclude={*LIMIT_NAMES, "batch_size", "device", "revision"}).encode())
    return digest.hexdigest()[:16]
