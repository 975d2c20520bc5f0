"""Tiny random models over a word-level vocabulary of 64 tokens, built in memory."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from trimtab_adapters.contract.manifest import Manifest, read_manifest
from trimtab_adapters.contract.records import Rollout
from trimtab_adapters.contract.rewards import RewardInput
from trimtab_adapters.contract.rollout_filter import RolloutFilter, select_rollouts
from trimtab_training.config import TrainConfig, parse_config
from trimtab_training.gateway import GatewayClient, ScoreReply
from trimtab_training.models import Vocabulary, load_vocabulary

NUM_TOKENS = 64
LUCKY = 7


def tiny_llama(*, seed: int, tied: bool = True, vocab_size: int = NUM_TOKENS, hidden_size: int = 32) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def tiny_gpt2(*, seed: int, vocab_size: int = NUM_TOKENS) -> Any:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocab_size, n_positions=128, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        model.transformer.wte.weight.mul_(10.0)  # far from uniform, so that wrong positions show
        model.transformer.wpe.weight.mul_(10.0)
    return model


def write_tokenizer(directory: Path, num_tokens: int = NUM_TOKENS) -> None:
    vocabulary = {"<eos>": 0, **{f"t{i}": i for i in range(1, num_tokens)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(directory / "tokenizer.json"))


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`base` and `adapter` (Llama, tied), `untied` (Llama) and `gpt2`, each with the tokenizer."""
    root = tmp_path_factory.mktemp("models")
    built = {
        "base": tiny_llama(seed=1),
        "adapter": tiny_llama(seed=2, hidden_size=16),
        "untied": tiny_llama(seed=3, tied=False),
        "gpt2": tiny_gpt2(seed=4),
    }
    for name, model in built.items():
        model.save_pretrained(root / name)
        write_tokenizer(root / name)
    return {name: root / name for name in built}


@pytest.fixture(scope="session")
def vocabulary(model_dirs: dict[str, Path]) -> Vocabulary:
    return load_vocabulary(model_dirs["base"])


class LuckyScorer:
    """Reward: the share of token 7 among the words of the output."""

    name = "lucky"

    def score(self, inputs: Any) -> ScoreReply:
        def share(item: RewardInput) -> float:
            words = item.output.split()
            return words.count(f"t{LUCKY}") / max(1, len(words))

        return ScoreReply(rewards=[share(item) for item in inputs], version="1")


@pytest.fixture
def lucky_scorer() -> LuckyScorer:
    return LuckyScorer()


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": " ".join(f"t{j}" for j in range(i, i + 1 + i % 3))}) for i in range(10, 50)]
    path.write_text("\n".join(lines) + "\n")
    return path


MakeConfig = Callable[..., TrainConfig]


