"""The published ChatGLM3 layout: config.json's keys, the tensors they imply, and a check of the files on disk.

Reads only JSON and safetensors headers, so that a wrong folder is refused in milliseconds, before torch is imported.

Shapes: V rows of the vocabulary, H hidden, F feed-forward, Q = heads x kv_channels, K = groups x kv_channels.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from glmft.errors import DamagedError, ProblemList, UserError, nearest
from glmft.files import read_json

SAMPLED = 65_536  # bytes of a file that the fingerprint reads at a time
HEADER_LIMIT = 100_000_000  # bytes, the limit of the safetensors format
INV_FREQ = "transformer.rotary_pos_emb.inv_freq"
FIXED_FLAGS = {  # the only values that ChatGLM3 was published with
    "rmsnorm": True,
    "post_layer_norm": True,
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "original_rope": True,
    "multi_query_attention": True,
    "apply_residual_connection_post_layernorm": False,
    "fp32_residual_connection": False,
    "tie_word_embeddings": False,
    "prefix_projection": False,
    "quantization_bit": 0,
    "pre_seq_len": None,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
}


@dataclass(frozen=True, slots=True)
class PublishedConfig:
    """config.json in the published key names. Units: tokens for seq_length, features for the rest."""

    num_layers: int
    padded_vocab_size: int
    hidden_size: int
    ffn_hidden_size: int
    kv_channels: int
    num_attention_heads: int
    multi_query_group_num: int
    seq_length: int
    layernorm_epsilon: float = 1e-5
    rope_ratio: float = 1.0
    torch_dtype: str = "float16"
    raw: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def query_rows(self) -> int:
        """Q."""
        return self.num_attention_heads * self.kv_channels

    @property
    def group_rows(self) -> int:
        """K."""
        return self.multi_query_group_num * self.kv_channels

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every published tensor name with its shape (without `inv_freq`, which is computed)."""
        h, f, q, k = self.hidden_size, self.ffn_hidden_size, self.query_rows, self.group_rows
        shapes: dict[str, tuple[int, ...]] = {
            "transformer.embedding.word_embeddings.weight": (self.padded_vocab_size, h),
            "transformer.encoder.final_layernorm.weight": (h,),
            "transformer.output_layer.weight": (self.padded_vocab_size, h),
        }
        for n in range(self.num_layers):
            layer = f"transformer.encoder.layers.{n}."
            shapes |= {
                layer + "input_layernorm.weight": (h,),
                layer + "self_attention.query_key_value.weight": (q + 2 * k, h),
                layer + "self_attention.query_key_value.bias": (q + 2 * k,),
                layer + "self_attention.dense.weight": (h, q),
                layer + "post_attention_layernorm.weight": (h,),
                layer + "mlp.dense_h_to_4h.weight": (2 * f, h),
                layer + "mlp.dense_4h_to_h.weight": (h, f),
            }
        return shapes

    def glm_tensors(self) -> dict[str, tuple[int, ...]]:
        """The same for transformers' own layout (`glm_hf`)."""
        h, f = self.hidden_size, self.ffn_hidden_size
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.padded_vocab_size, h),
            "model.norm.weight": (h,),
            "lm_head.weight": (self.padded_vocab_size, h),
        }
        for n in range(self.num_layers):
            layer = f"model.layers.{n}."
            for name, rows in (("q", self.query_rows), ("k", self.group_rows), ("v", self.group_rows)):
                shapes[f"{layer}self_attn.{name}_proj.weight"] = (rows, h)
                shapes[f"{layer}self_attn.{name}_proj.bias"] = (rows,)
            shapes |= {
                layer + "self_attn.o_proj.weight": (h, self.query_rows),
                layer + "mlp.gate_up_proj.weight": (2 * f, h),
                layer + "mlp.down_proj.weight": (h, f),
                layer + "input_layernorm.weight": (h,),
                layer + "post_attention_layernorm.weight": (h,),
            }
        return shapes

    def to_json(self) -> dict[str, Any]:
        """config.json as published, ready to be written; keys of the source that glmft does not use are kept,
        except those that would ask for remote code."""
        kept = {k: v for k, v in self.raw.items() if k not in ("auto_map", "dtype")}
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "raw"}
        if self.rope_ratio == 1.0 and "rope_ratio" not in self.raw:
            del own["rope_ratio"]
        base = {
            "model_type": "chatglm",
            "architectures": ["ChatGLMModel"],
            "eos_token_id": 2,
            "pad_token_id": 0,
            "use_cache": True,
        }
        return base | {k: v for k, v in FIXED_FLAGS.items() if v is not None} | kept | own


