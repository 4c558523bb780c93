"""A trained network written for other programs.

    model.safetensors   the weights of backbone, head and classifier by their names in networks.py
    model.pt2           a program of torch.export: torch.export.load("model.pt2").module()(images)
    model.onnx          an ONNX graph with one input, images, and one output, logits

Both programs take float32 images [N, C, H, W] in [0, 1], any N, and give logits [N, classes]: what trained.Trained.preprocess makes and the
mean and std inside. Every file carries the classes, the shape of an image, the crop, mean and std as JSON: the metadata "model" of
safetensors and ONNX, the extra file "model.json" of torch.export.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import checkpoint
import torch
from packages import need

if TYPE_CHECKING:
    from trained import Trained


@dataclass(frozen=True)
class Format:
    file: str
    packages: tuple[str, ...]  # that must be installed
    write: Callable[[Trained, str, BinaryIO], None]  # the model, its description, the file


def _safetensors(model: Trained, description: str, file: BinaryIO) -> None:
    from safetensors.torch import save

    state = {name: value.cpu().contiguous() for name, value in model.hybrid.state_dict().items()}
    file.write(save(state, {"format": "pt", "model": description}))


def _example(model: Trained) -> torch.Tensor:
    """Two images: of one, or of none, a program would be made for that number alone."""
    return torch.rand(2, *model.shape, device=model.device)


def _torch(model: Trained, description: str, file: BinaryIO) -> None:
    shapes = {"images": {0: torch.export.Dim("images")}}
    program = torch.export.export(model.network, (_example(model),), dynamic_shapes=shapes, strict=False)
    torch.export.save(program, file, extra_files={"model.json": description})


def _onnx(model: Trained, description: str, file: BinaryIO) -> None:
    shapes, names = {"images": {0: torch.export.Dim("images")}}, {"input_names": ["images"], "output_names": ["logits"]}
    program = torch.onnx.export(model.network, (_example(model),), dynamo=True, dynamic_shapes=shapes, verbose=False, **names)
    graph = program.model_proto
    graph.metadata_props.add(key="model", value=description)
    file.write(graph.SerializeToString())


FORMATS = {
    "safetensors": Format("model.safetensors", ("safetensors",), _safetensors),
    "torch": Format("model.pt2", (), _torch),
    "onnx": Format("model.onnx", ("onnx", "onnxscript"), _onnx),
}


def check(formats: Iterable[str]) -> None:
    """ValueError for a format that is unknown or whose packages cannot be used."""
    for name in formats:
        if name not in FORMATS:
            raise ValueError(f"export must be some of {', '.join(FORMATS)}, got {name!r}")
        for package in FORMATS[name].packages:
            need(package, f"export {name!r}")  # found is not enough: onnx without protobuf fails as it is imported


def export(model: Trained, formats: Iterable[str]) -> list[Path]:
    """Into the run's folder; returns the files."""
    check(formats)
    description, written = json.dumps(model.description), []
    for name in formats:
        path, write = model.folder / FORMATS[name].file, FORMATS[name].write
        checkpoint.write_whole(path, lambda file, write=write: write(model, description, file))
        written.append(path)
    return written
