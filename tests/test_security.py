"""Rules that are checked in the source, and a secret that must not appear in anything a run leaves."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import pytest
from attacks import PWNED, SECRET, attacks, attempt
from conftest import FAST, ROOT

pytestmark = pytest.mark.share("reliability")
SOURCES = sorted((ROOT / "glmft").rglob("*.py"))
FORBIDDEN_CALLS = {
    **{"eval": "runs text as code", "exec": "runs text as code", "compile": "makes code of text"},
    **{
        "pickle.load": "runs code",
        "pickle.loads": "runs code",
        "yaml.load": "runs code",
        "yaml.unsafe_load": "runs code",
    },
    **{"os.system": "a shell", "os.popen": "a shell", "shutil.unpack_archive": "archives are not opened"},
    **{"numpy.load": "may unpickle", "np.load": "may unpickle"},
}
FORBIDDEN_MODULES = ("pickle", "cPickle", "dill", "marshal", "shelve")
READ_AS_DATA = (
    "control text",
    "_target_ in a run's",
    "secret asked by",
    "status that is",
    "metrics that are",
    "adapter setting target",
    "adapter setting corda_config",
)
ONE_PLACE = {"hydra.utils.instantiate": "config.py", "hydra.utils.call": "config.py"}


def name_of(node: ast.AST) -> str:
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def offences(file: Path, source: str) -> list[str]:
    """What the rules forbid in a file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        where = f"{file.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call):
            name = name_of(node.func)
            keywords = {k.arg: k.value for k in node.keywords}
            if name in FORBIDDEN_CALLS:
                found.append(f"{where}: {name}: {FORBIDDEN_CALLS[name]}")
            if name in ONE_PLACE and file.name != ONE_PLACE[name]:
                found.append(f"{where}: {name} belongs into {ONE_PLACE[name]}")
            if name == "torch.load" and getattr(keywords.get("weights_only"), "value", None) is not True:
                found.append(f"{where}: torch.load without weights_only=True")
            for keyword in ("shell", "allow_pickle", "trust_remote_code"):
                if keyword in keywords and getattr(keywords[keyword], "value", None) is not False:
                    found.append(f"{where}: {keyword}")
            if name.endswith(".extractall"):
                found.append(f"{where}: archives are not opened")
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [
            f"{where}: imports {n}"
            for n in names
            if n.split(".")[0] in ("pickle", "cPickle", "dill", "marshal", "shelve")
        ]
    return found


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: str(f.relative_to(ROOT)))
def test_the_source_keeps_the_rules(file):
    assert offences(file, file.read_text(encoding="utf-8")) == []


BREACHES = [
    *("eval('1')", "torch.load(f)", "torch.load(f, weights_only=False)", "import pickle", "from pickle import loads"),
    *("subprocess.run(c, shell=True)", "np.load(f)", "hydra.utils.instantiate(x)", "yaml.load(f)", "z.extractall()"),
    *("AutoModel.from_pretrained(p, trust_remote_code=True)", "numpy.load(f, allow_pickle=True)", "os.system(c)"),
]


@pytest.mark.parametrize("source", BREACHES)
def test_a_breach_is_found(source):
    assert offences(Path("x.py"), source)


@pytest.fixture(scope="module")
def victim(tiny, tmp_path_factory) -> Path:
    """A base and an adapter, as one finds them."""
    import torch

    from glmft.models import load_model
    from glmft.strategies.adapter import save_adapter
    from glmft.strategies.lora import LoRA

    place = tmp_path_factory.mktemp("victim")
    shutil.copytree(tiny, place / "tiny")
    torch.manual_seed(0)
    save_adapter(LoRA(r=4).apply(load_model(tiny, dtype="float32")), place / "adapter", "card")
    return place


def test_attacks_do_nothing(victim, tmp_path, monkeypatch):
    """Every attack ends in a refusal or in plain data; nothing was run, read or written outside."""
    monkeypatch.setenv("CANARY", SECRET)
    outside = tmp_path / "outside.txt"
    outside.write_text(SECRET)
    place = tmp_path / "place"
    names = []
    for name, attack in attacks(place):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(victim, place)
        monkeypatch.chdir(place)
        came = attempt(attack, place)
        assert SECRET not in came, name
        assert came.startswith("refused") or name.startswith(READ_AS_DATA), (name, came)
        assert not list(tmp_path.rglob(f"*{PWNED}*")), name
        assert outside.read_text() == SECRET, name
        names.append(name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["outside.txt", "place"]
    assert len(set(names)) == len(names) >= 60


def test_no_secret_in_anything_that_a_run_leaves(train, monkeypatch):
    canary = "c4n4ry" * 6 + "abcd"
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD"):
        monkeypatch.setenv(name, canary)
    result = train("run.name=a", *FAST, "logger=wandb", "logger.wandb.mode=offline")
    assert result.code == 0, result.err
    assert canary not in result.out + result.err
    files = [p for p in Path().rglob("*") if p.is_file()]
    assert any(p.suffix == ".wandb" for p in files)
    leaks = [str(p) for p in files if canary.encode() in p.read_bytes()]
    assert leaks == []


def test_code_in_a_runs_own_files_is_never_made_an_object(train):
    """A run directory may come from somebody else: its configuration is compared, not instantiated."""
    assert train("run.name=a", *FAST).code == 0
    config = Path("runs/a/.hydra/config.yaml")
    config.write_text(config.read_text() + "evil:\n  _target_: os.system\n  command: touch EXECUTED\n")
    Path("runs/a/status.json").unlink()
    train("run.name=a", *FAST)
    assert not Path("EXECUTED").exists()


def test_a_run_name_or_data_set_stays_in_its_place(train):
    for name in ("../x", "a/b", "..", ".", "a\nb", "/etc/x"):
        assert train(f"run.name='{name}'", *FAST).code == 2
    assert not Path("x").exists()
