"""No module of the program has the means to execute what it reads."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXECUTING = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
FORBIDDEN = ("eval", "exec", "compile", "__import__", "os.system", "os.popen")
LOADS_OF_YAML = ("yaml.load", "yaml.load_all")
UNSAFE_YAML = ("yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all", "yaml.full_load_all")
WANTED = {"torch.load": ("weights_only", True), "numpy.load": ("allow_pickle", False)}
NEVER = {"allow_pickle": False, "weights_only": True, "trust_remote_code": False, "shell": False}


def offences(source: str) -> list[str]:
    """Places where a module could execute what it reads."""
    tree = ast.parse(source)
    names: dict[str, str] = {}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                whole = prefix + alias.name
                names[alias.asname or alias.name] = whole
                if whole.partition(".")[0] in EXECUTING:
                    found.append(f"imports {whole}")
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return found + [f"line {call.lineno}: {what}" for call in calls for what in _wrong(call, names)]


def _wrong(call: ast.Call, names: dict[str, str]) -> list[str]:
    first, dot, rest = ast.unparse(call.func).partition(".")
    function = names.get(first, first) + dot + rest
    given = {k.arg: k.value for k in call.keywords if k.arg is not None}
    constants = {n: v.value for n, v in given.items() if isinstance(v, ast.Constant)}
    found = [function] if function in (*FORBIDDEN, *UNSAFE_YAML) else []
    if function in WANTED:
        name, value = WANTED[function]
        found += [f"{function} without {name}={value}"] * (constants.get(name) is not value)
    if function in LOADS_OF_YAML:
        loader = ast.unparse(given.get("Loader", call.args[1] if len(call.args) > 1 else call))
        found += [f"{function} with {loader}"] * ("SafeLoader" not in loader.rpartition(".")[2])
    odd = [n for n, safe in NEVER.items() if n in given and constants.get(n) is not safe]
    return found + [f"{function} with {name}" for name in odd]


def test_no_module_can_execute_what_it_reads() -> None:
    modules = sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")])
    assert len(modules) > 50
    found = {str(m): wrong for m in modules if (wrong := offences(m.read_text(encoding="utf-8")))}
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "eval('1')",
        "compile('1', '', 'eval')",
        "import torch\ntorch.load('x')",
        "import torch\ntorch.load('x', weights_only=False)",
        "from torch import load\nload('x')",
        "import numpy as np\nnp.load('x')",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import yaml\nyaml.load(text, yaml.Loader)",
        "import yaml\nyaml.load(text)",
        "import yaml as y\ny.unsafe_load(text)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=trusted)",
        "import subprocess\nsubprocess.run(command, shell=True)",
        "import os\nos.system(command)",
    ],
)
def test_the_search_finds_each_of_them(source: str) -> None:
    assert offences(source)


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load('x', weights_only=True)",
        "import numpy as np\nnp.load('x', allow_pickle=False)",
        "import yaml\nyaml.load(text, Loader=yaml.CSafeLoader)",
        "import re\nre.compile('x')",
        "model.eval()",
    ],
)
def test_the_search_lets_the_safe_forms_be(source: str) -> None:
    assert not offences(source)
