"""The model card of a run: README.md in its folder, with the header that model hubs read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import settings
from data import DATASETS
from exports import FORMATS
from methods import METHODS
from networks import ON_FEATURES
from settings import AUGMENTS, Config

# What hubs call the data sets that are public.
PUBLIC = {
    "cifar10-lt": "cifar10",
    "cifar100-lt": "cifar100",
    "fashion-mnist-lt": "fashion_mnist",
    "mnist": "mnist",
}
FIGURES = {
    "balanced": "balanced accuracy, the mean of the classes'",
    "accuracy": "accuracy",
    "many": "many-shot classes",
    "medium": "medium-shot classes",
    "few": "few-shot classes",
    "worst": "worst class",
    "calibration_error": "expected calibration error",
}


PREPARED = (
    "Images are prepared as in the evaluation (`model.preprocess`). "
    "`python train/predict.py FOLDER IMAGES ...` does the same from the command line."
)


def card(folder: Path, config: Config, result: dict[str, Any], classes: list[str], *, tested: int) -> str:
    """Markdown, of a run's metrics. ``tested``: how many test images they are of."""
    best, counts, data, method = result["best"], result["train_images"], config.images.data, config.method.method
    name, of_features = f"{config.network.network}, {method}, {data}", config.network.network in ON_FEATURES
    given = "features" if of_features else '["image.png"]'
    figures = {label: best[key] for key, label in FIGURES.items() if best.get(key) is not None}
    shots = {
        "many-shot classes": f"more than {config.images.many} training images",
        "medium-shot classes": f"{config.images.few} to {config.images.many}",
        "few-shot classes": f"fewer than {config.images.few}",
        "worst class": f"{classes[best['worst_class']]}, {counts[best['worst_class']]} training images",
    }
    rows = [f"| {label}{f' ({shots[label]})' if label in shots else ''} | {value:.2f} |" for label, value in figures.items()]
    split = f", split `{result['split']}` (SHA-256 of the indices of the training images kept)" if result["split"] else ""
    chosen = "the last epoch" if result["chosen_by"] == "last epoch" else f"epoch {result['best_epoch']}, which the validation images chose"
    parameters = result["parameters"]
    sections = [
        header(name, data, figures),
        f"# {name}",
        f"An image classifier of {len(classes)} classes, trained on a long tail of images by {result['source']}, with fastsupcon. "
        f"{parameters['backbone'] + parameters['classifier']:,} parameters in use ({parameters['head']:,} more in the projection head).",
        "## How to load it",
        "```python\nfrom trained import load  # train/trained.py of fastsupcon\n"
        f'model = load("{folder.name}")  # this folder\n'
        f"probabilities = model({given})  # [N, classes], in the order of model.classes\n```",
        ("It takes features [N, F] as train/features.py computes them." if of_features else PREPARED) + exported(config),
        "## Data",
        f"`{data}` ({DATASETS[data].what}): {sum(counts):,} training images{split}, from {max(counts):,} to {min(counts):,} of a class, "
        f"and {tested:,} test images.",
        "## Accuracy",
        f"On the test images, in percent, of {chosen}; one run, seed {config.records.seed}.",
        "\n".join(["| | % |", "|---|---:|", *rows]),
        *(["![Accuracy of each class](per_class.png)"] if config.records.pictures else []),
        "Each class's figures are in `per_class.csv`, all others in `metrics.json`.",
        "## Training",
        f"{result['updates']:,} updates, {result['images']:,} images through the network, {result['seconds']:,.0f} s. "
        + differences(config),
        machine(folder),
        "## Limits",
        limits(config, result, classes),
    ]
    return "\n\n".join(part for part in sections if part) + "\n"


