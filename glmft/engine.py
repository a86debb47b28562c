"""One set of weights that answers as the base and as its adapters, side by side in one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftModel
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from glmft.artefacts import verify_if_listed
from glmft.errors import DamagedError, UserError
from glmft.files import read_json
from glmft.messages import Message
from glmft.models.generation import left_padded
from glmft.models.hub import find_local
from glmft.models.loading import glm, load_model
from glmft.models.scoring import Pair, Scores, score_answers
from glmft.models.tokenizer import load_tokenizer
from glmft.strategies.adapter import CONFIG, add_adapter, load_adapter
from glmft.strategies.combining import MOVE_THE_BASE

BASE = "base"


@dataclass(frozen=True)
class Tuned:
    """What a run, an adapter folder or a model folder holds. `adapter` is a folder, `model` a whole tuned model."""

    name: str
    base: str
    adapter: Path | None = None
    model: Path | None = None


def find_tuned(source: str, base: str | None = None) -> Tuned:
    """A run (its folder, or its name in ./runs), an adapter folder, or a model.

    Raises:
        UserError: it is none of these, or a run that left nothing yet.
    """
    given = Path(source).expanduser()
    if not given.exists() and given.parent != Path() and given.parent.is_dir():
        raise UserError(f"{source}: no run, adapter or model of this name in {given.parent}")
    folder = next((p for p in (given, Path("runs") / source) if p.is_dir()), None)
    if folder is None or (folder / "config.json").is_file():
        if folder is None and find_local(source) is None and "/" not in source:
            raise UserError(f"{source}: no run, adapter or model of this name (tried {given}, runs/{source})")
        return Tuned(BASE, source)
    if (folder / CONFIG).is_file():
        return Tuned(folder.parent.name if folder.name == "adapter" else folder.name, base or _base_of(folder), folder)
    if not (folder / ".hydra" / "config.yaml").is_file():
        raise UserError(f"{folder}: neither a run, nor an adapter folder ({CONFIG}), nor a model (config.json)")
    adapter, model = folder / "adapter", folder / "model"
    if adapter.is_dir():
        return Tuned(folder.name, base or _base_of(adapter), adapter)
    if model.is_dir():
        return Tuned(folder.name, base or _model_of(folder), model=model)
    raise UserError(f"{folder}: this run left no adapter/ or model/ yet; the same command finishes it")


def asked_of_run(run: Path) -> dict[str, Any]:
    """The configuration that a run was made with, as plain values: nothing in it is resolved or made an object.

    Raises:
        DamagedError: it is missing or broken.
    """
    file = run / ".hydra" / "config.yaml"
    try:
        return dict(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, yaml.YAMLError) as e:
        raise DamagedError(f"{file}: cannot be read ({type(e).__name__}); --model") from None


def _model_of(run: Path) -> str:
    try:
        return str(asked_of_run(run)["model"]["path"])
    except (KeyError, TypeError) as e:
        raise DamagedError(f"{run}: its configuration names no model ({type(e).__name__}); --model") from None


def one_base(tuned: Sequence[Tuned]) -> str:
    """The base that all share.

    Raises:
        UserError: there are several.
    """
    bases = {t.base for t in tuned}
    if len(bases) != 1:
        raise UserError(f"adapters of several base models: {', '.join(sorted(bases))}; give --model")
    return bases.pop()


def _base_of(adapter: Path) -> str:
    try:
        base = read_json(adapter / CONFIG)["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise DamagedError(f"{adapter / CONFIG}: does not name its base model ({type(e).__name__}); --model") from None
    return str(base)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: greedy where `temperature` is 0. `seed` makes sampling repeatable."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 0.8
    top_k: int = 50
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        wrong = [
            *(["max_new_tokens must be 1 or more"] if self.max_new_tokens < 1 else []),
            *(["temperature must be 0 to 5"] if not 0 <= self.temperature <= 5 else []),
            *(["top_p must be above 0, at most 1"] if not 0 < self.top_p <= 1 else []),
            *(["top_k must be 0 or more"] if self.top_k < 0 else []),
            *(["seed must be 0 to 2^63 - 1"] if self.seed is not None and not 0 <= self.seed < 2**63 else []),
            *(["repetition_penalty must be above 0"] if self.repetition_penalty <= 0 else []),
        ]
        if wrong:
            raise UserError("sampling: " + "; ".join(wrong))


@dataclass
class Reply:
    """One answer. `stopped` says why it ended: "end", "length" or "cancelled"."""

    voice: str
    message: Message
    ids: list[int] = field(default_factory=list)
    stopped: str = "end"


def checked_device(name: str) -> str:
    """The device, if it can be used; "auto" is the GPU where there is one.

    Raises:
        UserError: an unknown name, or a GPU that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"device '{name}': {str(e).splitlines()[0]}") from None
    return name


