# srpo_lightning on NVIDIA GPUs. torch's wheels bring CUDA's libraries along; the machine brings the driver.
#   docker build --tag srpo-lightning .
#   docker run --gpus all --shm-size 8g --volume "$PWD:/work" srpo-lightning fit --config recipe:emoji_demo
FROM python:3.11-slim-bookworm

# torch.compile needs a C compiler.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 trainer

COPY . /opt/srpo_lightning
RUN pip install --no-cache-dir "/opt/srpo_lightning[emoji,lora,quant]" && rm -r /opt/srpo_lightning

ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility HF_HOME=/work/.cache/huggingface
USER 1000
WORKDIR /work
ENTRYPOINT ["srpo"]
CMD ["--help"]