def read_config(folder: Path) -> tuple[PublishedConfig, str]:
    """(configuration, layout) of a model folder; the layout is "chatglm" (published) or "glm_hf".

    Raises:
        UserError: no folder, no config.json, or a relative of ChatGLM3 that is not supported, by name.
        DamagedError: config.json is not JSON.
    """
    file = folder / "config.json"
    if not folder.is_dir() or not file.is_file():
        raise UserError(f"model.path={folder}: {'no config.json in it' if folder.is_dir() else 'no such folder'}")
    try:
        raw = read_json(file)
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise DamagedError(f"{file}: not JSON ({e}); fetch it again") from None
    if not isinstance(raw, dict):
        raise DamagedError(f"{file}: holds {type(raw).__name__}, expected an object")
    _refuse_relatives(file, raw)
    if raw.get("model_type") == "glm":
        return _from_glm(file, raw), "glm_hf"
    return _from_published(file, raw), "chatglm"


def _refuse_relatives(file: Path, raw: dict[str, Any]) -> None:
    name = str(raw.get("_name_or_path", "")).lower()
    kind = raw.get("model_type")
    if "max_sequence_length" in raw or "inner_hidden_size" in raw or "position_encoding_2d" in raw:
        what = "ChatGLM-6B (first generation)"
    elif "chatglm2" in name:
        what = "ChatGLM2 (same layout, another chat template)"
    elif raw.get("padded_vocab_size") == 151552 or raw.get("vocab_size") == 151552 or "glm-4" in name:
        what = "GLM-4 (another tokenizer)"
    elif kind not in ("chatglm", "glm"):
        what = f"model_type {kind!r}"
    else:
        return
    raise UserError(f"{file}: this is {what}; glmft supports ChatGLM3-6B, -base, -32k and -128k")


def _from_published(file: Path, raw: dict[str, Any]) -> PublishedConfig:
    problems = []
    for key, wanted in FIXED_FLAGS.items():
        if key in raw and raw[key] != wanted and not (wanted == 0 and raw[key] is None):
            problems.append(f"{key} is {raw[key]!r}, ChatGLM3 has {wanted!r}")
    values: dict[str, Any] = {}
    for f in fields(PublishedConfig):
        if f.name == "raw" or (f.name not in raw and f.name in ("layernorm_epsilon", "rope_ratio", "torch_dtype")):
            continue
        value = raw.get(f.name)
        if f.name not in raw:
            problems.append(f"{f.name} is missing{nearest(f.name, raw)}")
        elif f.name != "torch_dtype" and (isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0):
            problems.append(f"{f.name} is {value!r}, a positive number is expected")
        else:
            values[f.name] = value
    if "torch_dtype" not in values and "dtype" in raw:
        values["torch_dtype"] = raw["dtype"]
    if problems:
        raise ProblemList(f"{file}: not a ChatGLM3 configuration", problems)
    return PublishedConfig(**values, raw=raw)


def _from_glm(file: Path, raw: dict[str, Any]) -> PublishedConfig:
    rope = raw.get("rope_parameters") or {"rope_theta": raw.get("rope_theta", 10000.0)}
    try:
        return PublishedConfig(
            num_layers=raw["num_hidden_layers"],
            padded_vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            ffn_hidden_size=raw["intermediate_size"],
            kv_channels=raw["head_dim"],
            num_attention_heads=raw["num_attention_heads"],
            multi_query_group_num=raw["num_key_value_heads"],
            seq_length=raw["max_position_embeddings"],
            layernorm_epsilon=raw["rms_norm_eps"],
            rope_ratio=rope["rope_theta"] / 10000.0,
            torch_dtype=raw.get("dtype", raw.get("torch_dtype", "float16")),
        )
    except KeyError as e:
        raise UserError(f"{file}: {e.args[0]} is missing, not a configuration of GlmForCausalLM") from None


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """Where the weights lie. `shapes` is empty for `pytorch_model-*.bin`, which have no readable header."""

    files: tuple[Path, ...]
    shapes: dict[str, tuple[int, ...]]
    format: str  # "safetensors" or "bin"

    @property
    def num_bytes(self) -> int:
        return sum(f.stat().st_size for f in self.files)


