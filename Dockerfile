# An image for one NVIDIA GPU. The host needs the driver and NVIDIA's container toolkit, nothing else of CUDA.
#
#   docker build --tag qlora-sft .                              # for an older driver: --build-arg DRIVER=525
#   docker run --rm --gpus all --volume "$PWD:/data" qlora-sft train recipe.yaml
FROM python:3.12-slim-bookworm

# Triton compiles with gcc when a kernel first runs; cmake, g++ and make build llama-quantize at the first K-quant.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends cmake g++ gcc make \
 && rm -rf /var/lib/apt/lists/*

# The driver of the machine that the image will run on; there is none where it is built.
ARG DRIVER=580
ENV PIP_NO_CACHE_DIR=1
COPY . /qlora_sft
WORKDIR /qlora_sft
RUN python3 -m venv .venv \
 && .venv/bin/python -m qlora_sft.install --driver $DRIVER

# What is downloaded and built stays on the host, beside the recipe.
ENV PATH=/qlora_sft/.venv/bin:$PATH QLORA_SFT_CACHE=/data/.cache/qlora_sft HF_HOME=/data/.cache/huggingface
WORKDIR /data
ENTRYPOINT ["qlora-sft"]