def moves_the_base(adapter: Path) -> str:
    """The initialisation that changes the base's own weights, as PiSSA and OLoRA do, or an empty text."""
    init = read_json(adapter / CONFIG).get("init_lora_weights")
    return init if isinstance(init, str) and init.startswith(MOVE_THE_BASE) else ""


Watch = Callable[[int, Message], bool]  # row and what it says so far; false ends the answer


class Engine:
    """Voices that can be asked: "base", and each adapter or tuned model by its name.

    Args:
        tuned: what is loaded; their base must be the same, but for whole models.
        dtype, device: of the weights; "auto" is the files' own, and the GPU where there is one.

    Raises:
        UserError, DamagedError, ProblemList: see `load_model` and `load_adapter`.
    """

    def __init__(self, tuned: Sequence[Tuned], dtype: str = "auto", device: str = "auto") -> None:
        device = checked_device(device)
        base = load_model(one_base(tuned), dtype=dtype, device=device).eval()
        self.base_fingerprint = str(base.base_fingerprint)
        self.tokenizer = load_tokenizer(base.source_folder)
        self.voices: dict[str, tuple[Any, str | None]] = {BASE: (base, None)}
        model: Any = base
        for i, t in enumerate(tuned):
            if t.name == BASE and (t.adapter or t.model):
                t = replace(t, name=f"{BASE} (tuned)")
            if t.name in self.voices and t.name != BASE:
                raise UserError(f"two voices are called '{t.name}'; rename one of the folders")
            inside = f"voice{i}"  # PEFT takes no dots in names
            if t.adapter is not None:
                if moved := moves_the_base(t.adapter):
                    raise UserError(
                        f"{t.adapter}: init_lora_weights={moved} moves the base's weights, so the base cannot answer "
                        "beside it; glmft export merges it into a model of its own"
                    )
                loading = add_adapter if isinstance(model, PeftModel) else load_adapter
                model = loading(model, t.adapter, inside)
                self.voices[t.name] = (model, inside)
            elif t.model is not None:
                verify_if_listed(t.model)
                self.voices[t.name] = (load_model(t.model, dtype=dtype, device=device).eval(), None)
        self.voices[BASE] = (model, None)
        self.limit: int = glm(model).config.max_position_embeddings

    @property
    def names(self) -> list[str]:
        """Of the voices, the base first."""
        return list(self.voices)

    def reply(
        self, asked: Sequence[tuple[str, Sequence[Message]]], sampling: Sampling, watch: Watch | None = None
    ) -> list[Reply]:
        """Answers of voices to conversations, in order; those of one set of weights share a batch.

        Raises:
            UserError: a voice is unknown, or a conversation leaves no room for an answer.
        """
        if unknown := [v for v, _ in asked if v not in self.voices]:
            raise UserError(f"'{unknown[0]}' is not loaded; there are {', '.join(self.names)}")
        prompts = [self.tokenizer.encode_prompt(messages) for _, messages in asked]
        if (longest := max(map(len, prompts))) >= self.limit:
            raise UserError(f"the conversation is {longest} tokens long, the model reads {self.limit}; begin a new one")
        out: dict[int, Reply] = {}
        groups: dict[tuple[int, str | None, int], list[int]] = {}
        for i, (voice, _) in enumerate(asked):
            model, adapter = self.voices[voice]
            alone = adapter if _needs_a_pass_of_its_own(model) else ""
            tight = len(prompts[i]) + sampling.max_new_tokens > self.limit  # would shorten the others' answers
            groups.setdefault((id(model), alone, i if tight else -1), []).append(i)
        for rows in groups.values():
            voices = [asked[i][0] for i in rows]
            found = self._generate(voices, [prompts[i] for i in rows], sampling, _rows_of(watch, rows))
            out |= dict(zip(rows, found, strict=True))
        return [out[i] for i in range(len(asked))]

    @contextmanager
    def speaking(self, voice: str) -> Iterator[Any]:
        """The model, with this voice's adapter on or off, for programs that ask it themselves."""
        model, adapter = self.voices[voice]
        with _speaking(model, [adapter]):
            yield model

    def score(self, voice: str, pairs: Sequence[Pair]) -> Scores:
        """How likely answers are under a voice: pairs of (prompt ids, answer ids)."""
        with self.speaking(voice) as model:
            return score_answers(model, pairs, self.tokenizer.pad_id)

    @torch.inference_mode()
    def _generate(
        self, voices: Sequence[str], prompts: Sequence[Sequence[int]], sampling: Sampling, watch: Watch | None
    ) -> list[Reply]:
        model = self.voices[voices[0]][0]
        device = next(model.parameters()).device
        ids, mask = left_padded(prompts, self.tokenizer.pad_id, device)
        follower = _Follower(self, voices, sampling, watch)
        options: dict[str, Any] = {"do_sample": False}
        if sampling.temperature:
            options = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
            options["top_k"] = sampling.top_k
            torch.manual_seed(torch.seed() % 2**63 if sampling.seed is None else sampling.seed)
        adapters = [self.voices[v][1] for v in voices]
        with _speaking(model, adapters) as chosen:
            model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=min(sampling.max_new_tokens, self.limit - ids.shape[1]),
                repetition_penalty=sampling.repetition_penalty,
                pad_token_id=self.tokenizer.pad_id,
                eos_token_id=self.tokenizer.stop_ids,
                streamer=follower,
                stopping_criteria=StoppingCriteriaList([follower]),
                **options,
                **chosen,
            )
        return follower.replies()