def find_weights(folder: Path) -> WeightFiles:
    """The weight files of a folder, complete, with their tensors' shapes from the headers.

    Raises:
        UserError: there are no weights, or a shard of the index is missing (all missing ones are named).
        DamagedError: a shard is shorter than its header says, or has no readable header.
    """
    for pattern, kind in (("model.safetensors", "safetensors"), ("pytorch_model.bin", "bin")):
        index = folder / f"{pattern}.index.json"
        if index.is_file():
            try:
                names = sorted(set(read_json(index)["weight_map"].values()))
            except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as e:
                raise DamagedError(f"{index}: not an index of shards ({e!r}); fetch it again") from None
            if bad := [n for n in names if Path(n).name != n]:
                raise UserError(f"{index}: names files outside its folder: {', '.join(bad)}")
        elif (folder / pattern).is_file():
            names = [pattern]
        else:
            continue
        files = tuple(folder / n for n in names)
        if missing := [f.name for f in files if not f.is_file()]:
            raise UserError(f"{folder}: {len(missing)} of {len(files)} shards are missing: {', '.join(missing)}")
        shapes = {} if kind == "bin" else {k: s for f in files for k, s in read_header(f).items()}
        return WeightFiles(files, shapes, kind)
    raise UserError(f"{folder}: no weights; expected model.safetensors(.index.json) or pytorch_model.bin(.index.json)")


def read_header(file: Path) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of a safetensors file.

    Raises:
        DamagedError: the header is unreadable, or the file is shorter or longer than the header says.
    """
    size = file.stat().st_size
    with file.open("rb") as f:
        head = f.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
        if not 0 < length <= min(HEADER_LIMIT, size - 8):
            raise DamagedError(f"{file}: {size} bytes with no readable safetensors header; fetch it again")
        try:
            header = json.loads(f.read(length))
            tensors = {k: v for k, v in header.items() if k != "__metadata__"}
            shapes = {k: tuple(v["shape"]) for k, v in tensors.items()}
            end = 8 + length + max((v["data_offsets"][1] for v in tensors.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DamagedError(f"{file}: its safetensors header is not valid JSON; fetch it again") from None
    if size != end:
        raise DamagedError(f"{file}: {size} bytes, its header says {end}: a truncated download; fetch it again")
    return shapes


def tensor_differences(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Everything missing, unexpected or misshapen, by names and shapes."""
    problems = [f"missing {k}, shape {list(s)}" for k, s in expected.items() if k not in found]
    problems += [f"unexpected {k}" for k in found if k not in expected]
    return problems + [
        f"{k} has shape {list(found[k])}, expected {list(s)}"
        for k, s in expected.items()
        if k in found and found[k] != s
    ]


def check_tensors(where: Path, found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    """Compares names and shapes; everything missing, unexpected or misshapen is named together.

    Raises:
        ProblemList: any difference (`inv_freq` may be there or not).
    """
    named = {k: s for k, s in found.items() if k in expected or not k.endswith("rotary_pos_emb.inv_freq")}
    if problems := tensor_differences(named, expected):
        raise ProblemList(f"{where}: the weights do not fit config.json", problems)


def check_folder(folder: Path) -> tuple[PublishedConfig, str, WeightFiles]:
    """Configuration, layout and weight files of a folder, compared with each other and with the tokenizer's size."""
    config, layout = read_config(folder)
    weights = find_weights(folder)
    if weights.shapes:
        check_tensors(folder, weights.shapes, config.tensors() if layout == "chatglm" else config.glm_tensors())
    return config, layout, weights


def fingerprint(folder: Path) -> str:
    """16 hex digits that tell this model from another: configuration, tensor names and shapes, and 64 KiB from the
    start, the middle and the end of every weight file. Not proof against someone who wants to deceive."""
    digest = hashlib.sha256()
    config, _, weights = check_folder(folder)
    digest.update(repr((config, sorted(weights.shapes.items()))).encode())
    for file in weights.files:
        size = file.stat().st_size
        with file.open("rb") as f:
            for start in (0, size // 2, max(size - SAMPLED, 0)):
                f.seek(start)
                digest.update(f.read(SAMPLED))
    return digest.hexdigest()[:16]


def check_tokenizer(num_tokens: int, config: PublishedConfig, folder: Path) -> None:
    """The published table is padded by at most a few hundred rows: a tokenizer of another size is another model's.

    Raises:
        UserError: the tokenizer does not fit the model's vocabulary.
    """
    spare = config.padded_vocab_size - num_tokens
    if not 0 <= spare < 1024:
        raise UserError(
            f"{folder / 'tokenizer.model'}: {num_tokens} tokens, but the model has {config.padded_vocab_size} rows; "
            "this is not the model's tokenizer"
        )


_LINEAR = re.compile(r"^model\.layers\.\d+\.\w+\.(\w+)\.weight$")


def linear_shapes(config: PublishedConfig) -> dict[str, tuple[int, int]]:
    """Linear layers of one decoder layer by GLM's names: `q_proj` -> (out, in)."""
    shapes = {}
    for name, shape in config.glm_tensors().items():
        if (match := _LINEAR.match(name)) and len(shape) == 2:
            shapes[match[1]] = (shape[0], shape[1])
    return shapes
