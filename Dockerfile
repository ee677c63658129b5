# ssl_emp with everything that a run needs; the same image serves CPUs and NVIDIA GPUs.
#
#   docker build -t ssl_emp .
#   docker run --rm -v "$PWD:/work" ssl_emp pretrain --config demo
#   docker run --rm --shm-size 1g -v "$PWD:/work" --gpus all ssl_emp pretrain --config folder_emp data.source=images
#
# With --gpus all (the NVIDIA container toolkit on the host) torch finds the GPUs: the default wheels of torch on Linux bring CUDA with
# them, about 6 GB. For an image without it, give the index of torch's CPU wheels, which pytorch.org/get-started names:
#
#   docker build -t ssl_emp:cpu --build-arg TORCH_INDEX=URL .
FROM python:3.12-slim

# torch.compile needs a C++ compiler; libgomp serves OpenMP
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libgomp1 \
    && rm -rf /var/lib/apt/lists/*

ARG TORCH_INDEX=
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch>=2.10" "torchvision>=0.25"

COPY . /src
# demo: the digits that the demo trains on
RUN pip install --no-cache-dir "/src[demo,timm]" && rm -rf /src

# Everybody may write here: start it as yourself, --user "$(id -u):$(id -g)", and files in /work are yours.
ENV HOME=/tmp/home TORCHINDUCTOR_CACHE_DIR=/tmp/home/inductor
RUN mkdir -m 1777 -p /tmp/home /work
WORKDIR /work
USER 1000:1000

ENTRYPOINT ["ssl-emp"]
CMD ["--help"]
