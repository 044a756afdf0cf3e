# bevfn with its tests:   docker build -t bevfn . && docker run --rm -it bevfn make test
# For CUDA:               docker build -t bevfn:cuda --build-arg TORCH_INDEX=https://pypi.org/simple .   (PyPI's build is CUDA's)
#                         docker run --rm -it --gpus all bevfn:cuda python -m bevfn.experiments.bevfusion --device cuda
# For Ascend NPUs:        --build-arg BASE=ascendai/cann:TAG --build-arg EXTRAS=npu, on a host with Ascend's driver and Docker
#                         runtime; TAG names a 910b image with Python 3.11 and the CANN that torch_npu 2.13's notes ask for.
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
