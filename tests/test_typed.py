"""What users rely on beside the numbers: public names and parameters stay, and a type checker knows them."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn

import fastsupcon
from fastsupcon import SupConLoss, options
from fastsupcon.backends import BACKENDS, _extension
from fastsupcon.losses._frame import Loss

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(fastsupcon.__file__).parent

#: Every public name and its parameters: = behind one that has a default, * before those that are given by name alone. To take a name or a
#: parameter away, or to give it another place, breaks somebody's code.
PUBLIC = {
    "fastsupcon": {
        "BalancedSupConLoss": "num_classes dim temperature= * normalize= reduction= group= across= backend=",
        "BalancedSupConLoss.forward": "features labels",
        "BalancedSupConLoss.logits": "features",
        "InfoNCELoss": "temperature= symmetric= * normalize= reduction= queue= group= across= backend=",
        "InfoNCELoss.chance_level": "pairs",
        "InfoNCELoss.forward": "a b keys= negatives=",
        "MemoryQueue": "size dim * dtype=",
        "MemoryQueue.clear": "",
        "MemoryQueue.columns": "like",
        "MemoryQueue.put": "rows keys",
        "NTXentLoss": "temperature= * normalize= reduction= queue= group= across= backend=",
        "NTXentLoss.chance_level": "rows",
        "NTXentLoss.forward": "z0 z1",
        "PSCLoss": "num_classes embedding_dim temperature= * prototypes_per_class= denominator= normalize= "
        "reduction= group= across= sharded= backend=",
        "PSCLoss.chance_level": "",
        "PSCLoss.forward": "features labels",
        "PSCLoss.logits": "features",
        "PSCLoss.whole_state_dict": "",
        "PaCoLoss": "num_classes dim class_counts= alpha= beta= gamma= * label_smoothing= temperature= class_temperature= normalize= "
        "queue= reduction= group= across= backend=",
        "PaCoLoss.forward": "features labels momentum_features= class_features=",
        "PaCoLoss.logits": "features",
        "PrototypeCrossEntropyLoss": "num_classes dim class_counts= margin= angular_margin= * temperature= normalize= ignore_index= "
        "reduction= group= across= sharded= backend=",
        "PrototypeCrossEntropyLoss.forward": "features labels",
        "PrototypeCrossEntropyLoss.logits": "features",
        "PrototypeCrossEntropyLoss.whole_state_dict": "",
        "SupConLoss": "temperature= contrast_mode= base_temperature= * form= denominator= beta= ignore_index= class_weights= queue= "
        "normalize= reduction= lone_anchors= "
        "group= across= backend=",
        "SupConLoss.chance_level": "rows",
        "SupConLoss.forward": "features labels= mask= * positives= keys= key_labels= anchor_weights=",
        "diagnostics": "a module",
        "functional": "a module",
        "grad_cache": "encoder *inputs chunk **options",
    },
    "fastsupcon.functional": {
        "balanced_supcon_loss": "features labels prototypes * temperature= normalize= reduction= group= across= backend=",
        "cross_logsumexp": "a b * scale= bias= skip= row_labels= column_labels= group= across= backend=",
        "info_nce_loss": "a b keys= negatives= * temperature= symmetric= normalize= reduction= queue= group= across= backend=",
        "nt_xent_loss": "z0 z1 * temperature= normalize= reduction= queue= group= across= backend=",
        "paco_loss": "features labels prototypes momentum_features= class_features= * alpha= beta= gamma= class_counts= label_smoothing= "
        "temperature= class_temperature= normalize= queue= reduction= group= across= backend=",
        "prototype_cross_entropy": "features labels prototypes * temperature= class_counts= margin= angular_margin= normalize= "
        "ignore_index= reduction= group= across= sharded= backend=",
        "psc_loss": "features labels prototypes * temperature= prototypes_per_class= denominator= normalize= "
        "reduction= group= across= sharded= backend=",
        "self_logsumexp": "z * scale= group= across= backend=",
        "supcon_loss": "features labels= mask= * positives= keys= key_labels= temperature= base_temperature= contrast_mode= form= "
        "denominator= beta= ignore_index= class_weights= anchor_weights= queue= normalize= reduction= lone_anchors= "
        "group= across= backend=",
    },
    "fastsupcon.diagnostics": {
        "alignment": "features labels=",
        "contrastive_top1": "features labels=",
        "diagnose": "features labels= * t= backend=",
        "lone_share": "labels",
        "similarities": "features labels=",
        "uniformity": "features t= * backend=",
    },
    "fastsupcon.integrations.lightly": {
        "NTXentLoss": "temperature= memory_bank_size= gather_distributed= * backend=",
        "NTXentLoss.forward": "out0 out1",
        "SupConLoss": "temperature= gather_distributed= * backend=",
        "SupConLoss.forward": "out0 out1 labels",
    },
    "fastsupcon.integrations.open_clip": {
        "ClipLoss": "local_loss= gather_with_grad= cache_labels= rank= world_size= use_horovod= * backend=",
        "ClipLoss.forward": "image_features text_features logit_scale logit_bias= output_dict=",
    },
    "fastsupcon.integrations.pytorch_metric_learning": {
        "AllPairs": "own_column=",
        "CrossBatchMemory": "the library's",
        "CrossBatchMemory.create_indices_tuple": "embeddings labels E_mem L_mem input_indices_tuple do_remove_self_comparisons",
        "SupConLoss": "temperature= * group= across= backend= **options",
        "SupConLoss.compute_loss": "embeddings labels indices_tuple ref_emb ref_labels",
    },
    "fastsupcon.integrations.sentence_transformers": {
        "CachedMultipleNegativesRankingLoss": "*arguments backend= **options",
        "CachedMultipleNegativesRankingLoss.calculate_loss": "reps labels= * with_backward=",
        "CachedMultipleNegativesRankingLoss.compute_loss_from_embeddings": "embeddings labels=",
        "CachedSupConLoss": "model temperature= * mini_batch_size= mini_batch_num_tokens= show_progress_bar= "
        "gather_across_devices= **options",
        "CachedSupConLoss.calculate_loss": "reps labels= * with_backward=",
        "CachedSupConLoss.compute_loss_from_embeddings": "embeddings labels=",
        "CachedSupConLoss.forward": "sentence_features labels=",
        "CachedSupConLoss.get_config_dict": "",
        "MultipleNegativesRankingLoss": "*arguments backend= **options",
        "MultipleNegativesRankingLoss.compute_loss_from_embeddings": "embeddings labels=",
        "SupConLoss": "model temperature= * gather_across_devices= **options",
        "SupConLoss.compute_loss_from_embeddings": "embeddings labels=",
        "SupConLoss.forward": "sentence_features labels=",
        "SupConLoss.get_config_dict": "",
    },
}


def _parameters(function) -> str:
    kinds, words = inspect.Parameter, []
    for p in inspect.signature(function).parameters.values():
        if p.kind is kinds.KEYWORD_ONLY and not any(word.startswith("*") for word in words):
            words.append("*")
        stars = {kinds.VAR_POSITIONAL: "*", kinds.VAR_KEYWORD: "**"}.get(p.kind, "")
        words.append(f"{stars}{p.name}{'' if p.default is p.empty else '='}")
    return " ".join(word for word in words if word != "self")


def _public(module) -> dict[str, str]:
    own = [name for name, x in vars(module).items() if not name.startswith("_") and getattr(x, "__module__", None) == module.__name__]
    found = {}
    for name in getattr(module, "__all__", own):
        x = getattr(module, name)
        if inspect.ismodule(x):
            found[name] = "a module"
        elif not isinstance(x, type):
            found[name] = _parameters(x)
        else:
            inherited = inspect.isfunction(x.__init__) and not x.__init__.__module__.startswith("fastsupcon.")
            found[name] = "the library's" if inherited else _parameters(x)
            found |= {f"{name}.{method}": text for method, text in _methods(x).items()}
    return found


def _methods(kind: type) -> dict[str, str]:
    """Ours: of what every nn.Module has, the forward alone."""
    ours = {}
    for base in reversed(kind.__mro__):
        if base.__module__.startswith("fastsupcon."):
            ours |= {name: x for name, x in vars(base).items() if inspect.isfunction(x) and not name.startswith("_")}
    return {name: _parameters(x) for name, x in ours.items() if name == "forward" or not hasattr(nn.Module, name)}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names(name):
    if name.startswith("fastsupcon.integrations."):
        pytest.importorskip(name, exc_type=ImportError)
    assert _public(importlib.import_module(name)) == PUBLIC[name]


def test_every_integration_is_listed():
    files = (PACKAGE / "integrations").glob("[!_]*.py")
    assert {f"fastsupcon.integrations.{file.stem}" for file in files} == {name for name in PUBLIC if ".integrations." in name}


@pytest.mark.parametrize("name", [name for name in fastsupcon.__all__ if name.endswith("Loss")])
def test_options_are_annotated(name):
    """As the parameters of the same names: to a type checker, an attribute of a module is otherwise a tensor or a module."""
    kind = getattr(fastsupcon, name)
    assert issubclass(kind, Loss)
    given = inspect.signature(kind).parameters
    options = kind(*(3 for p in given.values() if p.default is p.empty)).options
    annotated = {name: text for base in reversed(kind.__mro__) for name, text in vars(base).get("__annotations__", {}).items()}
    assert {name: annotated.get(name) for name in options} == {name: given[name].annotation for name in options}


def test_options_are_what_the_checks_take():
    """The types and the checks share one list; the backends have one of their own."""
    assert get_args(options.Backend)[0] == "auto" and set(get_args(options.Backend)[1:]) == set(BACKENDS)
    for name, values in (("Reduction", options.REDUCTIONS), ("LoneAnchors", options.LONE_ANCHORS), ("Across", options.ACROSS)):
        assert values == get_args(getattr(options, name))
    SupConLoss(contrast_mode="one", form="in", denominator="negatives", reduction="none", lone_anchors="skip", backend="chunked")
    with pytest.raises(ValueError, match=r"^lone_anchors must be one of 'zero', 'skip', 'error', got 'drop'$"):
        SupConLoss(lone_anchors="drop")


def _described(text: str | None) -> set[str]:
    """Names that a docstring has an entry for under "Args:"."""
    _, _, after = inspect.cleandoc(text or "").partition("\nArgs:\n")
    entries = after.split("\n\n")[0]
    return set(re.findall(r"^ {4}\*{0,2}(\w+): ", entries, re.MULTILINE))


def _expected(function) -> set[str]:
    return {name for name in inspect.signature(function).parameters if name != "self"}


@pytest.mark.parametrize("name", [name for name in fastsupcon.__all__ if name.endswith("Loss")])
def test_help_of_a_loss(name):
    """``help`` names the function of which a loss holds the options, and one of the two says what each argument means."""
    kind = getattr(fastsupcon, name)
    (named,) = set(re.findall(r"^``fastsupcon\.functional\.(\w+)``", kind.__doc__))
    function = getattr(fastsupcon.functional, named)
    assert _described(kind.__doc__) <= _expected(kind) <= _described(kind.__doc__) | _described(function.__doc__)
    forward = kind.__dict__["forward"]
    assert _described(forward.__doc__) == _expected(forward) and "Returns:" in forward.__doc__


@pytest.mark.parametrize("module", ["functional", "diagnostics"])
def test_help_of_a_function(module):
    for name in getattr(fastsupcon, module).__all__:
        function = getattr(getattr(fastsupcon, module), name)
        assert _described(function.__doc__) == _expected(function), name
        assert "Returns:" in function.__doc__ and "Raises:" in function.__doc__, name


#: What an editor offers at the end of a line of code: names, or the parameters of a call.
COMPLETED = {
    "import fastsupcon\nfastsupcon.functional.": PUBLIC["fastsupcon.functional"],
    "import fastsupcon\nfastsupcon.SupConLoss(": "temperature contrast_mode base_temperature form denominator beta ignore_index "
    "class_weights queue normalize reduction lone_anchors group across backend",
    "from fastsupcon import SupConLoss\nloss = SupConLoss(0.1)\nloss(": "features labels mask positives keys key_labels anchor_weights",
    "from fastsupcon import PaCoLoss\nloss = PaCoLoss(8, 16)\nloss(": "features labels momentum_features class_features",
    "from fastsupcon.integrations.lightly import SupConLoss\nloss = SupConLoss(0.1)\nloss(": "out0 out1 labels",
}


@pytest.mark.parametrize("code", COMPLETED)
def test_completion(code):
    """By jedi, which IPython and many editors complete with; pyright, behind others, resolves what mypy does."""
    jedi = pytest.importorskip("jedi")
    script = jedi.Script(code, project=jedi.Project(ROOT))
    if code.endswith("."):
        assert {completion.name for completion in script.complete()} >= set(COMPLETED[code])
    else:
        (signature,) = script.get_signatures()
        assert " ".join(p.name for p in signature.params if p.name != "*") == COMPLETED[code]


def test_the_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").exists() and (PACKAGE / "_C.pyi").exists()


@pytest.mark.long
def test_types():
    """mypy --strict over the package, and over what users write (typed_user.py)."""
    pytest.importorskip("mypy")
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("pyproject.toml, which holds mypy's settings, is not here")
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 9):
        pytest.skip(f"torch {torch.__version__} has fewer annotations of its own")
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def _bound(of, path: str = "") -> dict[str, str]:
    """Functions of the extension by path, with the types that pybind11 writes on the first line of their text."""
    found = {}
    for name in dir(of):
        if name.startswith("_") and name != "__init__":
            continue
        x, here = getattr(of, name), f"{path}{name}"
        if inspect.ismodule(x) or isinstance(x, type):
            found |= _bound(x, f"{here}.")
        elif match := re.match(r"\w+\((.*)\) -> (.+)", getattr(x, "__doc__", None) or ""):
            arguments = re.findall(r"arg\d+: ([^,]+)", match[1])
            found[here] = ", ".join(_short(argument) for argument in arguments) + " -> " + _short(match[2])
    return found


def _short(written: str) -> str:
    """pybind11's name of a type, without modules; int or float for what can be made one."""
    for kind in ("int", "float"):
        if written == kind or f"Supports{kind.title()}" in written:
            return kind
    return written.split(".")[-1]


def _declared(nodes: list[ast.stmt], path: str = "") -> dict[str, str]:
    """Functions of the stub, the same way."""
    found = {}
    for node in nodes:
        if isinstance(node, ast.ClassDef):
            found |= _declared(node.body, f"{path}{node.name}.")
        elif isinstance(node, ast.FunctionDef) and "property" not in map(ast.unparse, node.decorator_list):
            arguments = [_short(ast.unparse(a.annotation)) for a in node.args.posonlyargs if a.arg != "self"]
            found[path + node.name] = ", ".join(arguments) + " -> " + _short(ast.unparse(node.returns))
    return found


@pytest.mark.skipif(_extension.missing is not None, reason=str(_extension.missing))
def test_stub_is_the_extension():
    stub = ast.parse((PACKAGE / "_C.pyi").read_text())
    declared, bound = _declared(stub.body), _bound(_extension.module)
    if not hasattr(_extension.module, "cuda"):
        declared = {name: text for name, text in declared.items() if not name.startswith("cuda.")}
    of_enums = re.compile(r"(Scalar|Line\.Reduction)\.")  # they have functions of pybind11's own
    assert declared == {name: text for name, text in bound.items() if not of_enums.match(name)}
