# bevfn with its tests:   docker build -t bevfn . && docker run --rm -it bevfn make test
# For CUDA:               docker build -t bevfn:cuda --build-arg TORCH_INDEX=https://pypi.org/simple .   (PyPI's build is CUDA's)
#                         docker run --rm -it --gpus all bevfn:cuda python -m bevfn.experiments.bevfusion --device cuda
# For Ascend NPUs (A2):   docker build -t bevfn:npu --build-arg EXTRAS=npu \
#                             --build-arg BASE=quay.io/ascend/cann:9.1.0-910b-ubuntu22.04-py3.11 .
#                         on a host with Ascend's driver and Docker runtime. The tag is one of github.com/Ascend/cann-container-image.
#                         torch_npu 2.13.0 is of TorchNPU 26.2, whose release notes pair it with CANN 9.2.0 and list 8.5 to 9.2 as
#                         compatible; a 9.2.0 image for 910b was not among the published ones that were looked through (December
#                         2026): take it once it is there. Not built here: there was neither a registry nor an NPU.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=""

# A C++ compiler: the operators' CPU kernels and inductor's are built on first use.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ git make && rm -rf /var/lib/apt/lists/*

WORKDIR /bevfn
COPY . .
RUN python3 -m venv .venv \
    && .venv/bin/pip install --no-cache-dir torch==2.13.0 --index-url "${TORCH_INDEX}" \
    && make npu \
    && if [ -n "${EXTRAS}" ]; then .venv/bin/pip install --no-cache-dir --editable ".[${EXTRAS}]"; fi
ENV PATH=/bevfn/.venv/bin:$PATH
CMD ["bevfn", "--help"]