def header(name: str, data: str, figures: dict[str, float]) -> str:
    """YAML; a JSON string is one of YAML's."""
    tags = ["image-classification", "long-tailed-recognition", "supervised-contrastive-learning", "fastsupcon"]
    lines = ["---", "library_name: pytorch", "pipeline_tag: image-classification", "tags:", *(f"- {tag}" for tag in tags)]
    if data in PUBLIC:
        lines += ["datasets:", f"- {PUBLIC[data]}"]
    lines += ["metrics:", "- accuracy", "model-index:", f"- name: {json.dumps(name)}", "  results:", "  - task:"]
    lines += [
        "      type: image-classification",
        "    dataset:",
        f"      name: {json.dumps(data)}",
        f"      type: {PUBLIC.get(data, data)}",
    ]
    lines += ["    metrics:"]
    for label, value in figures.items():
        kind = "accuracy" if label != FIGURES["calibration_error"] else "expected_calibration_error"
        lines += [f"    - type: {kind}", f"      name: {json.dumps(label)}", f"      value: {value:.2f}"]
    return "\n".join([*lines, "---"])


def exported(config: Config) -> str:
    files = ", ".join(f"`{FORMATS[name].file}`" for name in config.records.export)
    return (
        f" For other programs there are {files}; programs among them are `model.network`: images as floats in [0, 1] to logits."
        if files
        else ""
    )


def differences(config: Config) -> str:
    """Settings other than the recipe's: the data set's with the method's, or the method's paper's where that is nearer."""
    images, method = config.images.data, config.method.method
    papers = (False, True) if METHODS[method].paper else (False,)
    recipes = {paper: settings.recipe(images, method, paper=paper) for paper in papers}
    paper = min(recipes, key=lambda paper: len(settings.differing(recipes[paper], config)))

    def values(of: Config) -> dict[str, Any]:
        return {f"{group}.{name}" if group in AUGMENTS else name: value for group, name, value in settings.settings_of(of)}

    was, now = values(recipes[paper]), values(config)
    told = [f"`{name}` {now[name]} ({was[name]})" for name in settings.differing(recipes[paper], config)]
    recipe = f"`--data {images} --method {method}{' --paper' if paper else ''}`"
    if not told:
        return f"The settings are those of {recipe}."
    return f"The settings are those of {recipe} but for (the recipe's in brackets): {', '.join(told)}. All are in `config.json`."


def machine(folder: Path) -> str:
    found = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    packages = ", ".join(f"{name} {version}" for name, version in found["packages"].items() if version)
    code = f"commit {found['git_commit']}{', with changes' if found['git_changes'] else ''}" if found["git_commit"] else "unknown commit"
    return f"Begun {found['date']} on {found['device']}, Python {found['python']}, {packages}; {code}."


def limits(config: Config, result: dict[str, Any], classes: list[str]) -> str:
    best, counts = result["best"], result["train_images"]
    worst, rarest = best["worst_class"], min(range(len(counts)), key=counts.__getitem__)
    told = [
        f"Classes are not equally reliable: of the test images of {classes[worst]} it gets {best['worst']:.1f} % right. "
        f"The rarest class, {classes[rarest]}, had {counts[rarest]} training images.",
        f"It gives every image one of its {len(classes)} classes, also one that shows none of them.",
        "Its probabilities are a softmax that was not calibrated"
        + (
            f": on the test images they are off by {error:.1f} % on average."
            if (error := best.get("calibration_error")) is not None
            else "."
        ),
        "The figures are of one seed and of images like the training images; seeds differ, and other cameras, sizes or crops do worse.",
    ]
    if result["chosen_by"] == "last epoch":
        told.append("No image was held out: settings that were chosen by these test figures make them too good.")
    if len(result.get("of_epochs", ())) > 1:
        lengths = ", then ".join(map(str, result["of_epochs"]))
        told.append(f"The run was extended: its learning rate, alpha and batches went as for {lengths} epochs, which no new run repeats.")
    if config.images.data == "cifar10-jpeg":
        told.append("Trained and tested on lossy JPEG copies of CIFAR-10: the figures are not comparable with those of CIFAR-10.")
    if config.machine.precision != "fp32":
        told.append(f"Trained and evaluated in {config.machine.precision}; loaded, it computes in fp32, and differs by rounding.")
    return "\n".join(f"- {one}" for one in told)