def _rows_of(watch: Watch | None, rows: Sequence[int]) -> Watch | None:
    return None if watch is None else lambda row, message: watch(rows[row], message)


def _needs_a_pass_of_its_own(model: Any) -> bool:
    """PEFT refuses DoRA beside other adapters in one batch."""
    return isinstance(model, PeftModel) and any(c.use_dora for c in model.peft_config.values())  # type: ignore[attr-defined]


class _speaking:
    """Switches a model to the adapters of a batch; gives what `generate` has to be told."""

    def __init__(self, model: Any, adapters: Sequence[str | None]) -> None:
        self.model, self.adapters = model, adapters
        self._off: Any = None

    def __enter__(self) -> dict[str, Any]:
        if not isinstance(self.model, PeftModel):
            return {}
        if len(set(self.adapters)) > 1:
            return {"adapter_names": [a or "__base__" for a in self.adapters]}
        if self.adapters[0] is None:
            self._off = self.model.disable_adapter()
            self._off.__enter__()
        else:
            self.model.set_adapter(self.adapters[0])
        return {}

    def __exit__(self, *error: Any) -> None:
        if self._off is not None:
            self._off.__exit__(*error)


class _Follower(BaseStreamer, StoppingCriteria):  # type: ignore[misc]
    """Takes tokens as they come, and ends rows that nobody wants to hear any more."""

    def __init__(self, engine: Engine, voices: Sequence[str], sampling: Sampling, watch: Watch | None) -> None:
        self.tokenizer, self.voices, self.watch = engine.tokenizer, voices, watch
        self.rows: list[list[int]] = [[] for _ in voices]
        self.stopped = ["length"] * len(voices)
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        """First the prompts [B, S], then a token of each row [B]."""
        if self._prompt:
            self._prompt = False
            return
        for row, token in enumerate(value.tolist()):
            if self.stopped[row] != "length":
                continue
            if token in self.tokenizer.stop_ids:
                self.stopped[row] = "end"
                continue
            self.rows[row].append(token)
            if self.watch and not self.watch(row, self.tokenizer.parse_beginning(self.rows[row])):
                self.stopped[row] = "cancelled"

    def end(self) -> None:
        """Nothing is left to flush."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.tensor([s != "length" for s in self.stopped], device=input_ids.device)

    def replies(self) -> list[Reply]:
        """What was said."""
        said = zip(self.voices, self.rows, self.stopped, strict=True)
        return [Reply(v, self.tokenizer.parse_reply(ids), ids, stopped) for v, ids, stopped in said]
