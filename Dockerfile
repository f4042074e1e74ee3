# vLLM's OpenAI server for glq checkpoints, on NVIDIA GPUs from sm_80 on:
#   docker build --tag glq .
#   docker run --gpus all --ipc host --publish 8000:8000 --volume /path/to/checkpoint:/model:ro glq
FROM python:3.12-slim

# torch.compile and Triton compile small launchers at run time; the distribution's compiler is as good as any
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc g++ libc6-dev \
    && rm -rf /var/lib/apt/lists/*

COPY pyproject.toml README.md LICENSE /src/
COPY glq /src/glq
RUN pip install --no-cache-dir '/src[vllm]' && rm -rf /src

RUN useradd --create-home --uid 1000 glq
USER 1000
WORKDIR /home/glq
EXPOSE 8000
ENTRYPOINT ["vllm", "serve"]
CMD ["/model"]
