#!/usr/bin/env bash
# nvcc from packages, where a container of wheels' builders has none: .github/nvcc.sh FOLDER, then nvcc is FOLDER/nvidia/cu13/bin/nvcc.
set -euo pipefail
version="13.0.*"
pip install --target "$1" "nvidia-cuda-nvcc==$version" "nvidia-nvvm==$version" "nvidia-cuda-crt==$version" "nvidia-cuda-runtime==$version" "nvidia-cuda-cccl==$version"
cd "$1/nvidia/cu13"
ln -sfn lib lib64                            # where nvcc looks for its libraries,
ln -sfn libcudart.so.13 lib/libcudart.so     # and what CMake takes as the sign of a toolkit
