"""docs/migrating.md: the values in its tables, of our calls always, and of the old ones where the library is installed."""

import importlib
import re
from pathlib import Path

import naive
import pytest
import torch
from published import alone
from torch.nn.functional import normalize

import fastsupcon

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "migrating.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| (`(?P<old>.+?)`|–) \| `(?P<new>.+?)` \| (?P<value>-?\d+\.\d{4}) \|", re.MULTILINE)


def supcontrast(*_, temperature: float = 0.07):
    return lambda features, labels=None: naive.supcon_loss(features, labels, temperature=temperature, base_temperature=0.07)


def simclr_loss_func(z, indexes, temperature):
    """solo-learn's arithmetic: -log of the positives' share of all exponentials."""
    e = (normalize(z) @ normalize(z).T / temperature).exp().fill_diagonal_(0)
    return -((e * (indexes[:, None] == indexes)).sum(1) / e.sum(1)).log().mean()


def library(module: str, *names: str) -> dict:
    pytest.importorskip(module.split(".")[0])
    return {name: getattr(importlib.import_module(module), name) for name in names}


OLD = {
    "SupContrast": lambda: {"SupConLoss": supcontrast},
    "pytorch-metric-learning": lambda: library("pytorch_metric_learning.losses", "SupConLoss"),
    "lightly": lambda: {"NTXentLoss": alone("lightly.loss.ntx_ent_loss", "lightly.models.utils").NTXentLoss},
    "open_clip": lambda: {"ClipLoss": alone("open_clip.loss").ClipLoss},
    "sentence-transformers": lambda: library("sentence_transformers.sentence_transformer.losses", "MultipleNegativesRankingLoss"),
    "solo-learn": lambda: {"simclr_loss_func": simclr_loss_func},
}


def ours(title: str) -> dict:
    text = re.search(rf"^## {title}\n.*?^`(from fastsupcon.+?)`", PAGE.partition("## solo-learn")[0], re.MULTILINE | re.DOTALL)
    names: dict = {}
    if text:
        if "integrations" in text[1] and title not in ("lightly", "open_clip"):
            pytest.importorskip(title.replace("-", "_"))
        exec(text[1], names)
    return names


def sections() -> list:
    parts = re.split(r"^## (.+)$", PAGE, flags=re.MULTILINE)
    return [
        pytest.param(title, match, id=f"{title}-{match['value']}-{number}")
        for title, text in zip(parts[1::2], parts[2::2], strict=True)
        for number, match in enumerate(ROW.finditer(text))
    ]


@pytest.fixture(scope="module")
def inputs() -> dict:
    names: dict = {}
    exec(re.search(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[1], names)
    return names | {"fastsupcon": fastsupcon}


def test_every_library_has_its_rows():
    assert {section.values[0] for section in sections()} == set(OLD)
    assert len(sections()) == PAGE.count("\n| `") + PAGE.count("\n| – |")


@pytest.mark.parametrize(("title", "row"), sections())
def test_the_new_call(inputs, title, row):
    value = eval(row["new"], inputs | ours(title))
    assert f"{value.item():.4f}" == row["value"]


@pytest.mark.parametrize(("title", "row"), [section for section in sections() if section.values[1]["old"]])
def test_the_old_call(inputs, title, row):
    value = eval(row["old"], inputs | OLD[title]())
    if 'form="in"' in row["new"]:
        labels = inputs["labels"][:10]
        value = value + torch.tensor([float((labels == label).sum() - 1) for label in labels]).log().mean()
    assert f"{value.item():.4f}" == row["value"]