@pytest.fixture
def make_config(tmp_path: Path, model_dirs: dict[str, Path], prompt_file: Path) -> MakeConfig:
    """A small local run; keyword arguments update its sections, except `prompts`, which they replace."""

    def make(**changes: Any) -> TrainConfig:
        data: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"),
            "models": {"base_model": str(model_dirs["base"]), "adapter": str(model_dirs["adapter"])},
            "reward": {"name": "lucky", "source": "local"},
            "prompts": {"type": "file", "path": str(prompt_file)},
            "publish": {"name": "lucky"},
            "logged": {"enabled": False},
            "fresh": {"source": "local", "interval": 5, "min_pool_size": 1},
            "sampling": {"max_tokens": 6},
            "optimiser": {"batch_size": 8, "lr": 1e-3},
            "evaluation": {"share": 0.25, "num_resamples": 100, "num_per_prompt": 2},
            "report": {"plots": False},
            "steps": 10,
            "log_every": 1,
        }
        for key, value in changes.items():
            is_update = key != "prompts" and isinstance(value, dict) and isinstance(data.get(key), dict)
            data[key] = {**data[key], **value} if is_update else value
        return parse_config(data)

    return make


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Any:
    """Tiny models gain nothing from threads, and wait long for them on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class FakeGateway:
    """The gateway's side of the calls that training makes, for `httpx.MockTransport`. Outputs are seeded noise."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, Any]] = []
        self.answers: list[httpx.Response | Exception] = []
        self.rollouts: list[str] = []
        self.engine: dict[str, Any] | None = None
        self.versions: dict[str, Manifest] = {}
        self.retired: list[str] = []
        self.routes: dict[str, Any] = {}
        self.jobs: list[dict[str, Any]] = []
        self.job_state = "running"
        self.finished: list[dict[str, Any]] = []
        self.released: list[dict[str, Any]] = []
        self.heartbeats: list[dict[str, Any]] = []
        self.lock = threading.Lock()
        self.on_request: Callable[[str], None] = lambda path: None

    def client(self, **settings: Any) -> GatewayClient:
        """A client of this gateway."""
        settings = {"admin_key": "admin", "concurrency": 4, "retry_for_s": 0.0, **settings}
        return GatewayClient("http://gateway", transport=httpx.MockTransport(self.handle), **settings)

    def bodies(self, path: str) -> list[Any]:
        """The bodies sent to one path."""
        return [body for _, sent_to, body in self.requests if sent_to == path]

    def handle(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        with self.lock:
            body = json.loads(request.content) if request.content else dict(request.url.params)
            self.requests.append((request.headers.get("authorization", ""), path, body))
            self.on_request(path)
            if self.answers:
                answer = self.answers.pop(0)
                if isinstance(answer, Exception):
                    raise answer
                return answer
            return self._answer(path, body)

    def _answer(self, path: str, body: Any) -> httpx.Response:
        match path.strip("/").split("/"):
            case ["v1", "completions"]:
                return httpx.Response(200, json={"choices": self._choices(body)})
            case ["admin", "rollouts", "export"]:
                return httpx.Response(200, text="".join(line + "\n" for line in self._selected(body)))
            case ["admin", "engines"]:
                return httpx.Response(200, json={"data": [{"status": self.engine}]})
            case ["admin", "rewards", _, "score"]:
                rewards = [item["output"].split().count(f"t{LUCKY}") for item in body["inputs"]]
                return httpx.Response(200, json={"name": "lucky", "version": "9", "rewards": rewards})
            case ["admin", "adapters"]:
                manifest = read_manifest(Path(body["path"]))
                self.versions[manifest.version_id] = manifest
                return httpx.Response(200, json={"name": body["name"], "version": manifest.version_id, "path": "/"})
            case ["admin", "adapters", _, "versions", version, "retire"]:
                self.retired.append(version)
                return httpx.Response(200, json={})
            case ["admin", "routes", route] if route in self.routes:
                return httpx.Response(200, json=self.routes[route])
            case ["admin", "routes", route, "promote"] if route in self.routes:
                return httpx.Response(200, json={})
            case ["admin", "routes", route, "activate"]:
                self.routes[route] = body
                return httpx.Response(200, json={})
            case ["admin", "training-jobs", "claim"]:
                return httpx.Response(200, json=self.jobs.pop(0)) if self.jobs else httpx.Response(204)
            case ["admin", "training-jobs", job, "heartbeat"]:
                self.heartbeats.append(body)
                return httpx.Response(200, json={"id": job, "state": self.job_state, "config": {}, "worker": "w"})
            case ["admin", "training-jobs", job, "release"]:
                self.released.append({"id": job, **body})
                return httpx.Response(200, json={"id": job, "state": "queued"})
            case ["admin", "training-jobs", job, "finish"]:
                self.finished.append({"id": job, **body})
                return httpx.Response(200, json={"id": job, "state": body["state"]})
        return httpx.Response(404, json={"error": {"message": f"no {path}", "code": "unknown_url"}})

    def _selected(self, query: dict[str, str]) -> list[str]:
        """The log's lines that a query selects; without conditions they are not even looked at."""
        where = RolloutFilter.model_validate({name: value for name, value in query.items() if name != "format"})
        if where == RolloutFilter():
            return self.rollouts
        lines = {json.loads(line)["id"]: line for line in self.rollouts}
        found = select_rollouts((Rollout.model_validate_json(line) for line in self.rollouts), where)
        return [lines[rollout.id] for rollout in found]

    def _choices(self, body: Any) -> list[Any]:
        prompt = body["prompt"]
        ids = [int(word[1:]) for word in prompt.split()] if isinstance(prompt, str) else prompt
        for term in body["steering"]["adapters"]:
            assert term["version"] in self.versions
            assert term["version"] not in self.retired
        choices = []
        for index in range(body["n"]):
            generator = torch.Generator().manual_seed(body["seed"] + index)
            tokens = torch.randint(1, 12, (4,), generator=generator).tolist()
            choice = {"text": " ".join(f"t{t}" for t in tokens), "token_ids": tokens, "prompt_token_ids": ids}
            choices.append({**choice, "index": index, "finish_reason": "length"})
        return choices[::-1]  # an order that nobody may rely on


@pytest.fixture
def gateway() -> FakeGateway:
    return FakeGateway()


@pytest.fixture(scope="session")
def toy_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`base_model` and `adapter` over 16 tokens, so that rewards on one token are not too rare to learn from."""
    root = tmp_path_factory.mktemp("toy")
    built = {
        "base_model": tiny_llama(seed=1, vocab_size=16),
        "adapter": tiny_llama(seed=2, vocab_size=16, hidden_size=16),
    }
    for name, model in built.items():
        model.save_pretrained(root / name)
        write_tokenizer(root / name, 16)
    return {name: root / name for name in built}
