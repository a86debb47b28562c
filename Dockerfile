# docker build -t glmft . && docker run --gpus all -v $PWD:/work -w /work glmft glmft doctor
FROM python:3.12-slim
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev git && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir uv
COPY . /opt/glmft
ARG TORCH_BACKEND=cu130
RUN uv pip install --system --no-cache --torch-backend=${TORCH_BACKEND} /opt/glmft
CMD ["glmft", "--help"]
